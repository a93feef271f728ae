"""A numerics profile: the integer arithmetic of one NPU as data, read from TOML and checked strictly."""

import dataclasses
import hashlib
import json
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from npu_wire.errors import InvalidProfile

_SHIPPED = resources.files("npu_server").joinpath("profiles")


@dataclass(frozen=True)
class WeightRule:
    """How weights become INT8; codes in [-127, 127].

    Attributes:
        symmetric: zero point 0 (the only kind there is).
        per_channel: one scale for each output channel instead of one for the tensor.
        scale: "any" or "power_of_two" (rounded up).
    """

    symmetric: bool
    per_channel: bool
    scale: str


@dataclass(frozen=True)
class ActivationRule:
    """How activations become INT8; codes in [-128, 127].

    Attributes:
        kind: "affine" (a zero point of its own) or "symmetric" (zero point 0).
        scale: "any" or "power_of_two" (rounded up).
    """

    kind: str
    scale: str


@dataclass(frozen=True)
class AccumulatorRule:
    """The register in which a convolution or a fully connected layer sums up.

    Attributes:
        bits: its width; biases are clipped to it.
        overflow: "saturate" or "wrap".
        where: "sum": overflow acts once, on the finished sum with its bias.
    """

    bits: int
    overflow: str
    where: str


@dataclass(frozen=True)
class RequantizeRule:
    """How an accumulator is brought to the scale of its INT8 output.

    Attributes:
        multiplier: "q31" (31-bit mantissa and shift), "float32", or "power_of_two" (shift only).
        rounding: of the last step: "half_away", "half_up", "half_even", "floor".
        steps: 2: rounded half up to 31 bits first, then by the shift (gemmlowp); 1: rounded once.
    """

    multiplier: str
    rounding: str
    steps: int


@dataclass(frozen=True)
class AddRule:
    """Addition of two INT8 tensors.

    Attributes:
        method: "shifted_int32" (operands shifted left and rescaled to a common scale), "float32_fma" (two
            fused multiply-adds in float32, the zero point inside), or "int8" (each operand requantized to the
            output's scale and clamped to INT8 before a saturating INT8 addition).
        left_shift: bits of head room of "shifted_int32".
    """

    method: str
    left_shift: int = 0


@dataclass(frozen=True)
class MulRule:
    """Product of two INT8 tensors, requantized by `RequantizeRule`.

    Attributes:
        zero_point: "after_rounding" or "before_rounding" (a float32 multiplier only; decides how ties fall).
    """

    zero_point: str


@dataclass(frozen=True)
class ConcatRule:
    """How operands come to the output's scale.

    Attributes:
        method: "requantize" (by `RequantizeRule`) or "table" (dequantize and quantize in float32, half to
            even).
    """

    method: str


@dataclass(frozen=True)
class AverageRule:
    """An average over a window.

    Attributes:
        method: "input_scale" (the output keeps the input's scale; sum of codes / count, rounded),
            "requantize" (the sum times input scale / (output scale * count) by `RequantizeRule`), or, for
            average pools, "float32_sum" (dequantized, summed row by row in float32, divided, quantized half
            to even with the zero point inside).
        rounding: of "input_scale": "half_away", "half_even" or "floor".
    """

    method: str
    rounding: str = ""


@dataclass(frozen=True)
class LutRule:
    """A 256-entry table of a function, computed in float64.

    Attributes:
        rounding: "half_away" or "half_even".
    """

    rounding: str


