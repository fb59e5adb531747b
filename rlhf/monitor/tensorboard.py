"""TensorBoard event files in RUN_DIR/tensorboard, the same numbers as metrics.jsonl."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlhf.monitor.sink import Cell, Event

FOLDER = "tensorboard"


class TensorBoardSink:
    """Scalars against the step for step events, against the round for all others, in float64.

    Loads torch when it is made. What JSON holds as null has no point here.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / FOLDER
        self._open()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(self._folder))

    def log(self, event: Event) -> None:
        """Write one scalar a metric and flush, as a killed run should show its last round."""
        self._write(event)
        self._writer.flush()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Tables are in RUN_DIR/tables and the report: TensorBoard shows numbers only."""

    def alert(self, message: str) -> None:
        """Alerts are not numbers."""

    def rebuild(self, events: Iterable[Event]) -> None:
        """Start over with `events`: event files cannot be cut, so a rewound run writes them again."""
        self.close(0)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._open()
        for event in events:
            self._write(event)
        self._writer.flush()

    def close(self, exit_code: int) -> None:
        """Flush and close."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        x = event.round if event.step is None else event.step
        for name, value in event.metrics.items():
            if value is not None:
                # The old scalar format is float32: new_style keeps the digits that metrics.jsonl has.
                self._writer.add_scalar(name, value, x, walltime=event.time, new_style=True, double_precision=True)
