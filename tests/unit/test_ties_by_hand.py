"""Roundings, registers and scales at the number where a slightly wrong rule shows: calculated by hand."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from single_layers import BACKENDS, Scale, single_layer

from npu_server.numerics.profile import load_profile
from npu_server.numerics.scales import activation_quantization, quantize_weights
from npu_server.seam import Backend, BackendOptions

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def fully_connected(
    backend: type[Backend],
    profile: str,
    weight: list[list[float]],
    scales: tuple[float, float],
    batch: list[list[int]],
    bias: list[float] | None = None,
) -> list[list[int]]:
    """Codes of a Gemm; both zero points are 0. A row of weights with 127 in it has a scale of exactly 1."""
    initializers = {"w": np.array(weight, np.float32)}
    if bias is not None:
        initializers["b"] = np.array(bias, np.float32)
    node = helper.make_node("Gemm", ["x", *initializers], ["y"], "gemm", transB=1)
    named = dict(zip("xy", (Scale(scale, 0) for scale in scales), strict=True))
    net = single_layer(profile, [node], (len(weight[0]),), named, initializers)
    return net.run(backend, np.array(batch, np.int8))["y"].tolist()


def changed(folder: Path, old: str, new: str) -> str:
    """Path of a copy of `tflm` with another rule."""
    shipped = resources.files("npu_server").joinpath("profiles", "tflm.toml").read_text("utf-8")
    assert shipped.count(old) == 1
    path = folder / "changed.toml"
    path.write_text(shipped.replace(old, new).replace('name = "tflm"', 'name = "changed"'), "utf-8")
    return str(path)


@each_backend
def test_mantissa_is_rounded(backend: type[Backend]) -> None:
    """7/16 over 10/16 is 0.7: 0.7 * 2^31 = 1,503,238,553.6 is held as ...554, a little more than 0.7.

    So 5 * 0.7 = 3.5 is just above the tie, 4, and -3.5 just below, -4. Cut off to ...553 they would be 3
    and -3; 10.5 and 17.5 would be 10 and 17.
    """
    codes = fully_connected(
        backend, "tflm", [[127, 1]], (7 / 16, 10 / 16), [[0, 5], [0, -5], [0, 15], [0, 25]]
    )
    assert codes == [[4], [-4], [11], [18]]


@each_backend
def test_register_of_16_bits_ends_at_32767_and_minus_32768(backend: type[Backend]) -> None:
    """At 3 / 2^16 a code, -32,768 is -1.5, code -2; -32,767 were -1.49995, code -1.

    32,767 is 1.49995, code 1; 32,768 were 1.5, code 2. Four products of 127 * 127 are 64,516, of -128 * 127
    -65,024.
    """
    batch = [[127] * 4, [-128] * 4]
    assert fully_connected(backend, "acc16", [[127] * 4], (3.0, 2.0**16), batch) == [[1], [-2]]


@each_backend
def test_register_of_16_bits_wraps_to_minus_32768(backend: type[Backend]) -> None:
    """127 * (127 + 127 + 4) + 2 is 32,768, which 16 bits hold as -32,768: -1.5, code -2; one less is 1."""
    batch = [[127, 127, 4, 2], [127, 127, 4, 1]]
    codes = fully_connected(backend, "acc16-wrap", [[127, 127, 127, 1]], (3.0, 2.0**16), batch)
    assert codes == [[-2], [1]]


@each_backend
def test_register_of_18_bits_ends_at_131071_and_minus_131072(backend: type[Backend]) -> None:
    """At 3 / 2^18 a code, -131,072 is -1.5, code -2; -131,071 were code -1. 131,071 is 1.49999, code 1."""
    batch = [[127] * 9, [-128] * 9]
    assert fully_connected(backend, "acc18", [[127] * 9], (3.0, 2.0**18), batch) == [[1], [-2]]


@each_backend
def test_register_begins_with_the_bias(backend: type[Backend]) -> None:
    """120,000 + 16,129 stops at 131,071; less 16,129 leaves 114,942: 113.1 at 1,016, code 113.

    A register that never filled up would hold 120,000 again: 118.1, code 118.
    """
    codes = fully_connected(
        backend, "acc18", [[127, 127]], (1.0, 1016.0), [[127, -127], [-127, 127]], [120000.0]
    )
    assert codes == [[113], [118]]


@pytest.mark.parametrize(
    ("profile", "scale", "expected"),
    [("acc16", 1024.0, [32, 32]), ("acc16-wrap", 1024.0, [-17, -17]), ("tflm", 1024.0, [47, 47])],
)
@each_backend
def test_product_of_activations_is_held_in_the_register(
    backend: type[Backend], profile: str, scale: float, expected: list[int]
) -> None:
    """Three products of 127 * 127 are 48,387: 47.3 at 1,024; 16 bits hold 32,767 (32.0), or -17,149."""
    node = helper.make_node("MatMul", ["x", "x"], ["y"], "product")
    net = single_layer(profile, [node], (3, 3), {"x": Scale(1.0, 0), "y": Scale(scale, 0)})
    codes = net.run(backend, np.full((2, 3, 3), 127, np.int8))["y"]
    assert [np.unique(sample).tolist() for sample in codes] == [[code] for code in expected]


@each_backend
def test_product_of_activations_saturates_on_the_way(backend: type[Backend]) -> None:
    """Nine products of 127 * 127 stop at 131,071, three of -127 * 127 leave 82,684: 81.4 at 1,016, code 81.

    In the rows of the other sign -131,072 + 48,387 = -82,685: -81.4, code -81. (Exact: 95 and -95.)
    """
    signs = np.array([127] * 9 + [-127] * 3, np.int8)
    net = single_layer(
        "acc18",
        [helper.make_node("MatMul", ["x", "x"], ["y"], "product")],
        (12, 12),
        {"x": Scale(1.0, 0), "y": Scale(1016.0, 0)},
    )
    codes = net.run(backend, np.repeat(signs[:, None], 12, axis=1)[None])["y"][0]
    assert codes[:, 0].tolist() == [81] * 9 + [-81] * 3
    assert (codes == codes[:, :1]).all()


@each_backend
def test_concatenation_divides(backend: type[Backend]) -> None:
    """3.5 over 7 is 1/2: 1.5, 6.5, 12.5, 14.5 and 22.5 are ties and go to the even code.

    1 / 7 in float32 is a little more than 1/7: 45.5 times that is 6.5000005, which would be code 7.
    """
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], "pool", kernel_shape=[1, 1]),
        helper.make_node("Concat", ["x", "p"], ["y"], "concat", axis=1),
    ]
    net = single_layer("onnxruntime", nodes, (1, 1, 1), {"x": Scale(3.5, 0), "y": Scale(7.0, 0)})
    batch = np.array([3, 13, 25, 29, 45, -13], np.int8).reshape(-1, 1, 1, 1)
    codes = net.run(backend, batch)["y"].reshape(-1, 2).tolist()
    assert codes == [[code, code] for code in (2, 6, 12, 14, 22, -6)]


@each_backend
def test_int8_addition_clamps_both_operands(backend: type[Backend]) -> None:
    """200 and -200 at scale 1 are 127 and -128 before they are added: -1. 100 and -100 fit: 0."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["n"], "negate"),
        helper.make_node("Add", ["x", "n"], ["y"], "add"),
    ]
    weights = {"w": np.full((1, 1, 1, 1), -1.0, np.float32)}
    net = single_layer("tflm", nodes, (1, 1, 1), {n: Scale(1.0, 0) for n in "xny"}, weights)
    program = backend(BackendOptions(profile="pow2-trunc")).compile(
        net.model, {"x": (-254.0, 254.0), "n": (-254.0, 254.0), "y": (-127.0, 127.0)}
    )
    batch = np.array([100, -100, 50], np.int8).reshape(-1, 1, 1, 1)
    assert list(program.forward(program.layer_map.named(batch), ()))[-1].data.reshape(-1).tolist() == [
        -1,
        -1,
        0,
    ]


