"""Hostile models over a real socket: each is answered with a clear status, and the server goes on serving."""

from collections.abc import Iterator

import numpy as np
import pytest
from fake_backend import Start
from hostile_models import RANGE_ATTACKS, good, hostile_models, ranges_for

from npu_server.conformance.targets import run_all
from npu_server.conformance.wire import RemoteTarget
from npu_server.registry import create_backend
from npu_server.seam import BackendOptions
from npu_wire.errors import (
    InvalidInput,
    InvalidModel,
    NonFiniteInput,
    NotCalibrated,
    NpuError,
    QuotaExceeded,
    UnsupportedModel,
)

REFUSALS = (InvalidModel, InvalidInput, NonFiniteInput, UnsupportedModel, NotCalibrated, QuotaExceeded)
OPTIONS = BackendOptions(profile="tflm", threads=1)


@pytest.fixture
def target(start: Start) -> Iterator[RemoteTarget]:
    """A server with the reference backend."""
    remote = RemoteTarget(start(create_backend("reference", OPTIONS)).address, timeout_s=60.0)
    yield remote
    remote.close()


def compile_and_release(
    target: RemoteTarget, model: bytes, ranges: dict[str, tuple[float, float]]
) -> NpuError | None:
    """The refusal, if it is one."""
    try:
        target.compile(model, ranges).close()
    except NpuError as error:
        return error
    return None


@pytest.mark.slow
def test_the_server_outlives_every_hostile_model(target: RemoteTarget) -> None:
    """A refusal has class and words; after each, a good model runs as before, bit for bit."""
    sound, batch = good().SerializeToString(), np.full((1, 3, 8, 8), 77, np.int8)
    session = target.compile(sound, ranges_for(sound))
    expected = run_all(session, batch)
    session.close()
    wrong: dict[str, str] = {}
    count = 0
    for title, model in hostile_models():
        error = compile_and_release(target, model, ranges_for(model))
        count += 1
        if error is not None and (type(error) not in REFUSALS or not str(error).strip()):
            wrong[title] = f"{type(error).__name__}: {error}"
        session = target.compile(sound, ranges_for(sound))
        for name, tensor in run_all(session, batch).items():
            np.testing.assert_array_equal(tensor, expected[name])
        session.close()
    assert wrong == {}
    assert count > 250


@pytest.mark.parametrize("attack", RANGE_ATTACKS)
def test_ranges_that_make_no_sense(target: RemoteTarget, attack: str) -> None:
    """Each is refused: what is not finite or of no width even where nobody asks for it."""
    error = compile_and_release(target, good().SerializeToString(), RANGE_ATTACKS[attack])
    assert type(error) in REFUSALS
