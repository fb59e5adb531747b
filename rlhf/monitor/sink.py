"""What every sink receives: an event whose numbers were cleaned once, so that all sinks record the same ones."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Number = int | float | None
Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Event:
    """One line of metrics.jsonl. `time` is seconds since the epoch; `step` is set for steps only."""

    event: str
    round: int
    step: int | None
    time: float
    metrics: Mapping[str, Number]


class Sink(Protocol):
    """One destination of metrics, tables and alerts."""

    def log(self, event: Event) -> None:
        """Record an event."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Record a table."""
        ...

    def alert(self, message: str) -> None:
        """Record a warning."""
        ...

    def close(self, exit_code: int) -> None:
        """Flush and let go; may be called twice."""
        ...


def clean_number(value: Any) -> Number:
    """A plain int or float; NaN and infinities, which JSON cannot hold, become None.

    Takes Python and NumPy numbers and one-element tensors.
    """
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def clean_metrics(metrics: Mapping[str, Any]) -> dict[str, Number]:
    """Every metric as `clean_number` gives it, in the order given."""
    return {name: clean_number(value) for name, value in metrics.items()}


def clean_rows(rows: Sequence[Sequence[Any]]) -> list[list[Cell]]:
    """Rows of strings, numbers, booleans and None; anything else is shown as its `str`."""
    return [[_clean_cell(cell) for cell in row] for row in rows]


def clean_text(text: str) -> str:
    """Text without lone surrogates and terminal control characters; newlines stay, tabs become spaces.

    Models write what they like: an escape sequence must not reach the terminal, nor a surrogate a file.
    """
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\t", "    ")
    return "".join(char if char == "\n" or not _is_control(char) else "�" for char in text)


def _is_control(char: str) -> bool:
    code = ord(char)
    # Bidirectional overrides are formatting, not C0/C1 control, but can reorder what a line shows.
    return code < 0x20 or 0x7F <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069


def _clean_cell(cell: Any) -> Cell:
    if isinstance(cell, str):
        return clean_text(cell)
    if cell is None or isinstance(cell, bool):
        return cell
    if isinstance(cell, numbers.Real):
        return clean_number(cell)
    return clean_text(str(cell))
