"""Weights set out for the NPU with the optimizer's step, and are still those of the moment of the forward."""

import gc
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from in_process_npu import InProcessSession
from in_the_loop import LABELS, new_npu, prepared
from small_nets import images, residual_net
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from npu_wire.errors import InvalidInput, NonFiniteInput
from npu_wire.layer_map import Float32Array
from trainer_client.qat.module import QatModule


def backward(qat: QatModule) -> None:
    """A training forward and the gradients."""
    qat.zero_grad()
    nn.functional.cross_entropy(qat(images(8, seed=1)), LABELS[:8]).backward()


def held(session: InProcessSession) -> dict[str, Tensor]:
    """What was pushed, all updates on top of each other."""
    merged = {name: array for push in session.pushes for name, array in push.items()}
    return {name: torch.from_numpy(np.array(array)) for name, array in merged.items()}


@pytest.fixture
def net() -> nn.Module:
    """A net to be trained."""
    return residual_net()


@pytest.fixture
def qat(net: nn.Module) -> QatModule:
    """The net in the loop."""
    return prepared(new_npu(), net).train()


@pytest.fixture
def session(qat: QatModule) -> InProcessSession:
    """What the net is compiled to."""
    return qat._npu.sessions[-1]


def assert_holds(session: InProcessSession, net: nn.Module) -> None:
    """The session has every live parameter."""
    for name, live in net.named_parameters():
        torch.testing.assert_close(held(session)[name], live.detach(), rtol=0, atol=0)


def test_weights_set_out_with_the_step(net: nn.Module, qat: QatModule, session: InProcessSession) -> None:
    """From the second step on, by when it is known which optimizer there is; once a step."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pushes = []
    for _ in range(4):
        backward(qat)
        before = len(session.pushes)
        optimizer.step()
        pushes.append(len(session.pushes) - before)
    assert pushes == [0, 1, 1, 1]
    assert_holds(session, net)
    optimizer.step()  # a second one before the next forward is not sent at once
    assert not torch.equal(held(session)["stem.weight"], net.get_parameter("stem.weight").detach())
    backward(qat)
    assert_holds(session, net)


@pytest.mark.parametrize("how", ["counted", "uncounted", "replaced"])
def test_what_changes_after_the_push_is_sent_with_the_forward(
    net: nn.Module, qat: QatModule, session: InProcessSession, how: str
) -> None:
    """Clipping of weights behind autograd's back, a checkpoint: the batch runs with the weights of now."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        backward(qat)
        optimizer.step()
    parameter = net.get_parameter("stem.weight")
    if how == "counted":
        with torch.no_grad():
            parameter.mul_(0.5)
    elif how == "uncounted":
        parameter.data.mul_(0.5)
    else:
        net.load_state_dict({n: 0.5 * t for n, t in net.state_dict().items()}, assign=True)
    batches = len(session.batches)
    qat(images(8, seed=1))
    assert_holds(session, net)
    assert len(session.batches) == batches + (2 if how == "uncounted" else 1)
    backward(qat)
    optimizer.step()
    parameter.data.mul_(0.5)
    qat(images(8, seed=1))
    assert_holds(session, net)


def test_the_last_of_several_optimizers_sends(
    net: nn.Module, qat: QatModule, session: InProcessSession
) -> None:
    """One update with what all of them have written; an optimizer of another model is none of them."""
    one, *others = net.parameters()
    first, second = torch.optim.SGD([one], 0.1), torch.optim.Adam(others, 0.1)
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    for _ in range(4):
        backward(qat)
        before = len(session.pushes)
        first.step()
        stranger.step()
        assert len(session.pushes) == before
        second.step()
        stranger.step()
    assert len(session.pushes) == before + 1
    assert_holds(session, net)


def test_a_step_that_the_npu_refuses_is_told_by_the_next_forward(
    net: nn.Module, qat: QatModule, session: InProcessSession
) -> None:
    """The optimizer's step itself does not fail; repaired weights go on."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        backward(qat)
        optimizer.step()
    backward(qat)
    weight = net.get_parameter("stem.weight")
    good = weight.detach().clone()
    assert weight.grad is not None
    weight.grad.fill_(torch.nan)
    optimizer.step()
    with pytest.raises(NonFiniteInput):
        qat(images(8, seed=1))
    with torch.no_grad():
        weight.copy_(good)
    qat(images(8, seed=1))
    assert_holds(session, net)


def test_a_refusal_of_weights_that_were_repaired_before_the_batch_is_no_error(
    net: nn.Module, qat: QatModule, session: InProcessSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session tells with the next update that it has refused the early one: all weights are sent anew."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        backward(qat)
        optimizer.step()
    push, refusals = session.push_weights, [InvalidInput("the early update was refused")]

    def told_late(tensors: Mapping[str, Float32Array]) -> None:
        if refusals:
            raise refusals.pop()
        push(tensors)

    session.pushes.clear()  # which loaded nothing
    monkeypatch.setattr(session, "push_weights", told_late)
    with torch.no_grad():
        net.get_parameter("stem.weight").clamp_(-0.1, 0.1)
    backward(qat)
    assert not refusals
    assert_holds(session, net)
    refusals.append(InvalidInput("another refusal"))
    with torch.no_grad():
        net.get_parameter("stem.weight").mul_(0.5)
    with pytest.raises(InvalidInput, match="another refusal"):
        qat(images(8, seed=1))


def test_nothing_is_left_of_a_module_that_is_gone() -> None:
    """PyTorch's list of hooks is as long as before."""
    before = len(torch_optimizer._global_optimizer_post_hooks)
    qat = prepared(new_npu(), residual_net())
    assert len(torch_optimizer._global_optimizer_post_hooks) == before + 1
    del qat
    gc.collect()
    assert len(torch_optimizer._global_optimizer_post_hooks) == before


def test_a_compiled_optimizer_step_sends_too(
    net: nn.Module, qat: QatModule, session: InProcessSession
) -> None:
    """`torch.compile(optimizer.step)` traces the step, and leaves the NPU alone."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        backward(qat)
        step()
    backward(qat)
    assert_holds(session, net)