@each_backend
def test_mean_between_two_powers_of_two(backend: type[Backend]) -> None:
    """7 / 3 at 1/2 is 4.67, at 2 is 1.17, at 8 is 0.29: 4, 1, 0; of -7 the next lower: -5, -2, -1."""
    node = helper.make_node("GlobalAveragePool", ["x"], ["y"], "mean")
    net = single_layer("tflm", [node], (1, 1, 3), {"x": Scale(1.0, 0), "y": Scale(1.0, 0)})
    batch = np.array([[3, 3, 1], [-3, -3, -1]], np.int8).reshape(2, 1, 1, 3)
    for largest, expected in ((63.5, [4, -5]), (254.0, [1, -2]), (1016.0, [0, -1])):
        ranges = {"x": (-127.0, 127.0), "y": (-largest, largest)}
        program = backend(BackendOptions(profile="pow2-trunc")).compile(net.model, ranges)
        assert (
            list(program.forward(program.layer_map.named(batch), ()))[-1].data.reshape(-1).tolist()
            == expected
        )


@each_backend
def test_bias_is_rounded_to_even(backend: type[Backend]) -> None:
    """In steps of 1, biases of 2.6, -2.6, 2.5 and 3.5 are 3, -3, 2 and 4."""
    weight = [[127.0]] * 4
    assert fully_connected(backend, "tflm", weight, (1.0, 1.0), [[0]], [2.6, -2.6, 2.5, 3.5]) == [
        [3, -3, 2, 4]
    ]