@dataclass(frozen=True)
class Profile:
    """The arithmetic of one NPU."""

    name: str
    description: str
    weights: WeightRule
    activations: ActivationRule
    accumulator: AccumulatorRule
    requantize: RequantizeRule
    add: AddRule
    mul: MulRule
    concat: ConcatRule
    average_pool: AverageRule
    mean: AverageRule
    lut: LutRule

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of what decides about bits: every key but name and description."""
        content = dataclasses.asdict(self)
        del content["name"], content["description"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_SECTIONS: dict[str, type] = {
    "weights": WeightRule,
    "activations": ActivationRule,
    "accumulator": AccumulatorRule,
    "requantize": RequantizeRule,
    "add": AddRule,
    "mul": MulRule,
    "concat": ConcatRule,
    "average_pool": AverageRule,
    "mean": AverageRule,
    "lut": LutRule,
}
_LEGAL: dict[str, tuple[Any, ...]] = {
    "weights.symmetric": (True,),
    "weights.per_channel": (True, False),
    "weights.scale": ("any", "power_of_two"),
    "activations.kind": ("affine", "symmetric"),
    "activations.scale": ("any", "power_of_two"),
    "accumulator.bits": tuple(range(8, 33)),
    "accumulator.overflow": ("saturate", "wrap"),
    "accumulator.where": ("sum",),
    "requantize.multiplier": ("q31", "float32", "power_of_two"),
    "requantize.rounding": ("half_away", "half_up", "half_even", "floor"),
    "requantize.steps": (1, 2),
    "add.method": ("shifted_int32", "float32_fma", "int8"),
    "add.left_shift": tuple(range(21)),
    "mul.zero_point": ("after_rounding", "before_rounding"),
    "concat.method": ("requantize", "table"),
    "average_pool.method": ("input_scale", "requantize", "float32_sum"),
    "average_pool.rounding": ("half_away", "half_even", "floor"),
    "mean.method": ("input_scale", "requantize"),
    "mean.rounding": ("half_away", "half_even", "floor"),
    "lut.rounding": ("half_away", "half_even"),
}
_ROUNDINGS = {
    ("q31", 1): ("half_up",),
    ("q31", 2): ("half_away", "half_up"),
    ("float32", 1): ("half_even",),
    ("power_of_two", 1): ("floor", "half_up", "half_away"),
}


def list_profiles() -> tuple[str, ...]:
    """Names of the profiles that ship with the package."""
    return tuple(sorted(p.name.removesuffix(".toml") for p in _SHIPPED.iterdir() if p.name.endswith(".toml")))


def load_profile(name_or_path: str) -> Profile:
    """Reads a shipped profile by name, or a file by path (anything that ends in .toml).

    Raises:
        InvalidProfile: no such profile or file, unknown or missing key, illegal value.
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
    return parse_profile(text, name_or_path)


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
    _check_keys(file, "", content, {"name", "description", *_SECTIONS}, {"name", *_SECTIONS})
    for key in ("name", "description"):
        if not isinstance(content.get(key, ""), str):
            raise InvalidProfile(f"profile {file}: {key} must be a string")
    sections = {name: _section(file, name, cls, content[name]) for name, cls in _SECTIONS.items()}
    profile = Profile(name=content["name"], description=content.get("description", ""), **sections)
    _check_combinations(file, profile)
    return profile


def _section(file: str, name: str, cls: type, table: object) -> Any:
    if not isinstance(table, dict):
        raise InvalidProfile(f"profile {file}: {name} must be a table, [{name}]")
    fields = dataclasses.fields(cls)
    required = {f.name for f in fields if f.default is dataclasses.MISSING}
    _check_keys(file, f"{name}.", table, {f.name for f in fields}, required)
    for key, value in table.items():
        legal = _LEGAL[f"{name}.{key}"]
        # The type is compared as well: in Python 1 == True, in a profile it is not.
        if not any(type(value) is type(option) and value == option for option in legal):
            raise InvalidProfile(f"profile {file}: {name}.{key} = {value!r}; legal: {_listed(legal)}")
    return cls(**table)


def _check_keys(file: str, prefix: str, table: dict[str, Any], legal: set[str], required: set[str]) -> None:
    for key in table:
        if key not in legal:
            raise InvalidProfile(
                f"profile {file}: unknown key {prefix}{key}; legal: {', '.join(sorted(legal))}"
            )
    for key in sorted(required):
        if key not in table:
            raise InvalidProfile(f"profile {file}: missing key {prefix}{key}")


def _check_combinations(file: str, profile: Profile) -> None:
    rule = profile.requantize
    if (rule.multiplier, rule.steps) not in _ROUNDINGS:
        raise InvalidProfile(f"profile {file}: requantize.steps = 2 needs requantize.multiplier = 'q31'")
    legal = _ROUNDINGS[rule.multiplier, rule.steps]
    if rule.rounding not in legal:
        raise InvalidProfile(
            f"profile {file}: requantize.rounding = {rule.rounding!r} with multiplier {rule.multiplier!r} "
            f"and steps {rule.steps}; legal: {_listed(legal)}"
        )
    powers = profile.weights.scale == profile.activations.scale == "power_of_two"
    if rule.multiplier == "power_of_two" and not powers:
        raise InvalidProfile(
            f"profile {file}: requantize.multiplier = 'power_of_two' needs weights.scale and "
            "activations.scale = 'power_of_two'"
        )
    if (profile.add.method == "shifted_int32") != (profile.add.left_shift > 0):
        raise InvalidProfile(
            f"profile {file}: add.left_shift (1..20) belongs to add.method = 'shifted_int32' only"
        )
    if profile.add.method == "shifted_int32" and rule.multiplier != "q31":
        raise InvalidProfile(
            f"profile {file}: add.method = 'shifted_int32' needs requantize.multiplier = 'q31'"
        )
    if profile.mul.zero_point == "before_rounding" and rule.multiplier != "float32":
        raise InvalidProfile(f"profile {file}: mul.zero_point = 'before_rounding' needs multiplier 'float32'")
    for name, average in (("average_pool", profile.average_pool), ("mean", profile.mean)):
        if (average.method == "input_scale") != bool(average.rounding):
            raise InvalidProfile(
                f"profile {file}: {name}.rounding belongs to {name}.method = 'input_scale' only"
            )


def _listed(values: tuple[Any, ...]) -> str:
    if len(values) > 4 and all(type(value) is int for value in values):
        return f"{values[0]}..{values[-1]}"
    return ", ".join(repr(value) for value in values)
