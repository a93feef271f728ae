"""The captured graphs are the user's own model under its own names."""

import onnx
import onnxruntime
import pytest
import torch
from small_nets import ResidualNet, images, residual_net
from torch import Tensor, nn

from npu_wire.errors import InvalidInput, UnsupportedModel
from trainer_client.qat.capture import Captured, capture
from trainer_client.qat.fold import fold_batch_norm, value_name


@pytest.fixture(scope="module")
def net() -> ResidualNet:
    """The user's model."""
    return residual_net()


@pytest.fixture(scope="module")
def captured(net: ResidualNet) -> Captured:
    """Its capture, from a single sample."""
    return capture(net, images(1))


def test_initializers_are_the_models_parameters_and_buffers(net: ResidualNet, captured: Captured) -> None:
    """Every float tensor of the state dict is an initializer of that name, and the very same object."""
    floats = {name for name, t in net.state_dict().items() if t.is_floating_point()}
    assert floats == set(captured.initializers)
    for name, parameter in net.named_parameters():
        assert captured.tensor(name) is parameter
    for name, buffer in net.named_buffers():
        assert captured.tensor(name) is buffer


def test_every_training_value_is_a_value_of_the_onnx_model(captured: Captured) -> None:
    """The names of what the training graph computes are output names of ONNX nodes."""
    outputs = {name for node in onnx.load_model_from_string(captured.onnx).graph.node for name in node.output}
    computed = [n for n in captured.graph.graph.nodes if n.op == "call_function" and n.users]
    tensors = {n.name for n in computed if isinstance(n.meta["val"], Tensor)}
    assert tensors <= outputs


def test_onnx_model_computes_what_the_net_computes(net: ResidualNet, captured: Captured) -> None:
    """ONNX Runtime on the captured bytes agrees with the user's model, for a batch size not captured."""
    x = images(5)
    session = onnxruntime.InferenceSession(captured.onnx)
    (out,) = session.run(None, {next(iter(captured.inputs)): x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), net.eval()(x).detach(), rtol=1e-4, atol=1e-5)


def test_training_flags_survive() -> None:
    """A submodule that the user had put into evaluation mode alone stays the only one."""
    net = residual_net()
    net.train()
    net.body_norm.eval()
    capture(net, images(2))
    assert [name for name, module in net.named_modules() if not module.training] == ["body_norm"]


def test_replaced_parameter_is_read_live(captured: Captured, net: ResidualNet) -> None:
    """Assigning a new Parameter object to the model changes what the graph computes with."""
    old = net.head.bias
    net.head.bias = nn.Parameter(torch.ones(5))
    assert captured.tensor("head.bias") is net.head.bias
    net.head.bias = old


def test_folding_keeps_function_and_gradients(net: ResidualNet, captured: Captured) -> None:
    """Forward and every gradient of the folded graph equal the user's model's, to float32 rounding."""
    net.eval()
    x, y = images(6), torch.arange(6) % 5
    graph = fold_batch_norm(captured.graph.graph)
    names = [value_name(n) for n in graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert len(names) == 2
    assert all(name.startswith("getitem") for name in names)
    folded = torch.fx.GraphModule(captured.graph, graph)

    def gradients(out: Tensor) -> dict[str, Tensor]:
        net.zero_grad()
        nn.functional.cross_entropy(out, y).backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    expected_out, (actual_out,) = net(x), folded(x)
    expected, actual = gradients(expected_out), gradients(actual_out)
    torch.testing.assert_close(actual_out, expected_out, rtol=1e-4, atol=1e-5)
    assert set(expected) == set(actual) == {name for name, _ in net.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_batch_norm_with_another_consumer_of_its_conv_stays() -> None:
    """A convolution that is also read unnormalised is not folded, and the function is unchanged."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            return h + self.norm(h)

    net = Forked()
    net(images(8))
    forked = capture(net, images(2))
    folded = torch.fx.GraphModule(forked.graph, fold_batch_norm(forked.graph.graph))
    torch.testing.assert_close(folded(images(3))[0], net.eval()(images(3)))


class _ValueDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class _FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (residual_net(), (images(1), images(1)), InvalidInput, "does not take these arguments: too many"),
        (residual_net(), images(1).double(), InvalidInput, r"torch.float64, expected torch.float32"),
        (residual_net(), images(0), InvalidInput, "at least one sample"),
        (residual_net().half(), images(1), InvalidInput, "'stem.weight' is torch.float16"),
        (_ValueDependent(), images(1), UnsupportedModel, "_ValueDependent: the forward decides by the value"),
        (_FixedBatch(), images(2), UnsupportedModel, "one size of batch only"),
    ],
)
def test_models_that_cannot_be_captured_are_refused(
    model: nn.Module, inputs: Tensor, error: type[Exception], message: str
) -> None:
    """What cannot be captured is refused with the reason, before anything is sent."""
    with pytest.raises(error, match=message):
        capture(model, inputs)
