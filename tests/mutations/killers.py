"""The tests that may catch a mutant: in each, somebody else computed the value.

Golden vectors and comparisons of `emulator` with `reference` are not among them: there our own code judges
itself.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Killer:
    """Some tests.

    Attributes:
        select: a file or a test id, as pytest takes it.
        witness: whose values they hold our code to.
    """

    select: str
    witness: str


KILLERS = (
    Killer("tests/unit/test_profile_by_hand.py", "calculated by hand"),
    Killer("tests/unit/test_ties_by_hand.py", "calculated by hand"),
    Killer("tests/unit/test_folding_by_hand.py", "calculated by hand"),
    Killer("tests/judges/test_pinned.py", "the engine in the test's name"),
    Killer("tests/judges/test_ties_of_sums.py", "the engine in the test's name"),
    Killer("tests/judges/test_last_roundings.py", "the engine in the test's name"),
    Killer("tests/unit/test_operators_exact.py", "ONNX Runtime, torch, NumPy, by hand"),
    Killer("tests/judges/test_claims.py", "the engine in the test's name"),
    Killer("tests/judges/test_every_pair.py", "ONNX Runtime"),
    Killer(
        "tests/independent/test_networks.py::test_random_networks_are_compiled_as_the_page_says",
        "quantized from the documentation alone, run in the engine",
    ),
    Killer(
        "tests/independent/test_networks.py::test_numbers_are_those_of_quantize_static",
        "ONNX Runtime's quantize_static",
    ),
    Killer("tests/unit/test_operators_float.py", "ONNX Runtime in float"),
    Killer("tests/unit/test_compile_emulator.py::test_sums_beyond_float32_stay_exact", "NumPy"),
    Killer("tests/unit/test_compile_emulator.py::test_slices_hold_by_hand", "calculated by hand"),
    Killer("tests/unit/test_compile_emulator.py::test_one_channel_in_a_batch", "NumPy"),
)


def witness_of(test: str) -> str:
    """Who computed the value that a test holds our code to.

    Args:
        test: its id.
    """
    return next(killer.witness for killer in KILLERS if test.startswith(killer.select))
