"""The catalogue: whose code a network is, how it is built, and what it is fed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from . import own
from .shrinking import shapes_of_inputs, shrunk, without_labels

LABELS = 3
TOKENS = 12

GROUPS = {
    "image classification": "IMAGE_CLASSIFICATION",
    "semantic segmentation": "SEMANTIC_SEGMENTATION",
    "object detection": "OBJECT_DETECTION",
    "depth estimation": "DEPTH_ESTIMATION",
    "audio classification": "AUDIO_CLASSIFICATION",
    "text classification": "SEQUENCE_CLASSIFICATION",
}
"""The mappings of `transformers` by the name that the table uses."""

GEFFNET = (
    "mnasnet_050",
    "semnasnet_050",
    "mnasnet_small",
    "mobilenetv2_100",
    "fbnetc_100",
    "spnasnet_100",
    "efficientnet_b0",
    "efficientnet_es",
    "efficientnet_cc_b0_4e",
    "efficientnet_lite0",
    "tf_efficientnet_b0",
    "tf_efficientnet_es",
    "tf_efficientnet_lite0",
    "mixnet_s",
    "tf_mixnet_s",
    "mobilenetv3_rw",
    "mobilenetv3_small_075",
    "mobilenetv3_small_minimal_100",
    "tf_mobilenetv3_small_075",
    "tf_mobilenetv3_small_minimal_100",
)
"""One of each family and each of its dialects ("tf": TensorFlow's padding)."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Network:
    """One network of the catalogue.

    Attributes:
        name: its class, or what it is.
        group: heading of the table that it stands under.
        build: makes the module; raises `ImportError` where a package is missing.
        batch: makes n samples for a built module, by names of the arguments of its forward.
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    batch: Callable[[nn.Module, int, torch.Generator], Batch]

    def model(self) -> nn.Module:
        """The network in evaluation mode, with weights that keep the signal alive."""
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=max(1, parameter[0].numel()) ** -0.5)
                else:
                    parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()


@cache
def catalogue() -> tuple[Network, ...]:
    """Every network, in the order of the table."""
    return (*_transformers(), *_geffnet(), *_own())


def find(name: str) -> Network:
    """The network of that name."""
    return next(network for network in catalogue() if network.name == name)


def _transformers() -> list[Network]:
    from transformers.models.auto import modeling_auto

    networks: dict[str, Network] = {}
    for group, mapping in GROUPS.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for name in names if isinstance(names, tuple) else (names,):
                networks.setdefault(name, Network(name, group, _class(name), _batch_of(group)))
    return list(networks.values())


def _class(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        found = getattr(transformers, name)
        config = shrunk(found.config_class, num_labels=LABELS)
        for part in (config, config.get_text_config()):
            if getattr(part, "pad_token_id", 0) is None:
                part.pad_token_id = 0
        config.problem_type = "single_label_classification"
        config._experts_implementation = "batched_mm"  # the grouped product has no ONNX form
        model: nn.Module = found(config)
        return model

    return build


def _batch_of(group: str) -> Callable[[nn.Module, int, torch.Generator], Batch]:
    """What a model of `transformers` is fed: its main input, masks, and labels where it computes a loss."""

    def make(model: nn.Module, n: int, random: torch.Generator) -> Batch:
        config: Any = model.config
        name = str(model.main_input_name)  # type: ignore[union-attr]
        shapes = shapes_of_inputs(type(model).__name__, str(config.model_type))
        batch: dict[str, Tensor] = {}
        for given in shapes or (name,):
            batch[given] = _values(given, shapes.get(given), config, n, random)
        name = next(iter(batch))
        if "input_ids" in batch and group == "text classification":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, -2:] = 0
        if without_labels(type(model).__name__) or "labels" not in signature(model.forward).parameters:
            return batch
        if group.endswith("classification"):
            batch["labels"] = torch.randint(LABELS, (n,), generator=random)
        if group == "semantic segmentation":
            size = batch[name].shape[-2:]
            batch["labels"] = torch.randint(LABELS, (n, *size), generator=random)
        return batch

    return make


def _values(name: str, shape: list[int] | None, config: Any, n: int, random: torch.Generator) -> Tensor:
    if name in ("input_ids", "decoder_input_ids", "inputs") and len(shape or [0]) == 1:
        vocabulary = getattr(config.get_text_config(), "vocab_size", 99)
        ids = torch.randint(3, vocabulary, (n, *(shape or [TOKENS])), generator=random)
        ids[:, -1] = 2  # the end of the sequence, which classifiers behind a decoder look for
        return ids
    if name.endswith("mask"):
        return torch.ones(n, *(shape or [TOKENS]), dtype=torch.long)
    if name == "spatial_shapes":
        return torch.tensor([shape] * n)
    if shape is None:
        size = _image_size(config)
        shape = [getattr(config, "num_channels", 3), *size] if name == "pixel_values" else [3200]
    return torch.randn(n, *shape, generator=random)


def _image_size(config: Any) -> tuple[int, int]:
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        size = getattr(part, "image_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else tuple(size)
    return (32, 32)


def _geffnet() -> list[Network]:
    def build_of(name: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            import geffnet

            model: nn.Module = getattr(geffnet, name)(num_classes=LABELS)
            return model

        return build

    def images(model: nn.Module, n: int, random: torch.Generator) -> Batch:
        return {"x": torch.randn(n, 3, 32, 32, generator=random)}

    return [Network(name, "geffnet", build_of(name), images) for name in GEFFNET]


def _own() -> list[Network]:
    def batch_of(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[nn.Module, int, torch.Generator], Batch]:
        return lambda model, n, random: {
            name: torch.randn(n, *shape, generator=random) for name, shape in shapes.items()
        }

    return [
        Network(name, group, build, batch_of(shapes))
        for group, networks in own.NETWORKS.items()
        for name, (build, shapes) in networks.items()
    ]
