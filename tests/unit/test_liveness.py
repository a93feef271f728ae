"""What capture froze is said, and what changed since is noticed."""

import warnings

import pytest
import torch
from difficult_models import Net, image
from in_process_npu import InProcessNpu
from in_the_loop import new_npu, prepared
from small_nets import images, residual_net
from torch import Tensor, nn
from torch.nn.utils import prune

from npu_server.backends.emulator import EmulatorBackend
from npu_server.seam import BackendOptions
from npu_wire.errors import InvalidInput
from trainer_client.qat.capture import capture
from trainer_client.qat.module import prepare


def test_a_buffer_that_forward_writes_stays_as_it_is() -> None:
    """In calibration, training and evaluation alike, so that all three are one network; prepare says so."""

    def counts(net: Net, h: Tensor) -> Tensor:
        net.steps += 1
        return h * net.steps

    net, x = Net(counts, steps=torch.ones(())), image(6)
    with pytest.warns(UserWarning, match="writes to the buffers steps; in the loop they stay"):
        qat = prepare(net, x, InProcessNpu(EmulatorBackend(BackendOptions(profile="tflm"))))
    qat.calibrate(x)
    trained = [qat(x).detach() for _ in range(2)]
    assert torch.equal(trained[0], trained[1])
    assert torch.equal(trained[0], qat.eval()(x))
    assert net.steps == 1


def test_hooks_of_the_users_own_are_said_to_be_captured() -> None:
    """By the path of their module; PyTorch's own, which compute weights, are not spoken of."""
    net = residual_net()
    prune.l1_unstructured(net.body, "weight", 0.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="hooks")
        capture(net, images(2))
    net.stem.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.warns(UserWarning, match=r"hooks on stem were captured .* not called in the loop"):
        capture(net, images(2))


def test_hooks_registered_later_are_said_to_be_idle_once() -> None:
    """Inside the model; those on the prepared module are called."""
    net = residual_net()
    qat = prepared(new_npu(), net)
    called = []
    qat.register_forward_hook(lambda module, inputs, output: called.append(output.shape))
    net.stem.register_forward_hook(lambda module, inputs, output: called.append("stem"))
    with pytest.warns(UserWarning, match="registered inside the model after prepare"):
        qat(images(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat(images(2))
    assert called == [(2, 5), (2, 5)]


@pytest.mark.parametrize("mode", [True, False])
def test_a_module_that_changed_after_prepare_is_refused(mode: bool) -> None:
    """Added, replaced, removed: the graph is not the model's any more, in either mode."""
    net = residual_net()
    qat = prepared(new_npu(), net).train(mode)
    original = net.stem_act
    net.extra = nn.Linear(5, 5)
    with pytest.raises(InvalidInput, match=r"since prepare\(\): extra\. .*call prepare\(\) again"):
        qat(images(2))
    del net.extra
    net.stem_act = nn.GELU()
    with pytest.raises(InvalidInput, match=r"since prepare\(\): stem_act\. "):
        qat(images(2))
    net.stem_act = original
    assert qat(images(2)).shape == (2, 5)


class Keeps(nn.Module):
    """Computes its bias once in evaluation, as LeViT does, and drops it in `train()`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bias = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(4, 1, 1))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Keeps":
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.conv(x) + self.bias * 2
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias * 2
        return self.conv(x) + self.kept["bias"]


def test_what_a_model_keeps_in_evaluation_is_computed_anew() -> None:
    """Its parameter trains in the loop, and the model itself holds no tensor of the trace afterwards."""
    net, x = Keeps().eval(), image(6)
    with torch.no_grad():
        wanted = net(x)
    qat = prepare(net, x, InProcessNpu(EmulatorBackend(BackendOptions(profile="tflm")))).calibrate(x)
    qat(x).square().sum().backward()
    assert net.bias.grad is not None
    assert bool(net.bias.grad.abs().sum() > 0)
    torch.testing.assert_close(net(x), wanted)
