"""A program of several commands: its help, its version, its completion, and how it ends."""

import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from npu_wire.errors import MissingPackage, NpuError
from npu_wire.extras import Extra, needs, own_version
from npu_wire.settings import Settings, flag, flags, load_settings

DONE, FAILED, CALLED_WRONGLY, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses."""

_COMPLETION = """\
# bash: eval "$({name} completion)"; zsh: the same after `autoload -U bashcompinit && bashcompinit`
_{function}() {{
  local word=${{COMP_WORDS[COMP_CWORD]}}
  case "$COMP_CWORD ${{COMP_WORDS[*]:1:2}}" in
    "1 "*) COMPREPLY=($(compgen -W "{commands}" -- "$word")) ;;
{cases}
  esac
}}
complete -o default -F _{function} {name}"""
_CASE = '    *" {command}"*) COMPREPLY=($(compgen -W "{words}" -- "$word")) ;;'


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        settings: the class of its settings; the first line of the docstring says what the command does.
        run: does it, given its settings and the whole command line, and returns the exit status.
        extra: brings the packages that it imports.
    """

    settings: type[Settings]
    run: Callable[[Any, str], int]
    extra: Extra

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return (self.settings.__doc__ or "").splitlines()[0]


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        name: as it is called.
        about: what it is.
        commands: name, of one word or two -> command, in the order of the help.
        if_interrupted: what to say after Ctrl-C.
    """

    name: str
    about: str
    commands: Mapping[str, Command]
    if_interrupted: str = "interrupted"

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Runs a command and returns its exit status: 0 done, 1 failed, 2 called wrongly, 130 interrupted.

        Args:
            arguments: command and flags; None: those of the process.

        Raises:
            SystemExit: an unknown flag, or --help.
        """
        words = list(sys.argv[1:] if arguments is None else arguments)
        match words:
            case ["-h" | "--help"]:
                print(self._usage())
                return DONE
            case ["--version"]:
                print(f"{self.name} {own_version()}")
                return DONE
            case ["completion"]:
                print(self._completion())
                return DONE
        for count in (2, 1):
            if (name := " ".join(words[:count])) in self.commands and len(words) >= count:
                return self._run(name, words[count:])
        print(self._usage() + (f"\n\nerror: unknown command '{words[0]}'" if words else ""), file=sys.stderr)
        return CALLED_WRONGLY

    def _run(self, name: str, arguments: Sequence[str]) -> int:
        command, debug = self.commands[name], False
        called = f"{self.name} {name}"
        try:
            settings = load_settings(command.settings, arguments, called)
            debug = settings.debug
            with needs(command.extra, f"`{called}`"):
                return command.run(settings, shlex.join([self.name, *name.split(), *arguments]))
        except ValidationError as error:
            for problem in error.errors():
                where = f"{flag('-'.join(map(str, problem['loc'])))}: " if problem["loc"] else ""
                print(f"error: {where}{problem['msg'].removeprefix('Value error, ')}", file=sys.stderr)
            return CALLED_WRONGLY
        except NpuError as error:
            if debug:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            return CALLED_WRONGLY if isinstance(error, MissingPackage) else FAILED
        except KeyboardInterrupt:
            print(self.if_interrupted, file=sys.stderr)
            return INTERRUPTED

    def _usage(self) -> str:
        width = max(map(len, [*self.commands, "completion"]))
        lines = {name: command.summary for name, command in self.commands.items()}
        lines["completion"] = f'Shell completion: eval "$({self.name} completion)".'
        return (
            f"usage: {self.name} COMMAND [options]\n\n{self.about}\n\ncommands:\n"
            + "".join(f"  {name:{width}}  {line}\n" for name, line in lines.items())
            + f"\n{self.name} COMMAND --help shows the options of a command; --version the version."
        )

    def _second_words(self, first: str) -> list[str]:
        """Of `profiles`, say, `show`."""
        return [name.removeprefix(f"{first} ") for name in self.commands if name.startswith(f"{first} ")]

    def _completion(self) -> str:
        """A script for bash."""
        cases = [
            _CASE.format(command=name, words=" ".join([*self._second_words(name), *flags(command.settings)]))
            for name, command in sorted(self.commands.items(), reverse=True)  # "profiles show" first
        ]
        first = sorted({name.split()[0] for name in self.commands} | {"completion", "--help", "--version"})
        return _COMPLETION.format(
            name=self.name,
            function=self.name.replace("-", "_"),
            commands=" ".join(first),
            cases="\n".join(cases),
        )
