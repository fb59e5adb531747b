"""metrics.jsonl: the record of a run, one JSON object a line, and tables beside it as JSON files."""

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.files import write_atomic, writing
from rlhf.monitor.sink import Cell, Event

FILE_NAME = "metrics.jsonl"
TABLES = "tables"
_RESERVED = ("event", "round", "step", "time")


class JsonlSink:
    """Appends events to RUN_DIR/metrics.jsonl and stores each table as RUN_DIR/tables/<name>.json.

    A line goes out in one write, so a kill can tear the last line only; a torn line is cut off when the file is opened
    again, and at once where the disk is full.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.path = run_dir / FILE_NAME
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file: io.FileIO | None = self._open()

    def log(self, event: Event) -> None:
        """Append one line. Raises `StorageError` where there is no room for it: then none of it is there."""
        if self._file is None:
            raise RuntimeError(f"{self.path}: logged to after close")
        # Unbuffered: what could not be written must not be tried again when the file is closed.
        line = (json.dumps(to_record(event), allow_nan=False) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        with writing(self.path):
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(end)
                raise

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Replace the stored table of that name."""
        table = {"name": name, "columns": list(columns), "rows": [list(row) for row in rows]}
        text = json.dumps(table, allow_nan=False, indent=1) + "\n"
        folder = self._run_dir / TABLES
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"{file_stem(name)}.json", text.encode())

    def alert(self, message: str) -> None:
        """Alerts are for people: metrics.jsonl holds numbers only."""

    def rewind(self, round: int) -> None:
        """Drop, atomically, the lines of rounds after `round`: a resumed run logs them again."""
        self.close(0)
        lines = [json.dumps(record) + "\n" for record in read_records(self.path) if record["round"] <= round]
        write_atomic(self.path, "".join(lines).encode())
        self._file = self._open()

    def close(self, exit_code: int) -> None:
        """Close the file; closing again does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> io.FileIO:
        _cut_torn_line(self.path)
        return io.FileIO(self.path, "a")


def to_record(event: Event) -> dict[str, Any]:
    """The JSON object of an event; raises `ValueError` for a metric that carries a reserved name."""
    clash = [name for name in event.metrics if name in _RESERVED]
    if clash:
        raise ValueError(f"metric {clash[0]!r} has the name of a field that every line holds")
    head: dict[str, Any] = {"event": event.event, "round": event.round}
    if event.step is not None:
        head["step"] = event.step
    return {**head, "time": event.time, **event.metrics}


def to_event(record: dict[str, Any]) -> Event:
    """The event of a JSON object as `read_records` gives it."""
    metrics = {name: value for name, value in record.items() if name not in _RESERVED}
    return Event(record["event"], record["round"], record.get("step"), record["time"], metrics)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; a torn last line is left out.

    A missing file has no lines. Raises `InputError` for a whole line that is not an event.
    """
    if not path.exists():
        return []
    whole, newline, _torn = path.read_bytes().rpartition(b"\n")
    if not newline:
        return []
    return [_parse(line, path, number) for number, line in enumerate(whole.split(b"\n"), start=1)]


def file_stem(name: str) -> str:
    """A table's name as a file name: what is neither letter, digit, '.', '_' nor '-' becomes '_'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".") or "table"


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError both
        record = None
    if not isinstance(record, dict) or not _is_event(record):
        raise InputError(
            f"{path}:{number}: not a metrics line (a JSON object with event, round and time): "
            "the file was edited or damaged; delete that line"
        )
    return record


def _is_event(record: dict[str, Any]) -> bool:
    number = (int, float)
    return (
        isinstance(record.get("event"), str)
        and isinstance(record.get("round"), int)
        and isinstance(record.get("time"), number)
        and isinstance(record.get("step", 0), int)
        and all(value is None or isinstance(value, (int, float, str)) for value in record.values())
    )


def _cut_torn_line(path: Path) -> None:
    """Truncate after the last newline, searching backwards so that a long file is not read whole."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            start = max(0, keep - 4096)
            file.seek(start)
            found = file.read(keep - start).rfind(b"\n")
            if found >= 0:
                keep = start + found + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)
