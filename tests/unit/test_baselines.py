import pytest
import torch
from torch import nn

from npu_wire.layer_map import LayerMap, LayerSpec, TensorSpec
from trainer_client.commands.baselines import TorchaoResult, join_ranges, train_torchao
from trainer_client.commands.data import Dataset, digits
from trainer_client.commands.nets import build_model
from trainer_client.commands.trainer import Recipe, fit


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Real images."""
    return digits()


@pytest.fixture(scope="module")
def trained(data: Dataset) -> nn.Module:
    """A net that already classifies well."""
    torch.manual_seed(0)
    model = build_model("mobilenet-v2-small", data.classes, data.channels)
    fit(model, data, Recipe(60, 32, 0.02, "sgd-onecycle"), seed=0)
    return model


@pytest.fixture(scope="module")
def result(trained: nn.Module, data: Dataset) -> TorchaoResult:
    """A short torchao run."""
    return train_torchao(trained, data, Recipe(10, 32, 1e-3, "adam-cosine"), seed=0)


def test_state_loads_into_the_users_model(trained: nn.Module, result: TorchaoResult) -> None:
    """Every parameter and buffer is there under the user's name, and training has changed the weights."""
    fresh = build_model("mobilenet-v2-small", 10, 1)
    fresh.load_state_dict(result.state)
    assert not torch.equal(fresh.classifier.weight, trained.classifier.weight)


def test_every_weighted_layer_has_the_range_of_its_input(trained: nn.Module, result: TorchaoResult) -> None:
    """Each convolution and linear layer is found, by the name of its weight."""
    layers = [f"{n}.weight" for n, m in trained.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(result.input_ranges) == sorted(layers)


def test_ranges_are_those_of_the_activations(result: TorchaoResult, data: Dataset) -> None:
    """The stem reads the images themselves; ReLU6 bounds what it writes; a bottleneck's range is signed."""
    low, high = result.input_ranges["features.0.0.weight"]
    assert low == pytest.approx(float(data.train_x.min()), rel=1e-3)
    assert high == pytest.approx(float(data.train_x.max()), rel=1e-3)
    low, high = result.output_ranges["features.0.0.weight"]
    assert low == 0
    assert 0 < high <= 6
    assert result.output_ranges["features.2.body.2.0.weight"][0] < 0


def tensor(name: str) -> TensorSpec:
    """An INT8 tensor."""
    return TensorSpec(name, (1,), 1.0, 0)


def test_ranges_join_by_weight_and_pass_through_layers_that_move_data() -> None:
    """A reader's range reaches the tensor behind a flatten; a tensor nobody observes stays out."""
    layer_map = LayerMap(
        (tensor("x"),),
        (
            LayerSpec(tensor("relu"), "Conv", ("x",), parameters=("c.weight", "b.weight")),
            LayerSpec(tensor("sum"), "Add", ("relu", "x")),
            LayerSpec(tensor("mean"), "GlobalAveragePool", ("sum",)),
            LayerSpec(tensor("flat"), "Flatten", ("mean",), moves_data_only=True),
            LayerSpec(tensor("logits"), "Gemm", ("flat",), parameters=("fc.weight", "fc.bias")),
        ),
        ("logits",),
    )
    result = TorchaoResult(
        {}, input_ranges={"c.weight": (-1, 2), "fc.weight": (0, 3)}, output_ranges={"c.weight": (0, 4)}
    )
    expected = {"x": (-1, 2), "relu": (0, 4), "flat": (0, 3), "mean": (0, 3)}
    assert join_ranges(result, layer_map) == expected
