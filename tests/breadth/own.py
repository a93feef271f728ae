"""Networks that no installed package has in small: recurrent, 1-D, 3-D, and of unusual signatures."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LABELS = 3


class Recurrent(nn.Module):
    """A sequence (n, time, features) through a recurrent layer and a classifier of its last step."""

    def __init__(self, layer: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.recurrent = layer(8, 12, batch_first=True, **options)
        self.classifier = nn.Linear(12 * (2 if options.get("bidirectional") else 1), LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (n, labels)."""
        return self.classifier(self.recurrent(x)[0][:, -1])  # type: ignore[no-any-return]


class LastState(nn.Module):
    """An LSTM whose final hidden state is classified, and whose cell state is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.classifier = nn.Linear(12, LABELS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores (n, labels), and the cell state (n, 12)."""
        _, (hidden, cell) = self.lstm(x)
        return self.classifier(hidden[-1]), cell[-1]


class UnrolledCell(nn.Module):
    """A cell called step by step, as code that was written by hand does it."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = cell(8, 12)  # type: ignore[call-arg, arg-type]
        self.classifier = nn.Linear(12, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (n, labels)."""
        state: Any = None
        for step in range(4):
            state = self.cell(x[:, step], state)
        return self.classifier(state[0] if isinstance(state, tuple) else state)  # type: ignore[no-any-return]


class Crnn(nn.Module):
    """Convolutions over a spectrogram, a bidirectional GRU over time: keyword spotting, text recognition."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d((2, 1))
        )
        self.recurrent = nn.GRU(32, 12, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(24, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, time, labels) of a spectrogram (n, 1, 8, time)."""
        steps = self.features(x).flatten(1, 2).transpose(1, 2)
        return functional.log_softmax(self.classifier(self.recurrent(steps)[0]), -1)


class Temporal(nn.Module):
    """Temporal convolutional network: causal, dilated, residual (Bai et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(8, 8, 3, dilation=2**i) for i in range(3))
        self.classifier = nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (n, labels) of a series (n, 8, time)."""
        for i, layer in enumerate(self.layers):
            x = functional.relu(x + layer(functional.pad(x, (2 * 2**i, 0))))
        return self.classifier(x[..., -1])  # type: ignore[no-any-return]


class Gated(nn.Module):
    """WaveNet's gated residual blocks with weight norm (van den Oord et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.gates = nn.ModuleList(norm(nn.Conv1d(8, 16, 3, padding="same", dilation=2**i)) for i in range(2))
        self.out = nn.ModuleList(norm(nn.Conv1d(8, 8, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """A series (n, 8, time) of the same shape."""
        for gate, out in zip(self.gates, self.out, strict=True):
            values, open_ = gate(x).chunk(2, 1)
            x = x + out(torch.tanh(values) * torch.sigmoid(open_))
        return x


class UNet(nn.Module):
    """One level of a U-Net in one, two or three dimensions."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dimensions - 1]
        self.down = nn.Sequential(conv(2, 8, 3, padding=1), norm(8), nn.ReLU())
        self.bottom = nn.Sequential(pool(2), conv(8, 16, 3, padding=1), norm(16), nn.ReLU())
        self.up = up(16, 8, 2, stride=2)
        self.out = conv(16, LABELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, labels, ...) of a volume (n, 2, ...)."""
        fine = self.down(x)
        return self.out(torch.cat([fine, self.up(self.bottom(fine))], 1))  # type: ignore[no-any-return]


class Video(nn.Module):
    """A residual 3-D convolutional network over frames."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(8), nn.ReLU())
        self.space = nn.Sequential(
            nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU()
        )
        self.time = nn.Sequential(nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(8))
        self.classifier = nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (n, labels) of a clip (n, 3, frames, height, width)."""
        x = self.stem(x)
        x = functional.relu(x + self.time(self.space(x)))
        return self.classifier(functional.adaptive_avg_pool3d(x, 1).flatten(1))  # type: ignore[no-any-return]


class Detector(nn.Module):
    """A detector with three outputs of three sizes."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inner: int, out: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inner, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.SiLU())

        self.stages = nn.ModuleList([stage(3, 8), stage(8, 16), stage(16, 16)])
        self.heads = nn.ModuleList(nn.Conv2d(width, 5 + LABELS, 1) for width in (8, 16, 16))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Boxes, objectness and classes (n, 5 + labels, h, w) at three strides."""
        outputs = []
        x = image
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            outputs.append(head(x))
        return outputs


class TwoInputs(nn.Module):
    """A picture and numbers about it."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.table = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
        self.classifier = nn.Linear(16, LABELS)

    def forward(self, image: Tensor, table: Tensor) -> dict[str, Tensor]:
        """Class scores (n, labels) under "scores", what they were made of under "features"."""
        features = torch.cat([self.image(image), self.table(table)], 1)
        return {"scores": self.classifier(features), "features": features}


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021), one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.classifier = nn.Linear(16, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (n, labels) of an image (n, 3, 32, 32)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.classifier(x.mean(1))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """PyTorch's own transformer encoder over a series."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (n, labels) of a series (n, time, 16)."""
        return self.classifier(self.encoder(x).mean(1))  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """A convolutional autoencoder over images."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ELU(), nn.Conv2d(8, 4, 3, 2, 1))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.ELU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image again, and its code."""
        code = self.encoder(x)
        return self.decoder(code), code


_SERIES = {"x": (6, 8)}

NETWORKS: dict[str, dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]]] = {
    "recurrent": {
        "LSTM": (lambda: Recurrent(nn.LSTM), _SERIES),
        "LSTM, two layers": (lambda: Recurrent(nn.LSTM, num_layers=2), _SERIES),
        "LSTM, bidirectional": (lambda: Recurrent(nn.LSTM, bidirectional=True), _SERIES),
        "LSTM, its states": (LastState, _SERIES),
        "GRU": (lambda: Recurrent(nn.GRU), _SERIES),
        "GRU, bidirectional": (lambda: Recurrent(nn.GRU, bidirectional=True), _SERIES),
        "RNN, tanh": (lambda: Recurrent(nn.RNN), _SERIES),
        "RNN, ReLU, bidirectional": (
            lambda: Recurrent(nn.RNN, nonlinearity="relu", bidirectional=True),
            _SERIES,
        ),
        "LSTMCell, unrolled": (lambda: UnrolledCell(nn.LSTMCell), _SERIES),
        "GRUCell, unrolled": (lambda: UnrolledCell(nn.GRUCell), _SERIES),
        "CRNN": (Crnn, {"x": (1, 8, 6)}),
    },
    "1-D": {
        "TCN": (Temporal, {"x": (8, 16)}),
        "WaveNet, weight norm": (Gated, {"x": (8, 16)}),
        "U-Net 1-D": (lambda: UNet(1), {"x": (2, 16)}),
        "transformer encoder": (Encoder, {"x": (6, 16)}),
    },
    "3-D": {
        "U-Net 3-D": (lambda: UNet(3), {"x": (2, 8, 8, 8)}),
        "residual (2+1)-D": (Video, {"x": (3, 4, 16, 16)}),
    },
    "other signatures": {
        "detector, three outputs": (Detector, {"image": (3, 32, 32)}),
        "two inputs, dict of outputs": (TwoInputs, {"image": (3, 16, 16), "table": (5,)}),
        "autoencoder": (Autoencoder, {"x": (3, 16, 16)}),
        "MLP-Mixer": (Mixer, {"x": (3, 32, 32)}),
    },
}
