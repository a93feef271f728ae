"""The code in the documentation: fenced blocks and inline commands, with the place where each stands."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:npu-server|npu-trainer|make|python|pytest) [^`]+)`")


@dataclass(frozen=True)
class Snippet:
    """A fenced block.

    Attributes:
        document: its file.
        line: where it begins.
        language: after the fence.
        code: what is in it.
    """

    document: Path
    line: int
    language: str
    code: str

    @property
    def commands(self) -> tuple[str, ...]:
        """Its lines without comments."""
        lines = (line.split("  #")[0].split(" # ")[0].strip() for line in self.code.splitlines())
        return tuple(line for line in lines if line)

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def snippets(*languages: str) -> list[Snippet]:
    """All blocks of some languages; without any, all blocks."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Snippet(document, line, match[1], match[2]))
    return [snippet for snippet in found if not languages or snippet.language in languages]


def inline_commands() -> list[str]:
    """Commands in running text."""
    found = {match for document in DOCUMENTS for match in _INLINE.findall(document.read_text())}
    return sorted(" ".join(command.split()) for command in found)
