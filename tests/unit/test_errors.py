"""The error tree and its way through gRPC."""

import grpc
import pytest

from npu_wire import errors
from npu_wire.errors import DeviceFault, InvalidInput, NpuError, from_status, status_of

ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, NpuError) and value is not NpuError
]


@pytest.mark.parametrize("cls", ALL)
def test_every_class_survives_the_wire(cls: type[NpuError]) -> None:
    """Status and class name rebuild the same class with the same message."""
    code = status_of(cls("why"))
    assert code in grpc.StatusCode.__members__
    again = from_status(code, cls.__name__, "why")
    assert type(again) is cls
    assert str(again) == "why"


@pytest.mark.parametrize(
    ("code", "name", "expected"),
    [
        ("INVALID_ARGUMENT", None, "InvalidInput"),
        ("FAILED_PRECONDITION", None, "UnsupportedModel"),
        ("NOT_FOUND", None, "SessionLost"),
        ("UNAVAILABLE", None, "ServerUnavailable"),
        ("DATA_LOSS", None, "DeviceFault"),
        ("INVALID_ARGUMENT", "os.system", "InvalidInput"),
        ("INTERNAL", "NpuError", "DeviceFault"),
    ],
)
def test_foreign_statuses_become_the_nearest_class(code: str, name: str | None, expected: str) -> None:
    """A proxy's status has no class name; a name that is none of ours is ignored."""
    assert type(from_status(code, name, "why")).__name__ == expected


def test_a_subclass_outside_the_table_keeps_its_parents_status() -> None:
    """A vendor's own error travels as the nearest that we know."""

    class OddShape(InvalidInput):
        """A shape that is odd."""

    assert status_of(OddShape("x")) == "INVALID_ARGUMENT"
    assert status_of(NpuError("x")) == "INTERNAL"
    assert issubclass(InvalidInput, ValueError)
    assert not issubclass(DeviceFault, ValueError)
