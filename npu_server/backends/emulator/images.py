"""Geometry of int8 images (N, H, W, C)."""

import torch
import torch.nn.functional as F

from npu_server.compile.graph import Window


def image_first(nhwc: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) on the same memory."""
    if nhwc.shape[3] > 1:
        return nhwc.permute(0, 3, 1, 2)
    # With one channel both orders are the same memory, but torch 2.13 on oneDNN convolves wrongly (batch > 1)
    # where the strides are those of a transposed view.
    return nhwc.reshape(len(nhwc), 1, nhwc.shape[1], nhwc.shape[2])


def pad_image(x: torch.Tensor, pads: tuple[int, int, int, int], value: float) -> torch.Tensor:
    """An image with `value` around it: (top, left, bottom, right)."""
    top, left, bottom, right = pads
    return F.pad(x, (0, 0, left, right, top, bottom), value=value)


def image_windows(padded: torch.Tensor, window: Window) -> torch.Tensor:
    """A view of what the window meets at each of its positions.

    Args:
        padded: the image, its padding included; contiguous.
        window: the window; its pads do not count here.

    Returns:
        Shape (N, output H, output W, window height, window width, C).
    """
    n, height, width, channels = padded.shape
    apart, (down, across), (rows, columns) = padded.stride(), window.strides, window.dilations
    bare = Window(window.size, window.strides, dilations=window.dilations)
    return padded.as_strided(
        (n, *bare.output_size(height, width), *window.size, channels),
        (apart[0], apart[1] * down, apart[2] * across, apart[1] * rows, apart[2] * columns, apart[3]),
        padded.storage_offset(),
    )


def window_maxima(padded: torch.Tensor, window: Window) -> torch.Tensor:
    """The largest code in each window, shape (N, output H, output W, C), contiguous; see `image_windows`."""
    windows = image_windows(padded, window)
    positions = [windows[:, :, :, i, j] for i in range(window.size[0]) for j in range(window.size[1])]
    largest = positions[0].clone(memory_format=torch.contiguous_format)
    for codes in positions[1:]:
        torch.maximum(largest, codes, out=largest)
    return largest
