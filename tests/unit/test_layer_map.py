"""The layer map on the wire."""

from npu_wire.layer_map import (
    LayerSpec,
    MemoryLayout,
    TensorSpec,
    layer_spec_from_proto,
    layer_spec_to_proto,
    tensor_spec_from_proto,
)
from npu_wire.v1 import program_pb2, tensor_pb2


def test_every_field_travels() -> None:
    """A layer that differs from every default arrives as it was sent."""
    output = TensorSpec("y", (3, 4), 0.5, -7, MemoryLayout.CHANNELS_LAST, outer=12)
    why = "no such operator"
    sent = LayerSpec(output, "Softmax", ("x",), ("node",), ("w",), -129, 128, True, why, 77, True)
    message = program_pb2.LayerSpec.FromString(layer_spec_to_proto(sent).SerializeToString())
    assert layer_spec_from_proto(message) == sent


def test_a_server_that_knows_no_outer_means_batch_first() -> None:
    """The field is absent in what an older server sends."""
    layout = tensor_pb2.MEMORY_LAYOUT_CONTIGUOUS
    message = program_pb2.TensorSpec(name="y", shape=[3], scale=1.0, layout=layout)
    assert tensor_spec_from_proto(message).outer == 1
