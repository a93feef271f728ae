"""Training a model with an NPU in the loop, and evaluating it there."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import in_process_npu
import numpy as np
import onnx
import pytest
import torch
from in_the_loop import LABELS, new_npu, prepared, train
from onnx import numpy_helper
from small_nets import images, residual_net
from torch import Tensor, nn

from npu_wire.errors import InvalidInput, NonFiniteInput, NotCalibrated
from npu_wire.layer_map import LayerMap, MemoryLayout
from npu_wire.quantize import dequantize, quantize
from trainer_client.qat import module as qat_module
from trainer_client.qat import training_pass
from trainer_client.qat.module import prepare
from trainer_client.qat.trace import Trace, overlap


@pytest.mark.parametrize("layout", list(MemoryLayout))
def test_zero_mismatch(layout: MemoryLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """After training, each injected value is bit for bit the NPU's tensor of a second, independent session.

    The second session is compiled from the weights as they are then, not pushed to: a missed push would show.
    """
    npu = new_npu(layout)
    net = residual_net()
    qat = prepared(npu, net)
    train(qat, torch.optim.Adam(net.parameters(), 1e-2), range(3))
    injected: list[Tensor] = []
    original = training_pass.inject

    def recording(*args: object) -> object:
        value, noise = original(*args)  # type: ignore[arg-type]
        injected.append(value.detach().clone())
        return value, noise

    monkeypatch.setattr(training_pass, "inject", recording)
    x = images(8, seed=77)
    out = qat(x)

    model = onnx.load_model_from_string(qat._captured.onnx)
    state = net.state_dict()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(state[tensor.name].numpy(), tensor.name))
    independent = npu._backend.compile(model.SerializeToString(), qat.ranges)
    specs = [independent.layer_map.inputs[0], *(layer.output for layer in independent.layer_map.layers)]
    codes = [quantize(x.numpy(), specs[0].scale, specs[0].zero_point)]
    codes += [
        t.data for t in independent.forward(independent.layer_map.named(codes[0]), range(len(specs) - 1))
    ]
    assert len(injected) == len(specs) == 6
    for spec, q, value in zip(specs, codes, injected, strict=True):
        np.testing.assert_array_equal(value.numpy(), dequantize(q, spec.scale, spec.zero_point), spec.name)
    assert torch.equal(out.detach(), injected[-1])
    assert qat.noise.fresh == 5
    assert qat.noise.without_noise == 0


def test_training_lowers_the_loss_and_reaches_every_parameter() -> None:
    """Overfitting one batch works; every parameter of the user's model has a finite, non-zero gradient."""
    net = residual_net()
    qat = prepared(new_npu(), net)
    assert {id(p) for p in qat.parameters()} == {id(p) for p in net.parameters()}
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(qat(images(8)), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_are_those_of_the_step_written_by_hand() -> None:
    """Every gradient equals that of the same step in plain torch: the user's modules, and a masked detour."""
    npu = new_npu()
    net = residual_net()
    qat = prepared(npu, net)
    x = images(8, seed=4)
    net.zero_grad()
    nn.functional.cross_entropy(qat(x), LABELS).backward()
    actual = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    session = npu.sessions[-1]
    layers = session.layer_map.layers
    (batch,) = session.batches[-1][0].values()
    codes = {
        layers[t.layer].name: t.data
        for t in session.program.forward(session.program.layer_map.named(batch), range(len(layers)))
        if t
    }
    specs = {layer.name: layer for layer in layers}

    def on_npu(name: str, y: Tensor) -> Tensor:
        spec = specs[name]
        q = torch.from_numpy(codes[name].copy()).int()
        real = (q - spec.output.zero_point) * torch.tensor(spec.output.scale)
        free = (y - real).abs() <= 3 * spec.output.scale
        free &= (q > spec.saturation_low) & (q < spec.saturation_high)
        return real + torch.where(free, y - y.detach(), 0.0)

    net.eval().zero_grad()
    h = torch.from_numpy(
        dequantize(batch, session.layer_map.inputs[0].scale, session.layer_map.inputs[0].zero_point)
    )
    h = on_npu("hardtanh", net.stem_act(net.stem_norm(net.stem(h))))
    h = on_npu("add_30", h + on_npu("relu", torch.relu(net.body_norm(net.body(h)))))
    out = on_npu("linear", net.head(on_npu("mean", h.mean((2, 3)))))
    nn.functional.cross_entropy(out, LABELS).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_evaluation_returns_the_npus_own_output_in_parts() -> None:
    """37 images through an NPU that takes 16: three batches without taps, equal to training mode's value."""
    npu = new_npu()
    qat = prepared(npu)
    x = images(37)
    expected = torch.cat([qat(part).detach() for part in x.split(16)])
    qat.eval()
    out = qat(x)
    assert torch.equal(out, expected)
    assert not out.requires_grad
    assert [(len(batch["x"]), taps) for batch, taps in npu.sessions[-1].batches[-3:]] == [
        (16, ()),
        (16, ()),
        (5, ()),
    ]


def test_only_what_changed_is_pushed() -> None:
    """Nothing at first (the model was compiled with it), then what was changed, in whatever way."""
    npu = new_npu()
    net = residual_net()
    qat = prepared(npu, net)
    session = npu.sessions[-1]

    def pushed() -> list[list[str]]:
        qat(images(2))
        names = [sorted(tensors) for tensors in session.pushes]
        session.pushes.clear()
        return names

    assert pushed() == []
    with torch.no_grad():
        net.head.bias.add_(1.0)
    assert pushed() == [["head.bias"]]
    assert pushed() == []
    net.stem.weight.data = net.stem.weight.data * 2
    assert pushed() == [["stem.weight"]]
    net.stem.weight.data.mul_(0.5)  # leaves the version counter where it was
    assert pushed() == [["stem.weight"]]
    net.body_norm.running_var.mul_(2.0)
    assert pushed() == [["body_norm.running_var"]]
    net.load_state_dict(residual_net(seed=3).state_dict())
    assert len(pushed()[0]) == 13
    net.load_state_dict(residual_net(seed=4).state_dict(), assign=True)
    assert len(pushed()[0]) == 13
    net.head.requires_grad_(False)
    optimizer = torch.optim.SGD([net.stem.weight, net.body.weight], 0.1)
    train(qat, optimizer, range(1))
    session.pushes.clear()
    assert pushed() == [["body.weight", "stem.weight"]]


def test_pushed_tensors_are_snapshots() -> None:
    """An optimizer step after the submit does not change what is on its way."""
    npu = new_npu()
    net = residual_net()
    qat = prepared(npu, net)
    with torch.no_grad():
        net.head.bias.fill_(1.0)
    qat(images(2))
    with torch.no_grad():
        net.head.bias.fill_(2.0)
    assert npu.sessions[-1].pushes[-1]["head.bias"].tolist() == [1.0] * 5


def test_refused_push_is_sent_again() -> None:
    """NaN in one weight refuses the whole update; once it is repaired, the other changes arrive too."""
    npu = new_npu()
    net = residual_net()
    qat = prepared(npu, net).eval()
    good = net.stem.weight.detach().clone()
    with torch.no_grad():
        net.head.bias.add_(1.0)
        net.stem.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteInput):
        qat(images(2))
    with torch.no_grad():
        net.stem.weight.copy_(good)
    fresh = prepare(net, images(1), new_npu(), ranges=qat.ranges).eval()
    assert torch.equal(qat(images(2)), fresh(images(2)))


