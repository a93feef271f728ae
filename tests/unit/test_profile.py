"""Numerics profiles: what ships, what is refused, what the hash covers."""

from importlib import resources

import pytest

from npu_server.numerics.profile import list_profiles, load_profile, parse_profile
from npu_server.numerics.version import ARITHMETIC_VERSION
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
        (
            '"q31"',
            '"q15"',
            r"f: requantize\.multiplier = 'q15'; legal: 'q31', 'float32', 'float64', 'power_of_two'",
        ),
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
        ('name = "tflm"', 'name = ""', r"f: name = ''; legal: 1 to 64 letters"),
        ('name = "tflm"', r'name = "my\nnpu"', r"f: name = 'my\\nnpu'; legal: 1 to 64 letters"),
        ("[weights]", "weights = 1\n[x]", "f: "),
        ("bits = 32", "bits = ", "f: not TOML"),
    ],
)
def test_illegal_profile_is_refused(old: str, new: str, message: str) -> None:
    """The message names file, key and legal values."""
    assert old in TFLM
    with pytest.raises(InvalidProfile, match=message):
        parse_profile(TFLM.replace(old, new, 1), "f")


def shipped(name: str) -> str:
    """Text of a shipped profile."""
    return resources.files("npu_server").joinpath(f"profiles/{name}.toml").read_text("utf-8")


def exception(name: str) -> str:
    """A table [exceptions.NAME] that is legal by itself."""
    return f'\n[exceptions.{name}]\nmultiplier = "q31"\nrounding = "half_up"\nsteps = 1\n'


@pytest.mark.parametrize(
    ("profile", "addition", "message"),
    [
        ("onnxruntime", exception("add"), r"exceptions\.add is ignored with add\.method = 'float32_fma'"),
        ("litert-xnnpack", exception("add"), r"exceptions\.add .* add\.method = 'multiplier_21bit'"),
        ("onnxruntime", exception("concat"), r"exceptions\.concat .* concat\.method = 'table'"),
        ("litert-xnnpack", exception("concat"), r"exceptions\.concat .* 'multiplier_8bit'"),
        ("litert-xnnpack", exception("mean"), r"exceptions\.mean .* mean\.method = 'float32_codes'"),
        ("onnxruntime", exception("add_operands"), r"exceptions\.add_operands .* = 'float32_fma'"),
        ("litert-xnnpack", exception("sub_operands"), r"exceptions\.sub_operands .* 'multiplier_21bit'"),
        ("tflm", exception("average_pool"), r"exceptions\.average_pool .* = 'input_scale'"),
        ("tosa-double", exception("average_pool"), r"exceptions\.average_pool .* = 'reciprocal'"),
        ("onnxruntime", exception("average_pool"), r"exceptions\.average_pool .* = 'float32_sum'"),
    ],
)
def test_an_exception_that_nothing_reads_is_refused(profile: str, addition: str, message: str) -> None:
    """The message names the key that decides; beside the method that reads it, the same table is legal."""
    with pytest.raises(InvalidProfile, match=message):
        parse_profile(shipped(profile) + addition, "f")
    reader = "tosa-single" if "operands" in addition else "pow2-trunc"
    parse_profile(shipped(reader) + addition, "f")


@pytest.mark.parametrize(
    ("profile", "old", "new", "message"),
    [
        (
            "onnxruntime",
            'method = "float32_fma"',
            'method = "float32_fma"\nleft_shift = 20',
            r"add\.left_shift is ig",
        ),
        (
            "onnxruntime",
            'method = "float32_fma"',
            'method = "float32_fma"\nleft_shift = 0',
            r"add\.left_shift is ig",
        ),
        ("tflm", "left_shift = 20", "left_shift = 0", r"add\.left_shift is missing or 0"),
        (
            "tosa-double",
            '"reciprocal"',
            '"reciprocal"\nrounding = "floor"',
            r"average_pool\.rounding is ignored",
        ),
        (
            "tflm",
            '[mean]\nmethod = "requantize"',
            '[mean]\nmethod = "requantize"\nrounding = "floor"',
            r"mean\.rounding",
        ),
        (
            "tflm",
            '[mean]\nmethod = "requantize"',
            '[mean]\nmethod = "input_scale"',
            r"mean\.rounding is missing",
        ),
        (
            "onnxruntime",
            "steps = 1\n\n[add]",
            'steps = 1\nratio = "float32"\n\n[add]',
            r"requantize\.ratio is ignored",
        ),
        (
            "onnxruntime",
            "steps = 1\n\n[add]",
            'steps = 1\nratio = "float64"\n\n[add]',
            r"requantize\.ratio is ignored",
        ),
        (
            "tflm",
            'kind = "affine"',
            'kind = "symmetric"',
            r"lut\.output = 'fixed' brings zero points",
        ),
        ("tflm", 'output = "fixed"\n', "", r"lut\.sigmoid = 'int32' needs lut\.output = 'fixed'"),
        (
            "litert-xnnpack",
            'arithmetic = "float32"\n',
            "",
            r"lut\.sigmoid = 'float64' is ignored without lut\.arithmetic = 'float32'",
        ),
    ],
)
def test_a_key_that_nothing_reads_is_refused(profile: str, old: str, new: str, message: str) -> None:
    """Whatever its value: a profile says nothing that does not count."""
    assert old in shipped(profile)
    with pytest.raises(InvalidProfile, match=message):
        parse_profile(shipped(profile).replace(old, new, 1), "f")


def test_zero_points_that_are_always_zero_have_no_place() -> None:
    """With symmetric activations it does not count when the zero point is added."""
    text = shipped("pow2-trunc")
    with pytest.raises(
        InvalidProfile, match=r"lut\.zero_point is ignored with activations\.kind = 'symmetric'"
    ):
        parse_profile(text.replace("[lut]", '[lut]\nzero_point = "before_rounding"'), "f")
    mul = '\n[exceptions.mul]\nmultiplier = "float32"\nrounding = "half_even"\nsteps = 1\n'
    with pytest.raises(InvalidProfile, match=r"exceptions\.mul\.zero_point is ignored"):
        parse_profile(text + mul + 'zero_point = "before_rounding"\n', "f")
    parse_profile(text + mul, "f")


def test_a_file_does_not_take_a_shipped_name(tmp_path) -> None:
    """Whoever reads "tflm" in a fingerprint may rely on what ships under it, whatever --profile PATH says."""
    path = tmp_path / "mine.toml"
    path.write_text(TFLM.replace("bits = 32", "bits = 24"))
    with pytest.raises(InvalidProfile, match=r"mine\.toml: name = 'tflm' is that of a shipped profile"):
        load_profile(str(path))
    path.write_text(TFLM.replace('"tflm"', '"TFLM"'))
    with pytest.raises(InvalidProfile, match="name = 'TFLM' is that of a shipped profile"):
        load_profile(str(path))


def test_hash_covers_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same keys read by another version of the arithmetic are another arithmetic."""
    before = load_profile("tflm").hash
    monkeypatch.setattr("npu_server.numerics.profile.ARITHMETIC_VERSION", ARITHMETIC_VERSION + 1)
    assert load_profile("tflm").hash != before


@pytest.mark.parametrize("name", ["", "nothing", "nowhere/to/be/found.toml"])
def test_unknown_profile_is_refused(name: str) -> None:
    """A name that does not ship and a file that is not there are errors of the user's."""
    with pytest.raises(InvalidProfile):
        load_profile(name)
