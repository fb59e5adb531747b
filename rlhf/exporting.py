"""A finished run's policy as a folder to publish: the Hugging Face checkpoint and a model card."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import InputError
from rlhf.files import rename_durable, sync_file
from rlhf.monitor.jsonl import read_records


def export_run(run_dir: Path, out: Path) -> Path:
    """Copy RUN_DIR/policy to `out` with a README.md, whole or not at all; returns `out`.

    Raises `InputError` if RUN_DIR is no finished run, or `out` is not empty or lies inside the policy.
    """
    policy = run_dir / "policy"
    resolved = read_run_config(run_dir)
    if not (policy / "config.json").is_file():
        raise InputError(
            f"RUN_DIR = {str(run_dir)!r}: the run has not finished, there is no policy/ in it; "
            "run `rlhf train` with its config again, it goes on from the last checkpoint"
        )
    if out.resolve().is_relative_to(policy.resolve()):
        raise InputError(f"OUT = {str(out)!r}: lies inside the policy to be exported; name another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"OUT = {str(out)!r}: exists and is not empty; remove it or name another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise InputError(f"OUT = {str(out)!r}: cannot write there: {error.strerror}") from error
    try:
        copy = staging / "copy"
        shutil.copytree(policy, copy)
        (copy / "README.md").write_text(model_card(resolved, read_records(run_dir / "metrics.jsonl")), encoding="utf-8")
        for file in copy.rglob("*"):
            if file.is_file():
                sync_file(file)
        if out.exists():
            out.rmdir()
        rename_durable(copy, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """RUN_DIR/config.yaml; raises `InputError` if the folder is no run directory."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        reason = "it has no config.yaml" if run_dir.is_dir() else "there is no such folder"
        raise InputError(f"RUN_DIR = {str(run_dir)!r}: not a run directory, {reason}; name a folder under output_dir")
    resolved = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(resolved, dict):
        raise InputError(f"{file}: the run's config is damaged: expected a mapping of keys")
    return resolved


def config_digest(resolved: dict[str, Any]) -> str:
    """SHA-256 of the resolved config, without the package versions, the folder it ran in and how it came to be so."""
    kept = {key: value for key, value in resolved.items() if key not in ("versions", "history", "output_dir")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def model_card(resolved: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The README.md of an exported policy: where it comes from, how it was trained, how it did."""
    base = str(resolved["policy"]["path"])
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base.count("/") == 1 and not Path(base).exists():
        header["base_model"] = base
    header["tags"] = ["rlhf", "online-dpo"]
    loss, learner, versions = resolved["learner"]["loss"], resolved["learner"], resolved.get("versions", {})
    facts = {
        "Base model": f"`{base}`",
        "Method": f"online iterative DPO, `{loss['type']}` loss, beta {loss['beta']}",
        "Rounds": f"{resolved['rounds']['count']} of {resolved['rounds']['prompts']} prompts",
        "Responses a prompt": str(resolved["generator"]["samples"]),
        "Judge": f"`{resolved['judge']['type']}`, pairs by `{resolved['pairing']['strategy']}`",
        "Learning rate": f"{learner['optimizer']['lr']:g}, {learner['optimizer']['schedule']}",
        "Seed": str(resolved["seed"]),
        "Config digest (SHA-256)": f"`{config_digest(resolved)}`",
        "Software": ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded",
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {resolved['name']}", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    evals = [record for record in records if record["event"] == "eval"]
    if not evals:
        return "\n".join([*lines, "No evaluation ran.", ""])
    last = evals[-1]
    lines += [f"## Evaluation after round {last['round']}", ""]
    lines += ["Against the policy the run started from, on prompts that training never saw.", ""]
    lines += ["| metric | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.4g} |" for name, value in sorted(last.items()) if name.startswith("eval/")]
    return "\n".join([*lines, ""])
