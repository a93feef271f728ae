"""Networks that no installed package has: a keyword-spotting DS-CNN and a YOLO-style detector.

Written after their papers, with PyTorch's own layers; the catalogue says "own" beside them.
"""

import torch
from torch import Tensor, nn


def conv_bn(
    inner: int, out: int, kernel: int | tuple[int, int], stride: int | tuple[int, int] = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size (divided by the stride), and batch norm."""
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    return nn.Sequential(
        nn.Conv2d(inner, out, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(out)
    )


class DsCnn(nn.Module):
    """DS-CNN of "Hello Edge" (Zhang et al. 2017), as MLPerf Tiny runs it: 49 x 10 MFCCs, 12 words."""

    def __init__(self, width: int = 64, blocks: int = 4, words: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(1, width, (10, 4), (2, 2)), nn.ReLU()]
        for _ in range(blocks):
            layers += [conv_bn(width, width, 3, groups=width), nn.ReLU(), conv_bn(width, width, 1), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Dropout(0.4), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class ConvSilu(nn.Sequential):
    """The unit of YOLOv5 and its successors: convolution, batch norm, SiLU."""

    def __init__(self, inner: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(*conv_bn(inner, out, kernel, stride), nn.SiLU())


class CspBlock(nn.Module):
    """Split in two halves, bottlenecks on one of them, all that comes out side by side (YOLOv8's C2f)."""

    def __init__(self, inner: int, out: int, repeats: int, shortcut: bool) -> None:
        super().__init__()
        half = out // 2
        self.enter = ConvSilu(inner, out)
        self.bottlenecks = nn.ModuleList(
            nn.Sequential(ConvSilu(half, half, 3), ConvSilu(half, half, 3)) for _ in range(repeats)
        )
        self.leave = ConvSilu((2 + repeats) * half, out)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for bottleneck in self.bottlenecks:
            y = bottleneck(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        return self.leave(torch.cat(parts, 1))


class SpatialPyramid(nn.Module):
    """Three max pools in a row, all four stages concatenated (SPPF)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = ConvSilu(width, width // 2), ConvSilu(width * 2, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        stages = [self.enter(x)]
        for _ in range(3):
            stages.append(self.pool(stages[-1]))
        return self.leave(torch.cat(stages, 1))


class YoloLike(nn.Module):
    """A detector of the YOLOv8 kind: CSP backbone, feature pyramid down and up (PAN), three decoupled heads.

    Returns the raw maps of all scales side by side, (n, 4 * bins + classes, cells), as YOLO's head does
    before boxes are decoded on the host.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128, 256), classes: int = 20) -> None:
        super().__init__()
        w, bins = widths, 8
        self.stem = nn.Sequential(ConvSilu(3, w[0], 3, 2), ConvSilu(w[0], w[1], 3, 2))
        self.stage2 = CspBlock(w[1], w[1], 1, True)
        self.stage3 = nn.Sequential(ConvSilu(w[1], w[2], 3, 2), CspBlock(w[2], w[2], 2, True))
        self.stage4 = nn.Sequential(ConvSilu(w[2], w[3], 3, 2), CspBlock(w[3], w[3], 2, True))
        self.stage5 = nn.Sequential(
            ConvSilu(w[3], w[4], 3, 2), CspBlock(w[4], w[4], 1, True), SpatialPyramid(w[4])
        )
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.top4 = CspBlock(w[4] + w[3], w[3], 1, False)
        self.top3 = CspBlock(w[3] + w[2], w[2], 1, False)
        self.down3 = ConvSilu(w[2], w[2], 3, 2)
        self.out4 = CspBlock(w[2] + w[3], w[3], 1, False)
        self.down4 = ConvSilu(w[3], w[3], 3, 2)
        self.out5 = CspBlock(w[3] + w[4], w[4], 1, False)
        self.boxes = nn.ModuleList(
            nn.Sequential(ConvSilu(c, w[2], 3), nn.Conv2d(w[2], 4 * bins, 1)) for c in w[2:]
        )
        self.classes = nn.ModuleList(
            nn.Sequential(ConvSilu(c, w[2], 3), nn.Conv2d(w[2], classes, 1)) for c in w[2:]
        )

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.stage3(self.stage2(self.stem(x)))
        p4 = self.stage4(p3)
        p5 = self.stage5(p4)
        t4 = self.top4(torch.cat([self.up(p5), p4], 1))
        t3 = self.top3(torch.cat([self.up(t4), p3], 1))
        o4 = self.out4(torch.cat([self.down3(t3), t4], 1))
        o5 = self.out5(torch.cat([self.down4(o4), p5], 1))
        maps = [
            torch.cat([box(f), kind(f)], 1)
            for f, box, kind in zip((t3, o4, o5), self.boxes, self.classes, strict=True)
        ]
        return torch.cat([m.flatten(2) for m in maps], 2)
