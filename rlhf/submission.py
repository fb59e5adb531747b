"""What a run takes along when it leaves this machine: its config with paths that hold there, and its code.

Ray hands a job one folder, its working directory, which is the job's current folder and importable in all of its
processes. The folder made here holds the config, the data files that only this machine has, and the project as an
unpacked wheel: with its metadata, since vLLM finds the weight-transfer plugin by an entry point, and under a name that
follows the content, since Ray keeps wheels by their file name and would run old code of the same version.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf import __version__
from rlhf.config import OfflineConfig, RunConfig
from rlhf.errors import InputError, RLHFError

CONFIG = "config.yaml"
INPUTS = "inputs"
MAX_INPUTS = 64 << 20
"""Bytes of data files that travel with a job; more belongs on storage that the nodes share."""

SOURCES = ("rlhf", "actors", "requirements", "pyproject.toml", "README.md")
"""What a wheel of this project is built from."""

_DATA_SUFFIXES = {".jsonl", ".json", ".parquet", ".csv", ".gz"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Bundle:
    """A job's folder, and what its metadata say of it."""

    folder: Path
    metadata: dict[str, str]


def make_bundle(
    config: RunConfig | OfflineConfig, folder: Path, packages: Sequence[Path] = (), *, installed: bool = False
) -> Bundle:
    """Fill the empty `folder` with what a job needs; with `installed` the cluster's own rlhf is used.

    Raises `InputError` for a path that the nodes would not have, and where the project cannot be packed.
    """
    resolved = portable_config(config, folder / INPUTS)
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if not installed:
        unpack_wheel(folder)
    for package in packages:
        _copy_package(package, folder)
    canonical = json.dumps(resolved, sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return Bundle(folder, {"run": config.name, "config_sha256": digest, "rlhf_version": __version__})


def portable_config(config: RunConfig | OfflineConfig, inputs: Path) -> dict[str, Any]:
    """The resolved config as the job reads it: paths absolute, data files of this machine copied to `inputs`.

    A path below a folder of `cluster.shared` is taken as it is; one that exists here and nowhere in those folders is
    refused, and so is a relative one that exists nowhere: on the cluster it would mean another place. A Hugging Face
    id, or an absolute path that this machine does not have, is the cluster's.

    Raises `InputError` naming the key.
    """
    shared = [Path(os.path.abspath(folder)) for folder in config.cluster.shared]
    document = config.model_dump(mode="json")
    packed: dict[Path, int] = {}
    for section, key, kind in _paths(document):
        name = key.rsplit(".", 1)[-1]
        section[name] = _portable(section[name], key, kind, shared, inputs, packed)
    document["cluster"] |= {"address": "auto", "temp_dir": None}
    return document


def check_environment(names: Sequence[str]) -> None:
    """Raise `InputError` if this process lacks a variable of `cluster.env`."""
    if missing := [name for name in names if not os.environ.get(name)]:
        raise InputError(
            f"cluster.env: {', '.join(missing)} not set in the environment of this process; export it on every node "
            "(on a cluster: before `ray start`, or from a Kubernetes secret), or leave it out"
        )


def unpack_wheel(folder: Path) -> None:
    """Build a wheel of this project with its build backend, without the network, and unpack it into `folder`.

    Raises `InputError` if this rlhf was installed without its sources, `RLHFError` if the backend fails.
    """
    root = Path(__file__).parents[1]
    if not all((root / name).exists() for name in SOURCES):
        raise InputError(
            f"{root}: rlhf is installed here without its sources, so that it cannot be packed; use --installed if the "
            "cluster's image has it, or submit from a checkout"
        )
    with tempfile.TemporaryDirectory(prefix="rlhf-wheel-") as scratch:
        # A copy: the backend writes beside the sources, and packs again what an older build left there.
        source, out = Path(scratch, "source"), Path(scratch, "out")
        source.mkdir()
        for name in SOURCES:
            _copy(root / name, source / name)
        command = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
        done = subprocess.run(
            [sys.executable, "-c", command, str(out)], cwd=source, capture_output=True, text=True, check=False
        )
        wheels = list(out.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RLHFError(f"{root}: building a wheel of this project failed: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(folder)


def _paths(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every path of a config: the section that holds it, its dotted key, and what it is of."""
    yield document, "output_dir", "folder"
    yield document["policy"], "policy.path", "model"
    for top in ("prompts", "preferences"):
        if section := document.get(top):
            yield section, f"{top}.path", "data"
            for child in ("eval", "held_out"):
                if inner := section.get(child):
                    yield inner, f"{top}.{child}.path", "data"
    for top in ("judge", "eval_judge"):
        if judge := document.get(top):
            yield from _judge_paths(judge, top)


def _judge_paths(judge: dict[str, Any], key: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    if judge.get("path") is not None:
        yield judge, f"{key}.path", "model"
    for index, member in enumerate(judge.get("members", ())):
        yield from _judge_paths(member["judge"], f"{key}.members.{index}.judge")


def _portable(text: str, key: str, kind: str, shared: Sequence[Path], inputs: Path, packed: dict[Path, int]) -> str:
    path = Path(os.path.abspath(Path(text).expanduser()))
    if any(path.is_relative_to(folder) for folder in shared):
        return str(path)
    where = f"{key} = {text!r}"
    if path.exists() or (kind == "folder" and not Path(text).is_absolute()):
        if kind == "data" and path.is_file():
            return _pack(path, where, inputs, packed)
        advice = "put it on storage that every node mounts and list that folder in cluster.shared"
        hub = ", or give a Hugging Face id" if kind != "folder" else ""
        raise InputError(f"{where}: {path} is this machine's and the cluster's nodes would not have it; {advice}{hub}")
    if Path(text).is_absolute():
        return str(path)
    if _is_hub_id(text, kind):
        return text
    raise InputError(
        f"{where}: {path} does not exist; give an absolute path of the cluster's nodes or a file that is here"
    )


def _is_hub_id(text: str, kind: str) -> bool:
    if kind == "data" and Path(text).suffix in _DATA_SUFFIXES:
        return False
    return bool(_HUB_ID.fullmatch(text))


def _pack(path: Path, where: str, inputs: Path, packed: dict[Path, int]) -> str:
    """Copy a data file to `inputs` under a name that follows its content; returns its path in the job's folder."""
    packed[path] = path.stat().st_size
    if sum(packed.values()) > MAX_INPUTS:
        raise InputError(
            f"{where}: data files of more than {MAX_INPUTS >> 20} MiB in all do not travel with a job; put them on "
            "storage that every node mounts and list that folder in cluster.shared"
        )
    content = path.read_bytes()
    name = f"{hashlib.sha256(content).hexdigest()[:12]}-{path.name}"
    inputs.mkdir(exist_ok=True)
    (inputs / name).write_bytes(content)
    return f"{inputs.name}/{name}"


def _copy_package(package: Path, folder: Path) -> None:
    path = package.resolve()
    if not path.exists() or not (path.is_dir() or path.suffix == ".py"):
        raise InputError(f"--package {package}: no such folder or .py file")
    if (folder / path.name).exists():
        raise InputError(f"--package {package}: the job's folder has a {path.name} already; rename the package")
    _copy(path, folder / path.name)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".git"))
    else:
        shutil.copyfile(source, target)
