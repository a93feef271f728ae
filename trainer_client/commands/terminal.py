"""What the commands show on the terminal: progress bars and the four-way table."""

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trainer_client.commands.report import accuracy_text
from trainer_client.commands.results import METHODS, Cell, Results
from trainer_client.commands.trainer import OnStep


class ProgressView:
    """A `Watcher`: a bar of cells, a bar of the training that runs, and a line for each finished cell."""

    def __init__(self, console: Console, cells: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<38}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._all = self._progress.add_task("all cells", total=cells, note="")
        self._training = self._progress.add_task("", total=1, note="", visible=False)

    def begin(self, what: str, steps: int) -> OnStep:
        """Shows a training; see `Watcher`."""
        self._progress.reset(self._training, total=steps, description=what, visible=False, note="")

        def on_step(step: int, loss: float) -> None:  # shows the bar: a finished checkpoint has no step left
            self._progress.update(self._training, completed=step, note=f"loss {loss:.3f}", visible=True)

        return on_step

    def finished(self, cell: Cell) -> None:
        """Prints a cell; see `Watcher`."""
        where = f" on {cell.profile}" if cell.profile else ""
        self._progress.advance(self._all)
        self._progress.update(self._training, visible=False)
        self._progress.print(f"seed {cell.seed}  {METHODS[cell.method] + where:<34} {cell.accuracy:6.2f} %")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()


def print_results(console: Console, results: Results, report: Path) -> None:
    """Prints the four-way table with what its numbers are, and where the report lies."""
    setup, seeds = results.setup, len({cell.seed for cell in results.cells})
    spread = f"mean ± std of {seeds} seeds" if seeds > 1 else "one seed"
    console.print(
        f"\n{setup['model']} on {setup['dataset']}: % of {setup['test_images']} test images, {spread}"
    )
    console.print(results_table(results))
    console.print("INT8 rows were measured on the NPU; * best of them")
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
