"""A model compiled for an NPU: a session, the training graph that fits it, and the weights that it holds."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from npu_wire.errors import DeviceFault, NpuError
from npu_wire.layer_map import Array, LayerMap, TensorSpec
from npu_wire.quantize import quantize
from trainer_client.npu.session import Npu, PendingBatch, Session
from trainer_client.qat.calibrate import Range
from trainer_client.qat.capture import Captured
from trainer_client.qat.lean_graph import thin
from trainer_client.qat.signature import Call
from trainer_client.qat.taps import TappedGraph, tap
from trainer_client.qat.weights import PushedWeights


@dataclass(frozen=True)
class Compiled:
    """What a forward pass runs with.

    Attributes:
        captured: the user's model.
        session: the model's program on the NPU.
        layer_map: of that program.
        tapped: the training graph with an injection after each layer that the NPU reports.
        weights: what of the model's weights the session holds.
    """

    captured: Captured
    session: Session
    layer_map: LayerMap
    tapped: TappedGraph
    weights: PushedWeights

    def push(self, only_counted: bool = False) -> bool:
        """Sends the weights that changed, and tells whether there were any.

        What the NPU had against weights that set out early counts for nothing where they have been repaired
        before a batch: then all are sent anew. Where they have not, the batch raises it.
        """
        was_early, self.weights.are_early = self.weights.are_early, False
        try:
            return self.weights.push_changes(self.session, only_counted)
        except NpuError:
            if not was_early:
                raise
        self.weights.forget()
        return self.weights.push_changes(self.session)

    def push_early(self) -> None:
        """Sends what version counters tell; what goes wrong is for the next forward to raise."""
        self.weights.are_early = True
        try:
            self.weights.push_changes(self.session, only_counted=True)
        except NpuError:
            self.weights.forget()

    def submit(self, inputs: Mapping[str, Array]) -> PendingBatch:
        """Starts the NPU on a training batch, with the weights of now.

        To compare those whose version counters stand still takes longer than the NPU's first layers, so it is
        done beside them: a batch that was wrong to start is dropped and sent again. Where that has happened
        once, later batches wait for the comparison.
        """
        if self.weights.counters_tell:
            self.push(only_counted=True)
            pending = self.session.submit(inputs, self.tapped.taps)
            if not self.push():
                return pending
            self.weights.counters_tell = False
        self.push()
        return self.session.submit(inputs, self.tapped.taps)

    def inputs_of(self, call: Call, start: int, end: int) -> dict[str, Array]:
        """What the NPU gets of some samples of a call: INT8 codes, and raw inputs as they are."""
        inputs: dict[str, Array] = {}
        for spec in self.layer_map.inputs:
            position = self.captured.inputs[spec.name]
            value = call.leaves[position].detach()
            if self.captured.signature.leaves[position].batched:
                value = value[start:end]
            array = value.numpy(force=True)
            if isinstance(spec, TensorSpec):
                array = quantize(array, spec.scale, spec.zero_point).reshape(end - start, *spec.shape)
            inputs[spec.name] = array
        return inputs

    def close(self) -> None:
        """Releases the session; idempotent."""
        self.session.close()


def compile_for(
    npu: Npu, captured: Captured, graph: fx.Graph, ranges: Mapping[str, Range], lean: bool
) -> Compiled:
    """Compiles a captured model.

    Args:
        npu: the NPU.
        captured: the model.
        graph: its folded training graph; not changed.
        ranges: activation ranges by value name.
        lean: make a graph for a `LeanPass`.

    Raises:
        NpuError: see `Npu.compile`.
        DeviceFault: the layers that the NPU reports are no values of the model.
    """
    session = npu.compile(captured.onnx, ranges)
    try:
        tapped = (thin if lean else tap)(graph, session.layer_map)
        if not tapped.taps:
            raise DeviceFault(
                f"none of the layers that the NPU reports ({', '.join(tapped.missing)}) is a value of "
                "the model; this backend does not keep the names of the ONNX values"
            )
        return Compiled(captured, session, session.layer_map, tapped, PushedWeights(captured))
    except BaseException:
        session.close()
        raise
