"""Integer operators judged bit for bit: by ONNX Runtime's QLinear kernels, by torch's integers, by hand."""

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from single_layers import BACKENDS, Scale, random_codes, single_layer

from npu_server.compile.reading.views import View
from npu_server.seam import Backend, BackendOptions


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("scales", "inner"),
    [
        ((Scale(0.02, 5), Scale(0.03, -20), Scale(0.05, 3)), 7),
        ((Scale(0.25, 0), Scale(0.5, 0), Scale(32.0, 0)), 16),
        ((Scale(0.01, -128), Scale(0.07, -128), Scale(16.0, -128)), 300),
    ],
)
def test_product_of_activations_is_onnx_runtimes(
    backend: type[Backend], scales: tuple[Scale, Scale, Scale], inner: int
) -> None:
    """QLinearMatMul agrees on every element, ties and sums beyond float32 included."""
    left, right, out = scales
    rng = np.random.default_rng(inner)
    nodes = [
        helper.make_node("Slice", ["x", "zero", "five", "one"], ["a"], "left"),
        helper.make_node("Slice", ["x", "five", "all", "one"], ["r"], "right"),
        helper.make_node("Mul", ["r", "gain"], ["s"], "other_scale"),
        helper.make_node("Transpose", ["s"], ["b"], "turn", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["a", "b"], ["y"], "product"),
    ]
    constants = {"zero": [0], "five": [5], "one": [2], "all": [99]}
    initializers = {name: np.array(value, np.int64) for name, value in constants.items()}
    initializers["gain"] = np.full((1, 2, 1, inner), np.float32(right.scale / left.scale))
    named = {"x": left, "s": right, "y": out}
    net = single_layer("onnxruntime", nodes, (2, 9, inner), named, initializers)
    run = net.run(backend, random_codes(rng, 3, 2, 9, inner))
    node = helper.make_node("QLinearMatMul", ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], ["y"])
    inputs = {"a": run["a"], "b": run["b"]}
    graph = helper.make_graph(
        [node],
        "judge",
        [
            helper.make_tensor_value_info(name, TensorProto.INT8, array.shape)
            for name, array in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT8, (3, 2, 5, 4))],
        [
            helper.make_tensor(prefix + name, kind, [], [value])
            for name, scale in zip("aby", scales, strict=True)
            for prefix, kind, value in (
                ("s", TensorProto.FLOAT, np.float32(scale.scale)),
                ("z", TensorProto.INT8, scale.zero_point),
            )
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {name: np.ascontiguousarray(array) for name, array in inputs.items()})
    assert len(np.unique(expected)) > 20
    np.testing.assert_array_equal(run["y"], expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_transposed_convolution_is_torchs(data: st.DataObject) -> None:
    """With scales of 1 the codes are the integers that torch's conv_transpose2d gives in float64."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 2]))
    channels, out = 2 * groups, groups * data.draw(st.integers(1, 2))
    kernel, strides, dilations = data.draw(pair), data.draw(pair), data.draw(pair)
    extra = tuple(data.draw(st.integers(0, s - 1)) for s in strides)
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    pads = tuple(data.draw(st.integers(0, min(2, r))) for r in reach)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weight = rng.integers(-2, 3, (channels, out // groups, *kernel)).astype(np.float32)
    weight[:, :, 0, 0] = 127  # a weight scale of exactly 1
    batch = rng.integers(-1, 2, (2, channels, 4, 3)).astype(np.int8)
    size = [
        (n - 1) * s - 2 * p + r + 1 + e
        for n, s, p, r, e in zip((4, 3), strides, pads, reach, extra, strict=True)
    ]
    attributes = {"strides": strides, "dilations": dilations, "pads": [*pads, *pads], "group": groups}
    if min(size) < 1:
        return
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up", output_padding=extra, **attributes)
    scales = {"x": Scale(1.0, 3), "y": Scale(4.0, -5)}
    net = single_layer("onnxruntime", [node], (channels, 4, 3), scales, {"w": weight})
    codes = torch.from_numpy(batch.astype(np.float64) - 3)
    exact = torch.nn.functional.conv_transpose2d(
        codes, torch.from_numpy(weight).double(), None, strides, pads, extra, groups, dilations
    )
    expected = np.clip(np.rint(exact.numpy() / 4) - 5, -128, 127)
    for backend in BACKENDS:
        np.testing.assert_array_equal(net.run(backend, batch)["y"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bilinear_resize_by_hand(backend: type[Backend]) -> None:
    """Twice the width, half-pixel centres: 0, 1/4, 3/4, ... between 0, 100 and -50, halves away from zero."""
    node = helper.make_node("Resize", ["x", "", "sizes"], ["y"], "up", mode="linear")
    node.input.insert(2, "")
    net = single_layer(
        "tflm", [node], (1, 1, 3), {"x": Scale(0.5, 7)}, {"sizes": np.array([1, 1, 1, 6], np.int64)}
    )
    batch = np.array([0, 100, -50], np.int8).reshape(1, 1, 1, 3)
    # 62.5 becomes 63, -12.5 becomes -13.
    assert net.run(backend, batch)["y"].reshape(-1).tolist() == [0, 25, 75, 63, -13, -50]


@pytest.mark.parametrize("kind", ["Split", "Sequence"])
def test_split_weights_follow_an_update(kind: str) -> None:
    """Fused weights that are split in the graph: 2 * 3 with the first ones, 4 * 3 after an update."""
    if kind == "Split":
        split = [helper.make_node("Split", ["w"], ["", "half"], "split", axis=1, num_outputs=2)]
    else:
        split = [
            helper.make_node("SplitToSequence", ["w", "two"], ["both"], "split", axis=1),
            helper.make_node("SequenceAt", ["both", "one"], ["half"], "at"),
        ]
    nodes = [*split, helper.make_node("MatMul", ["x", "half"], ["y"], "product")]
    weight = np.array([[1, 1, 2, 2]], np.float32)
    constants = {"w": weight, "one": np.array(1), "two": np.array(2)}
    net = single_layer("tflm", nodes, (1,), {"x": Scale(1.0, 0), "y": Scale(1.0, 0)}, constants)
    for backend in BACKENDS:
        program = backend(BackendOptions(profile="tflm")).compile(net.model, net.ranges)
        batch = np.array([[3]], np.int8)
        assert list(program.forward(program.layer_map.named(batch), ()))[-1].data.tolist() == [[6, 6]]
        program.load_weights({"w": 2 * weight})
        assert list(program.forward(program.layer_map.named(batch), ()))[-1].data.tolist() == [[12, 12]]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_views_follow_numpy(data: st.DataObject) -> None:
    """Wherever reshapes and transpositions move the batch, (batch, outer, rest) reordered is NumPy's."""
    batch, shape = 5, (4, 6)
    numbers = np.arange(batch * 24).reshape(batch, *shape)
    npu, view = numbers, View("x", (1, *shape))
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(numbers.ndim)))
            numbers = numbers.transpose(order)
            view, pieces = view.transposed(order)
            npu = npu.transpose(0, *(axis + 1 for axis in pieces))
        else:
            target, axis = data.draw(st.sampled_from(_targets(numbers.shape)))
            factors = [n // batch if i == axis else n for i, n in enumerate(target)]
            shapes = [tuple(n * b if i == axis else n for i, n in enumerate(factors)) for b in (2, 3)]
            result = view.reshaped(shapes)
            if result is None:
                continue
            numbers, view = numbers.reshape(target), result
            npu = npu.reshape(batch, *result.shape)
        assert npu.shape == (batch, *view.shape)
        assert view.at(batch) == numbers.shape
        own = npu.reshape(batch, view.outer, -1).swapaxes(0, 1).reshape(numbers.shape)
        np.testing.assert_array_equal(own, numbers)


def _targets(shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
    """Shapes of as many elements with the axis that holds the batch of 5: axes merged or split."""
    found = []
    for i in range(len(shape) - 1):
        merged = (*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :])
        found += [(merged, axis) for axis, n in enumerate(merged) if n % 5 == 0]
    for i, n in enumerate(shape):
        for divisor in (d for d in range(1, n + 1) if n % d == 0):
            split = (*shape[:i], divisor, n // divisor, *shape[i + 1 :])
            found += [(split, axis) for axis, m in enumerate(split) if m % 5 == 0]
    return found
