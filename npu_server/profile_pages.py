"""`npu-server profiles`: which numerics profiles there are, and what every key of one says."""

import dataclasses
import json
import re
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npu_server.numerics.profile import Profile, list_profiles, load_profile
from npu_server.numerics.rules import Exceptions, RequantizeRule
from npu_server.numerics.version import ARITHMETIC_VERSION
from npu_server.verdicts import verdicts


def print_profiles(console: Console, as_json: bool = False) -> None:
    """Name and description of every shipped profile, one a line."""
    if as_json:
        print(json.dumps({name: load_profile(name).description for name in list_profiles()}, indent=2))
        return
    width = max(len(name) for name in list_profiles())
    for name in list_profiles():
        console.print(f"{name:{width}}  {load_profile(name).description}", markup=False, soft_wrap=True)


def print_profile(name_or_path: str, console: Console, as_json: bool = False) -> None:
    """Keys, values, meaning and hash of one profile.

    Raises:
        InvalidProfile: there is none, or it is illegal.
    """
    profile = load_profile(name_or_path)
    if as_json:
        keys = {key: {"value": value, "meaning": meaning} for key, value, meaning in describe_keys(profile)}
        what = {"name": profile.name, "description": profile.description, "hash": profile.hash}
        arithmetic = {"arithmetic_version": ARITHMETIC_VERSION, "operators": _by_verdict(profile)}
        print(json.dumps(what | arithmetic | {"keys": keys}, indent=2))
        return
    console.print(f"{profile.name}: {profile.description}", markup=False, soft_wrap=True)
    if not profile.judged_by:
        console.print("a specification of its own: no engine computes alike", markup=False, soft_wrap=True)
    for verdict, operators in _by_verdict(profile).items():
        console.print(f"{verdict}: {', '.join(operators)}", markup=False, soft_wrap=True)
    console.print(f"hash {profile.hash} (arithmetic version {ARITHMETIC_VERSION})", soft_wrap=True)
    table = Table("key", "value", "meaning", show_lines=True)
    for key, value, meaning in describe_keys(profile):
        table.add_row(escape(key), escape(value), escape(meaning))
    console.print(table)


def _by_verdict(profile: Profile) -> dict[str, list[str]]:
    """What is known of operators -> those of which it is."""
    grouped: dict[str, list[str]] = {}
    for operator, verdict in verdicts(profile).items():
        grouped.setdefault(verdict, []).append(operator)
    return dict(sorted(grouped.items()))


def describe_keys(profile: Profile) -> list[tuple[str, str, str]]:
    """Key, value and meaning of everything that decides about bits."""
    rows = [("unsupported", _in_toml(unsupported_of(profile)), _UNSUPPORTED)]
    for section in dataclasses.fields(profile):
        rule = getattr(profile, section.name)
        if not dataclasses.is_dataclass(rule) or isinstance(rule, type):
            continue
        meanings = attribute_meanings(type(rule))
        for field in dataclasses.fields(rule):
            value, key = getattr(rule, field.name), f"{section.name}.{field.name}"
            if isinstance(rule, Exceptions):
                if value is not None:
                    rows.append((key, _in_short(value), meanings[field.name]))
            elif value != "" or field.default is dataclasses.MISSING:
                rows.append((key, _in_toml(value), meanings[field.name]))
    return rows


_UNSUPPORTED = (
    'What becomes of operators that the NPU cannot run: "host": its host runs them in floating point, in '
    'ONNX Runtime; "refuse": the model is refused; a list: the host runs these ONNX operators and no others.'
)


def unsupported_of(profile: Profile) -> str | tuple[str, ...]:
    """The key's value as a profile says it."""
    return {("*",): "host", (): "refuse"}.get(profile.unsupported, profile.unsupported)


def attribute_meanings(rule: type) -> dict[str, str]:
    """What a rule's docstring says of each attribute (Google style)."""
    text = (rule.__doc__ or "").split("Attributes:")[-1]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", text, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def _in_short(rule: RequantizeRule) -> str:
    return ", ".join(_in_toml(value) for value in dataclasses.astuple(rule))


def _in_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_in_toml(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
