"""Models with any call signature: what `model(...)` takes and returns, `qat(...)` takes and returns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from in_process_npu import InProcessNpu
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from npu_wire.errors import InvalidInput
from trainer_client import connect, prepare
from trainer_client.qat.module import QatModule


def _npu() -> InProcessNpu:
    return InProcessNpu(EmulatorBackend(BackendOptions(profile="tflm")))


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Backbone(nn.Module):
    """Two stages of an image network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())


@dataclass
class Detections:
    """What a detector returns."""

    boxes: list[Tensor]
    classes: Tensor
    image: Tensor


class Detector(Backbone):
    """Three heads, one of them on the layer in the middle; the image is passed through."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.classes = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Detections:
        fine = self.stem(x)
        coarse = self.deep(fine)
        return Detections([self.fine(fine), self.coarse(coarse)], self.classes(coarse), x)


class Fusion(nn.Module):
    """Two inputs, of which one is an image; returns a dict with a layer that others read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.conv, self.table = nn.Conv2d(3, 6, 3), nn.Linear(5, 6)
        self.head = nn.Linear(6, 4)

    def forward(
        self, image: Tensor, extra: Mapping[str, Tensor], mask: Tensor | None = None, *, scale: int = 1
    ) -> dict[str, Any]:
        features = self.conv(image).relu().mean((2, 3)) + self.table(extra["row"])
        return {"logits": self.head(features), "nested": (features, None), "scale": scale}


class OneHead(nn.Module):
    """A detector that returns one of its outputs alone."""

    def __init__(self, detector: Detector, index: int) -> None:
        super().__init__()
        self.detector, self.index = detector, index

    def forward(self, x: Tensor) -> Tensor:
        found = self.detector(x)
        return [*found.boxes, found.classes][self.index]


