"""`report.html`: one file, no network; it tells the outcome in ten seconds, and below that the rest."""

import html
import os
from importlib import resources
from pathlib import Path
from string import Template

from npu_wire.host_share import HOST_FLOAT
from trainer_client.commands.charts import COLOURS, accuracy_chart, sqnr_chart
from trainer_client.commands.results import FP32, METHODS, NPU, PTQ, TORCHAO, Results, summarize

REPORT_FILE = "report.html"


def write_report(results: Results, directory: Path) -> Path:
    """Writes `report.html` beside `results.json` and returns its path."""
    template = Template(
        resources.files("trainer_client.commands").joinpath("report_template.html").read_text()
    )
    setup = results.setup
    page = template.substitute(
        title=_text(f"{setup['model']} on {' and '.join(npu.profile for npu in results.npus)}"),
        subtitle=f"{_text(setup['dataset'])}: {setup['train_images']:,} images to train on, "
        f"{setup['test_images']:,} to test on; {setup['parameters']:,} parameters",
        verdict=_verdicts(results),
        headline=_headline(results),
        table_note=_table_note(results),
        accuracy_chart=accuracy_chart(results),
        gap=_gap(results),
        sqnr_chart=sqnr_chart(results),
        seeds=_seeds(results),
        npus=_npus(results),
        host=_host(results),
        recipe=_recipe(results),
        command=_text(results.command),
        versions=_text(", ".join(f"{name} {version}" for name, version in setup["versions"].items())),
    )
    path = directory / REPORT_FILE
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def verdict(results: Results, profile: str) -> str | None:
    """One sentence on how NPU in the loop did on an NPU, whatever the outcome; None: a method is missing."""
    found = {method: results.summary(method, profile) for method in METHODS}
    ours, torchao, ptq, fp32 = found[NPU], found[TORCHAO], found[PTQ], found[FP32]
    if ours is None or torchao is None or ptq is None or fp32 is None:
        return None
    other, name = (torchao, METHODS[TORCHAO]) if torchao.mean >= ptq.mean else (ptq, METHODS[PTQ])
    return (
        f"NPU in the loop reaches {ours.mean:.1f} % on {profile}: "
        f"{_distance(ours.mean - other.mean)} {name}, {_distance(ours.mean - fp32.mean)} FP32."
    )


def _distance(points: float) -> str:
    """How far one accuracy is from another, to a tenth of a point."""
    if abs(points) < 0.05:
        return "level with"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"


def _verdicts(results: Results) -> str:
    blocks = []
    for npu in results.npus:
        sentence = verdict(results, npu.profile)
        if sentence:
            won = results.best_quantized(npu.profile) == NPU
            blocks.append(f'<div class="verdict{"" if won else " warn"}"><p>{_text(sentence)}</p></div>')
    if len(results.npus) > len(blocks):
        blocks.append('<div class="verdict warn"><p>Not finished: some cells are missing.</p></div>')
    return "\n".join(blocks)


def _headline(results: Results) -> str:
    rows = [["", *(f"on {_text(npu.profile)}" for npu in results.npus)]]
    body = []
    for method, name in METHODS.items():
        swatch = f'<span class="swatch" style="background:{COLOURS[method]}"></span>'
        cells = [f"<td>{swatch}{_text(name)}</td>"]
        for npu in results.npus:
            best = " best" if method == results.best_quantized(npu.profile) else ""
            cells.append(f'<td class="number{best}">{accuracy_text(results, method, npu.profile)}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th class="{"number" if i else ""}">{c}</th>' for i, c in enumerate(rows[0]))
    return f'<table class="headline"><tr>{head}</tr>{"".join(body)}</table>'


def accuracy_text(results: Results, method: str, profile: str) -> str:
    """Mean and deviation as "98.2 ± 0.3"; the mean alone for one seed; or a dash."""
    summary = results.summary(method, profile)
    if summary is None:
        return "-"
    return f"{summary.mean:.1f} ± {summary.std:.1f}" if summary.seeds > 1 else f"{summary.mean:.1f}"


