"""Models that capture must refuse in the user's words, and models with habits that it must bear: as data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune

from npu_wire.errors import InvalidInput, NpuError, UnsupportedModel


def image(n: int = 4, channels: int = 3) -> Tensor:
    """Images of 8 x 8."""
    return torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """A convolution, something between, and a head; `between(net, hidden)` is what a table's row is about."""

    def __init__(self, between: Callable[[Any, Tensor], Any] = lambda net, h: h, **extra: Any) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)
        self.between = between
        for name, value in extra.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Three numbers a sample, if what is between yields four channels."""
        h = self.between(self, self.conv(x))
        return self.head(h.mean((2, 3)))


@dataclass(frozen=True)
class Refused:
    """A model that cannot be captured.

    Attributes:
        make: model and example.
        words: regular expressions that the message must hold, in any order: what, where, remedy.
        error: class of the error.
    """

    make: Callable[[], tuple[Any, Tensor]]
    words: tuple[str, ...]
    error: type[NpuError] = InvalidInput


def _unsupported(between: Callable[[Any, Tensor], Any], *words: str, **extra: Any) -> Refused:
    return Refused(lambda: (Net(between, **extra), image()), (*words, r"Net"), UnsupportedModel)


def _fake() -> Tensor:
    with FakeTensorMode():
        return torch.randn(4, 3, 8, 8)


def _half_statistics() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean = torch.zeros(4, dtype=torch.float16)
    return Net(lambda net, h: net.norm(h), norm=norm)


def _hooked_to_numpy() -> nn.Module:
    net = Net()
    net.conv.register_forward_hook(lambda module, inputs, output: output + float(np.mean(output.numpy())))
    return net


def _orthogonal() -> nn.Module:
    net = Net()
    parametrizations.orthogonal(net.head)
    return net


def _in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Net()


def _raise(net: Any, h: Tensor) -> Tensor:
    raise KeyError("colour")


@torch.library.custom_op("hostile::twice", mutates_args=())
def _twice(x: Tensor) -> Tensor:
    return x * 2


_twice.register_fake(torch.empty_like)
_PLACE = r"difficult_models.py:\d+"

REFUSED: dict[str, Refused] = {
    "if on a value": _unsupported(
        lambda net, h: h if h.sum() > 0 else -h, "decides by the value of a tensor", _PLACE, r"torch\.where"
    ),
    "int() of a value": _unsupported(
        lambda net, h: sum((h for _ in range(int(h.max().abs()))), h),
        "decides by the value of a tensor",
        _PLACE,
        r"torch\.where",
    ),
    "numpy": _unsupported(
        lambda net, h: torch.from_numpy(h.detach().numpy()),
        "leaves PyTorch for NumPy",
        _PLACE,
        "torch operations",
    ),
    "numpy in a hook": Refused(
        lambda: (_hooked_to_numpy(), image()),
        ("or a hook, leaves PyTorch for NumPy", "module 'conv'", _PLACE, "remove the hook"),
        UnsupportedModel,
    ),
    "loop over the batch": _unsupported(
        lambda net, h: torch.stack([sample * 2 for sample in h]),
        "one size of batch only",
        _PLACE,
        r"x\.shape\[0\]",
    ),
    "batch of the example": _unsupported(
        lambda net, h: h.view(4, 4, 8, 8), "one size of batch only", _PLACE, r"x\.shape\[0\]"
    ),
    "batch of two": Refused(
        lambda: (Net(lambda net, h: h.view(2, 4, 8, 8)), image(2)),
        ("one size of batch only", _PLACE, r"x\.shape\[0\]"),
        UnsupportedModel,
    ),
    "a row for each sample": Refused(
        lambda: (Net(lambda net, h: h + net.rows, rows=torch.ones(2, 4, 8, 8)), image(2)),
        ("one size of batch only", _PLACE, r"as many rows as the batch"),
        UnsupportedModel,
    ),
    "a convolution of each sample's own": _unsupported(
        lambda net, h: F.conv2d(
            h.reshape(1, -1, 8, 8),
            net.head.weight.new_ones(4, 4, 1, 1).repeat(h.shape[0], 1, 1, 1),
            groups=h.shape[0],
        ).reshape(-1, 4, 8, 8),
        "a convolution's groups",
        "size of the batch",
        r"sum\(w\[i\] \* conv\[i\]\(x\)\)",
    ),
    "operator without a translation": _unsupported(
        lambda net, h: torch.linalg.eigvals(h).real.unsqueeze(-1),
        r"operator aten\.linalg_eig has no translation",
        "other torch operators",
    ),
    "operator of the user's own": _unsupported(
        lambda net, h: _twice(h), r"operator hostile\.twice has no translation", "other torch operators"
    ),
    "parametrization without a translation": Refused(
        lambda: (_orthogonal(), image()),
        (
            r"aten\.linalg_householder_product",
            r"module 'head\.parametrizations\.weight\.0'",
            "remove_parametrizations",
        ),
        UnsupportedModel,
    ),
    "dropout that never rests": _unsupported(
        lambda net, h: F.dropout(h, 0.5, training=True),
        "Net draws random numbers",
        r"native_dropout",
        r"nn\.Dropout",
    ),
    "noise": _unsupported(
        lambda net, h: h + torch.randn_like(h), "Net draws random numbers", r"aten\.randn_like", "an input"
    ),
    "TorchScript": Refused(
        lambda: (torch.jit.trace(Net().eval(), image()), image()),
        ("is TorchScript", "module that was scripted or traced"),
        UnsupportedModel,
    ),
    "made in inference mode": Refused(
        lambda: (_in_inference_mode(), image()), ("inference_mode", "outside of it"), UnsupportedModel
    ),
    "fails alone": Refused(
        lambda: (Net(_raise), image()),
        (
            r"Net cannot run on example_inputs, even without an NPU: KeyError: 'colour'",
            _PLACE,
            r"model\.eval\(\)",
        ),
    ),
    "another number of channels": Refused(
        lambda: (Net(), image(channels=1)),
        (r"even without an NPU: .*to have 3 channels", "module 'conv'", "shapes"),
    ),
    "meta model": Refused(
        lambda: (Net().to("meta"), image()), (r"'conv\.weight'", "without values", "load the weights")
    ),
    "meta example": Refused(
        lambda: (Net(), image().to("meta")), ("example_inputs", "without values", "real batch")
    ),
    "fake example": Refused(lambda: (Net(), _fake()), ("example_inputs", "without values", "real batch")),
    "half": Refused(lambda: (Net().half(), image()), (r"'conv\.weight' is torch\.float16", r"\.float\(\)")),
    "bfloat16": Refused(
        lambda: (Net().bfloat16(), image()), (r"'conv\.weight' is torch\.bfloat16", r"\.float\(\)")
    ),
    "half statistics": Refused(
        lambda: (_half_statistics(), image()), (r"'norm\.running_mean' is torch\.float16", r"\.float\(\)")
    ),
    "lazy": Refused(
        lambda: (nn.Sequential(nn.LazyConv2d(4, 3)), image()),
        (r"'0\.weight' has no shape yet", "run the model once"),
    ),
    "function": Refused(lambda: (torch.relu, image()), ("is a builtin_function", r"torch\.nn\.Module")),
}


def _hooked() -> nn.Module:
    net = Net()
    net.conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    net.conv.register_forward_hook(lambda module, inputs, output: output.relu())
    return net


def _twice_used() -> nn.Module:
    return Net(lambda net, h: net.again(net.again(h).relu()), again=nn.Conv2d(4, 4, 3, padding=1))


def _tied() -> nn.Module:
    net = Net(
        lambda net, h: net.second(net.first(h).relu()), first=nn.Conv2d(4, 4, 1), second=nn.Conv2d(4, 4, 1)
    )
    net.second.weight = net.first.weight
    return net


def _one_storage() -> nn.Module:
    net, store = Net(), torch.randn(10, 4)
    net.head.weight, net.conv.bias = nn.Parameter(store[:3]), nn.Parameter(store[5])
    return net


def _pruned() -> nn.Module:
    net = Net()
    prune.l1_unstructured(net.conv, "weight", 0.3)
    return net


def _normalized(how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    net = Net()
    how(net.conv)
    return net


def _counts(net: Any, h: Tensor) -> Tensor:
    net.steps += 1
    return h


def _erases(net: Any, h: Tensor) -> Tensor:
    h[:, 0] = 0
    return h


def _in_place(net: Any, h: Tensor) -> Tensor:
    h += 1
    return h.mul_(2).relu_()


def _unfolded(net: Any, h: Tensor) -> Tensor:
    """Patches as MobileViT cuts them: views of what it believes to lie channels-first."""
    n = h.shape[0]
    patches = h.relu().reshape(n * 16, 2, 4, 2).transpose(1, 2).reshape(n, 4, 16, 4)
    patches = patches.permute(0, 3, 2, 1).reshape(n * 4, 16, 4) * 1.5
    return patches.contiguous().view(n, 4, 16, -1).permute(0, 3, 2, 1).reshape(n, 4, 8, 8)


def _counted(net: Any, h: Tensor) -> Tensor:
    """`len` is a plain number to Python."""
    return h.relu().reshape(len(h), 2, -1).reshape(len(h), 4, 8, 8)


def _heads_merged(net: Any, h: Tensor) -> Tensor:
    """A view of what PyTorch's attention computes, which lies in memory as the heads will be merged."""
    n, _, height, width = h.shape
    q = h.repeat(1, 4, 1, 1).permute(0, 2, 3, 1).contiguous().view(n, height * width, 2, 8).transpose(1, 2)
    attended = F.scaled_dot_product_attention(q, q, q).permute(0, 2, 1, 3)
    return attended.view(n, height, width, 16)[..., :4].permute(0, 3, 1, 2)


