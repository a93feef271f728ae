"""Operators that the exporter makes several of, or makes wrongly: written out, they run on the NPU."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from in_process_npu import InProcessNpu
from torch import Tensor, nn

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from trainer_client import prepare
from trainer_client.qat.capture import capture


class Scores(nn.Module):
    """Scores with a bias of their own, as Bloom and `nn.MultiheadAttention` with a mask compute them."""

    def __init__(self, beta: float, alpha: float) -> None:
        super().__init__()
        self.q, self.out, self.bias = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 5)
        self.factors = {"beta": beta, "alpha": alpha}

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.baddbmm(self.bias(x), self.q(x), x.transpose(1, 2), **self.factors)
        return self.out(scores.softmax(-1) @ x)


class Einsums(nn.Module):
    """Attention of two heads, written as Einstein sums."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Parameter(torch.randn(8, 2, 4) / 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("bti,ihd->bthd", x, self.q)
        shares = torch.einsum("bqhd,bkhd->bhqk", q, x.unflatten(2, (2, 4))).softmax(-1)
        return self.out(torch.einsum("bhqk,bki->bqi", shares, x))


class Elu(nn.Module):
    """A function that is several nodes, with factors 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ELU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Marked(nn.Module):
    """Token ids, some of them replaced by position."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.clone()
        ids[ids == 4] = 0
        vectors = self.table(ids)
        return self.out(vectors.masked_fill((ids == 2)[..., None], 0.5))


class Video(nn.Module):
    """A 3-D convolution without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).relu().mean((2, 3, 4)))


def sequences() -> Tensor:
    """Five vectors for each of three samples."""
    return torch.randn(3, 5, 8)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "baddbmm": (lambda: Scores(1, 0.5), sequences, {"softmax"}),
    "baddbmm, both factors": (lambda: Scores(0.5, 2), sequences, {"softmax"}),
    "baddbmm, the product alone": (lambda: Scores(0, 1), sequences, {"softmax"}),
    "einsum": (Einsums, sequences, {"softmax"}),
    "ELU": (Elu, sequences, set()),
    "numbers where a mask is true": (Marked, lambda: torch.randint(0, 9, (3, 5)), {"masked_fill_1"}),
    "Conv3d without bias": (Video, lambda: torch.randn(3, 2, 4, 5, 5), {"getitem"}),
}


@pytest.mark.parametrize("name", CASES)
def test_onnx_model_computes_what_the_network_computes(name: str) -> None:
    """ONNX Runtime yields the module's values, for another size of the batch as well."""
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    session = onnxruntime.InferenceSession(capture(model, x).onnx, providers=["CPUExecutionProvider"])
    for batch in (x, torch.cat([x, x])):
        (got,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, model(batch).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.startswith("baddbmm,") else n for n in CASES]
)
def test_runs_on_the_npu(name: str) -> None:
    """What no NPU has is the host's; evaluation is the training forward, near the float model's."""
    make, inputs, host = CASES[name]
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    with torch.no_grad():
        expected = model(x)
    values = []
    for backend in (ReferenceBackend, EmulatorBackend):
        qat = prepare(model, x, InProcessNpu(backend(BackendOptions(profile="tflm")))).calibrate([x])
        assert {layer.name for layer in qat.layer_map.layers if layer.host_float} == host
        values.append(qat.train()(x).detach())
        with torch.no_grad():
            assert torch.equal(values[-1], qat.eval()(x))
    assert torch.equal(*values)
    assert (values[0] - expected).abs().max() < 0.06 * expected.abs().max()


EQUATIONS = {
    "bij,bjk->bik": [(3, 4, 5), (3, 5, 2)],
    "bqhd,bkhd->bhqk": [(3, 4, 2, 5), (3, 6, 2, 5)],
    "oi,bi->bo": [None, (3, 5)],
    "bti,ohi->btoh": [(3, 4, 5), None],
    "bhi,hio->bho": [(3, 2, 5), None],
    "bijk,bkjl->bil": [(3, 2, 4, 5), (3, 5, 4, 3)],
    "bi,bj->bij": [(3, 4), (3, 5)],
    "bi,bi->b": [(3, 4), (3, 4)],
    "bij,j->bi": [(3, 4, 5), None],
    "bij->bj": [(3, 4, 5)],
    "bij->bji": [(3, 4, 5)],
    "bij,bij": [(3, 4, 5), (3, 4, 5)],
    "b...i,oi->b...o": [(3, 2, 4, 5), None],
    "...ij,...jk": [(3, 2, 4, 5), (3, 2, 5, 3)],
    "bi,ij,bjk->bk": [(3, 4), None, (3, 5, 2)],
}
"""An equation, and the shape of each operand with samples; None: a parameter."""

QUICK = "bijk,bkjl->bil"


class Einsum(nn.Module):
    """An equation over inputs and parameters."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation, self.inputs = equation, EQUATIONS[equation]
        sizes = {"o": 6, "h": 2, "i": 5, "j": 5} | ({"i": 4} if equation.startswith("bi,ij") else {})
        for i, (part, shape) in enumerate(zip(equation.split("->")[0].split(","), self.inputs, strict=True)):
            if shape is None:
                self.register_parameter(f"w{i}", nn.Parameter(torch.randn([sizes[label] for label in part])))

    def forward(self, *given: Tensor) -> Tensor:
        left = list(given)
        named = dict(self.named_parameters())
        operands = [named[f"w{i}"] if s is None else left.pop(0) for i, s in enumerate(self.inputs)]
        return torch.einsum(self.equation, *operands) * 2


@pytest.mark.parametrize(
    "equation", [QUICK, *(pytest.param(e, marks=pytest.mark.slow) for e in EQUATIONS if e != QUICK)]
)
def test_einsum_is_written_out(equation: str) -> None:
    """ONNX Runtime computes what torch computes, without an Einsum, for another size of the batch as well."""
    torch.manual_seed(0)
    model = Einsum(equation)
    given = tuple(torch.randn(shape) for shape in EQUATIONS[equation] if shape is not None)
    captured = capture(model, given)
    operators = {node.op_type for node in onnx.load_from_string(captured.onnx).graph.node}
    assert "Einsum" not in operators
    session = onnxruntime.InferenceSession(captured.onnx, providers=["CPUExecutionProvider"])
    for batch in (given, tuple(torch.cat([x, x]) for x in given)):
        feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), batch, strict=True)}
        with torch.no_grad():
            expected = model(*batch).numpy()
        np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-4, atol=1e-5)


def test_einsum_with_a_diagonal_stays_what_it_is() -> None:
    """A label that repeats within an operand is no product of matrices; such a model is captured as well."""

    class Trace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bii->bi", x) * 2

    x = torch.randn(3, 4, 4)
    session = onnxruntime.InferenceSession(capture(Trace(), x).onnx, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], Trace()(x).numpy(), rtol=1e-6)
