import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from npu_wire.errors import InvalidInput
from trainer_client.commands.data import Dataset, digits, fashion_mnist, load_dataset, read_idx


def own_dataset() -> Dataset:
    """What a user's own function looks like."""
    x, y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 1])
    return Dataset("own", x, y, x, y)


def not_a_dataset() -> int:
    """A user's mistake."""
    return 3


def write_idx(path: Path, values: np.ndarray) -> None:
    """Writes an IDX file as its specification draws it: magic, sizes, bytes."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_digits_split_is_a_partition_of_sklearns_labels() -> None:
    """The two halves together hold each class as often as scikit-learn's own set."""
    data = digits()
    assert (len(data.train_y), len(data.test_y)) == (1097, 700)
    ours = torch.cat([data.train_y, data.test_y]).bincount()
    assert np.bincount(load_digits().target).tolist() == ours.tolist()


def test_digits_keep_flat_areas_exactly() -> None:
    """A blank corner pixel stays (0 - .305) / .376 after scaling up."""
    data = digits()
    assert data.train_x.shape == (1097, 1, 16, 16)
    assert float(data.train_x.min()) == pytest.approx((0 - 0.305) / 0.376)
    assert float(data.train_x.max()) == pytest.approx((1 - 0.305) / 0.376)


def test_idx_round_trip(tmp_path: Path) -> None:
    """A file written after the IDX specification is read back."""
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", values)
    np.testing.assert_array_equal(values, read_idx(tmp_path / "a.gz"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "cannot read"),
        (gzip.compress(b"PNG?...."), "not an IDX file"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"), "holds 3 bytes for shape"),
    ],
)
def test_broken_idx_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that is not IDX is refused with its path."""
    path = tmp_path / "broken.gz"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_fashion_mnist_from_a_directory(tmp_path: Path) -> None:
    """Four IDX files become normalised images with their labels."""
    for stem, count in (("train", 3), ("t10k", 2)):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", np.full((count, 28, 28), 255))
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.arange(count))
    data = fashion_mnist(tmp_path)
    assert (data.train_x.shape, data.test_x.shape) == ((3, 1, 28, 28), (2, 1, 28, 28))
    assert float(data.test_x[1, 0, 5, 5]) == pytest.approx((1 - 0.286) / 0.353)
    assert data.train_y.tolist() == [0, 1, 2]


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    """The error ends with the remedy."""
    with pytest.raises(InvalidInput, match="apt-get install dataset-fashion-mnist"):
        load_dataset("fashion-mnist", tmp_path / "nowhere")


def test_own_dataset_by_reference() -> None:
    """A `package.module:function` is imported and called."""
    assert load_dataset(f"{__name__}:own_dataset").classes == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "choose digits, fashion-mnist"),
        ("no.such.module:f", "cannot import"),
        (f"{__name__}:not_a_dataset", "returned int"),
    ],
)
def test_unknown_dataset_is_refused(name: str, message: str) -> None:
    """Names that lead nowhere are answered with what would."""
    with pytest.raises(InvalidInput, match=message):
        load_dataset(name)


def test_wrong_dtypes_are_refused() -> None:
    """A data set says at once that its labels are no class numbers."""
    x, y = torch.zeros(4, 1, 2, 2), torch.zeros(4)
    with pytest.raises(InvalidInput, match=r"labels torch\.float32 \(4,\)"):
        Dataset("own", x, y, x, y)
