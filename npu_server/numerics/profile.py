"""A numerics profile: the integer arithmetic of one NPU as data, read from TOML and checked strictly."""

import dataclasses
import hashlib
import json
import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import onnx

from npu_server.numerics.combinations import check_combinations, listed
from npu_server.numerics.rules import (
    HOST_OPERATORS,
    AccumulatorRule,
    ActivationRule,
    AddRule,
    AverageRule,
    ConcatRule,
    Exceptions,
    HostFloatRule,
    LutRule,
    RequantizeRule,
    SumRule,
    WeightRule,
)
from npu_server.numerics.version import ARITHMETIC_VERSION
from npu_wire.errors import InvalidProfile

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHIPPED = resources.files("npu_server").joinpath("profiles")


@dataclass(frozen=True)
class Profile:
    """The arithmetic of one NPU.

    Attributes:
        name: how the NPU is called.
        description: one line for people.
        judged_by: the engines that its claim is judged by; empty for a specification of our own.
        unjudged: operators that its engine computes otherwise or not at all, here a specification of our own;
            "operator: condition" where it does so under a condition only (`npu_server.verdicts`).
        unsupported: operators that the host runs in floating point where the NPU cannot; "*": every one.
    """

    name: str
    description: str
    judged_by: tuple[str, ...]
    unjudged: tuple[str, ...]
    weights: WeightRule
    activations: ActivationRule
    accumulator: AccumulatorRule
    requantize: RequantizeRule
    add: AddRule
    concat: ConcatRule
    average_pool: AverageRule
    mean: AverageRule
    lut: LutRule
    reduce_sum: SumRule = field(default_factory=SumRule)
    exceptions: Exceptions = field(default_factory=Exceptions)
    host_float: HostFloatRule = field(default_factory=HostFloatRule)
    unsupported: tuple[str, ...] = ()

    def takes_on_host(self, operator: str) -> bool:
        """Whether the host runs an ONNX operator that the NPU cannot."""
        return self.unsupported == ("*",) or operator in self.unsupported

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of what decides about bits: every key, and the version of what reads them."""
        content: dict[str, Any] = {f.name: dataclasses.asdict(getattr(self, f.name)) for f in _sections()}
        content["unsupported"] = self.unsupported
        content["arithmetic"] = ARITHMETIC_VERSION
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def requantize_in(self, operator: str) -> RequantizeRule:
        """The rule of an operator: its exception, or else the rule of all."""
        exception: RequantizeRule | None = getattr(self.exceptions, operator)
        return exception or self.requantize


_WORDS = ("name", "description", "judged_by", "unjudged", "unsupported")


def _sections() -> tuple[Any, ...]:
    return tuple(f for f in dataclasses.fields(Profile) if f.name not in _WORDS)


def list_profiles() -> tuple[str, ...]:
    """Names of the profiles that ship with the package."""
    return tuple(sorted(p.name.removesuffix(".toml") for p in _SHIPPED.iterdir() if p.name.endswith(".toml")))


def load_profile(name_or_path: str) -> Profile:
    """Reads a shipped profile by name, or a file by path (anything that ends in .toml).

    Raises:
        InvalidProfile: no such profile or file, unknown or missing key, illegal value, or a file that calls
            itself as a shipped profile is called.
    """
    if name_or_path in list_profiles():
        return parse_profile(
            _SHIPPED.joinpath(f"{name_or_path}.toml").read_text("utf-8"), f"{name_or_path}.toml"
        )
    if not name_or_path.endswith(".toml"):
        raise InvalidProfile(
            f"unknown profile {name_or_path!r}; shipped profiles: {', '.join(list_profiles())}; "
            "your own: give the path of a .toml file"
        )
    try:
        text = Path(name_or_path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidProfile(f"profile {name_or_path}: cannot be read ({error})") from error
    profile = parse_profile(text, name_or_path)
    if profile.name.lower() in list_profiles():
        raise InvalidProfile(
            f"profile {name_or_path}: name = {profile.name!r} is that of a shipped profile; choose another"
        )
    return profile


def parse_profile(text: str, file: str) -> Profile:
    """Checks the text of a profile.

    Args:
        text: TOML.
        file: how messages call it.

    Raises:
        InvalidProfile: the message names file, key and legal values.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidProfile(f"profile {file}: not TOML: {error}") from error
    required = {"name"} | {f.name for f in _sections() if f.default_factory is dataclasses.MISSING}
    _check_keys(file, "", content, {f.name for f in dataclasses.fields(Profile)}, required)
    words = {"description": "", "judged_by": [], "unjudged": []} | content
    for key in ("name", "description"):
        if not isinstance(words[key], str):
            raise InvalidProfile(f"profile {file}: {key} must be a string")
    if not _NAME.fullmatch(words["name"]):
        raise InvalidProfile(
            f"profile {file}: name = {words['name']!r}; legal: 1 to 64 letters, digits, '.', '_' and '-'"
        )
    for key in ("judged_by", "unjudged"):
        if not isinstance(words[key], list) or not all(isinstance(word, str) for word in words[key]):
            raise InvalidProfile(f"profile {file}: {key} must be a list of strings")
    rules = {f.name: _rule(file, f.name, f.type, content[f.name]) for f in _sections() if f.name in content}
    check_combinations(file, content)
    return Profile(
        words["name"],
        words["description"],
        tuple(words["judged_by"]),
        tuple(words["unjudged"]),
        unsupported=_unsupported(file, content.get("unsupported", "refuse")),
        **rules,
    )


