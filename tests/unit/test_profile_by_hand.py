"""`pow2-trunc`, `acc16` and their kin have no engine to judge them: layers calculated by hand."""

import numpy as np
import pytest
from onnx import helper
from single_layers import BACKENDS, Scale, single_layer

from npu_server.numerics.profile import load_profile
from npu_server.numerics.scales import activation_quantization, quantize_weights
from npu_server.seam import Backend, BackendOptions

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def column(*codes: int) -> np.ndarray:
    """A batch of single numbers."""
    return np.array(codes, np.int8).reshape(-1, 1)


def run(backend: type[Backend], profile: str, nodes, weights, ranges, batch: np.ndarray) -> list[int]:
    """Compiles for symmetric ranges given as max|x| and returns the last layer's codes."""
    net = single_layer("tflm", nodes, batch.shape[1:], {n: Scale(1.0, 0) for n in ranges}, weights)
    program = backend(BackendOptions(profile=profile)).compile(
        net.model, {n: (-m, m) for n, m in ranges.items()}
    )
    return list(program.forward(program.layer_map.named(batch), ()))[-1].data.reshape(-1).tolist()


def test_scales_are_powers_of_two_rounded_up() -> None:
    """Largest |x| 127/64 is the scale 1/64 itself; a little more the next power, 1/32; zero point 0."""
    profile = load_profile("pow2-trunc")
    assert activation_quantization("x", -127 / 64, 1.0, profile).scale == 1 / 64
    assert activation_quantization("x", -2.0, 1.0, profile).scale == 1 / 32
    assert activation_quantization("x", 0.0, 2.0, profile).zero_point == 0
    # One scale for the tensor: max|w| = 1 / 127 -> 2^-6; codes 64, 16 and -8.
    weights = quantize_weights(
        np.array([[1.0], [0.25], [-0.125]], np.float32), np.zeros(3, np.float32), 1.0, 1.0, profile
    )
    assert weights.scales.tolist() == [2**-6] * 3
    assert weights.codes.reshape(-1).tolist() == [64, 16, -8]


@each_backend
def test_shift_drops_bits_towards_minus_infinity(backend: type[Backend]) -> None:
    """Scales are 1, weight 1.0 is code 64 at 1/64: (64 * x) >> 6 is x; weight 0.5 is code 32: floor(x / 2).

    The bias 0.25 counts as 16 in units of 1/64: (64 * x + 16) >> 6 is x for every x.
    """
    weight = np.array([[1.0, 0.0], [0.0, 0.5]], np.float32)
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)]
    bias = np.array([0.25, 0.0], np.float32)
    batch = np.array([[5, 5], [-5, -5], [-1, -1], [127, 127], [-128, -128]], np.int8)
    codes = run(backend, "pow2-trunc", nodes, {"w": weight, "b": bias}, {"x": 127.0, "y": 127.0}, batch)
    assert codes == [5, 2, -5, -3, -1, -1, 127, 63, -128, -64]


@each_backend
def test_residual_add_is_int8(backend: type[Backend]) -> None:
    """X at scale 1, relu(x) at scale 2 and their sum at scale 4: floor(x / 4) + floor(r / 2), saturating.

    x = 7: r = floor(7 / 2) = 3, 1 + 1 = 2 (the exact sum 14 / 4 = 3.5 is lost). x = -7: -2 + 0.
    """
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("Add", ["x", "r"], ["y"], "add"),
    ]
    # The second consumer of x keeps this from being a function of one activation.
    nodes.insert(1, helper.make_node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[1, 1]))
    nodes[2].input[1] = "p"
    batch = np.array([7, -7, 127, -128, 5], np.int8).reshape(-1, 1, 1, 1)
    codes = run(backend, "pow2-trunc", nodes, {}, {"x": 127.0, "r": 254.0, "y": 508.0}, batch)
    assert codes == [1 + 1, -2, 31 + 31, -32, 1 + 1]


