"""One monitor in front of all sinks."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf.monitor.console import ConsoleSink, Part
from rlhf.monitor.jsonl import JsonlSink, read_records, to_event
from rlhf.monitor.monitored import Monitored
from rlhf.monitor.sink import Event, Sink, clean_metrics, clean_rows, clean_text
from rlhf.monitor.tensorboard import TensorBoardSink


class MonitorGroup:
    """The `Monitor` port. Numbers are cleaned once, then every sink gets the same event."""

    def __init__(
        self,
        jsonl: JsonlSink,
        console: ConsoleSink,
        tensorboard: TensorBoardSink | None = None,
        others: Sequence[Sink] = (),
    ) -> None:
        self._jsonl = jsonl
        self._console = console
        self._tensorboard = tensorboard
        self._sinks: list[Sink] = [jsonl, console, *([tensorboard] if tensorboard else []), *others]

    def log(self, event: str, round: int, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics of an event: step (with `step`), round or eval. NaN and infinities become null."""
        record = Event(event, round, step, time.time(), clean_metrics(metrics))
        for sink in self._sinks:
            sink.log(record)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table and store it; a later table of the same name replaces it in the run directory.

        Raises `ValueError` for a row that has not one cell a column.
        """
        for number, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(f"table {name!r}: row {number} has {len(row)} cells for {len(columns)} columns")
        cells = clean_rows(rows)
        for sink in self._sinks:
            sink.table(name, columns, cells)

    def alert(self, message: str) -> None:
        """Warn on the console and in W&B."""
        for sink in self._sinks:
            sink.alert(clean_text(message))

    def progress(self, name: str, total: int | None) -> Part:
        """A progress bar for a long part; use as a context manager. Several may be open at once."""
        return self._console.progress(name, total)

    def rewind(self, round: int) -> None:
        """Forget the rounds after `round`, which a resumed run goes through again.

        W&B cannot take back what was sent: there, a replayed round's points lie on top of the first ones.
        """
        self._jsonl.rewind(round)
        self._console.rewind(round)
        if self._tensorboard:
            self._tensorboard.rebuild(to_event(record) for record in read_records(self._jsonl.path))

    def close(self, exit_code: int) -> None:
        """Close every sink; `exit_code` is the command's, and tells W&B how the run ended."""
        for sink in self._sinks:
            sink.close(exit_code)


def build_monitor(config: Monitored, run_dir: Path, rounds: int, console: Console | None = None) -> MonitorGroup:
    """The sinks that `config.monitor` asks for, writing to `run_dir`; `rounds` is how many there will be.

    Without `console`, output goes to stdout. Raises `InputError` if W&B is asked for and cannot start, or if
    metrics.jsonl is damaged; then nothing has been opened.
    """
    screen = ConsoleSink(console or Console(), rounds)
    for record in read_records(run_dir / "metrics.jsonl"):
        screen.remember(to_event(record))
    others: list[Sink] = []
    if config.monitor.wandb.mode != "disabled":
        from rlhf.monitor.wandb_monitor import WandbSink

        others.append(WandbSink(config, run_dir, screen.alert))
    tensorboard = TensorBoardSink(run_dir) if config.monitor.tensorboard else None
    return MonitorGroup(JsonlSink(run_dir), screen, tensorboard, others)
