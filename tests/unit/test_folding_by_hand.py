"""What the compiler folds, pads, splits and joins: networks whose every number is calculated by hand."""

import numpy as np
import pytest
from onnx import helper
from single_layers import BACKENDS, Scale, single_layer

from npu_server.seam import Backend, BackendOptions

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def run(
    backend: type[Backend],
    nodes: list,
    sample: object,
    constants: dict[str, object] | None = None,
    scales: dict[str, float] | None = None,
) -> list:
    """The codes of "y" for one sample, under `tflm`; all zero points are 0, scales 1 where none is given.

    Args:
        backend: the backend.
        nodes: from "x" to "y".
        sample: codes of "x".
        constants: numbers become float32, but for lists of int.
        scales: of values by name.
    """
    arrays = {name: np.asarray(value) for name, value in (constants or {}).items()}
    arrays = {n: a if a.dtype.kind == "i" else a.astype(np.float32) for n, a in arrays.items()}
    batch = np.array([sample], np.int8)
    names = ["x", *(name for node in nodes for name in node.output)]
    named = {name: Scale((scales or {}).get(name, 1.0), 0) for name in names}
    return single_layer("tflm", nodes, batch.shape[1:], named, arrays).run(backend, batch)["y"][0].tolist()


def node(op: str, inputs: str, output: str = "y", **attributes: object):
    """A node; its inputs separated by blanks."""
    return helper.make_node(op, inputs.split(), output.split(), f"node_{output.split()[-1]}", **attributes)


def image(*rows: list[int]) -> list[list[list[int]]]:
    """One channel."""
    return [list(rows)]


@each_backend
def test_batch_norm_is_folded(backend: type[Backend]) -> None:
    """Gamma 2, beta 1, mean 3, variance 1/4 with epsilon 3/4: 2 * (c - 3) / sqrt(1) + 1 = 2 * c - 5.

    Behind a convolution by 1 with bias 1/2 that is 2 * x - 4. Without the epsilon it were 4 * x - 9.
    """
    nodes = [
        node("Conv", "x w b", "c"),
        node("BatchNormalization", "c gamma beta mean variance", epsilon=0.75),
    ]
    constants = {
        "w": [[[[1.0]]]],
        "b": [0.5],
        "gamma": [2.0],
        "beta": [1.0],
        "mean": [3.0],
        "variance": [0.25],
    }
    assert run(backend, nodes, image([5, -3, 2]), constants) == image([6, -10, 0])


@each_backend
def test_epsilon_of_a_batch_norm_that_names_none(backend: type[Backend]) -> None:
    """ONNX says 1e-5: variance 0 and a gamma of its root make a factor of 1."""
    constants = {"gamma": [1e-5**0.5], "beta": [0.0], "mean": [0.0], "variance": [0.0]}
    nodes = [node("BatchNormalization", "x gamma beta mean variance")]
    assert run(backend, nodes, image([100, -7]), constants) == image([100, -7])


@each_backend
def test_epsilon_of_a_normalization_is_inside_the_root(backend: type[Backend]) -> None:
    """1, -1, 1, -1 has mean 0 and variance 1: over sqrt(1 + 3) 1/2, which is 4 steps of 1/8; plus 1: 12."""
    nodes = [node("LayerNormalization", "x scale shift", axis=-1, epsilon=3.0)]
    constants = {"scale": [1.0] * 4, "shift": [0.0, 0.0, 1.0, 1.0]}
    assert run(backend, nodes, [1, -1, 1, -1], constants, {"y": 0.125}) == [4, -4, 12, 4]


@each_backend
def test_alpha_and_beta_of_a_gemm(backend: type[Backend]) -> None:
    """2 * (0.5 * 5) + 3 * 1 = 8."""
    constants = {"w": [[63.5, 0.5]], "b": [1.0]}
    assert run(backend, [node("Gemm", "x w b", alpha=2.0, beta=3.0, transB=1)], [0, 5], constants) == [8]


@each_backend
def test_weight_of_a_gemm_as_onnx_has_it(backend: type[Backend]) -> None:
    """(0, 5) times a matrix is five times its second row; 5 * 127 is beyond INT8."""
    assert run(backend, [node("Gemm", "x w")], [0, 5], {"w": [[127.0, 0.0], [3.0, 127.0]]}) == [15, 127]
    assert run(backend, [node("MatMul", "x w")], [0, 5], {"w": [[127.0, 127.0], [3.0, 2.0]]}) == [15, 10]


