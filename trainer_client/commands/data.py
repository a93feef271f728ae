"""Image classification data that is real and needs no download, and the door for a user's own."""

import gzip
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from npu_wire.errors import InvalidInput

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""

_DIGITS_TRAIN = 1097
_DIGITS_SPLIT_SEED = 1234


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory, split once and for all.

    Attributes:
        name: what tables call it.
        train_x: float32, shape (n, channels, height, width), normalised.
        train_y: int64, shape (n,), classes from 0.
        test_x: as train_x; seen by evaluation only, never by training, calibration or selection.
        test_y: as train_y.
        shift: augmentation rolls a batch by up to this many pixels each way.
        flip: augmentation mirrors images with probability 1/2.
    """

    name: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if x.dtype != torch.float32 or y.dtype != torch.int64 or y.shape != x.shape[:1] or len(y) == 0:
                raise InvalidInput(
                    f"data set {self.name!r}: {part} images are {x.dtype} {tuple(x.shape)} and labels "
                    f"{y.dtype} {tuple(y.shape)}; give float32 images (n, ...) and int64 labels (n,)"
                )

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(torch.max(self.train_y.max(), self.test_y.max())) + 1

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(self.train_x.shape[1])

    def calibration_set(self, images: int) -> torch.Tensor:
        """The first `images` training images, as they are: ranges must not depend on a seed."""
        return self.train_x[:images]


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Loads "digits", "fashion-mnist" or what a user's own `package.module:function` returns.

    Raises:
        InvalidInput: unknown name, missing files, or a function that returns no `Dataset`.
    """
    if name == "digits":
        return digits()
    if name == "fashion-mnist":
        return fashion_mnist(data_dir or FASHION_MNIST_DIR)
    if ":" not in name:
        raise InvalidInput(
            f"unknown data set {name!r}; choose digits, fashion-mnist or your own package.module:function"
        )
    dataset = load_object(name)()
    if not isinstance(dataset, Dataset):
        raise InvalidInput(
            f"{name} returned {type(dataset).__name__}; return a trainer_client.commands.data.Dataset instead"
        )
    return dataset


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 scaled up to 16x16: 1,097 to train on, 700 to test on."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(
        (images / 16 - 0.305) / 0.376, scale_factor=2, mode="bilinear", align_corners=False
    )
    labels = torch.tensor(source.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_DIGITS_SPLIT_SEED))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return Dataset("digits", images[train], labels[train], images[test], labels[test], shift=1)


def fashion_mnist(directory: Path) -> Dataset:
    """Fashion-MNIST from its four gzip IDX files: 60,000 images of 28x28 to train on, 10,000 to test on.

    Raises:
        InvalidInput: a file is missing or is not IDX.
    """
    if not directory.is_dir():
        raise InvalidInput(
            f"no Fashion-MNIST in {directory}; run `apt-get install dataset-fashion-mnist` or set --data-dir"
        )

    def images(stem: str) -> torch.Tensor:
        codes = read_idx(directory / f"{stem}-images-idx3-ubyte.gz")
        return (torch.tensor(codes, dtype=torch.float32).unsqueeze(1) / 255 - 0.286) / 0.353

    def labels(stem: str) -> torch.Tensor:
        return torch.tensor(read_idx(directory / f"{stem}-labels-idx1-ubyte.gz"), dtype=torch.int64)

    return Dataset(
        "fashion-mnist", images("train"), labels("train"), images("t10k"), labels("t10k"), shift=1, flip=True
    )


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Reads a gzip IDX file of bytes: magic 0 0 8 ndim, ndim big-endian uint32 sizes, the bytes.

    Raises:
        InvalidInput: the file is missing or says something else.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise InvalidInput(
            f"cannot read {path}: {error}; run `apt-get install dataset-fashion-mnist` or set --data-dir"
        ) from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise InvalidInput(f"{path} is not an IDX file of unsigned bytes; fetch it again")
    start = 4 + 4 * raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], ">u4"))
    if len(raw) - start != int(np.prod(shape)):
        raise InvalidInput(f"{path} holds {len(raw) - start} bytes for shape {shape}; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def load_object(reference: str) -> Callable[[], Any]:
    """Imports `package.module:callable` from the installed packages and the working directory.

    Raises:
        InvalidInput: no such module or no such callable.
    """
    module_name, _, attribute = reference.partition(":")
    if (here := os.getcwd()) not in sys.path:  # a console script's own folder stands there instead
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInput(
            f"cannot import {reference!r}: {error}; give package.module:function, importable from "
            f"{here} (set PYTHONPATH if it lies elsewhere)"
        ) from error
    if not callable(found):
        raise InvalidInput(f"{reference!r} is a {type(found).__name__}; give a function without arguments")
    return found  # type: ignore[no-any-return]
