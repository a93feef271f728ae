"""The pictures of the report, as self-contained SVG. Colours are Okabe and Ito's, told apart by all eyes."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer_client.commands.results import FP32, METHODS, NPU, PTQ, TORCHAO, Results

COLOURS = {FP32: "#8c8c8c", PTQ: "#e69f00", TORCHAO: "#56b4e9", NPU: "#009e73"}
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the picture is the same everywhere
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.hashsalt": "npu-in-the-loop",  # ids inside the SVG are repeatable
}
_MAX_LAYER_LABELS = 30
_BEFORE, _AFTER = "before (PTQ weights)", "after (NPU in the loop)"


def accuracy_chart(results: Results) -> str:
    """Bars of mean accuracy with standard deviation and the single seeds, one panel an NPU."""
    with mpl.rc_context(_STYLE):
        panels = [npu.profile for npu in results.npus]
        figure = Figure(figsize=(1.2 + 4.4 * len(panels), 2.7), layout="constrained")
        for axes, profile in zip(_row(figure, len(panels)), panels, strict=True):
            _accuracy_panel(axes, results, profile)
        return _svg(figure)


def sqnr_chart(results: Results) -> str:
    """Signal to quantization noise ratio per layer before and after training, mean over seeds."""
    with mpl.rc_context(_STYLE):
        panels = [npu.profile for npu in results.npus]
        figure = Figure(figsize=(1.2 + 4.4 * len(panels), 3.4), layout="constrained")
        for axes, profile in zip(_row(figure, len(panels)), panels, strict=True):
            before, after = sqnr_by_layer(results, PTQ, profile), sqnr_by_layer(results, NPU, profile)
            layers = [layer for layer in before if layer in after]
            axes.plot([before[n] for n in layers], "o--", color=COLOURS[PTQ], label=_BEFORE, markersize=4)
            axes.plot([after[n] for n in layers], "o-", color=COLOURS[NPU], label=_AFTER, markersize=4)
            every = -(-len(layers) // _MAX_LAYER_LABELS) or 1
            axes.set_xticks(range(0, len(layers), every), layers[::every], rotation=90, fontsize=7)
            axes.set_title(profile)
            axes.grid(axis="y", color="#e5e5e5")
        figure.axes[0].set_ylabel("SQNR (dB), higher is better")
        figure.axes[0].legend(frameon=False, fontsize=8)
        return _svg(figure)


def sqnr_by_layer(results: Results, method: str, profile: str) -> dict[str, float]:
    """Layer -> mean over seeds of its finite SQNR values in dB, in the order of execution."""
    values: dict[str, list[float]] = {}
    for cell in results.cells:
        if (cell.method, cell.profile) == (method, profile):
            for layer, sqnr_db in cell.sqnr_db.items():
                if sqnr_db is not None:
                    values.setdefault(layer, []).append(sqnr_db)
    return {layer: sum(numbers) / len(numbers) for layer, numbers in values.items()}


def _accuracy_panel(axes: Axes, results: Results, profile: str) -> None:
    best = results.best_quantized(profile)
    for row, method in enumerate(METHODS):
        summary = results.summary(method, profile)
        if summary is None:
            continue
        axes.barh(row, summary.mean, 0.66, color=COLOURS[method])
        if summary.seeds > 1:
            axes.errorbar(summary.mean, row, xerr=summary.std, color="#222222", capsize=3, linewidth=1.2)
        seeds = list(results.accuracies(method, profile).values())
        axes.plot(seeds, [row] * len(seeds), ".", color="#222222", markersize=4)
        edge = max(summary.mean + summary.std, *seeds)
        weight = "bold" if method == best else "normal"
        axes.text(edge + 1.5, row, f"{summary.mean:.1f}", va="center", fontweight=weight)
    axes.set_yticks(range(len(METHODS)), list(METHODS.values()))
    axes.set_ylim(len(METHODS) - 0.5, -0.5)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("test accuracy (%)")
    axes.set_title(profile)


def _row(figure: Figure, panels: int) -> Sequence[Axes]:
    grid: Any = figure.subplots(1, panels, sharey=True, squeeze=False)
    return list(grid[0])


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]  # the XML prologue has no place inside HTML
    # Without a size of its own the picture takes the width of the page.
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", drawing, count=1)