def _masked_under_vmap(net: Any, h: Tensor) -> Tensor:
    """Attention to what comes before, in the words of Hugging Face: a rule for one pair, mapped over all."""
    index = torch.arange(8)
    seen = torch.vmap(lambda i: torch.vmap(lambda j: i.new_ones((), dtype=torch.bool) & (j <= i))(index))
    q = h.mean(3).transpose(1, 2)
    return h + F.scaled_dot_product_attention(q, q, q, seen(index)).transpose(1, 2).unsqueeze(3)


def _rotated(net: Any, h: Tensor) -> Tensor:
    """Pairs of channels turned by an angle that grows along a row, as complex numbers."""
    angle = torch.arange(8.0)
    with torch.no_grad():
        turn = torch.polar(torch.ones_like(angle), angle) * 1.5
    pairs = torch.view_as_complex(h.unflatten(1, (2, 2)).movedim(2, -1).contiguous())
    return torch.view_as_real(pairs * turn[None, None, None]).movedim(-1, 2).flatten(1, 2)


def _sorted(net: Any, h: Tensor) -> Tensor:
    """Rows in the order of their means, channels alike."""
    order = h.mean((1, 3), keepdim=True).argsort(2)
    return torch.take_along_dim(h, order, dim=2) * torch.arange(8.0)[:, None]