def _table_note(results: Results) -> str:
    seeds = len({cell.seed for cell in results.cells})
    spread = f"mean ± sample standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"Test accuracy in percent, {spread}. INT8 rows ran the full test set on the NPU, FP32 on the CPU. "
        "Best quantized result in green."
    )


def _gap(results: Results) -> str:
    rows = []
    for npu in results.npus:
        pairs = [
            (cell.simulated_accuracy, cell.accuracy)
            for cell in results.cells
            if (cell.method, cell.profile) == (TORCHAO, npu.profile) and cell.simulated_accuracy is not None
        ]
        promised, delivered = summarize([p for p, _ in pairs]), summarize([d for _, d in pairs])
        if promised and delivered:
            gap = delivered.mean - promised.mean
            rows.append([npu.profile, f"{promised.mean:.1f}", f"{delivered.mean:.1f}", f"{gap:+.1f}"])
    return _table(["NPU", "torchao's simulation", "on the NPU", "difference (points)"], rows)


def _seeds(results: Results) -> str:
    seeds = sorted({cell.seed for cell in results.cells})
    rows = []
    for npu in results.npus:
        for method, name in METHODS.items():
            found = results.accuracies(method, npu.profile)
            rows.append([npu.profile, name, *(f"{found[s]:.2f}" if s in found else "-" for s in seeds)])
    return _table(["NPU", "method", *(f"seed {seed}" for seed in seeds)], rows, text_columns=2)


def _npus(results: Results) -> str:
    rows = [
        [
            npu.profile,
            npu.fingerprint.backend,
            f"{npu.fingerprint.vendor} {npu.fingerprint.model}",
            npu.fingerprint.firmware,
            npu.location,
            npu.profile_hash[:16],
        ]
        for npu in results.npus
    ]
    return _table(
        ["profile", "backend", "device", "firmware", "location", "profile hash"], rows, text_columns=6
    )


def _host(results: Results) -> str:
    rows, why = [], []
    for npu in results.npus:
        host = results.host_share(npu.profile)
        if host is not None:
            rows.append(
                [
                    npu.profile,
                    f"{host.of_layers - len(host.layers)}",
                    f"{len(host.layers)}",
                    f"{host.macs_share:.1%}",
                    f"{host.bytes_across:,}",
                ]
            )
            why += [[npu.profile, layer.name, layer.op, layer.reason] for layer in host.layers]
    head = ["NPU", "layers on the NPU", "on its host", "of multiply-accumulates", "bytes across a sample"]
    table = _table(head, rows)
    if not why:
        return f"{table}<p>The NPU computes every layer.</p>"
    reasons = _table(["NPU", "layer", "operators", "why on the host"], why, text_columns=4)
    return f"{table}<p>On the host is {_text(HOST_FLOAT)}.</p>{reasons}"


def _recipe(results: Results) -> str:
    setup = results.setup
    kinds = {"sgd-onecycle": "SGD, one-cycle", "adam-cosine": "Adam, cosine to 0"}
    rows = []
    for stage, key in (("FP32 training", "fp32"), ("either QAT method", "finetune")):
        recipe = setup[key]
        kind = kinds.get(recipe["kind"], recipe["kind"])
        rows.append([stage, str(recipe["steps"]), str(recipe["batch_size"]), f"{recipe['lr']:g}", kind])
    table = _table(["", "steps", "batch", "learning rate", "optimizer"], rows)
    return (
        f"{table}<p>Ranges come from {setup['calibration_images']:,} training images; torchao's network is "
        "deployed with the ranges that torchao learned. torchao follows its QAT tutorial: batch norm is "
        "frozen after 40 % of the steps, ranges after 50 %. NPU in the loop keeps batch norm statistics and "
        "ranges frozen. No checkpoint is chosen by its test accuracy. "
        f"Torch threads: {setup['threads']}.</p>"
    )


def _table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    def row(tag: str, cells: list[str]) -> str:
        marked = (
            f'<{tag} class="{"number" if i >= text_columns else ""}">{_text(cell)}</{tag}>'
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{row('th', head)}{''.join(row('td', cells) for cells in rows)}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))
