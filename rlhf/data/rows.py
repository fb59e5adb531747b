"""Rows of a dataset as plain dicts, from a local file, a local dataset folder or a Hugging Face dataset id."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rlhf.errors import InputError

Row = dict[str, Any]


def load_rows(path: str, *, split: str, name: str | None = None, key: str = "prompts") -> list[Row]:
    """All rows of `path`, one dict a row, in file order.

    A local JSONL, JSON, Parquet or CSV file, told by its extension and optionally gzipped (`.gz`); CSV values are
    strings. Anything else is given to `datasets.load_dataset` with the configuration `name` and the `split`, which
    local files have no use for. `key` is the config section to blame.

    Raises `InputError` where there is no such file or dataset, it cannot be read, or it holds no row.
    """
    file = Path(path).expanduser()
    where = f"{key}.path = {path}"
    if file.is_file():
        rows = _read_file(file, where)
    elif file.is_dir() or not _names_a_file(path):
        rows = _load_dataset(str(file) if file.is_dir() else path, split, name, key, where)
    else:
        raise InputError(f"{where}: no such file; give a {_KNOWN} file that exists, or a Hugging Face dataset id")
    if not rows:
        raise InputError(f"{where}: there are no rows in it; give a dataset with at least one row")
    return rows


def _names_a_file(path: str) -> bool:
    """A path that does not exist is taken for a dataset id only where it could be one: `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _kind(Path(path)) is not None


def _kind(file: Path) -> str | None:
    name = file.name.lower().removesuffix(".gz")
    return next((suffix for suffix in _READERS if name.endswith(suffix)), None)


def _read_file(file: Path, where: str) -> list[Row]:
    kind = _kind(file)
    if kind is None:
        raise InputError(f"{where}: unknown kind of file; expected {_KNOWN}, optionally with .gz")
    opener: Callable[..., Any] = gzip.open if file.name.lower().endswith(".gz") else open
    try:
        with opener(file, "rb") as stream:
            rows = _READERS[kind](stream)
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:
        # ValueError covers bad UTF-8, bad JSON and pyarrow's ArrowInvalid.
        raise InputError(f"{where}: cannot be read as {kind[1:]}: {one_line(error)}; repair the file") from error
    bad = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if bad is not None:
        raise InputError(
            f"{where}: row {bad} is a {type(rows[bad - 1]).__name__}; every row must be an object of columns"
        )
    return rows


def _text(stream: IO[bytes]) -> io.TextIOWrapper:
    # utf-8-sig: spreadsheet programs start their files with a byte-order mark.
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _read_jsonl(stream: IO[bytes]) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(stream), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not valid JSON: {error}") from error
    return rows


def _read_json(stream: IO[bytes]) -> list[Row]:
    """A list of objects; many files of this extension hold one object a line, so that is read too."""
    text = stream.read().decode("utf-8-sig")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        return _read_jsonl(io.BytesIO(text.encode()))
    return data if isinstance(data, list) else [data]


def _read_csv(stream: IO[bytes]) -> list[Row]:
    reader = csv.DictReader(_text(stream), strict=True)
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more fields than the header")
        rows.append(dict(row))
    return rows


def _read_parquet(stream: IO[bytes]) -> list[Row]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(io.BytesIO(stream.read())).to_pylist()


_READERS: dict[str, Callable[[IO[bytes]], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
_KNOWN = ", ".join(_READERS)


def _load_dataset(path: str, split: str, name: str | None, key: str, where: str) -> list[Row]:
    import datasets
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        data = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, DatasetsError, httpx.HTTPError) as error:
        # OSError covers a missing file, no connection and offline mode; ValueError an unknown split or configuration.
        named = "" if name is None else f", {key}.name = {name}"
        raise InputError(
            f"{where}: cannot load it as a Hugging Face dataset ({key}.split = {split}{named}): {one_line(error)}; "
            "check the id, the split and the connection, or give a local file"
        ) from error
    return data.to_list()


def one_line(error: BaseException, limit: int = 160) -> str:
    """The message of an exception on one line, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