@each_backend
def test_constant_less_an_activation(backend: type[Backend]) -> None:
    """10 - 5 = 5, folded into a fully connected layer; 100 - 27 = 73, and by element."""
    nodes = [node("Gemm", "x w", "g", transB=1), node("Sub", "c g")]
    assert run(backend, nodes, [0, 5], {"w": [[127.0, 1.0]], "c": [10.0]}) == [5]
    assert run(backend, [node("Sub", "c x")], [27, -2], {"c": [[127.0, 100.0]]}) == [100, 102]


@pytest.mark.parametrize(
    ("auto_pad", "expected"), [("SAME_UPPER", [10, 20, 30]), ("SAME_LOWER", [0, 10, 20])]
)
@each_backend
def test_same_puts_the_odd_pixel(backend: type[Backend], auto_pad: str, expected: list[int]) -> None:
    """A kernel (127, 0) copies the left pixel of two: UPPER pads behind, LOWER pads in front."""
    nodes = [node("Conv", "x w", auto_pad=auto_pad, kernel_shape=[1, 2])]
    constants = {"w": [[[[127.0, 0.0]]]]}
    assert run(backend, nodes, image([10, 20, 30]), constants, {"y": 127.0}) == image(expected)
    pool = [node("MaxPool", "x", auto_pad=auto_pad, kernel_shape=[1, 2])]
    pooled = [20, 20, 15] if auto_pad == "SAME_UPPER" else [10, 20, 20]
    assert run(backend, pool, image([10, 20, 15])) == image(pooled)


@each_backend
def test_pad_before_a_convolution(backend: type[Backend]) -> None:
    """One row above and two columns to the right of a single pixel."""
    nodes = [node("Pad", "x pads", "p"), node("Conv", "p w")]
    constants = {"pads": [0, 0, 1, 0, 0, 0, 0, 2], "w": [[[[127.0]]]]}
    assert run(backend, nodes, image([10]), constants, {"y": 127.0}) == image([0, 0, 0], [10, 0, 0])


@each_backend
def test_ceil_mode(backend: type[Backend]) -> None:
    """A last window of one pixel counts, its average is that pixel; none begins behind the input."""
    fields = {"kernel_shape": [1, 2], "strides": [1, 2], "ceil_mode": 1}
    row = image([2, 4, 6, 8, 10])
    assert run(backend, [node("MaxPool", "x", **fields)], row) == image([4, 8, 10])
    for counts in (0, 1):
        average = [node("AveragePool", "x", count_include_pad=counts, **fields)]
        assert run(backend, average, row) == image([3, 7, 10])
    padded = [node("MaxPool", "x", pads=[0, 1, 0, 1], **fields)]
    assert run(backend, padded, image([1, 5, 2])) == image([1, 5])
    column = [node("MaxPool", "x", kernel_shape=[2, 1], strides=[2, 1], ceil_mode=1)]
    assert run(backend, column, image([1, 2], [4, 3], [5, 6])) == image([4, 3], [5, 6])


@each_backend
def test_padding_that_counts(backend: type[Backend]) -> None:
    """4 beside one padding pixel: 2 where padding counts, else 4. A padded maximum is never the padding."""
    fields = {"kernel_shape": [1, 2], "strides": [1, 2], "pads": [0, 1, 0, 1]}
    for counts, expected in ((1, [2, -4]), (0, [4, -8])):
        pool = [node("AveragePool", "x", count_include_pad=counts, **fields)]
        assert run(backend, pool, image([4, -8])) == image(expected)
    assert run(backend, [node("MaxPool", "x", **fields)], image([-4, -8])) == image([-4, -8])


@each_backend
def test_average_of_an_oblong_window(backend: type[Backend]) -> None:
    """Six pixels of two rows: (1 + 2 + 3 + 5 + 6 + 7) / 6 = 4, then (2 + 3 + 4 + 6 + 7 + 8) / 6 = 5."""
    pool = [node("AveragePool", "x", kernel_shape=[2, 3])]
    assert run(backend, pool, image([1, 2, 3, 4], [5, 6, 7, 8])) == image([4, 5])


@each_backend
def test_bounds_in_a_row_are_the_narrower_ones(backend: type[Backend]) -> None:
    """Clip to [-2, 5], then to [-4, 3]: [-2, 3]. Max(x, 3) and Min(x, 3) are bounds."""
    nodes = [
        node("Gemm", "x w", "g", transB=1),
        node("Clip", "g low1 high1", "c"),
        node("Clip", "c low2 high2"),
    ]
    constants = {"low1": -2.0, "high1": 5.0, "low2": -4.0, "high2": 3.0, "w": [[127.0, 1.0]]}
    for code, expected in ((-5, -2), (1, 1), (5, 3)):
        assert run(backend, nodes, [0, code], constants) == [expected]
    assert run(backend, [node("Max", "x three")], [1, 5], {"three": 3.0}) == [3, 5]
    assert run(backend, [node("Min", "x three")], [1, 5], {"three": 3.0}) == [1, 3]
    assert run(backend, [node("Relu", "x")], [-1, 5]) == [0, 5]


