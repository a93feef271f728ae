"""Settings of a command: flags > environment NPU_* > TOML file (--config) > defaults.

A command's settings are a class, and each base class of it is a group of its help: the first line of the
class's docstring is the group's title. What a value looks like there is its field's `title`, or follows from
its type and unit.
"""

import argparse
import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from npu_wire.channel import Security, read_token
from npu_wire.errors import InvalidInput

_BY_UNIT = {"_s": "SECONDS", "_bytes": "BYTES"}
_BY_TYPE: dict[Any, str] = {int: "N", float: "NUMBER", str: "NAME", Path: "FILE", dict: "KEY=VALUE"}


class Settings(BaseSettings):
    """General."""

    model_config = SettingsConfigDict(env_prefix="NPU_", env_ignore_empty=True, extra="forbid")
    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that are given by their place on the command line, not by a flag."""

    config: Path | None = Field(None, description="TOML file with any of these settings")
    debug: bool = Field(False, description="show the traceback of an error")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


class ServerAccess(BaseModel):
    """The way to a server."""

    tls: bool = Field(False, description="encrypt, trusting the system's authorities")
    tls_ca: Path | None = Field(None, description="PEM file of the server's authority; implies TLS")
    tls_cert: Path | None = Field(None, description="PEM file of the client's own certificate")
    tls_key: Path | None = Field(None, description="PEM file of its private key")
    token_file: Path | None = Field(None, description="file with the bearer token")

    def security(self) -> Security:
        """The same, with the token read.

        Raises:
            InvalidInput: the file holds no token.
        """
        token = read_token(self.token_file) if self.token_file else None
        return Security(self.tls, self.tls_ca, self.tls_cert, self.tls_key, token)


T = TypeVar("T", bound=Settings)


def load_settings(settings: type[T], arguments: Sequence[str], program: str) -> T:
    """Settings of one call of a command.

    Args:
        settings: their class.
        arguments: what follows the command's name.
        program: program and command, for the help.

    Raises:
        InvalidInput: the TOML file is missing.
        pydantic.ValidationError: a setting is illegal.
        SystemExit: an unknown flag, or --help.
    """
    given = vars(_parser(settings, program).parse_args(arguments))
    path = given.get("config") or os.environ.get("NPU_CONFIG")
    if path is not None and not Path(path).is_file():
        raise InvalidInput(f"--config {path}: no such file")

    class Found(settings, toml_file=path):  # type: ignore[misc, valid-type, call-arg]
        """Settings that know their file."""

    found: T = Found(**given)
    return found


def flags(settings: type[Settings]) -> Iterator[str]:
    """The flags of a command, in the order of its help."""
    for action in _parser(settings, "")._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))


def flag(name: str) -> str:
    """The flag of a field; a trailing underscore keeps a field apart from a method of its class."""
    return "--" + name.rstrip("_").replace("_", "-")


def _parser(settings: type[Settings], program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program, description=settings.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for group in settings.__mro__:
        names = [name for name in settings.model_fields if _group_of(settings, name) is group]
        if not names:
            continue
        section = parser.add_argument_group("settings" if group is settings else _title(group))
        for name in names:
            field = settings.model_fields[name]
            if name in settings.positional:
                section.add_argument(name, metavar=_metavar(name, field), help=field.description)
            else:
                section.add_argument(flag(name), dest=name, help=_help(field), **_kind(name, field))
    return parser


def _title(group: type) -> str:
    """The first line of a docstring, as part of a sentence."""
    line = (group.__doc__ or "").splitlines()[0].rstrip(".")
    return line[:1].lower() + line[1:]


def _group_of(settings: type[Settings], name: str) -> type:
    """The first class that declares a field."""
    return next(c for c in reversed(settings.__mro__) if name in inspect.get_annotations(c))


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    return text if field.default in (None, False, "", {}) else f"{text} (default: {field.default})"


def _kind(name: str, field: FieldInfo) -> dict[str, Any]:
    type_ = _type(field)
    if type_ is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(type_) is Literal:
        return {"choices": get_args(type_)}
    if get_origin(type_) is dict:
        return {"metavar": _metavar(name, field), "action": _Pair}
    return {"metavar": _metavar(name, field)}


def _metavar(name: str, field: FieldInfo) -> str:
    by_unit = [metavar for unit, metavar in _BY_UNIT.items() if name.endswith(unit)]
    type_ = _type(field)
    return field.title or (by_unit or [_BY_TYPE[get_origin(type_) or type_]])[0]


def _type(field: FieldInfo) -> Any:
    """The type of a value that is given."""
    alternatives = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    return alternatives[0] if NoneType in get_args(field.annotation) else field.annotation


class _Pair(argparse.Action):
    """A repeatable key=value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Adds one to those that are there."""
        key, equals, value = str(values).partition("=")
        if not equals:
            parser.error(f"{option_string} {values}: write KEY=VALUE")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), key: value})
