"""Training without FP32 layers: values, gradients and habits of autograd are those of the full step."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from blocks import BLOCKS
from difficult_models import BORNE, image
from in_process_npu import InProcessNpu, InProcessSession
from small_nets import images, residual_net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from npu_server.backends.emulator import EmulatorBackend
from npu_server.seam import BackendOptions, Ranges
from npu_wire.errors import InvalidInput
from npu_wire.layer_map import LayerMap
from npu_wire.quantize import dequantize
from trainer_client.qat.calibrate import observe
from trainer_client.qat.capture import Captured, capture
from trainer_client.qat.codes import codes_of, dequantized, gated
from trainer_client.qat.inject import InjectionRule
from trainer_client.qat.module import QatModule

LABELS = torch.arange(8) % 5
Gradients = dict[str, Tensor]


class DoubtfulSession(InProcessSession):
    """Of an NPU that tells of no layer that it cannot overflow."""

    @property
    def layer_map(self) -> LayerMap:
        told = self.program.layer_map
        return replace(told, layers=tuple(replace(layer, never_overflows=False) for layer in told.layers))


class DoubtfulNpu(InProcessNpu):
    def compile(self, model: bytes, ranges: Ranges) -> InProcessSession:
        self.sessions.append(DoubtfulSession(self._backend.compile(model, ranges)))
        return self.sessions[-1]


def _npu(profile: str = "tflm", doubtful: bool = False) -> InProcessNpu:
    backend = EmulatorBackend(BackendOptions(profile=profile))
    return (DoubtfulNpu if doubtful else InProcessNpu)(backend)


def _modes(
    model: nn.Module | Captured, x: Tensor, npu: InProcessNpu, wide: float = 1.0
) -> tuple[QatModule, QatModule]:
    """The model with the full step, and with the lean one; ranges that many times as wide as measured."""
    captured = model if isinstance(model, Captured) else capture(model, x)
    ranges = {name: (wide * low, wide * high) for name, (low, high) in observe(captured, [x]).items()}
    full = QatModule(captured, npu, ranges=ranges)
    return full, QatModule(captured, npu, ranges=ranges, fp32_pass="where_needed", full_pass_every=0)


def _step(qat: QatModule, x: Tensor) -> tuple[Tensor, Gradients]:
    """Output and gradients of a step."""
    qat.model.zero_grad()
    out = qat(x)
    out.square().sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in qat.model.named_parameters() if p.grad is not None}


def _assert_equal(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-5 * scale + 1e-12, msg=name)


@pytest.mark.parametrize("name", ["convnext", "plain_attention", "fpn"])
def test_measured_everywhere_it_is_the_full_step(name: str) -> None:
    """An NPU that vouches for no layer: outputs bit for bit, gradients but for rounding, of the full step."""
    make, shape = BLOCKS[name]
    _compare_with_full_step(make, torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in BLOCKS if name not in ("convnext", "plain_attention", "fpn")]
)
def test_other_blocks(name: str) -> None:
    """The same for the rest of the blocks."""
    make, shape = BLOCKS[name]
    _compare_with_full_step(make, torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", BORNE)
def test_what_people_do_to_modules_is_borne(name: str) -> None:
    """Shared and double weights, parametrizations, in-place operations, views: as in the full step."""
    _compare_with_full_step(BORNE[name], image(6))


def _compare_with_full_step(make: Callable[[], nn.Module], x: Tensor) -> None:
    torch.manual_seed(0)
    full, lean = _modes(make(), x, _npu(doubtful=True))
    expected, gradients = _step(full, x)
    actual, lean_gradients = _step(lean, x)
    assert torch.equal(actual, expected)
    assert torch.equal(lean.eval()(x), expected)
    _assert_equal(lean_gradients, gradients)


class Smooth(nn.Module):
    """Layers of every form and none with a clamp: convolutions, one of them in groups, a sum, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.head, self.out = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        h = h + self.grouped(nn.functional.silu(h))
        return self.out(self.head(h.mean((2, 3))))


@functools.cache
def _captured_smooth() -> Captured:
    torch.manual_seed(0)
    return capture(Smooth(), images(8))


def _smooth() -> tuple[QatModule, QatModule]:
    return _modes(_captured_smooth(), images(8), _npu(), wide=1.5)


def test_where_no_code_is_clipped_nothing_is_computed_and_nothing_lost() -> None:
    """No layer is measured, and the gradients are those of the full step but for rounding."""
    full, lean = _smooth()
    expected, gradients = _step(full, images(8))
    actual, lean_gradients = _step(lean, images(8))
    assert torch.equal(actual, expected)
    _assert_equal(lean_gradients, gradients)
    assert len(full.noise.layers) == len(full.layer_map.layers) + 1
    assert not lean.noise.layers
    assert (lean.noise.steps, lean.noise.fresh) == (1, len(full.layer_map.layers))


def test_codes_are_kept_for_the_backward_pass() -> None:
    """What autograd saves that is no parameter is INT8, and less than half of the full step's bytes."""

    def saved(qat: QatModule) -> dict[int, Tensor]:
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() and len(tensor) == 7 and tensor.numel() > 64:  # begins with the batch
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            qat(images(7))
        return kept

    full, lean = _smooth()
    codes = saved(lean)
    assert {tensor.dtype for tensor in codes.values()} == {torch.int8}
    bytes_of = [sum(t.numel() * t.element_size() for t in kept.values()) for kept in (codes, saved(full))]
    assert 0 < 2 * bytes_of[0] <= bytes_of[1]


