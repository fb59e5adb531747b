"""The live console: progress bars while a part runs, one summary line a round, warnings, tables. All on stdout."""

import sys
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from rlhf.monitor.format import StepMeans, duration, eval_cells, pack, round_cells, timing_cells
from rlhf.monitor.sink import Cell, Event, Number, clean_text

MAX_ROWS = 20
MAX_CHARS = 700
_LONG = 24  # a column with a longer text shares the free width
_NARROW = 78  # unless the table fits a terminal as it is
_QUIET_S = 5.0


class ConsoleSink:
    """Shows events to a person.

    On a terminal, open parts have a bar each and leave nothing behind; elsewhere a part that took longer than five
    seconds, or failed, leaves a line. `rounds` is the number of rounds of the run.
    """

    def __init__(self, console: Console, rounds: int) -> None:
        self.console = console
        self._rounds = rounds
        self._means = StepMeans()
        self._first_score: float | None = None
        self._bars = _Bars(console)

    def log(self, event: Event) -> None:
        """Show a round or an evaluation; steps are kept for their round's means."""
        if event.event == "step":
            self._means.add(event.round, event.metrics)
        elif event.event == "round":
            self._show_round(event.round, event.metrics)
        elif event.event == "eval":
            self._show_eval(event.round, event.metrics)
        self.remember(event)

    def remember(self, event: Event) -> None:
        """Take the first evaluation's score as the one that later ones are compared with; shows nothing."""
        if event.event == "eval" and self._first_score is None:
            self._first_score = event.metrics.get("eval/score")

    def rewind(self, round: int) -> None:
        """Forget the steps of rounds after `round`: they are taken again."""
        self._means.rewind(round)

    def alert(self, message: str) -> None:
        """A yellow warning."""
        line = f"! {' '.join(clean_text(message).split())}"
        if self.console.is_terminal:
            line = textwrap.fill(line, self.console.width, subsequent_indent="  ")
        self._print(Text(line, style="yellow"))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table that folds long texts inside their columns."""
        # Rich would fold a title to the width of a narrow table.
        self._print(Text(f"\n{clean_text(name)}", style="bold"))
        self._print(build_table(columns, rows, self.console.encoding))
        if len(rows) > MAX_ROWS:
            self._print(Text(f"{len(rows) - MAX_ROWS} more rows in the run directory's tables/", style="dim"))

    def progress(self, name: str, total: int | None) -> "Part":
        """A long part; `total` None shows a spinner and the time that has passed."""
        return Part(self, self._bars, clean_text(name), total)

    def close(self, exit_code: int) -> None:
        """Take away bars that are still open."""
        self._bars.stop()

    def part_ended(self, name: str, done: int, total: int | None, seconds: float, failed: bool) -> None:
        """Say that a part is over, where no bar has shown it."""
        if failed:
            count = "" if total is None else f" at {done}/{total}"
            self._print(Text(f"{name} stopped{count} after {duration(seconds)}", style="red"))
        elif not self.console.is_terminal and seconds > _QUIET_S:
            count = "" if total is None else f" {done}/{total}"
            self._print(Text(f"{name}{count} in {duration(seconds)}"))

    def _show_round(self, round: int, metrics: Mapping[str, Number]) -> None:
        merged = {**self._means.pop(round), **metrics}
        groups = [round_cells(merged), timing_cells(merged)]
        self._lines(f"round {round:{len(str(self._rounds))}d}/{self._rounds}", groups, "bold")

    def _show_eval(self, round: int, metrics: Mapping[str, Number]) -> None:
        head = f"eval  {round:{len(str(self._rounds))}d}/{self._rounds}"
        self._lines(head, [eval_cells(metrics, self._first_score)], "bold cyan")

    def _lines(self, head: str, groups: list[list[str]], style: str) -> None:
        width = self.console.width if self.console.is_terminal else sys.maxsize  # a log file gets whole lines
        for number, line in enumerate(pack(head, groups, width)):
            text = Text(line)
            if number == 0:
                text.stylize(style, 0, len(head))
            else:
                text.stylize("dim")
            self._print(text)

    def _print(self, item: Text | Table) -> None:
        if isinstance(item, Text):
            item.plain = _encodable(item.plain, self.console.encoding)
        self.console.print(item, highlight=False, soft_wrap=isinstance(item, Text) and not self.console.is_terminal)


MOVES = 1000
"""Movements of a bar over its whole length at most."""


class Part:
    """One running part; a context manager that counts what `advance` reports."""

    def __init__(self, sink: ConsoleSink, bars: "_Bars", name: str, total: int | None) -> None:
        self._sink = sink
        self._bars = bars
        self._name = name
        self._total = total
        self._done = self._shown = 0
        self._task: TaskID | None = None
        self._started = 0.0

    def __enter__(self) -> "Part":
        self._started = time.monotonic()
        self._task = self._bars.add(self._name, self._total)
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.remove(self._task)
        seconds = time.monotonic() - self._started
        self._sink.part_ended(self._name, self._done, self._total, seconds, failed=exc[0] is not None)

    def advance(self, amount: int = 1) -> None:
        """Move on by `amount`. A long bar moves in thousandths: moving it costs more than most of what it counts."""
        self._done += amount
        if self._done - self._shown >= (self._total or 0) // MOVES or self._done == self._total:
            self._bars.advance(self._task, self._done - self._shown)
            self._shown = self._done


class _Bars:
    """All open bars in one live display, which exists while there is one. Does nothing without a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._open: set[TaskID] = set()

    def add(self, name: str, total: int | None) -> TaskID | None:
        if not self._console.is_terminal:
            return None
        with self._lock:
            if self._progress is None:
                self._progress = _display(self._console)
                self._progress.start()
            task = self._progress.add_task(_encodable(name, self._console.encoding), total=total)
            self._open.add(task)
            return task

    def advance(self, task: TaskID | None, amount: int) -> None:
        with self._lock:
            if task in self._open and self._progress is not None and task is not None:
                self._progress.advance(task, amount)

    def remove(self, task: TaskID | None) -> None:
        with self._lock:
            if task is None or task not in self._open or self._progress is None:
                return
            self._open.discard(task)
            self._progress.remove_task(task)
            if not self._open:
                self._progress.stop()
                self._progress = None

    def stop(self) -> None:
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
            self._progress = None
            self._open.clear()


