"""The framework's own quantization-aware training, torchao PT2E, and its way onto an NPU.

torchao simulates INT8 arithmetic in float32 (fake quantization). What it has learned, weights and activation
ranges, is then deployed to the NPU as its users would: weights by parameter name, ranges joined to the NPU's
tensors by the weight of the layer that reads or writes them.
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from npu_wire.layer_map import LayerMap
from trainer_client.commands.data import Dataset
from trainer_client.commands.trainer import OnStep, Recipe, accuracy, fit

Range = tuple[float, float]

FREEZE_BATCH_NORM_AT = 0.4
"""Share of the budget after which batch norm is frozen (torchao's QAT tutorial: 4 of 10 epochs)."""
FREEZE_OBSERVERS_AT = 0.5
"""Share of the budget after which ranges stay as they are (the tutorial: 5 of 10 epochs)."""

_aten = torch.ops.aten
_WEIGHTED = frozenset({_aten.conv1d.default, _aten.conv2d.default, _aten.linear.default})
_BATCH_NORM = _aten.batch_norm.default
# What lies between a weighted layer and the observer of its output in the prepared graph: the division that
# undoes the folded scale of batch norm, batch norm itself, and the activations that every NPU fuses.
_EPILOGUE = frozenset(
    {
        _aten.div.Tensor,
        _BATCH_NORM,
        _aten.relu.default,
        _aten.relu_.default,
        _aten.hardtanh.default,
        _aten.hardtanh_.default,
        _aten.clamp.default,
    }
)


@dataclass(frozen=True)
class TorchaoResult:
    """What torchao's training leaves behind.

    Attributes:
        state: parameters and buffers under the names of the user's model.
        input_ranges: weight parameter -> range of the activation that its layer reads.
        output_ranges: weight parameter -> range of what its layer writes, after a fused activation.
        simulated_accuracy: accuracy on the test set that torchao's own INT8 simulation promises, in percent.
    """

    state: Mapping[str, torch.Tensor]
    input_ranges: Mapping[str, Range] = field(default_factory=dict)
    output_ranges: Mapping[str, Range] = field(default_factory=dict)
    simulated_accuracy: float = 0.0


def train_torchao(
    model: nn.Module, data: Dataset, recipe: Recipe, seed: int, on_step: OnStep | None = None
) -> TorchaoResult:
    """Fine-tunes a copy of `model` with torchao's QAT as its tutorial does it.

    The quantizer is `X86InductorQuantizer` with its default QAT configuration: per-channel symmetric INT8
    weights, per-tensor affine 8-bit activations, moving average min-max observers. Batch norm starts in
    training mode.

    Args:
        model: FP32 network; not changed.
        data: trained on its training half, its test half measures `simulated_accuracy`.
        recipe: budget and optimizer.
        seed: order of the images and their augmentation.
        on_step: progress.
    """
    names = set(model.state_dict())
    with _quiet():
        prepared = prepare_torchao(copy.deepcopy(model), data.train_x[:2])
        from torchao.quantization.pt2e import disable_observer  # type: ignore[import-untyped]

        def after(step: int, loss: float) -> None:
            if step == int(recipe.steps * FREEZE_BATCH_NORM_AT):
                freeze_batch_norm(prepared)
            if step == int(recipe.steps * FREEZE_OBSERVERS_AT):
                prepared.apply(disable_observer)
            if on_step:
                on_step(step, loss)

        prepared.train()
        fit(prepared, data, recipe, seed, on_step=after)
        prepared.apply(
            disable_observer
        )  # a budget too small for the schedule must not let the test set move ranges
        inputs, outputs = observed_ranges(prepared)
        simulated = accuracy(prepared, data.test_x, data.test_y)
    state = {name: value.clone() for name, value in prepared.state_dict().items() if name in names}
    return TorchaoResult(state, inputs, outputs, simulated)


def freeze_batch_norm(prepared: fx.GraphModule) -> None:
    """Makes batch norm use its running statistics from now on."""
    for node in prepared.graph.nodes:
        if node.target is _BATCH_NORM:
            node.update_arg(5, False)  # (input, weight, bias, running_mean, running_var, training, ...)
    prepared.recompile()


def observed_ranges(prepared: fx.GraphModule) -> tuple[dict[str, Range], dict[str, Range]]:
    """Observed ranges of the inputs and of the outputs of weighted layers, by weight parameter."""
    inputs: dict[str, Range] = {}
    outputs: dict[str, Range] = {}
    for node in prepared.graph.nodes:
        if node.target not in _WEIGHTED:
            continue
        weight = _weight_name(node.args[1])
        read = _observer_range(prepared, node.args[0])
        if read:
            inputs[weight] = read
        written = node
        while len(written.users) == 1 and next(iter(written.users)).target in _EPILOGUE:
            written = next(iter(written.users))
        for user in written.users:
            observed = _observer_range(prepared, user)
            if observed:
                outputs[weight] = observed
    return inputs, outputs


def join_ranges(result: TorchaoResult, layer_map: LayerMap) -> dict[str, Range]:
    """Ranges of torchao's observers under the names of the NPU's tensors.

    A tensor that only moves data shares the range of what it moves. Tensors without an observer are absent.
    """
    producers = {layer.name: layer for layer in layer_map.layers}
    joined: dict[str, Range] = {}

    def assign(tensor: str, observed: Range) -> None:
        joined[tensor] = observed
        layer = producers.get(tensor)
        if layer and layer.moves_data_only and len(layer.inputs) == 1:
            assign(layer.inputs[0], observed)

    for layer in layer_map.layers:
        for parameter in layer.parameters:
            if parameter in result.output_ranges:
                assign(layer.name, result.output_ranges[parameter])
    for layer in layer_map.layers:  # what the reader observed wins: it sees the tensor as it is stored
        for parameter in layer.parameters:
            if parameter in result.input_ranges:
                assign(layer.inputs[0], result.input_ranges[parameter])
    return joined


def prepare_torchao(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """The model with fake quantization in place and batch norm in training mode; it may share parameters.

    Args:
        model: FP32 network; put into training mode.
        example: one batch, at least two samples.
    """
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e  # type: ignore[import-untyped]
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (  # type: ignore[import-untyped]
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    dynamic_batch = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model.train(), (example,), dynamic_shapes=dynamic_batch)
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    prepared: fx.GraphModule = prepare_qat_pt2e(exported.module(), quantizer)
    allow_exported_model_train_eval(prepared)
    return prepared


def _weight_name(node: fx.Node) -> str:
    """Name of the parameter that a weighted layer's fake-quantized, batch-norm-scaled weight comes from."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]  # weight is the first operand of fake quantization and of the scaling
    return str(node.target)


def _observer_range(prepared: fx.GraphModule, node: Any) -> Range | None:
    """The real interval that a per-tensor fake quantization can represent, or None for any other node."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = prepared.get_submodule(str(node.target))
    observer = getattr(module, "activation_post_process", None)
    if observer is None or observer.min_val.numel() != 1 or not torch.isfinite(observer.min_val).all():
        return None
    # Both ends enclose zero, as the fake quantization itself has it.
    return min(float(observer.min_val), 0.0), max(float(observer.max_val), 0.0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what torchao says about optional CUDA libraries and its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