@each_backend
def test_relu_stays_apart_from_what_another_layer_reads(backend: type[Backend]) -> None:
    """The convolution's -5 is added to the pooled relu of it, 0; of 5 it is 10."""
    nodes = [
        node("Conv", "x w", "c"),
        node("Relu", "c", "r"),
        node("MaxPool", "r", "p", kernel_shape=[1, 1]),
        node("Add", "c p"),
    ]
    constants = {"w": [[[[127.0]]]]}
    scales = {"c": 127.0, "r": 127.0, "p": 127.0, "y": 127.0}
    assert run(backend, nodes, image([-5, 5]), constants, scales) == image([-5, 10])


@each_backend
def test_fixed_factor_behind_a_product(backend: type[Backend]) -> None:
    """[[1, 2], [3, 4]] squared is [[7, 10], [15, 22]]; by 1/2: 3.5 and 7.5 are rounded away from zero."""
    half = helper.make_node("Constant", [], ["f"], "half", value_float=0.5)
    nodes = [half, node("MatMul", "x x", "p"), node("Mul", "p f")]
    assert run(backend, nodes, [[1, 2], [3, 4]]) == [[4, 5], [8, 11]]
    nodes = [half, node("MatMul", "x x", "p"), node("Div", "p f")]
    assert run(backend, nodes, [[1, 2], [3, 4]]) == [[14, 20], [30, 44]]


@each_backend
def test_trained_factor_behind_a_product_follows_its_update(backend: type[Backend]) -> None:
    """3 * 3 times a factor of 1 is 9, times 2 it is 18."""
    nodes = [node("MatMul", "x x", "p"), node("Mul", "p f")]
    scales = {name: Scale(1.0, 0) for name in ("x", "p", "y")}
    net = single_layer("tflm", nodes, (1, 1), scales, {"f": np.array([1.0], np.float32)})
    program = backend(BackendOptions(profile="tflm")).compile(net.model, net.ranges)
    batch = np.array([[[3]]], np.int8)
    assert list(program.forward(program.layer_map.named(batch), ()))[-1].data.tolist() == [[[9]]]
    program.load_weights({"f": np.array([2.0], np.float32)})
    assert list(program.forward(program.layer_map.named(batch), ()))[-1].data.tolist() == [[[18]]]


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (1, [[[1, 2], [3, 4]], [[2, 4], [6, 8]]]),
        (2, [[[1, 2], [3, 4], [2, 4], [6, 8]]]),
        (3, [[[1, 2, 2, 4], [3, 4, 6, 8]]]),
    ],
)
@each_backend
def test_concatenation_along_each_axis(backend: type[Backend], axis: int, expected: list) -> None:
    """An image beside its double."""
    nodes = [node("Conv", "x w", "d"), node("Concat", "x d", axis=axis)]
    assert run(backend, nodes, image([1, 2], [3, 4]), {"w": [[[[2.0]]]]}) == expected


@each_backend
def test_pieces_of_a_split_keep_their_order(backend: type[Backend]) -> None:
    """7 - 2 = 5."""
    nodes = [node("Split", "x", "a b", axis=1, num_outputs=2), node("Sub", "a b")]
    assert run(backend, nodes, [7, 2]) == [5]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("round_prefer_floor", [1, 3]), ("round_prefer_ceil", [2, 4]), ("floor", [1, 3]), ("ceil", [2, 4])],
)
@each_backend
def test_nearest_neighbour_on_a_tie(backend: type[Backend], mode: str, expected: list[int]) -> None:
    """Four pixels to two with pixels' centres on each other: positions 0.5 and 2.5."""
    resize = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], "resize", nearest_mode=mode)
    assert run(backend, [resize], image([1, 2, 3, 4]), {"sizes": [1, 1, 1, 2]}) == image(expected)


@each_backend
def test_transposed_convolution_cuts_off_what_pads_take(backend: type[Backend]) -> None:
    """A kernel of one pixel leaves three rows as they are; a pad of 1 above takes the first away."""
    up = [node("ConvTranspose", "x w", pads=[1, 0, 0, 0])]
    constants = {"w": [[[[127.0]]]]}
    assert run(backend, up, image([1], [2], [3]), constants, {"y": 127.0}) == image([2], [3])
    right = [node("ConvTranspose", "x w", pads=[0, 0, 0, 1])]
    assert run(backend, right, image([1, 2, 3]), constants, {"y": 127.0}) == image([1, 2])