def test_a_full_pass_measures_all_and_changes_nothing() -> None:
    """Of three steps the first and the third report the full step's noise; all have the same gradients."""
    full, _ = _smooth()
    lean = QatModule(
        _captured_smooth(), _npu(), ranges=full.ranges, fp32_pass="where_needed", full_pass_every=2
    )
    steps = [_step(lean, images(8)) for _ in range(2)]
    assert not lean.noise.layers
    steps.append(_step(lean, images(8)))
    _step(full, images(8))
    assert str(lean.noise) == str(full.noise)
    for out, gradients in steps[1:]:
        assert torch.equal(out, steps[0][0])
        assert all(torch.equal(gradients[name], steps[0][1][name]) for name in gradients)
    with torch.no_grad():
        lean(images(8))
    assert str(lean.noise) == str(full.noise)


def _twice_retained(qat: QatModule) -> Gradients:
    out = qat(images(8)).square().sum()
    out.backward(retain_graph=True)
    out.backward()
    return {}


def _checkpointed(qat: QatModule) -> Gradients:
    checkpoint(qat, images(8), use_reentrant=False).square().sum().backward()
    return {}


def _frozen(qat: QatModule) -> Gradients:
    qat.model.first.requires_grad_(False)
    qat.model.norm.requires_grad_(False)
    qat.model.head.weight.requires_grad_(False)
    qat(images(8)).square().sum().backward()
    qat.model.requires_grad_(True)
    return {}


def _to_the_input(qat: QatModule) -> Gradients:
    x = images(8).requires_grad_()
    qat(x).square().sum().backward()
    assert x.grad is not None
    return {"x": x.grad}


def _hooked(qat: QatModule) -> Gradients:
    seen: Gradients = {}
    handle = qat.model.grouped.weight.register_hook(
        lambda gradient: seen.update(hook=gradient) or 2 * gradient
    )
    qat(images(8)).square().sum().backward()
    handle.remove()
    return seen


def _two_batches(qat: QatModule) -> Gradients:
    (qat(images(8)) * qat(images(8, seed=5))).sum().backward()
    return {}


@pytest.mark.parametrize(
    "habit", [_twice_retained, _checkpointed, _frozen, _to_the_input, _hooked, _two_batches]
)
def test_habits_of_autograd(habit: Callable[[QatModule], Gradients]) -> None:
    """Retained graphs, checkpoints, frozen parameters, inputs, hooks, two batches at once: as ever."""
    found = []
    for qat in _smooth():
        qat.model.zero_grad()
        seen = habit(qat)
        found.append({n: p.grad for n, p in qat.model.named_parameters() if p.grad is not None} | seen)
        qat.model.zero_grad()
    _assert_equal(found[1], found[0])


# Code and whether its gradient passes, by hand.
GATES = {
    "plain": (InjectionRule(0.5, 3), [(-128, False), (-127, True), (3, True), (126, True), (127, False)]),
    "ReLU, real = (q + 100) / 4": (
        InjectionRule(0.25, -100, lower=0.0),
        [(-128, False), (-100, False), (-99, True), (126, True), (127, False)],
    ),
    "ReLU6, real = (q + 128) / 16": (
        InjectionRule(0.0625, -128, -129, 128, lower=0.0, upper=6.0),
        [(-128, False), (-127, True), (-33, True), (-32, False), (127, False)],
    ),
    "ReLU6 that never reaches 6": (
        InjectionRule(1 / 64, -128, -129, 127, lower=0.0, upper=6.0),
        [(-128, False), (-127, True), (126, True), (127, False)],
    ),
    "nothing clips": (InjectionRule(0.5, -128, -129, 128), [(-128, True), (127, True)]),
}


@pytest.mark.parametrize("shape", [(2, 5, 1, 1), (10,), (2, 5, 1)])
@pytest.mark.parametrize("title", GATES)
def test_gates_by_hand(title: str, shape: tuple[int, ...]) -> None:
    """A gradient passes between the codes that a clip or a bound leaves."""
    rule, rows = GATES[title]
    rows = (10 * rows)[:10]
    q = np.array([code for code, _ in rows], np.int8).reshape(shape)
    codes = codes_of(q, shape, rule, torch.device("cpu"))
    grad = torch.arange(1.0, 11.0).reshape(shape)
    passed = torch.tensor([passes for _, passes in rows]).reshape(shape)
    assert torch.equal(gated(grad, codes, None, rule), grad * passed)
    assert torch.equal(grad, torch.arange(1.0, 11.0).reshape(shape))
    assert dequantized(codes, rule).numpy().tolist() == dequantize(q, rule.scale, rule.zero_point).tolist()


def test_training_on_a_narrow_register_goes_the_full_steps_way() -> None:
    """Every convolution of this NPU may overflow and is measured: after ten steps the losses are the same."""
    first, last = [], []
    x = images(8)
    for qat in _modes(residual_net(), x, _npu("acc16")):
        qat.model.load_state_dict(residual_net().state_dict())
        optimizer = torch.optim.SGD(qat.model.parameters(), 0.05)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(qat(x), LABELS)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        first.append(losses[0])
        last.append(losses[-1])
    assert first[1] == first[0] > last[0]
    assert last[1] == pytest.approx(last[0], rel=0.02)


def test_unknown_options_are_refused() -> None:
    """With the legal ones."""
    with pytest.raises(InvalidInput, match="legal: always, where_needed"):
        QatModule(_captured_smooth(), _npu(), fp32_pass="never")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="full_pass_every is -1"):
        QatModule(_captured_smooth(), _npu(), full_pass_every=-1)
