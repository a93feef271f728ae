"""ONNX's own tests of its operators: whatever compiles yields about the value that ONNX publishes."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from own_profile import profile_with

from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from npu_wire.errors import NpuError
from npu_wire.quantize import quantize

# Inputs of 10,000 and their neighbours, which 8 bits do not tell apart.
BEYOND_8_BITS = ("test_softmax_large_number", "test_logsoftmax_large_number")


class NodeCase(NamedTuple):
    """A model with one output, its input, and what ONNX says it yields."""

    title: str
    model: onnx.ModelProto
    x: np.ndarray
    expected: np.ndarray


def node_cases() -> Iterator[NodeCase]:
    """One for each float output of each of ONNX's cases with a float input; other inputs are constants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    for case in cases:
        if not case.data_sets or case.name.startswith(BEYOND_8_BITS):
            continue
        inputs, outputs = case.data_sets[0]
        if not all(isinstance(value, np.ndarray | np.generic) for value in (*inputs, *outputs)):
            continue
        arrays = [np.asarray(value) for value in inputs]
        for info, value in zip(case.model.graph.output, outputs, strict=True):
            if arrays and arrays[0].dtype == np.asarray(value).dtype == np.float32 and arrays[0].ndim:
                yield NodeCase(
                    case.name, _with_constants(case.model, info, arrays), arrays[0], np.asarray(value)
                )


def _with_constants(
    model: onnx.ModelProto, output: onnx.ValueInfoProto, arrays: list[np.ndarray]
) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    names = [info.name for info in made.graph.input]
    del made.graph.input[1:], made.graph.output[:]
    made.graph.output.append(output)
    made.graph.initializer.extend(map(numpy_helper.from_array, arrays[1:], names[1:]))
    return made


def ranges_of(case: NodeCase) -> dict[str, tuple[float, float]]:
    """What the values of a case really cover, by ONNX's reference evaluator."""
    given = {case.model.graph.input[0].name: case.x}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = ReferenceEvaluator(case.model).run(None, given, intermediate=True)
    ranges = {}
    for name, value in values.items():
        real = isinstance(value, np.ndarray) and value.dtype == np.float32 and value.size > 0
        if real and np.isfinite(value).all():
            low, high = float(value.min()), float(value.max())
            ranges[name] = (low, max(high, low + 1e-3))
    return ranges


@pytest.mark.slow
def test_what_compiles_yields_what_onnx_publishes(tmp_path: Path) -> None:
    """Shapes are equal, values within four steps or a tenth of their spread; a wrong attribute is far off."""
    backend = ReferenceBackend(BackendOptions(profile=profile_with(tmp_path, 'unsupported = "refuse"')))
    compared, wrong = set(), []
    for case in node_cases():
        graph, model = case.model.graph, case.model.SerializeToString()
        names = [graph.input[0].name, *(name for node in graph.node for name in node.output)]
        try:
            backend.compile(model, dict.fromkeys(names, (-1.0, 1.0)))
        except NpuError:
            continue
        program = backend.compile(model, ranges_of(case))
        entry, output = program.layer_map.inputs[0], program.layer_map.tensors[program.layer_map.outputs[0]]
        codes = quantize(case.x, entry.scale, entry.zero_point).reshape(len(case.x), *entry.shape)
        *_, last = program.forward(program.layer_map.named(codes), ())
        if last.data.shape != case.expected.shape:
            wrong.append(f"{case.title}: shape {last.data.shape} instead of {case.expected.shape}")
            continue
        compared.add(case.title)
        apart = np.abs((last.data.astype(np.float64) - output.zero_point) * output.scale - case.expected)
        if apart.max() > 4 * output.scale and np.sqrt((apart**2).mean()) > 0.1 * case.expected.std():
            wrong.append(f"{case.title}: {apart.max() / output.scale:.1f} steps apart")
    assert wrong == []
    assert len(compared) > 250
