"""The list of mutants: one wrong line each, with what it breaks."""

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LISTS = Path(__file__).parent / "lists"


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        id: its name.
        file: relative to the root.
        old: text that occurs there exactly once.
        new: what stands there instead.
        breaks: what is wrong then, in words.
        first: killers whose test ids contain this go first; all others follow.
        named: it went unnoticed once; it must be caught, come what may.
        survives: why no killer can catch it; empty: one must.
    """

    id: str
    file: str
    old: str
    new: str
    breaks: str
    first: str = ""
    named: bool = False
    survives: str = ""

    def apply(self, text: str) -> str:
        """The file's text with the change.

        Raises:
            ValueError: the text has moved on, or the change is none.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"mutant {self.id}: {self.file} holds its old text {count} times, not once; rewrite it in "
                f"{_LISTS.relative_to(ROOT)}"
            )
        changed = text.replace(self.old, self.new)
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text)):
            raise ValueError(f"mutant {self.id}: the code stays what it was")
        return changed


def load() -> tuple[Mutant, ...]:
    """All mutants, list by list."""
    tables = (
        tomllib.loads(path.read_text("utf-8")).get("mutant", []) for path in sorted(_LISTS.glob("*.toml"))
    )
    return tuple(Mutant(**entry) for table in tables for entry in table)
