"""What the commands show on the terminal: progress bars and the four-way table."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trainer_client.commands.report import accuracy_text
from trainer_client.commands.results import METHODS, Cell, Results
from trainer_client.commands.trainer import OnStep


class ProgressView(Protocol):
    """Shows trainings, one after the other, on standard error: standard output belongs to the results."""

    def begin(self, what: str, steps: int) -> OnStep:
        """Shows a training; what it returns is called after each step."""
        ...

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        ...


@contextmanager
def progress_view(console: Console | None = None) -> Iterator[ProgressView]:
    """A bar on a terminal, else a line a tenth of each training."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description:<38}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bar(progress)


class _Bar:
    """For terminals."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._training = progress.add_task("", total=1, note="", visible=False)

    def begin(self, what: str, steps: int) -> OnStep:
        self._progress.reset(self._training, total=steps, description=what, visible=False, note="")

        def on_step(step: int, loss: float) -> None:  # shows the bar: a finished checkpoint has no step left
            self._progress.update(self._training, completed=step, note=f"loss {loss:.3f}", visible=True)

        return on_step

    def say(self, line: str) -> None:
        self._progress.update(self._training, visible=False)
        self._progress.print(line)


class _Lines:
    """For files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, what: str, steps: int) -> OnStep:
        every = max(1, steps // 10)

        def on_step(step: int, loss: float) -> None:
            if step % every == 0 or step == steps:
                self.say(f"{what}: step {step} of {steps}, loss {loss:.3f}")

        return on_step

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class ComparisonView:
    """A `Watcher`: the trainings, and a line for each finished cell."""

    def __init__(self, progress: ProgressView, cells: int) -> None:
        self._progress = progress
        self._cells = cells
        self._finished = 0

    def begin(self, what: str, steps: int) -> OnStep:
        """Shows a training; see `Watcher`."""
        return self._progress.begin(what, steps)

    def finished(self, cell: Cell) -> None:
        """Prints a cell; see `Watcher`."""
        self._finished += 1
        where = f" on {cell.profile}" if cell.profile else ""
        count = f"{self._finished:>{len(str(self._cells))}}/{self._cells}"
        what = f"seed {cell.seed}  {METHODS[cell.method] + where:<34}"
        self._progress.say(f"{count}  {what} {cell.accuracy:6.2f} %")


def print_results(console: Console, results: Results, report: Path) -> None:
    """Prints the four-way table with what its numbers are, and where the report lies."""
    setup, seeds = results.setup, len({cell.seed for cell in results.cells})
    spread = f"mean ± std of {seeds} seeds" if seeds > 1 else "one seed"
    console.print(
        f"\n{setup['model']} on {setup['dataset']}: % of {setup['test_images']} test images, {spread}"
    )
    console.print(results_table(results))
    console.print("INT8 rows were measured on the NPU; * best of them")
    for npu in results.npus:
        host = results.host_share(npu.profile)
        if host is not None and host.layers:
            console.print(f"{npu.profile}: {host}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"report: {report}", soft_wrap=True)


def results_table(results: Results) -> Table:
    """The four-way table: a row a method, a column an NPU, the best quantized cell marked with a star."""
    table = Table()
    table.add_column("method")
    for npu in results.npus:
        table.add_column(f"on {npu.profile}", justify="right")
    for method, name in METHODS.items():
        row = [name]
        for npu in results.npus:
            best = method == results.best_quantized(npu.profile)
            text = accuracy_text(results, method, npu.profile)
            row.append(f"[bold green]* {text}[/]" if best else text)
        table.add_row(*row)
    return table
