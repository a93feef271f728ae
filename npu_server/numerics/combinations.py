"""Which keys of a profile mean something together: a key that nothing would read is refused, not ignored."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from npu_server.numerics.rules import AverageRule
from npu_wire.errors import InvalidProfile

_ROUNDINGS = {
    ("q31", 1): ("half_up", "half_away"),
    ("q31", 2): ("half_away", "half_up"),
    ("float32", 1): ("half_even",),
    ("float64", 1): ("half_away",),
    ("power_of_two", 1): ("floor", "half_up", "half_away"),
}

_READ_BY: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "exceptions.add": ("add.method", ("shifted_int32", "int8")),
    "exceptions.add_operands": ("add.method", ("shifted_int32",)),
    "exceptions.sub_operands": ("add.method", ("shifted_int32",)),
    "exceptions.leaky_relu": ("lut.leaky_relu", ("requantize", "multiplier_8bit")),
    "exceptions.concat": ("concat.method", ("requantize",)),
    "exceptions.mean": ("mean.method", ("requantize",)),
    "exceptions.average_pool": ("average_pool.method", ("requantize",)),
    "add.left_shift": ("add.method", ("shifted_int32",)),
    "lut.zero_point": ("activations.kind", ("affine",)),
    "mean.rounding": ("mean.method", ("input_scale",)),
    "average_pool.rounding": ("average_pool.method", ("input_scale",)),
}
"""Key -> the key that decides whether it is read, and with which of its values."""

_NEEDED = ("add.left_shift", "mean.rounding", "average_pool.rounding")
"""Keys without a default where they are read."""

_FOREIGN = {"mean": ("reciprocal", "float32_sum"), "average_pool": ("float32_codes",)}
"""Methods of an average that only the other one has."""


def check_combinations(file: str, content: Mapping[str, Any]) -> None:
    """Refuses keys that are legal one by one but mean nothing together.

    Args:
        file: how messages call the profile.
        content: its tables, every key and value legal by itself.

    Raises:
        InvalidProfile: the message names both keys and what is legal.
    """
    for problem in _problems(content):
        raise InvalidProfile(f"profile {file}: {problem}")


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    for key, rule in _requantize_rules(content):
        yield from _requantize_problems(key, rule, content)
    accumulator = content["accumulator"]
    if (accumulator["where"], accumulator["overflow"]) == ("every_mac", "wrap"):
        yield (
            "accumulator.where = 'every_mac' needs accumulator.overflow = 'saturate'; a register that wraps "
            "ends at the same sum either way: write 'sum'"
        )
    for name, foreign in _FOREIGN.items():
        method = content[name]["method"]
        if method in foreign:
            legal = tuple(m for m in key_values(AverageRule, "method") if m not in foreign)
            yield f"{name}.method = {method!r}; legal for {name}: {listed(legal)}"
    for key, (other, values) in _READ_BY.items():
        chosen, given = _value(content, other), _value(content, key) is not None
        if given and chosen not in values:
            yield f"{key} is ignored with {other} = {chosen!r}; it belongs to {listed(values)}: leave it out"
        if key in _NEEDED and chosen in values and not _value(content, key):
            yield f"{key} is missing or 0; {other} = {chosen!r} needs it"
    for key in ("sigmoid", "tanh"):
        if content["lut"].get(key) == "int32" and content["lut"].get("output") != "fixed":
            yield f"lut.{key} = 'int32' needs lut.output = 'fixed': its fixed point knows no other scale"
    if content["lut"].get("sigmoid") == "float64" and content["lut"].get("arithmetic") != "float32":
        yield "lut.sigmoid = 'float64' is ignored without lut.arithmetic = 'float32': leave it out"
    if content["activations"]["kind"] == "symmetric" and content["lut"].get("output") == "fixed":
        yield "lut.output = 'fixed' brings zero points; activations.kind = 'symmetric' needs 'calibrated'"


def _requantize_rules(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "requantize", content["requantize"]
    for name, rule in content.get("exceptions", {}).items():
        yield f"exceptions.{name}", rule


def _requantize_problems(key: str, rule: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[str]:
    multiplier, steps, rounding = rule["multiplier"], rule["steps"], rule["rounding"]
    if (multiplier, steps) not in _ROUNDINGS:
        yield f"{key}.steps = 2 needs {key}.multiplier = 'q31'"
    elif rounding not in _ROUNDINGS[multiplier, steps]:
        yield (
            f"{key}.rounding = {rounding!r} with multiplier {multiplier!r} and steps {steps}; legal: "
            f"{listed(_ROUNDINGS[multiplier, steps])}"
        )
    powers = content["weights"]["scale"] == content["activations"]["scale"] == "power_of_two"
    if multiplier == "power_of_two" and not powers:
        yield (
            f"{key}.multiplier = 'power_of_two' needs weights.scale and activations.scale = 'power_of_two'"
        )
    if "ratio" in rule and multiplier in ("float32", "float64"):
        yield f"{key}.ratio is ignored with multiplier {multiplier!r}, which divides in it: leave it out"
    before = rule.get("zero_point") == "before_rounding"
    if before and (multiplier != "float32" or key != "exceptions.mul"):
        yield (
            f"{key}.zero_point = 'before_rounding' needs multiplier 'float32', and exists in exceptions.mul "
            "only; elsewhere: 'after_rounding'"
        )
    elif before and content["activations"]["kind"] == "symmetric":
        yield f"{key}.zero_point is ignored with activations.kind = 'symmetric', where it is 0: leave it out"


def _value(content: Mapping[str, Any], key: str) -> Any:
    table, name = key.split(".")
    return content.get(table, {}).get(name)


def key_values(cls: Any, key: str) -> tuple[Any, ...]:
    """Legal values of a key."""
    values: tuple[Any, ...] = next(f for f in dataclasses.fields(cls) if f.name == key).metadata["legal"]
    return values


def listed(values: tuple[Any, ...]) -> str:
    """Legal values for a message: `1..32` for a long run of integers."""
    if len(values) > 4 and all(type(value) is int for value in values):
        return f"{values[0]}..{values[-1]}"
    return ", ".join(repr(value) for value in values)
