"""What a Forward stream says to its client, and the messages that say it."""

from collections.abc import Iterator
from dataclasses import dataclass

from npu_server.seam import LayerTensor
from npu_server.service.intake import Batch
from npu_server.service.rendezvous import StreamMemory
from npu_wire.framing import Slice
from npu_wire.layer_map import LayerMap
from npu_wire.tensors import OutgoingTensor
from npu_wire.v1 import npu_pb2

Message = npu_pb2.ForwardResponse | Slice
"""What is sent."""


@dataclass(frozen=True)
class Attached:
    """The stream is open."""

    weights_version: int


@dataclass(frozen=True)
class Loaded:
    """The device has an update's weights."""

    weights_version: int
    duration_ns: int


@dataclass(frozen=True)
class Computed:
    """A layer's tensor, and the version of the weights that computed it."""

    batch: Batch
    tensor: LayerTensor
    weights_version: int


@dataclass(frozen=True)
class Done:
    """All of a batch's tensors have been sent."""

    batch: Batch
    queued_ns: int
    device_ns: int


Answer = Attached | Loaded | Computed | Done


class Encoder:
    """Makes messages of answers.

    Args:
        layer_map: of the session.
        profile_hash: of the device; every message carries it.
        shared: memory that the client may have in common with this process.
    """

    def __init__(self, layer_map: LayerMap, profile_hash: str, shared: StreamMemory) -> None:
        self._layers = layer_map.layers
        self._profile_hash = profile_hash
        self._shared = shared

    def messages(self, answer: Answer) -> Iterator[Message]:
        """One, or, of a tensor that is sent in slices, several."""
        if isinstance(answer, Computed):
            yield from self._tensor(answer)
            return
        response = npu_pb2.ForwardResponse(profile_hash=self._profile_hash)
        if isinstance(answer, Attached):
            response.weights_version = answer.weights_version
            response.attached.weights_version = answer.weights_version
            if (offer := self._shared.offer()) is not None:
                response.attached.shared_memory.CopyFrom(offer)
        elif isinstance(answer, Loaded):
            response.weights_version = answer.weights_version
            response.weights_loaded.duration_ns = answer.duration_ns
        else:
            response.weights_version = answer.batch.weights_version
            response.batch_id = answer.batch.batch_id
            response.done.queued_ns = answer.queued_ns
            response.done.device_ns = answer.device_ns
        yield response

    def _tensor(self, answer: Computed) -> Iterator[Message]:
        tensor = answer.tensor
        spec = self._layers[tensor.layer].output
        outgoing = OutgoingTensor(spec.name, tensor.data, spec.layout)
        slot = self._shared.place(outgoing.raw)
        for offset in outgoing.offsets() if slot is None else (0,):
            response = npu_pb2.ForwardResponse(
                profile_hash=self._profile_hash,
                weights_version=answer.weights_version,
                batch_id=answer.batch.batch_id,
            )
            carrier = npu_pb2.LayerTensor(layer=tensor.layer, start_ns=tensor.start_ns, end_ns=tensor.end_ns)
            if slot is None:
                data = outgoing.data(offset)
            else:
                data = memoryview(b"")
                carrier.shared.slot, carrier.shared.offset = slot.number, slot.offset
                carrier.shared.length = slot.nbytes
            yield Slice(response, carrier, outgoing.chunk(offset), data)
