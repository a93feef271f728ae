"""Numerics profiles: what ships, what is refused, what the hash covers."""

from importlib import resources

import pytest

from npu_server.numerics.profile import list_profiles, load_profile, parse_profile
from npu_wire.errors import InvalidProfile

TFLM = resources.files("npu_server").joinpath("profiles/tflm.toml").read_text("utf-8")


def test_profiles_ship() -> None:
    """The names are part of the product."""
    assert list_profiles() == (
        "acc16",
        "acc16-wrap",
        "acc18",
        "litert-reference",
        "litert-ruy",
        "litert-xnnpack",
        "onnxruntime",
        "pow2-trunc",
        "pow2-trunc-per-channel",
        "tflm",
        "tosa-double",
        "tosa-single",
    )


@pytest.mark.parametrize("name", list_profiles())
def test_shipped_profile_loads(name: str) -> None:
    """A file's name is the name it carries."""
    assert load_profile(name).name == name


def test_file_of_the_user_loads(tmp_path) -> None:
    """A path that ends in .toml is read from disk."""
    path = tmp_path / "mine.toml"
    path.write_text(TFLM.replace('name = "tflm"', 'name = "mine"'))
    assert load_profile(str(path)).name == "mine"


def test_hash_covers_arithmetic_only() -> None:
    """Comments, name and description do not change it; a rounding does."""
    same = parse_profile("# a comment\n" + TFLM.replace('name = "tflm"', 'name = "other"'), "f")
    other = parse_profile(TFLM.replace('rounding = "half_away"\nsteps', 'rounding = "half_up"\nsteps'), "f")
    assert same.hash == load_profile("tflm").hash
    assert other.hash != load_profile("tflm").hash


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "steps = 2",
            "stepz = 2",
            r"f: unknown key requantize\.stepz; legal: multiplier, ratio, rounding, steps, zero_point",
        ),
        ("steps = 2", "", r"f: missing key requantize\.steps"),
        ("[lut]", "[luts]", r"f: unknown key luts; legal: "),
        ("bits = 32", "bits = 64", r"f: accumulator\.bits = 64; legal: 8\.\.32"),
        ("bits = 32", "bits = 32.0", r"f: accumulator\.bits = 32\.0; legal: 8\.\.32"),
        ("steps = 2", "steps = true", r"f: requantize\.steps = True; legal: 1, 2"),
        ('"q31"', '"q15"', r"f: requantize\.multiplier = 'q15'; legal: 'q31', 'float32', 'power_of_two'"),
        (
            '"half_away"\nsteps',
            '"floor"\nsteps',
            r"f: requantize\.rounding = 'floor' .* legal: 'half_away', 'half_up'",
        ),
        (
            'multiplier = "q31"',
            'multiplier = "power_of_two"',
            "steps = 2 needs requantize.multiplier = 'q31'",
        ),
        ("left_shift = 20", "", "add.left_shift"),
        ('method = "input_scale"', 'method = "requantize"', "average_pool.rounding"),
        ('name = "tflm"', "name = 5", "f: name must be a string"),
        ("[weights]", "weights = 1\n[x]", "f: "),
        ("bits = 32", "bits = ", "f: not TOML"),
    ],
)
def test_illegal_profile_is_refused(old: str, new: str, message: str) -> None:
    """The message names file, key and legal values."""
    assert old in TFLM
    with pytest.raises(InvalidProfile, match=message):
        parse_profile(TFLM.replace(old, new, 1), "f")


@pytest.mark.parametrize("name", ["", "nothing", "nowhere/to/be/found.toml"])
def test_unknown_profile_is_refused(name: str) -> None:
    """A name that does not ship and a file that is not there are errors of the user's."""
    with pytest.raises(InvalidProfile):
        load_profile(name)
