"""ONNX nodes -> operations: one small function an operator."""

import numpy as np
from onnx import ModelProto, NodeProto

from npu_server.compile import graph as g
from npu_server.compile.constants import PROBE_BATCHES, Constants
from npu_server.compile.importer import Handler, Importer, attributes, refuse
from npu_server.compile.windows import conv_window, pool_window
from npu_wire.errors import InvalidModel


def _optional_name(node: NodeProto, index: int) -> str | None:
    return node.input[index] if index < len(node.input) and node.input[index] else None


def _conv(im: Importer, node: NodeProto) -> None:
    x, (channels, height, width) = im.image(node)
    weight = im.constant(node, 1, "the weight")
    im.constant(node, 2, "the bias")
    groups = int(attributes(node).get("group", 1))  # type: ignore[call-overload]
    if weight is None or weight.ndim != 4 or groups < 1 or weight.shape[1] * groups != channels:
        raise refuse(
            node,
            f"weight of shape {None if weight is None else weight.shape} does not fit {channels} channels",
        )
    if weight.shape[0] % groups:
        raise refuse(node, f"{weight.shape[0]} output channels do not divide into {groups} groups")
    window = conv_window(node, (weight.shape[2], weight.shape[3]), (height, width))
    weights = g.Weights(node.input[1], _optional_name(node, 2), weight.shape[0])
    im.emit(node, [x], g.Conv(weights, window, groups), (weight.shape[0], *window.output_size(height, width)))


def _gemm(im: Importer, node: NodeProto) -> None:
    x, shape = im.activation(node, 0)
    given = attributes(node)
    weight = im.constant(node, 1, "the weight")
    bias = im.constant(node, 2, "the bias")
    transposed = not given.get("transB", 0)
    if given.get("transA", 0) or len(shape) != 1 or weight is None or weight.ndim != 2:
        raise refuse(node, "needs (N, K) times a constant (K, M), A not transposed")
    inner, outer = weight.shape if transposed else weight.shape[::-1]
    if inner != shape[0] or (bias is not None and bias.size not in (1, outer)):
        raise refuse(node, f"weight {weight.shape} or bias does not fit the input (N, {shape[0]})")
    alpha, beta = (float(given.get(key, 1.0)) for key in ("alpha", "beta"))  # type: ignore[arg-type]
    weights = g.Weights(node.input[1], _optional_name(node, 2), outer, transposed, alpha, beta)
    im.emit(node, [x], g.Gemm(weights), (outer,))


def _matmul(im: Importer, node: NodeProto) -> None:
    x, shape = im.activation(node, 0)
    weight = im.constant(node, 1, "the right operand")
    if weight is None or weight.ndim != 2 or weight.shape[0] != shape[-1]:
        raise refuse(node, "the right operand must be a constant matrix that fits the last axis")
    im.emit(
        node,
        [x],
        g.Gemm(g.Weights(node.input[1], None, weight.shape[1], True)),
        (*shape[:-1], weight.shape[1]),
    )


def _batch_norm(im: Importer, node: NodeProto) -> None:
    x, shape = im.activation(node, 0)
    given = attributes(node)
    if len(shape) not in (1, 3):
        raise refuse(node, "needs (N, C) or (N, C, H, W)")
    for index, what in enumerate(("scale", "bias", "mean", "variance"), 1):
        value = im.constant(node, index, what)
        if value is None or value.shape != (shape[0],):
            raise refuse(node, f"{what} must have one entry for each of {shape[0]} channels")
    if given.get("training_mode", 0):
        raise refuse(node, "training mode; export the model in eval mode")
    epsilon = float(given.get("epsilon", 1e-5))  # type: ignore[arg-type]
    im.emit(node, [x], g.Affine("batch_norm", tuple(node.input[1:5]), epsilon), shape)


def _binary(im: Importer, node: NodeProto) -> None:
    op = node.op_type.lower()
    constant = [name in im.constants for name in node.input]
    if not any(constant):
        if op not in ("add", "mul"):
            raise refuse(node, "of two activations is not an operator of the NPU")
        (a, shape_a), (b, shape_b) = im.activation(node, 0), im.activation(node, 1)
        try:
            shape = np.broadcast_shapes((1, *shape_a), (1, *shape_b))[1:]
        except ValueError:
            shape = ()
        if len(shape_a) != len(shape_b) or not shape:
            raise refuse(node, f"shapes (N, {shape_a}) and (N, {shape_b}) do not broadcast")
        im.emit(node, [a, b], g.Add() if op == "add" else g.Mul(), shape)
        return
    left = constant[0]
    x, shape = im.activation(node, 1 if left else 0)
    value = im.constant(node, 0 if left else 1, "the other operand")
    if left and op == "div":
        raise refuse(node, "a constant divided by an activation is not an operator of the NPU")
    assert value is not None
    if not _is_per_channel(value.shape, shape):
        raise refuse(
            node,
            f"constant of shape {value.shape} is neither one number nor one a channel",
        )
    kind = "rsub" if left and op == "sub" else op
    im.emit(node, [x], g.Affine(kind, (node.input[0 if left else 1],)), shape)