def test_weights_are_rounded_to_even() -> None:
    """The largest, 127, makes a scale of 1: 2.6, -2.6, 2.5 and 3.5 are 3, -3, 2 and 4; never -128."""
    weight = np.array([[127, 2.6, -2.6, 2.5, 3.5, -127]], np.float32)
    for profile in ("tflm", "pow2-trunc"):
        weights = quantize_weights(weight, np.zeros(1, np.float32), 1.0, 1.0, load_profile(profile))
        assert weights.scales.tolist() == [1.0]
        assert weights.codes.tolist() == [[127, 3, -3, 2, 4, -127]]


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 255.0, 1.0, -128),
        (-0.75, 254.25, 1.0, -127),  # -127.25
        (-0.25, 254.75, 1.0, -128),  # -127.75
        (-254.25, 0.75, 1.0, 126),  # 126.25
        (-0.5, 254.5, 1.0, -128),  # -127.5, to even
        (-1.5, 253.5, 1.0, -126),  # -126.5, to even
        (-255.0, -5.0, 1.0, 127),  # widened to 0
        (5.0, 255.0, 1.0, -128),  # widened to 0
    ],
)
def test_zero_point_is_rounded_to_even(low: float, high: float, scale: float, zero_point: int) -> None:
    """(high - low) / 255 and -128 - low / scale, of a range that contains 0."""
    quantization = activation_quantization("x", low, high, load_profile("tflm"))
    assert (quantization.scale, quantization.zero_point) == (scale, zero_point)


@pytest.mark.parametrize(
    ("profile", "zero_point", "expected"),
    [("tflm", 0, [-2, -1, 1, 2]), ("tflm", 1, [-1, 0, 2, 3]), ("litert-xnnpack", 1, [0, 0, 2, 2])],
)
@each_backend
def test_bound_of_a_clip_on_a_tie(
    backend: type[Backend], profile: str, zero_point: int, expected: list[int]
) -> None:
    """+-1.5 at scale 1: TFLite rounds away from zero, to 2 and -2, and then adds the zero point.

    XNNPACK rounds -1.5 + 1 = -0.5 and 1.5 + 1 = 2.5 to even: 0 and 2.
    """
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["g"], "gemm", transB=1),
        helper.make_node("Clip", ["g", "low", "high"], ["y"], "clip"),
    ]
    constants = {"w": np.array([[127.0, 1.0]]), "low": np.array(-1.5), "high": np.array(1.5)}
    weights = {name: value.astype(np.float32) for name, value in constants.items()}
    scales = {"x": Scale(1.0, 0), "y": Scale(1.0, zero_point)}
    net = single_layer(profile, nodes, (2,), scales, weights)
    batch = np.array([[0, -5], [0, -1], [0, 1], [0, 5]], np.int8)
    assert net.run(backend, batch)["y"].reshape(-1).tolist() == expected


@each_backend
def test_what_has_no_value_is_the_code_of_zero(backend: type[Backend]) -> None:
    """Roots at 1/8 with zero point -10: of 4 is 16 - 10, of 9 is 24 - 10, of -4 there is none: -10."""
    scales = {"x": Scale(1.0, 0), "y": Scale(0.125, -10)}
    net = single_layer("tflm", [helper.make_node("Sqrt", ["x"], ["y"], "root")], (3,), scales)
    assert net.run(backend, np.array([[4, 9, -4]], np.int8))["y"].tolist() == [[6, 14, -10]]


@each_backend
def test_multiplier_in_float64(backend: type[Backend], tmp_path: Path) -> None:
    """1/10 has ties in float64: 0.5, 1.5 and -2.5 go away from zero, to 1, 2 and -3.

    In Q31 1/10 is a little less, and they went to 0, 1 and -2. So does the mean of three numbers at 3/20: a
    sum of 10 is 10 / 3 * 3/20 = 0.5.
    """
    rule = 'multiplier = "{}"\nrounding = "half_away"\nsteps = {}'
    path = changed(tmp_path, rule.format("q31", 2), rule.format("float64", 1))
    codes = fully_connected(backend, path, [[127, 1]], (1.0, 10.0), [[0, 5], [0, 15], [0, -25]])
    assert codes == [[1], [2], [-3]]
    node = helper.make_node("GlobalAveragePool", ["x"], ["y"], "mean")
    net = single_layer(path, [node], (1, 1, 3), {"x": Scale(3.0, 0), "y": Scale(20.0, 0)})
    batch = np.array([[10, 0, 0], [-10, 0, 0], [9, 0, 0]], np.int8).reshape(3, 1, 1, 3)
    assert net.run(backend, batch)["y"].reshape(-1).tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("rounding", "expected"), [("half_away", [1, 2, -1, -2]), ("half_up", [1, 2, 0, -1])]
)
@each_backend
def test_one_rounding_of_a_tie(
    backend: type[Backend], rounding: str, expected: list[int], tmp_path: Path
) -> None:
    """Halves of 1, 3, -1 and -3 by a Q31 multiplier that rounds once."""
    path = changed(tmp_path, 'rounding = "half_away"\nsteps = 2', f'rounding = "{rounding}"\nsteps = 1')
    batch = [[0, 1], [0, 3], [0, -1], [0, -3]]
    assert fully_connected(backend, path, [[127, 1]], (1.0, 2.0), batch) == [[code] for code in expected]