def _same_in_both_modes(qat: QatModule, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Training and evaluation of one call, checked for equal structure and equal bits."""
    trained = qat.train()(*args, **kwargs)
    evaluated = qat.eval()(*args, **kwargs)
    (left, structure), (right, other) = pytree.tree_flatten(trained), pytree.tree_flatten(evaluated)
    assert structure == other
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    return trained, evaluated


def test_a_detector_returns_what_its_heads_return_alone() -> None:
    """A dataclass of three outputs and the image: each equals the NPU's output of a model of that head."""
    model, x = Detector().eval(), _rand(4, 3, 8, 8)
    qat = prepare(model, x, _npu()).calibrate([_rand(8, 3, 8, 8, seed=1)])
    found, _ = _same_in_both_modes(qat, x)
    assert type(found) is Detections
    assert found.image is x
    assert len(qat.layer_map.output_layers) == 3
    for index, output in enumerate((*found.boxes, found.classes)):
        alone = prepare(OneHead(model, index), x, _npu()).calibrate([_rand(8, 3, 8, 8, seed=1)]).eval()
        assert torch.equal(alone(x), output)


def test_a_detector_trains_on_all_its_outputs() -> None:
    """A loss over the three outputs reaches every parameter, and goes down."""
    model, x = Detector(), _rand(8, 3, 8, 8)
    qat = prepare(model, x, _npu()).calibrate([x]).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(12):
        found = qat(x)
        loss = (
            (found.boxes[0] - 1).square().mean()
            + (found.boxes[1] + 1).square().mean()
            + nn.functional.cross_entropy(found.classes, torch.zeros(8, 4, 4, dtype=torch.long))
        )
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            gradients = {name: p.grad for name, p in model.named_parameters()}
            assert [n for n, grad in gradients.items() if grad is None or not grad.abs().sum()] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_inputs_in_containers_go_by_position_or_keyword() -> None:
    """A tensor and a dict, given in any legal way: equal results, constants and structure as the model's."""
    model, image, row = Fusion().eval(), _rand(4, 3, 6, 6), _rand(4, 5, seed=2)
    qat = prepare(model, (image, {"row": row}), _npu(), example_kwargs={"scale": 3})
    qat.calibrate([{"image": image, "extra": {"row": row}, "label": "unused"}])
    assert {spec.name for spec in qat.layer_map.inputs} == {"image", "extra_row"}
    by_position, _ = _same_in_both_modes(qat, image, {"row": row}, None, scale=3)
    by_keyword, _ = _same_in_both_modes(qat, scale=3, extra={"row": row}, image=image)
    assert torch.equal(by_position["logits"], by_keyword["logits"])
    assert by_position["scale"] == 3
    assert by_position["nested"][1] is None
    expected = model(image, {"row": row}, scale=3)
    assert list(by_position) == list(expected)
    for got, real in (
        (by_position["logits"], expected["logits"]),
        (by_position["nested"][0], expected["nested"][0]),
    ):
        assert float((got - real).abs().max()) < 0.05 * float(real.abs().max())


def test_an_output_in_the_middle_is_the_layer_that_others_read() -> None:
    """The features that the head reads come as they are: dequantized codes of that very layer."""
    model, image, row = Fusion().eval(), _rand(4, 3, 6, 6), _rand(4, 5, seed=2)
    npu = _npu()
    qat = prepare(model, (image, {"row": row}), npu).calibrate([(image, {"row": row}, "label")]).eval()
    features = qat(image, {"row": row})["nested"][0]
    layer_map, program = qat.layer_map, npu.sessions[-1].program
    inputs, _ = npu.sessions[-1].batches[-1]
    tensors = [t for t in program.forward(inputs, ()) if t is not None]
    assert {t.layer for t in tensors} == set(layer_map.output_layers)
    reals = [
        (t.data.astype(np.float32) - layer_map.layers[t.layer].output.zero_point)
        * np.float32(layer_map.layers[t.layer].output.scale)
        for t in tensors
    ]
    assert any(np.array_equal(real, features.numpy()) for real in reals)


def test_evaluation_in_several_batches_is_one() -> None:
    """More samples than the NPU takes at once: every output as if computed in parts."""
    model, many = Detector().eval(), _rand(300, 3, 8, 8)
    npu = InProcessNpu(ReferenceBackend(BackendOptions(profile="tflm")))
    qat = prepare(model, many[:2], npu).calibrate([many]).eval()
    assert npu.info.max_batch < 300
    whole, parts = qat(many), [qat(part) for part in many.split(100)]
    assert torch.equal(whole.classes, torch.cat([part.classes for part in parts]))
    assert torch.equal(whole.boxes[0], torch.cat([part.boxes[0] for part in parts]))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing a required argument"),
        ((_rand(4, 3, 6, 6), {"row": _rand(3, 5)}), {}, r"extra\['row'\].* holds 3 samples and .* 4"),
        ((_rand(4, 3, 6, 6), {"row": _rand(4, 6)}), {}, r"extra\['row'\].* expected torch.float32 of shape"),
        ((_rand(4, 3, 6, 6), {"line": _rand(4, 5)}), {}, "nested as in example_inputs"),
        ((_rand(4, 3, 6, 6), {"row": _rand(4, 5)}), {"scale": 2}, "was captured with|captured with"),
        ((_rand(4, 3, 6, 6), {"row": _rand(4, 5)}, _rand(4)), {}, "mask"),
    ],
)
def test_other_arguments_than_captured_are_refused(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    """Another structure, shape, number of samples or constant: what came, what was captured, what to do."""
    row = _rand(4, 5)
    qat = prepare(Fusion(), (_rand(4, 3, 6, 6), {"row": row}), _npu()).calibrate(
        [(_rand(4, 3, 6, 6), {"row": row})]
    )
    with pytest.raises(InvalidInput, match=message):
        qat(*args, **kwargs)


class Lookup(nn.Module):
    """Takes two tensors that have nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)

    def forward(self, table: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x).relu(), table


def test_a_batch_that_cannot_be_told_is_asked_for() -> None:
    """Two first sizes, and the model takes other numbers of both."""
    x, table = _rand(4, 5), _rand(7, 6)
    with pytest.raises(InvalidInput, match=r"which dimension is the batch .* 'table' with 7, 'x' with 4"):
        prepare(Lookup(), (table, x), _npu())


class Pairs(nn.Module):
    """Passes a table of seven rows through."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, table: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(table) != 7:
            raise ValueError("the table has seven rows")
        return self.first(x).relu(), table


def test_the_batch_is_told_by_running_the_model() -> None:
    """Of two first sizes, the batch is the one that the model takes in other numbers; the other stays."""
    x, table = _rand(4, 6), _rand(7, 6)
    qat = prepare(Pairs().eval(), (table, x), _npu()).calibrate([(table, x)])
    (_, passed), _ = _same_in_both_modes(qat, table, x[:3])
    assert passed is table
    assert [spec.name for spec in qat.layer_map.inputs] == ["x"]


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """As a loader yields them."""
    for seed in range(3):
        yield _rand(4, 3, 8, 8, seed=seed), torch.zeros(4)


def test_calibration_takes_what_a_loader_yields() -> None:
    """(batch, label) tuples and dicts of keywords give equal ranges, of as many batches as asked for."""
    model, x = Detector().eval(), _rand(4, 3, 8, 8)
    by_tuple = prepare(model, x, _npu()).calibrate(batches(), max_batches=2)
    by_dict = prepare(model, {"x": x}, _npu()).calibrate(
        ({"x": image, "label": label} for image, label in batches()), max_batches=2
    )
    assert by_tuple.ranges == by_dict.ranges


class WithLoss(nn.Module):
    """Returns its loss where it gets labels, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.conv(pixels).relu().mean((2, 3)))
        found = {"logits": logits, "class": logits.argmax(-1)}
        if labels is not None:
            found["loss"] = nn.functional.cross_entropy(logits, labels) * self.weight
        return found


def test_a_loss_inside_the_model_is_that_of_the_npus_logits() -> None:
    """Labels never travel; the loss is PyTorch's on the returned logits, with its gradient to all."""
    model, pixels, labels = WithLoss(), _rand(4, 3, 6, 6), torch.tensor([0, 3, 1, 2])
    npu = _npu()
    batch = {"labels": labels, "pixels": pixels}
    qat = prepare(model, batch, npu).calibrate([batch])
    found, _ = _same_in_both_modes(qat, **batch)
    assert npu.sessions[-1].batches[-1][0].keys() == {"pixels"}
    assert torch.equal(found["loss"], nn.functional.cross_entropy(found["logits"], labels) * model.weight)
    assert torch.equal(found["class"], found["logits"].argmax(-1))
    found["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


class Recurrent(nn.Module):
    """Returns logits, and states that no layer of the NPU computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.lstm = nn.LSTM(6, 8, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, (state, _) = self.lstm(x)
        return self.head(steps[:, -1]), state


@pytest.mark.slow
def test_an_lstm_trains_over_a_real_server() -> None:
    """Logits and state, equal in both modes; the state is PyTorch's on the input as the NPU has it."""
    model, x = Recurrent(), _rand(4, 5, 6)
    with connect() as npu:
        qat = prepare(model, x, npu).calibrate([x])
        (logits, state), _ = _same_in_both_modes(qat, x)
        spec = qat.layer_map.tensors["x"]
        codes = torch.clamp(torch.round(x / spec.scale) + spec.zero_point, -128, 127)
        seen = (codes - spec.zero_point) * torch.tensor(spec.scale)
        torch.testing.assert_close(state, model(seen)[1], rtol=0, atol=1e-6)
        (nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])) + state.square().mean()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        qat.close()


class Gated(nn.Module):
    """Takes what its signature does not name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, unused: Tensor | None = None, **more: Tensor) -> Tensor:
        """Three numbers a sample."""
        assert unused is None
        return self.head(x * more["gate"])


def test_a_keyword_that_the_signature_does_not_name() -> None:
    """It has the batch dimension like any other: the NPU's result follows it, sample by sample."""
    model, x = Gated(), _rand(4, 6)
    batch = {"x": x, "gate": _rand(4, 6, seed=1).sign()}
    qat = prepare(model, batch, _npu()).calibrate([batch])
    both, _ = _same_in_both_modes(qat, **batch)
    _same_in_both_modes(qat, x=x[:3], gate=batch["gate"][:3])
    assert torch.allclose(both, model(**batch), atol=0.1)
    assert not torch.allclose(both, model.head(x), atol=0.1)
