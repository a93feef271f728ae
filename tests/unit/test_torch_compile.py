"""torch.compile around a model in the loop, inside it, and before it: the values stay the NPU's."""

from collections.abc import Callable

import pytest
import torch
from in_the_loop import LABELS, new_npu, prepared, train
from small_nets import images, residual_net
from torch import Tensor, nn

from trainer_client.qat.module import QatModule, prepare


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def _step(qat: Callable[[Tensor], Tensor], net: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    net.zero_grad()
    out = qat(images(8))
    nn.functional.cross_entropy(out, LABELS).backward()
    return out.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def _equal(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    assert len(a[1]) > 8
    for name, gradient in a[1].items():
        assert torch.equal(gradient, b[1][name]), name


def _in_place(qat: QatModule) -> Callable[[Tensor], Tensor]:
    qat.compile()
    return qat


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [torch.compile, _in_place])
def test_a_compiled_module_computes_as_it_did(
    compiled: Callable[[QatModule], Callable[[Tensor], Tensor]],
) -> None:
    """Output and every gradient bit for bit, before and after a step, in both modes."""
    net = residual_net()
    qat = prepared(new_npu(), net)
    expected = _step(qat, net)
    wrapped = compiled(qat)
    _equal(_step(wrapped, net), expected)
    train(qat, torch.optim.SGD(net.parameters(), 0.1), range(1))
    after = _step(qat, net)
    assert not torch.equal(after[0], expected[0])
    _equal(_step(wrapped, net), after)
    qat.eval()
    assert torch.equal(wrapped(images(8)), after[0])


@pytest.mark.slow
def test_a_compiled_step_around_it_trains() -> None:
    """Loss and gradients of a whole compiled step: what is around the NPU is compiled, the NPU is not."""
    net = residual_net()
    qat = prepared(new_npu(), net)
    expected = _step(lambda x: torch.tanh(qat(x) * 2), net)
    _equal(_step(torch.compile(lambda x: torch.tanh(qat(x) * 2), backend="aot_eager"), net), expected)


@pytest.mark.slow
def test_a_model_that_was_compiled_is_trained_as_what_it_is() -> None:
    """Whole or in part, and the optimizer may hold the wrapper's parameters: the same losses."""
    plain, whole, part = residual_net(), residual_net(), residual_net()
    wrapper = torch.compile(whole)
    part.body = torch.compile(part.body)
    part.stem.compile()
    losses = []
    for model, owner in ((plain, plain), (wrapper, wrapper), (part, part)):
        qat = prepare(model, images(1), new_npu()).calibrate(images(16))
        losses.append(train(qat, torch.optim.SGD(owner.parameters(), 0.1), range(3)))
    assert losses[0] == losses[1] == losses[2]
    assert losses[0][0] != losses[0][2]
    assert torch.equal(whole.stem.weight, plain.stem.weight)


def test_a_demand_for_one_whole_graph_is_answered_with_the_reason() -> None:
    """`fullgraph=True` cannot be had; PyTorch's error carries our words."""
    qat = prepared(new_npu())
    with pytest.raises(Exception, match="the forward of a QatModule is the NPU's"):
        torch.compile(lambda x: qat(x) + 1, fullgraph=True, backend="eager")(images(2))