def _unsupported(file: str, value: object) -> tuple[str, ...]:
    if value in ("host", "refuse"):
        return ("*",) if value == "host" else ()
    if isinstance(value, list) and all(isinstance(name, str) and onnx.defs.has(name) for name in value):
        return tuple(sorted(set(value)))
    raise InvalidProfile(
        f'profile {file}: unsupported = {value!r}; legal: "host", "refuse", or a list of ONNX operators that '
        "the host runs"
    )


def _rule(file: str, name: str, cls: Any, table: object) -> Any:
    """Reads a table of a profile as the dataclass that documents it."""
    if not isinstance(table, dict):
        raise InvalidProfile(f"profile {file}: {name} must be a table, [{name}]")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    required = {key for key, f in fields.items() if f.default is dataclasses.MISSING}
    _check_keys(file, f"{name}.", table, set(fields), required)
    if cls is Exceptions:
        return Exceptions(
            **{key: _rule(file, f"{name}.{key}", RequantizeRule, value) for key, value in table.items()}
        )
    if cls is HostFloatRule:
        return _host_float(file, table)
    for key, value in table.items():
        legal = fields[key].metadata["legal"]
        # The type is compared as well: in Python 1 == True, in a profile it is not.
        if not any(type(value) is type(option) and value == option for option in legal):
            raise InvalidProfile(f"profile {file}: {name}.{key} = {value!r}; legal: {listed(legal)}")
    return cls(**table)


def _host_float(file: str, table: dict[str, Any]) -> HostFloatRule:
    operators = table.get("operators", [])
    known = sorted(HOST_OPERATORS)
    if not isinstance(operators, list) or any(operator not in known for operator in operators):
        raise InvalidProfile(
            f"profile {file}: host_float.operators = {operators!r}; legal: a list out of "
            f"{listed(tuple(known))}"
        )
    return HostFloatRule(tuple(sorted(set(operators))))


def _check_keys(file: str, prefix: str, table: dict[str, Any], legal: set[str], required: set[str]) -> None:
    for key in table:
        if key not in legal:
            raise InvalidProfile(
                f"profile {file}: unknown key {prefix}{key}; legal: {', '.join(sorted(legal))}"
            )
    for key in sorted(required):
        if key not in table:
            raise InvalidProfile(f"profile {file}: missing key {prefix}{key}")