def _filled(net: Any, h: Tensor) -> Tensor:
    """Memory of nobody's, written in two parts; one of them the same row for every row."""
    whole = h.new_empty(h.shape)
    whole[..., :4, :] = h[..., :4, :] * 2
    whole[..., 4:, :] = h[..., :1, :]
    return whole


def _copied_broadcast(net: Any, h: Tensor) -> Tensor:
    """One channel, written to all of an image that has been read before."""
    first = h[:, 0]
    again = h * 0.5
    again[:, 1:] = first.unsqueeze(1)
    again[:, 2, :4] = first[:, 0].unsqueeze(1)
    return again + h


def _faint(net: Any, h: Tensor) -> Tensor:
    """Pixels of which some are so faint that their mean square has the code of 0."""
    h = torch.cat([h[..., :4], h[..., 4:] * 1e-2], -1)
    return h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-6)


BORNE: dict[str, Callable[[], nn.Module]] = {
    "views of a channels-first order": lambda: Net(_unfolded),
    "pooled to one pixel, channels-last": lambda: Net(lambda net, h: F.adaptive_avg_pool2d(h, 1)).to(
        memory_format=torch.channels_last
    ),  # type: ignore[call-overload]
    "len() of the batch": lambda: Net(_counted),
    "a view of attention": lambda: Net(_heads_merged),
    "a mask made under vmap": lambda: Net(_masked_under_vmap),
    "one minus an integer": lambda: Net(lambda net, h: h * (1.0 - (h.argmax(1, keepdim=True) > 2).long())),
    "complex numbers that rotate": lambda: Net(_rotated),
    "taken along a dimension": lambda: Net(_sorted),
    "new memory filled": lambda: Net(_filled),
    "one row written to many": lambda: Net(_copied_broadcast),
    "normalized next to nothing": lambda: Net(_faint),
    "hooks that compute": _hooked,
    "a module used twice": _twice_used,
    "tied weights": _tied,
    "parameters in one storage": _one_storage,
    "pruned": _pruned,
    "weight_norm": lambda: _normalized(parametrizations.weight_norm),
    "weight_norm as a hook": lambda: _normalized(nn.utils.weight_norm),
    "spectral_norm": lambda: _normalized(parametrizations.spectral_norm),
    "spectral_norm as a hook": lambda: _normalized(nn.utils.spectral_norm),
    "a slice written": lambda: Net(_erases),
    "dropout": lambda: Net(lambda net, h: net.dropout(h), dropout=nn.Dropout(0.5)),
    "a counter in a buffer": lambda: Net(_counts, steps=torch.zeros((), dtype=torch.int64)),
    "operators in place": lambda: Net(_in_place),
    "constant in calibration": lambda: Net(lambda net, h: (h * 0 + 5).relu() + h),
    "an activation of 1e-31": lambda: Net(lambda net, h: h + h * 1e-31),
    "torch.compile": lambda: torch.compile(Net()),  # type: ignore[arg-type, return-value]
    "data parallel": lambda: nn.DataParallel(Net()),
}
