"""Durable writes: a reader sees the old content or the new, whole, whatever is killed in between."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to a temporary neighbour, flush it to disk, rename it over `path`, flush the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename_durable(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON; NaN is refused."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def rename_durable(source: Path, target: Path) -> None:
    """Rename a file or a folder and flush the parent folder, so that the rename survives a power cut."""
    source.rename(target)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file that somebody else wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
