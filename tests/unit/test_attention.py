"""Attention is written out where it can be, and means what torch's own kernel computes."""

import pytest
import torch
from in_process_npu import InProcessNpu
from torch import Tensor, nn
from torch.nn import functional as F

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import Backend, BackendOptions
from trainer_client.qat.capture import capture
from trainer_client.qat.module import prepare

WIDTH, HEADS, TOKENS = 8, 2, 5


class Attention(nn.Module):
    """Self-attention between two linear layers; `mask` is what a case hands to torch's kernel."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        parts = self.enter(x).chunk(3, -1)
        query, key, value = (p.reshape(x.shape[0], TOKENS, HEADS, -1).transpose(1, 2) for p in parts)
        options: dict[str, object] = {}
        if self.mask == "hides nothing":
            positions = torch.arange(TOKENS) >= 0
            options["attn_mask"] = positions[None, None, None].expand(x.shape[0], 1, TOKENS, TOKENS)
        elif self.mask == "hides one token":
            options["attn_mask"] = (torch.arange(TOKENS) > 0)[None].expand(TOKENS, TOKENS)
        elif self.mask == "hides the future":
            options["is_causal"] = True
        elif self.mask == "adds minus infinity":
            options["attn_mask"] = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
        elif self.mask == "shared keys":
            options["enable_gqa"] = True
            key, value = key[:, :1], value[:, :1]
        elif self.mask == "own scale":
            options["scale"] = 0.25
        y = F.scaled_dot_product_attention(query, key, value, **options)
        return self.leave(y.transpose(1, 2).reshape(x.shape[0], TOKENS, WIDTH))


def targets(mask: str) -> tuple[nn.Module, torch.fx.GraphModule, list[str]]:
    """The network, its training graph and the operators in it."""
    torch.manual_seed(0)
    model = Attention(mask).eval()
    graph = capture(model, torch.randn(2, TOKENS, WIDTH)).graph
    return model, graph, [str(node.target) for node in graph.graph.nodes]


MASKS = ("hides one token", "hides the future", "adds minus infinity")


@pytest.mark.parametrize("mask", ["none", "hides nothing", "own scale", "shared keys", *MASKS])
def test_scores_and_probabilities_are_values(mask: str) -> None:
    """Two matrix products around a softmax stand where torch's kernel stood, and compute the same."""
    model, graph, operators = targets(mask)
    assert operators.count("aten.matmul.default") == 2
    assert operators.count("aten.softmax.int") == 1
    assert not any("scaled_dot_product" in name for name in operators)
    x = torch.randn(7, TOKENS, WIDTH)
    torch.testing.assert_close(graph(x), model(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mask", ["shared keys", *MASKS])
@pytest.mark.parametrize("backend", [ReferenceBackend, EmulatorBackend])
def test_masked_attention_runs_on_the_npu(mask: str, backend: type[Backend]) -> None:
    """Scores keep their resolution beside a mask, and no gradient is that of something hidden."""
    torch.manual_seed(0)
    model = Attention(mask)
    x = torch.randn(8, TOKENS, WIDTH)
    npu = backend(BackendOptions(profile="tflm"))
    npu.open()
    qat = prepare(model, x, InProcessNpu(npu)).calibrate([x])
    value = qat(x)
    expected = model(x)
    assert (value - expected).square().mean() < 2e-3 * expected.var()
    value.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert qat.noise.without_noise == 0
    assert torch.equal(qat.eval()(x), value)


def test_parameters_stay_the_users_own() -> None:
    """The rewritten graph computes with the model's parameter objects."""
    model, graph, _ = targets("none")
    own = dict(model.named_parameters())
    assert {name: id(p) for name, p in graph.named_parameters()} == {n: id(p) for n, p in own.items()}


def test_every_layer_of_multi_head_attention_has_a_name() -> None:
    """In `nn.MultiheadAttention` each ONNX value but a linear layer's bare product is a node's value."""
    import onnx

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    captured = capture(Encoder(), torch.randn(2, TOKENS, WIDTH))
    names = {node.name for node in captured.graph.graph.nodes}
    reached, unnamed = {next(iter(captured.inputs))}, []
    for node in onnx.load_from_string(captured.onnx).graph.node:
        if node.op_type != "Shape" and reached.intersection(node.input):
            reached.update(node.output)
            unnamed += [node.op_type for name in node.output if name not in names]
    assert set(unnamed) <= {"MatMul"}
    assert "softmax" in reached