def _is_per_channel(constant: tuple[int, ...], shape: g.Shape) -> bool:
    if int(np.prod(constant)) == 1:
        return len(constant) <= len(shape) + 1
    aligned = (1,) * (len(shape) + 1 - len(constant)) + constant
    # The channel axis is 1 of (N, C) and of (N, C, H, W); on other ranks it is the last, as a linear layer's
    # bias has it.
    channel = 1 if len(shape) in (1, 3) else len(shape)
    expected = tuple(shape[axis - 1] if axis == channel else 1 for axis in range(len(shape) + 1))
    return aligned == expected


def _clip(im: Importer, node: NodeProto) -> None:
    x, shape = im.activation(node, 0)
    bounds = [im.constant(node, index, "the bound") for index in (1, 2)]
    low, high = (float(b.reshape(-1)[0]) if b is not None and b.size else None for b in bounds)
    clamp = g.Clamp(-np.inf if low is None else low, np.inf if high is None else high)
    if not clamp.low < clamp.high:
        raise refuse(node, f"bounds {low} and {high} leave nothing")
    im.emit(node, [x], clamp, shape)


def _relu(im: Importer, node: NodeProto) -> None:
    x, shape = im.activation(node, 0)
    im.emit(node, [x], g.Clamp(low=0.0), shape)


def _bound(im: Importer, node: NodeProto) -> None:
    """Max(x, low) and Min(x, high), as torch.clamp arrives."""
    constant = [name in im.constants for name in node.input]
    if len(constant) != 2 or sum(constant) != 1:
        raise refuse(node, "the NPU bounds one activation by one constant")
    x, shape = im.activation(node, constant.index(False))
    value = im.constant(node, constant.index(True), "the bound")
    assert value is not None
    if value.size != 1 or not np.isfinite(value).all():
        raise refuse(node, "the bound must be one finite number")
    bound = float(value.reshape(-1)[0])
    im.emit(node, [x], g.Clamp(low=bound) if node.op_type == "Max" else g.Clamp(high=bound), shape)


def _function(im: Importer, node: NodeProto) -> None:
    x, shape = im.activation(node, 0)
    given = attributes(node)
    alpha, beta = (float(given.get(k, d)) for k, d in (("alpha", 0.2), ("beta", 0.5)))  # type: ignore[arg-type]
    parameters = (alpha, beta) if node.op_type == "HardSigmoid" else (0.0, 0.0)
    im.emit(node, [x], g.Function(node.op_type, *parameters), shape)


def _concat(im: Importer, node: NodeProto) -> None:
    names, shapes = zip(*(im.activation(node, i) for i in range(len(node.input))), strict=True)
    rank = len(shapes[0]) + 1
    axis = int(attributes(node)["axis"]) % rank  # type: ignore[call-overload]
    others = {s[: axis - 1] + s[axis:] for s in shapes} if axis else set()
    if axis == 0 or len(others) != 1 or len({len(s) for s in shapes}) != 1:
        raise refuse(node, f"shapes {shapes} do not join along axis {axis}")
    joined = sum(s[axis - 1] for s in shapes)
    im.emit(node, list(names), g.Concat(axis), (*shapes[0][: axis - 1], joined, *shapes[0][axis:]))


def _pool(im: Importer, node: NodeProto) -> None:
    x, (channels, height, width) = im.image(node)
    if len(node.output) > 1 and node.output[1]:
        raise refuse(node, "indices are not supported")
    window = pool_window(node, (height, width))
    shape = (channels, *window.output_size(height, width))
    if node.op_type == "MaxPool":
        im.emit(node, [x], g.MaxPool(window), shape)
    else:
        im.emit(node, [x], g.AveragePool(window, bool(attributes(node).get("count_include_pad", 0))), shape)


def _global_average(im: Importer, node: NodeProto) -> None:
    x, (channels, _, _) = im.image(node)
    im.emit(node, [x], g.Mean(), (channels, 1, 1))


def _reduce_mean(im: Importer, node: NodeProto) -> None:
    x, (channels, _, _) = im.image(node)
    given = attributes(node)
    axes = im.constant(node, 1, "axes")
    wanted = given.get("axes", []) if axes is None else axes.reshape(-1).tolist()
    if sorted(int(a) % 4 for a in wanted) != [2, 3]:  # type: ignore[attr-defined]
        raise refuse(node, f"axes {wanted}: the NPU averages over height and width only")
    im.emit(node, [x], g.Mean(), (channels, 1, 1) if given.get("keepdims", 1) else (channels,))