@each_backend
def test_product_beyond_float32(backend: type[Backend]) -> None:
    """2,486 * 127 * 127 + 127 * 89 + 35 is 40,108,032, which is 76.5 * 2^19: rounded up once, code 77.

    float32 counts in fours there, so that adding 16,129 again and again loses something each time: code 76.
    """
    constants = {"zero": [0], "one": [1], "all": [99]}
    nodes = [
        helper.make_node("Slice", ["x", "zero", "one", "one"], ["a"], "first_row"),
        helper.make_node("Slice", ["x", "one", "all", "one"], ["r"], "other_rows"),
        helper.make_node("Transpose", ["r"], ["b"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["a", "b"], ["y"], "product"),
    ]
    initializers = {name: np.array(value, np.int64) for name, value in constants.items()}
    scales = {"x": Scale(1.0, 0), "y": Scale(2.0**19, 0)}
    net = single_layer("tosa-single", nodes, (33, 2488), scales, initializers)
    rows = np.full((33, 2488), 127, np.int8)
    rows[0, -1], rows[1:, -1] = 35, 1
    rows[np.arange(1, 33), np.arange(32) * 64] = 89
    assert net.run(backend, rows[None])["y"].tolist() == [[[77] * 32]]


@each_backend
def test_sum_in_parts_beyond_float32(backend: type[Backend]) -> None:
    """1,799 * 127 * 255 + 255 less 58,260,872 is -2; with 254 for the input whose weight is 1 it is -3.

    float32 counts in fours there.
    """
    weight = np.full((1, 200, 3, 3), 127.0, np.float32)
    weight[0, 0, 0, 0] = 1.0
    net = single_layer(
        "tflm",
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv")],
        (200, 3, 3),
        {"x": Scale(1.0, -128), "y": Scale(1.0, 0)},
        {"w": weight, "b": np.array([-58260872.0], np.float32)},
    )
    batch = np.full((2, 200, 3, 3), 127, np.int8)
    batch[1, 0, 0, 0] = 126
    assert net.run(backend, batch)["y"].reshape(-1).tolist() == [-2, -3]


@each_backend
def test_average_pool_by_reciprocal_keeps_its_scale(backend: type[Backend]) -> None:
    """At scale 1 and zero point 3, 7 and 9 are 4 and 6, on average 5, code 8, whatever was calibrated."""
    node = helper.make_node("AveragePool", ["x"], ["y"], "pool", kernel_shape=[1, 2])
    net = single_layer("tosa-single", [node], (1, 1, 2), {"x": Scale(1.0, 3), "y": Scale(2.0, 0)})
    program = backend(BackendOptions(profile="tosa-single")).compile(net.model, net.ranges)
    output = program.layer_map.tensors[program.layer_map.outputs[0]]
    assert (output.scale, output.zero_point) == (1.0, 3)
    batch = np.array([7, 9], np.int8).reshape(1, 1, 1, 2)
    assert list(program.forward(program.layer_map.named(batch), ()))[-1].data.reshape(-1).tolist() == [8]


@each_backend
def test_ratio_that_no_multiplier_holds_is_zero(backend: type[Backend]) -> None:
    """127 * 127 + 127 times 2^-34 is a millionth of a code; times 2^-8 it is 63.5, away from zero 64."""
    for exponent, expected in ((-34, 0), (-8, 64)):
        codes = fully_connected(backend, "tflm", [[127, 1]], (2.0**exponent, 1.0), [[127, 127], [-127, -127]])
        assert codes == [[expected], [-expected]]


@each_backend
def test_channel_without_weights_counts_its_bias_in_output_codes(backend: type[Backend]) -> None:
    """0.3 at 1/4 is 1.2, code 1; 0.4 is 1.6, code 2; the input's step of 1 would hold neither."""
    weight = [[0.0, 0.0], [0.0, 0.0]]
    assert fully_connected(backend, "tflm", weight, (1.0, 0.25), [[5, -5]], [0.3, 0.4]) == [[1, 2]]
