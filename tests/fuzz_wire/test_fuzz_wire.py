"""The short campaign, as a command, and the judges of its numbers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from npu_server.registry import create_backend
from npu_server.seam import BackendOptions, Program
from npu_wire.layer_map import Int8Array
from npu_wire.v1 import npu_pb2, tensor_pb2

from .foe import WrongBitsError, check_bits
from .recordings import PROFILE, Recording, record_small
from .server import Sample
from .verdict import judge_process, judge_witness, slope_mib_per_min
from .witness import CheckedBatch, Tally

_ROOT = Path(__file__).parents[2]
_BEFORE = Sample(at_s=0, rss_mib=500.0, threads=40, descriptors=14, sessions=1, queued=0)


@pytest.mark.slow
def test_a_short_campaign(tmp_path: Path) -> None:
    """Twenty seconds of every attack: no wrong bit, no unanswered question, nothing grows."""
    report = tmp_path / "report.json"
    flags = ["--minutes", "0.35", "--seed", "20", "--json", str(report)]
    command = [sys.executable, "-m", "tests.fuzz_wire", *flags]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    told = json.loads(report.read_text())
    assert told["well_behaved"]["batches"] > 20
    assert told["well_behaved"]["mismatches"] == 0
    assert sum(sum(outcomes.values()) for outcomes in told["attacks"].values()) > 50


def _after(**changed: float) -> Sample:
    return Sample(**(vars(_BEFORE) | {"at_s": 1200} | changed))


@pytest.mark.parametrize(
    ("after", "complaint"),
    [
        (_after(rss_mib=565.0), "resident memory"),
        (_after(threads=49), "threads"),
        (_after(descriptors=19), "descriptors"),
        (_after(sessions=2), "2 sessions"),
        (_after(queued=9), "9 jobs"),
    ],
)
def test_what_grew_is_named(after: Sample, complaint: str) -> None:
    """Each number has its own complaint; equal numbers have none."""
    assert judge_process([_BEFORE, _after()]) == []
    (found,) = judge_process([_BEFORE, after])
    assert complaint in found


def test_a_slope_is_found_in_the_second_half() -> None:
    """Memory that rises 1 MiB a minute after the middle of 60 minutes; the first half does not count."""
    moments = [_after(at_s=60.0 * t, rss_mib=500.0 + max(0, t - 30)) for t in range(0, 61, 10)]
    assert slope_mib_per_min(moments) == pytest.approx(1.0)
    assert slope_mib_per_min(moments[:3]) is None
    assert slope_mib_per_min([_after(at_s=60.0 * t) for t in range(0, 61, 10)]) == 0.0
    (found,) = judge_process(moments)
    assert "1.00 MiB a minute" in found


def test_a_wrong_bit_is_a_violation() -> None:
    """So are an error, a step that took too long, and a client that did nothing."""
    assert judge_witness(Tally(batches=1), 60) == []
    assert "3 of 9 elements" in judge_witness(Tally(batches=1, elements=9, mismatches=3), 60)[0]
    assert "61.0 s" in judge_witness(Tally(batches=1, longest_step_s=61.0), 60)[0]
    assert judge_witness(Tally(batches=1, errors=["why"]), 60) == ["why"]
    assert "single batch" in judge_witness(Tally(), 60)[0]


@pytest.fixture(scope="module")
def recording() -> Recording:
    """A legal session."""
    return record_small()


def answers(recording: Recording) -> list[bytes]:
    """What a server must say to it."""
    said = []
    for (batch_id, layer), codes in recording.expected.items():
        answer = npu_pb2.ForwardResponse(batch_id=batch_id)
        chunk = answer.tensor.chunk
        answer.tensor.layer = layer
        chunk.name, chunk.dtype, chunk.layout = "t", tensor_pb2.DATA_TYPE_INT8, 1
        chunk.shape.extend(codes.shape)
        chunk.data = codes.tobytes()
        said.append(answer.SerializeToString())
    return said


def test_a_wrong_bit_in_a_replayed_session_is_seen(recording: Recording) -> None:
    """All right: every element counts. One bit of one code of the last tensor: the client objects."""
    right = answers(recording)
    assert check_bits(recording, right) == sum(codes.size for codes in recording.expected.values())
    wrong = npu_pb2.ForwardResponse.FromString(right[-1])
    data = wrong.tensor.chunk.data
    wrong.tensor.chunk.data = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(WrongBitsError):
        check_bits(recording, [*right[:-1], wrong.SerializeToString()])


def test_a_wrong_bit_in_any_layer_is_seen_by_the_well_behaved_client(recording: Recording) -> None:
    """Its tally counts the elements that differ, in layers that training does not ask for as well."""
    backend = create_backend("reference", BackendOptions(profile=PROFILE, threads=1))
    backend.open()
    program: Program = backend.compile(recording.model, recording.ranges)
    batch = np.zeros((2, *program.layer_map.inputs[0].shape), np.int8)
    expected = {
        t.layer: np.array(t.data)
        for t in program.forward(program.layer_map.named(batch), range(recording.layers))
        if t
    }
    sent = {layer: codes.copy() for layer, codes in expected.items()}
    sent[0].flat[5] ^= 1
    sent[1].flat[:3] ^= 64
    tally = Tally()
    CheckedBatch(Sent(sent), expected, tally).tensor(max(expected))
    assert (tally.mismatches, tally.batches) == (4, 1)
    assert tally.elements == sum(codes.size for codes in expected.values())


class Sent:
    """A batch whose answers are known."""

    def __init__(self, tensors: dict[int, Int8Array]) -> None:
        self.tensor = tensors.__getitem__
