"""What the report reads from a run directory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import InputError
from rlhf.monitor.jsonl import FILE_NAME, TABLES, read_records, to_event
from rlhf.monitor.redact import redact
from rlhf.monitor.sink import Cell, Event


@dataclass(frozen=True, slots=True)
class StoredTable:
    """A table as the monitor stored it."""

    name: str
    columns: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True, slots=True)
class RunFiles:
    """A run directory's content. `states` maps rounds to the ledger's state; `config` is without secrets."""

    path: Path
    events: list[Event]
    config: dict[str, Any]
    states: dict[int, str]
    tables: list[StoredTable]


def read_run(run_dir: Path) -> RunFiles:
    """Read a run directory; raises `InputError` for one that is no run, has logged nothing, or is damaged."""
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such folder; give the directory of a run (output_dir/name)")
    metrics = run_dir / FILE_NAME
    if not metrics.is_file():
        raise InputError(f"{run_dir}: not a run directory: it has no {FILE_NAME}; give the directory of a run")
    events = [to_event(record) for record in read_records(metrics)]
    if not events:
        raise InputError(f"{metrics}: no metrics yet; report a run that has logged at least one step")
    return RunFiles(run_dir, events, _config(run_dir / "config.yaml"), _states(run_dir / "rounds"), _tables(run_dir))


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML; restore the file or move it away") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping, got {type(data).__name__}; restore the file or move it away")
    return redact(data)


def _states(folder: Path) -> dict[int, str]:
    states = {}
    for path in sorted(folder.glob("*/manifest.json")):
        if path.parent.name.isdigit():
            state = _json(path).get("state")
            states[int(path.parent.name)] = str(state) if state is not None else ""
    return states


def _tables(run_dir: Path) -> list[StoredTable]:
    tables = []
    for path in sorted((run_dir / TABLES).glob("*.json")):
        data = _json(path)
        columns, rows = data.get("columns"), data.get("rows")
        if not isinstance(columns, list) or not isinstance(rows, list) or not all(_fits(row, columns) for row in rows):
            raise InputError(f"{path}: not a stored table (columns, and rows of that many cells); delete the file")
        tables.append(StoredTable(str(data.get("name", path.stem)), [str(column) for column in columns], rows))
    return tables


def _fits(row: object, columns: list[Any]) -> bool:
    return isinstance(row, list) and len(row) == len(columns)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON; restore or delete the file") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object; restore or delete the file")
    return data