def build_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], encoding: str = "utf-8") -> Table:
    """A rich table: numbers to the right, long texts folded and cut, the first `MAX_ROWS` rows."""
    texts = [[_encodable(_cell(cell), encoding) for cell in row] for row in rows[:MAX_ROWS]]
    widths = [max((len(row[i]) for row in texts), default=0) for i in range(len(columns))]
    folded = any("\n" in cell for row in texts for cell in row) or sum(widths) + 3 * len(widths) > _NARROW
    wide = [folded and any(len(row[i]) > _LONG or "\n" in row[i] for row in texts) for i in range(len(columns))]
    table = Table(
        box=box.ROUNDED if any(wide) else box.SIMPLE_HEAD,
        show_lines=any(wide),
        expand=any(wide),
        border_style="dim",
    )
    for i, column in enumerate(columns):
        header = _encodable(clean_text(column), encoding)
        number = all(_is_number(row[i]) for row in rows if row[i] is not None)
        # Beside long texts, a narrow column is as wide as its cells and its header's longest word.
        narrow = max(map(cell_len, [*(row[i] for row in texts), *header.split()]), default=1)
        table.add_column(
            Text(header),
            justify="right" if number and rows else "left",
            overflow="fold",
            ratio=1 if wide[i] else None,
            width=narrow if any(wide) and not wide[i] else None,
        )
    for row in texts:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _display(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(style="cyan"),
        _Name(table_column=Column(no_wrap=True, min_width=12)),
        _Bar(table_column=Column(width=28)),
        _Count(table_column=Column(justify="right", no_wrap=True)),
        _Clock(table_column=Column(justify="right", no_wrap=True)),
        console=console,
        transient=True,
        refresh_per_second=8,
    )


class _Name(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.description, overflow="ellipsis")


class _Bar(ProgressColumn):
    def render(self, task: Task) -> ProgressBar | Text:
        if task.total is None:
            return Text("")
        return ProgressBar(total=max(1.0, task.total), completed=task.completed, width=28)


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _Clock(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed = duration(task.elapsed or 0.0)
        left = "" if task.time_remaining is None or task.finished else f", {duration(task.time_remaining)} left"
        return Text(elapsed + left, style="dim")


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _cell(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.3f}" if 1e-3 <= abs(cell) < 1e5 or cell == 0 else f"{cell:.3g}"
    text = clean_text(str(cell)).strip()
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS].rstrip()}… ({len(text)} characters)"


def _encodable(text: str, encoding: str) -> str:
    """A terminal that is not UTF-8 gets question marks instead of a crash."""
    return text.encode(encoding, "replace").decode(encoding)