@each_backend
def test_residual_add_saturates(backend: type[Backend]) -> None:
    """X at scale 1 plus max(x) at scale 1, sum at scale 1: 100 + 100 is 127, -100 - 100 is -128."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], "pool", kernel_shape=[1, 1]),
        helper.make_node("Add", ["x", "p"], ["y"], "add"),
    ]
    batch = np.array([100, -100, 3], np.int8).reshape(-1, 1, 1, 1)
    assert run(backend, "pow2-trunc", nodes, {}, {"x": 127.0, "y": 127.0}, batch) == [127, -128, 6]


@each_backend
def test_mean_floors_an_integer_division(backend: type[Backend]) -> None:
    """Sum 7 over 3 numbers at equal scales: floor(7 / 3) = 2; -7: floor(-7 / 3) = -3."""
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["y"], "mean")]
    batch = np.array([[3, 3, 1], [-3, -3, -1]], np.int8).reshape(2, 1, 1, 3)
    assert run(backend, "pow2-trunc", nodes, {}, {"x": 127.0, "y": 127.0}, batch) == [2, -3]


@each_backend
def test_sum_saturates_at_16_bits(backend: type[Backend]) -> None:
    """Four products of 127 * 127 = 64,516 leave 32,767 in the register; of -128 * 127 leave -32,768.

    Weights are 1.0 (code 127), sx = 1, sy = 4, zero points 0. Then
    the multiplier is (1 / 127) / 4 and 32,767 / 508 = 64.50..., rounded away: 65 (exact: 127). One product of
    127 * 127 = 16,129 does not saturate: 31.75 -> 32. The bias 100 (12,700) is part of the sum: 16,129 +
    12,700 fits.
    """
    weight = np.ones((1, 4), np.float32)
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)]
    scales = {"x": Scale(1.0, 0), "y": Scale(4.0, 0)}
    batch = np.array([[127] * 4, [-128] * 4, [127, 0, 0, 0], [0] * 4], np.int8)
    for bias, expected in ((0.0, [65, -65, 32, 0]), (100.0, [65, -65, 57, 25])):
        net = single_layer("acc16", nodes, (4,), scales, {"w": weight, "b": np.array([bias], np.float32)})
        assert net.run(backend, batch)["y"].reshape(-1).tolist() == expected


@each_backend
def test_bias_is_clipped_to_the_register(backend: type[Backend]) -> None:
    """A bias of 1,000 is 127,000 in units of 1/127: the register takes 32,767, 64.5 -> 65 at scale 4."""
    net = single_layer(
        "acc16",
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)],
        (4,),
        {"x": Scale(1.0, 0), "y": Scale(4.0, 0)},
        {"w": np.ones((1, 4), np.float32), "b": np.array([1000.0], np.float32)},
    )
    assert net.prepared.weights.bias.tolist() == [32767]
    assert net.run(backend, np.zeros((1, 4), np.int8))["y"].tolist() == [[65]]


@each_backend
def test_weights_that_are_zero_leave_the_bias(backend: type[Backend]) -> None:
    """With no weights the bias counts in output codes: 2.6 at scale 0.5 is 5.2, rounded 5."""
    net = single_layer(
        "tflm",
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)],
        (2,),
        {"x": Scale(0.25, 0), "y": Scale(0.5, 0)},
        {"w": np.zeros((1, 2), np.float32), "b": np.array([2.6], np.float32)},
    )
    assert net.run(backend, np.array([[3, -9]], np.int8))["y"].tolist() == [[5]]


@each_backend
@pytest.mark.parametrize("profile", ["tflm", "onnxruntime", "litert-ruy", "pow2-trunc-per-channel"])
def test_weights_that_are_nearly_zero_leave_the_bias(backend: type[Backend], profile: str) -> None:
    """A channel that training pruned (1e-9, ImageNet weights have such) keeps its bias 2.5 at scale 0.5."""
    ranges = {"x": (-0.25 * 128, 0.25 * 127), "y": (-0.5 * 128, 0.5 * 127)}
    net = single_layer(
        "tflm",
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)],
        (2,),
        {"x": Scale(0.25, 0), "y": Scale(0.5, 0)},
        {"w": np.full((1, 2), 1e-9, np.float32), "b": np.array([2.5], np.float32)},
    )
    program = backend(BackendOptions(profile=profile)).compile(net.model, ranges)
    (output,) = program.forward(program.layer_map.named(np.array([[127, -128]], np.int8)), ())
    scale, zero_point = (
        program.layer_map.layers[-1].output.scale,
        program.layer_map.layers[-1].output.zero_point,
    )
    assert (output.data.item() - zero_point) * scale == pytest.approx(2.5, abs=scale / 2)


def test_scale_of_a_channel_holds_its_bias_in_31_bits() -> None:
    """Bias 0.5 at input scale 2^-7: weight scale 2^-24, bias code 2^30; 3e-8 is 0.503 steps, code 1."""
    weight, bias = np.array([[3e-8], [1.0]], np.float32), np.array([0.5, 0.5], np.float32)
    made = quantize_weights(weight, bias, 2.0**-7, 1.0, load_profile("tflm"))
    assert made.scales.tolist() == [2.0**-24, float(np.float32(1 / 127))]
    assert made.codes.reshape(-1).tolist() == [1, 127]
    assert made.bias.tolist() == [2**30, 8128]


def test_scale_of_each_channel_is_a_power_of_two() -> None:
    """Per channel: 1.0 / 127 -> 2^-6, code 64; 0.1 / 127 -> 2^-10, code 102. Per tensor: 6 at 2^-6."""
    weight, bias = np.array([[1.0], [0.1]], np.float32), np.zeros(2, np.float32)
    own = quantize_weights(weight, bias, 1.0, 1.0, load_profile("pow2-trunc-per-channel"))
    assert own.scales.tolist() == [2**-6, 2**-10]
    assert own.codes.reshape(-1).tolist() == [64, 102]
    shared = quantize_weights(weight, bias, 1.0, 1.0, load_profile("pow2-trunc"))
    assert shared.codes.reshape(-1).tolist() == [64, 6]


@each_backend
def test_each_channel_shifts_by_itself(backend: type[Backend]) -> None:
    """X = 127: (64 * 127) >> 6 is 127, (102 * 127) >> 10 is 12; x = -5: -5 and floor(-0.498) = -1."""
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "gemm", transB=1)]
    weights = {"w": np.array([[1.0], [0.1]], np.float32)}
    ranges = {"x": 127.0, "y": 127.0}
    assert run(backend, "pow2-trunc-per-channel", nodes, weights, ranges, column(127, -5)) == [
        127,
        12,
        -5,
        -1,
    ]


@each_backend
def test_register_of_18_bits_saturates_on_the_way(backend: type[Backend]) -> None:
    """Nine products of 127 * 127 reach 131,071 (exact: 145,161); three of -127 * 127 leave 82,684.

    82,684 / (127 * 8) = 81.4: 81. The other way round nothing saturates: 96,774 / 1,016 = 95.3: 95. Twelve
    negative ones stay at -131,072: -129.01, clamped to -128.
    """
    net = single_layer(
        "acc18",
        [helper.make_node("Gemm", ["x", "w"], ["y"], "gemm", transB=1)],
        (12,),
        {"x": Scale(1.0, 0), "y": Scale(8.0, 0)},
        {"w": np.ones((1, 12), np.float32)},
    )
    up, down = [127] * 9, [-127] * 3
    batch = np.array([up + down, down + up, [-127] * 12], np.int8)
    assert net.run(backend, batch)["y"].reshape(-1).tolist() == [81, 95, -128]


@each_backend
def test_register_sums_position_by_position(backend: type[Backend]) -> None:
    """Position by position, channel by channel: 6 * 16,129, then 3 more (131,071), then three less: 82,684.

    Channel by channel first, the sum would never leave 18 bits: 96,774, code 95 instead of 81.
    """
    net = single_layer(
        "acc18",
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv")],
        (6, 1, 2),
        {"x": Scale(1.0, 0), "y": Scale(8.0, 0)},
        {"w": np.ones((1, 6, 1, 2), np.float32)},
    )
    batch = np.array([[127] * 6, [127] * 3 + [-127] * 3], np.int8).T.reshape(1, 6, 1, 2)
    assert net.run(backend, batch)["y"].reshape(-1).tolist() == [81]


@each_backend
def test_sum_wraps_at_16_bits(backend: type[Backend]) -> None:
    """Four products of 127 * 127 are 64,516, in 16 bits -1,020: -1,020 / (127 * 4) = -2.01, code -2.

    Four of -128 * 127 are -65,024, in 16 bits 512: 1.01, code 1. One of 127 * 127 fits: 31.75, code 32.
    """
    net = single_layer(
        "acc16-wrap",
        [helper.make_node("Gemm", ["x", "w"], ["y"], "gemm", transB=1)],
        (4,),
        {"x": Scale(1.0, 0), "y": Scale(4.0, 0)},
        {"w": np.ones((1, 4), np.float32)},
    )
    batch = np.array([[127] * 4, [-128] * 4, [127, 0, 0, 0]], np.int8)
    assert net.run(backend, batch)["y"].reshape(-1).tolist() == [-2, 1, 32]


@each_backend
def test_product_of_activations_saturates_on_every_multiplication(backend: type[Backend]) -> None:
    """Ten times 127 * 127 and ten times its opposite, in 18 bits: 131,071 - 161,290 = -30,219, not 0.

    At the output's scale 1024 that is -29.51, code -30. A register that overflows once holds 0, code 0.
    """
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], "split", axis=1, num_outputs=2),
        helper.make_node("Transpose", ["b"], ["c"], "transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["a", "c"], ["y"], "product"),
    ]
    batch = np.array([[[127] * 20, [127] * 10 + [-127] * 10]], np.int8)
    ranges = {"x": 127.5, "y": 127.5 * 1024}
    assert run(backend, "acc18", nodes, {}, ranges, batch) == [-30]
    assert run(backend, "tflm", nodes, {}, ranges, batch) == [0]