def test_forward_before_calibrate_names_the_remedy() -> None:
    """In both modes."""
    qat = prepare(residual_net(), images(1), new_npu())
    for mode in (qat.train(), qat.eval()):
        with pytest.raises(NotCalibrated, match=r"call qat.calibrate\(loader\)"):
            mode(images(2))


def test_recalibration_keeps_the_method_and_sees_the_weights_of_now() -> None:
    """As a fresh calibration of the changed model; of five batches it takes, and shows, two."""
    net = residual_net()
    qat = prepare(net, images(1), new_npu())
    shown = []

    def progress(batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            shown.append(batch)
            yield batch

    qat.calibrate(images(16), method="percentile", percentile=95.0)
    first = qat.ranges
    with torch.no_grad():
        net.stem.weight.mul_(3.0)
    qat.recalibrate(images(40).split(8), max_batches=2, progress=progress)
    fresh = prepare(net, images(1), new_npu()).calibrate(
        images(16).split(8), method="percentile", percentile=95.0
    )
    assert qat.ranges == fresh.ranges != first
    assert [len(batch) for batch in shown] == [8, 8]


def test_activations_that_leave_their_ranges_are_reported_once() -> None:
    """Weights grow after calibration: the clipped layers are named, until the ranges are measured anew."""
    net = residual_net()
    qat = prepared(new_npu(), net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat(images(8))
        with torch.no_grad():
            net.head.weight.mul_(20.0)
            net.body_norm.weight.mul_(20.0)
        with pytest.warns(UserWarning, match=r"model \(add_30, \d+ %\).*qat.recalibrate\(loader\)"):
            qat(images(8))
        qat(images(8))
        qat.recalibrate(images(8))
        qat(images(8))
    assert qat.noise.layers["add_30"].max_noise_lsb < 1


def test_batches_that_do_not_fit_are_refused() -> None:
    """Shape, dtype, NaN and size: each with what was expected, and nothing is sent to the NPU."""
    npu = new_npu()
    qat = prepared(npu)
    with pytest.raises(
        InvalidInput, match=r"\(2, 3, 9, 9\), expected torch.float32 of shape \(batch, 3, 8, 8\)"
    ):
        qat(torch.zeros(2, 3, 9, 9))
    with pytest.raises(InvalidInput, match="float64"):
        qat(images(2).double())
    with pytest.raises(InvalidInput, match="17 samples, more than the NPU takes"):
        qat(images(17))
    broken = images(2)
    broken[0, 0, 0, 0] = math.nan
    for mode in (qat.train(), qat.eval()):
        with pytest.raises(NonFiniteInput, match="NaN"):
            mode(broken)
    assert npu.sessions[-1].batches == []


def test_training_mode_without_gradient_and_with_input_gradient() -> None:
    """Under `no_grad` the value is the same; an input that wants a gradient gets a finite one."""
    qat = prepared(new_npu())
    x = images(4)
    with torch.no_grad():
        silent = qat(x)
    leaf = x.clone().requires_grad_()
    out = qat(leaf)
    out.sum().backward()
    assert torch.equal(silent, out.detach())
    assert torch.equal(leaf.detach(), x)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() > 0


def test_batch_norm_and_dropout_are_frozen_in_training_mode() -> None:
    """Statistics stay, two passes are equal and equal to evaluation; gamma and beta have gradients."""
    net = residual_net()
    qat = prepared(new_npu(), net).train()
    assert net.dropout.training
    before = {name: value.clone() for name, value in net.named_buffers()}
    out = qat(images(8))
    out.sum().backward()
    assert torch.equal(out, qat(images(8)))
    assert torch.equal(out, qat.eval()(images(8)))
    assert not net.dropout.training
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    assert net.stem_norm.weight.grad is not None
    assert net.stem_norm.bias.grad is not None


def test_noise_reports_add_up_and_start_anew() -> None:
    """Two steps of 8 and 4 images: the total counts the elements of both, the last report its own."""
    qat = prepared(new_npu())
    qat(images(8))
    qat(images(4))
    assert qat.noise.layers["hardtanh"].elements == 4 * 8 * 8 * 8
    assert qat.total_noise.layers["hardtanh"].elements == 12 * 8 * 8 * 8
    assert qat.total_noise.steps == 2
    assert 30 < qat.total_noise.layers["hardtanh"].sqnr_db < 60
    qat.reset_noise()
    assert qat.total_noise.steps == 0


def test_noise_is_printed_with_the_names_of_the_users_modules() -> None:
    """The value that a batch norm or an activation yields stands beside the path of that very module."""
    qat = prepared(new_npu())
    qat(images(8))
    for report, steps in ((qat.noise, 1), (qat.total_noise, 1)):
        title, head, *rows = str(report).splitlines()
        assert title == f"noise of {steps} training steps"
        at = head.index("value")
        pairs = {row[at:].split()[0]: row[:at].strip() for row in rows}
        assert pairs == {
            "x": "",
            "hardtanh": "stem_act",
            "relu": "",
            "add_30": "",
            "mean": "",
            "linear": "head",
        }


def test_trace_holds_both_passes(tmp_path: Path) -> None:
    """Every layer of every training batch is there, and an in-process NPU that runs first hides nothing."""
    with Trace(tmp_path / "trace.json") as trace:
        qat = prepare(residual_net(), images(1), new_npu(), trace=trace).calibrate(images(8))
        qat(images(4))
        qat(images(4))
    seen = overlap(trace.document)
    assert seen.fp32_layers == 10
    assert seen.fp32_layers_beside_npu == 0
    assert seen.npu_ms > 0


def test_close_releases_the_session_and_the_next_forward_opens_another() -> None:
    """Closing is idempotent; the ranges and the trained weights are still there."""
    npu = new_npu()
    net = residual_net()
    qat = prepared(npu, net)
    train(qat, torch.optim.SGD(net.parameters(), 0.1), range(1))
    before = qat(images(4))
    qat.close()
    qat.close()
    assert npu.sessions[0].closed
    assert torch.equal(qat(images(4)), before)
    assert len(npu.sessions) == 2


def test_layers_that_receive_no_noise_are_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer of the map without a value in the FP32 graph is no secret, and no litany."""
    session = in_process_npu.InProcessSession
    told = session.layer_map.fget

    def renamed(self: object) -> LayerMap:
        layer_map = told(self)
        inner = replace(layer_map.layers[1], output=replace(layer_map.layers[1].output, name="inner_1"))
        return replace(layer_map, layers=(layer_map.layers[0], inner, *layer_map.layers[2:]))

    monkeypatch.setattr(session, "layer_map", property(renamed))
    qat = prepared(new_npu())
    messages = [record.message for record in caplog.records if record.name == qat_module.__name__]
    (message,) = messages
    assert message.startswith("1 of the NPU's 5 layers")
    assert message.endswith(": inner_1")
    qat.calibrate([(images(16, seed=3), None)])
    assert messages == [record.message for record in caplog.records if record.name == qat_module.__name__]
