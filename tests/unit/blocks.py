"""The building blocks of today's networks as small torch modules, each with the shape of one sample."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(approximate), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class TorchAttention(nn.Module):
    """nn.MultiheadAttention, which moves the batch to the second axis and merges it with the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class PlainAttention(nn.Module):
    """Attention by hand, as vision transformers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, channels = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, tokens, channels))


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class UnetUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv2d(9, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([F.relu(self.up(F.relu(self.down(x)))), x], 1))


class Fpn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c2, self.c3 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.lateral, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        c2 = F.relu(self.c2(x))
        c3 = F.relu(self.c3(c2))
        nearest = F.interpolate(c3, scale_factor=2, mode="nearest")
        linear = F.interpolate(c3, size=c2.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(torch.cat([self.lateral(c2) + nearest, linear], 1))


class Csp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.silu(self.a(x)).chunk(2, 1)
        return F.silu(self.c(torch.cat([left, right, right + F.silu(self.b(right))], 1)))


class PixelShuffleHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.pixel_unshuffle(F.pixel_shuffle(self.a(x), 2), 2))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(3, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8)
        self.up, self.out = nn.ConvTranspose1d(8, 4, 4, stride=2, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool1d(F.leaky_relu(self.norm(self.a(x)), 0.1), 2)
        return self.out(self.up(y).mean(-1))


class Vit(nn.Module):
    """Patches, class token, position embedding, one block, the class token's head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token, self.position = (nn.Parameter(torch.randn(1, n, 16) * 0.2) for n in (1, 17))
        self.attention, self.mlp = TorchAttention(), Mlp()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.position
        return self.head(self.norm(self.mlp(self.attention(y)))[:, 0])


class Shuffled(nn.Module):
    """Channel shuffle, functions as torch decomposes them, padding, slices, reductions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.prelu = nn.Conv2d(4, 8, 1), nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        y = self.prelu(self.a(x)).view(n, 2, 4, 6, 6).transpose(1, 2).reshape(n, 8, 6, 6)
        y = F.elu(y) + F.softplus(y) * F.mish(y) - F.tanh(y)
        y = F.pad(F.pad(y, (1, 1, 0, 2)), (1, 1, 1, 1), mode="reflect")[:, 1:7, ::2, 1:-1]
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
        return torch.cat([y.mean((1,)).flatten(1), y.amax((2, 3)), y.sum(-1).flatten(1)], 1)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.group = nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8)
        self.instance, self.rms = nn.InstanceNorm2d(8), nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.rms(self.instance(self.group(self.a(x))))


BLOCKS = {
    "gelu": (Mlp, (5, 16)),
    "gelu_tanh": (lambda: Mlp("tanh"), (5, 16)),
    "torch_attention": (TorchAttention, (5, 16)),
    "plain_attention": (PlainAttention, (5, 16)),
    "convnext": (ConvNext, (8, 10, 10)),
    "unet_up": (UnetUp, (3, 12, 12)),
    "fpn": (Fpn, (3, 12, 12)),
    "csp": (Csp, (3, 10, 10)),
    "pixel_shuffle": (PixelShuffleHead, (3, 6, 6)),
    "sequence": (Sequence, (3, 32)),
    "vit": (Vit, (3, 16, 16)),
    "shuffled": (Shuffled, (4, 6, 6)),
    "norms": (Norms, (4, 6, 6)),
}
