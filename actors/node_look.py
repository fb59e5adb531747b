"""What a process finds on its node: versions, model folders, and whether a folder can be written.

Nothing but the standard library: this module travels to the nodes by value, so that it runs where rlhf is missing or
old too.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PIECE = 4096
"""Bytes that are read at the start, in the middle and at the end of a file: fine-tuned copies of a model have files of
the same names and sizes."""

MODEL_FILES = {".json", ".safetensors", ".model", ".txt", ".jinja"}


def look(packages: dict[str, tuple[str, ...]], folders: Iterable[str], run_dir: str | None) -> dict[str, Any]:
    """What this process finds, in plain types.

    `packages` holds the distributions that a package may come from. In the answer `versions` holds "" for one that is
    not there; `models` holds, by folder, either a mark of each file or the reason why there is none; `run_dir` is why
    it cannot be written, None if it can, and `config` marks the config.yaml there.
    """
    versions = {name: next(filter(None, map(_version, names)), "") for name, names in packages.items()}
    versions["python"] = ".".join(map(str, sys.version_info[:2]))
    return {
        "versions": versions,
        "code": _code(("rlhf", "actors")),
        "models": {folder: mark_folder(folder) for folder in folders},
        "run_dir": _cannot_write(run_dir) if run_dir else None,
        "config": _mark(Path(run_dir, "config.yaml")) if run_dir else None,
    }


def mark_folder(folder: str) -> dict[str, str] | str:
    """A mark of each file of a model by name, of its size and pieces of it; the reason if the folder cannot be read."""
    try:
        files = [path for path in sorted(Path(folder).iterdir()) if path.suffix in MODEL_FILES and path.is_file()]
    except OSError as error:
        return error.strerror or str(error)
    return {path.name: _mark(path) for path in files} or "no model there"


def _mark(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256()
            for start in sorted({0, size // 2, max(0, size - PIECE)}):
                file.seek(start)
                digest.update(file.read(PIECE))
    except OSError as error:
        return error.strerror or str(error)
    return f"{size} {digest.hexdigest()[:16]}"


def _cannot_write(folder: str) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"rlhf")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code(packages: Iterable[str]) -> str:
    """A digest of the packages' own sources, which change more often than their version; "" if one is missing."""
    digest = hashlib.sha256()
    for package in packages:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            return ""
        root = Path(next(iter(found.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