def _reshape(im: Importer, node: NodeProto) -> None:
    x, shape = im.activation(node, 0)
    if node.op_type == "Flatten":
        if int(attributes(node).get("axis", 1)) != 1:  # type: ignore[call-overload]
            raise refuse(node, "axis must be 1")
        im.emit(node, [x], g.Reshape(), (int(np.prod(shape)),))
        return
    if node.input[1] not in im.constants:
        raise refuse(node, "the target shape must be constant")
    target = im.constants[node.input[1]]
    results = [
        _reshaped(
            (batch, *shape), [int(n) for n in value.reshape(-1)], bool(attributes(node).get("allowzero", 0))
        )
        for batch, value in zip(PROBE_BATCHES, target.values, strict=True)
    ]
    first, second = results
    if first is None or second is None or first[:1] != (2,) or second[:1] != (3,) or first[1:] != second[1:]:
        raise refuse(
            node, f"target shape {target.values[0].tolist()} does not keep the batch as first dimension"
        )
    im.emit(node, [x], g.Reshape(), first[1:])


def _reshaped(shape: g.Shape, target: list[int], allow_zero: bool) -> g.Shape | None:
    sizes = [shape[i] if n == 0 and not allow_zero and i < len(shape) else n for i, n in enumerate(target)]
    total = int(np.prod(shape))
    known = int(np.prod([n for n in sizes if n != -1], dtype=object))
    if sizes.count(-1) == 1 and known > 0:
        sizes = [total // known if n == -1 else n for n in sizes]
    if any(n < 1 for n in sizes) or int(np.prod(sizes, dtype=object)) != total:
        return None
    return tuple(sizes)


def _pad(im: Importer, node: NodeProto) -> None:
    x, (channels, height, width) = im.image(node)
    pads, value, axes = (im.constant(node, i, w) for i, w in ((1, "pads"), (2, "the value"), (3, "axes")))
    mode = attributes(node).get("mode", b"constant")
    if (
        pads is None
        or mode != b"constant"
        or (value is not None and value.size and float(value.reshape(-1)[0]) != 0)
    ):
        raise refuse(node, "the NPU pads with the constant 0 only")
    which = [0, 1, 2, 3] if axes is None else [int(a) % 4 for a in axes]
    if len(pads) != 2 * len(which):
        raise refuse(node, f"{len(pads)} pads for {len(which)} axes")
    sides = {(axis, end): int(pads[end * len(which) + i]) for i, axis in enumerate(which) for end in (0, 1)}
    if any(n and axis < 2 for (axis, _), n in sides.items()) or any(n < 0 for n in sides.values()):
        raise refuse(node, "the NPU pads height and width only, by 0 or more")
    top, left, bottom, right = (sides.get(key, 0) for key in ((2, 0), (3, 0), (2, 1), (3, 1)))
    im.emit(
        node, [x], g.Pad((top, left, bottom, right)), (channels, height + top + bottom, width + left + right)
    )


def _identity(im: Importer, node: NodeProto) -> None:
    im.activation(node, 0)
    training = im.constant(node, 2, "training_mode") if node.op_type == "Dropout" else None
    if training is not None and bool(training.reshape(-1)[0]):
        raise refuse(node, "training mode; export the model in eval mode")
    im.alias(node)


_HANDLERS: dict[str, Handler] = {
    "Add": _binary,
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _binary,
    "Dropout": _identity,
    "Flatten": _reshape,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "HardSigmoid": _function,
    "HardSwish": _function,
    "Identity": _identity,
    "MatMul": _matmul,
    "Max": _bound,
    "MaxPool": _pool,
    "Min": _bound,
    "Mul": _binary,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _relu,
    "Reshape": _reshape,
    "Sigmoid": _function,
    "Sub": _binary,
    "Tanh": _function,
}

OPERATORS = tuple(sorted(_HANDLERS))
"""ONNX operators on activations that the compiler knows."""


def import_model(model: ModelProto) -> tuple[g.Graph, Constants]:
    """Operations and constants of a checked model.

    Raises:
        InvalidModel: a constant cannot be evaluated.
        UnsupportedModel: an operator, attribute or shape that the NPU does not have.
    """
    importer = Importer(model, _HANDLERS)
    try:
        return importer.run(), importer.constants
    except (OverflowError, KeyError, IndexError, TypeError) as error:
        raise InvalidModel(f"the model contradicts itself: {type(error).__name__}: {error}") from error
