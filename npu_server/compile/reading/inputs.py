"""A model's inputs: which become INT8 activations, which travel as they are, and which nobody takes."""

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import ModelProto, ValueInfoProto

from npu_server.compile.graph import Entry
from npu_server.compile.reading.constants import Constants
from npu_wire.layer_map import WIRE_TYPES, RawSpec
from npu_wire.tensors import MAX_RANK

MAX_ACTIVATION_ELEMENTS = 1 << 26


def taken_inputs(
    model: ModelProto, constants: Constants
) -> Iterator[tuple[ValueInfoProto, Entry | RawSpec | str]]:
    """How each input is taken, or in words why it cannot be.

    Float inputs with a batch become activations, others stay what they are. Where an input has a first
    dimension without a size, that is the batch, and an input without one has no batch dimension. Where none
    has, each first dimension is taken for the batch.

    Args:
        model: the model.
        constants: its constants; an input may be one of them.
    """
    values = [value for value in model.graph.input if value.name not in constants]
    free = any(_is_free(value) for value in values)
    for value in values:
        yield value, _taken(value, batched=_is_free(value) or not free)


def no_activation(name: str) -> str:
    """Why an operator of the NPU cannot read an input."""
    return f"input {name!r} must be float32 with batch and 1 to 4 more dimensions"


def _is_free(value: ValueInfoProto) -> bool:
    """Whether an input's first dimension has no size of its own."""
    dims = value.type.tensor_type.shape.dim
    return bool(dims) and not dims[0].HasField("dim_value")


def _taken(value: ValueInfoProto, batched: bool) -> Entry | RawSpec | str:
    """How an input is taken, or why it cannot be."""
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    batched = batched and bool(dims)
    rest = dims[1:] if batched else dims
    static = tuple(n for n in rest if n is not None and n > 0)
    if len(static) != len(rest):
        return f"input {value.name!r} has shape {dims}; only the batch may be dynamic"
    if math.prod(static) > MAX_ACTIVATION_ELEMENTS:
        return f"input {value.name!r} has shape {dims}; {MAX_ACTIVATION_ELEMENTS} numbers at most"
    if tensor.elem_type == onnx.TensorProto.FLOAT and batched and 1 <= len(static) <= 4:
        return Entry(value.name, static)
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    except KeyError:
        dtype = np.dtype(object)
    if dtype not in WIRE_TYPES or len(dims) > MAX_RANK:
        return no_activation(value.name)
    return RawSpec(value.name, static, dtype, batched)
