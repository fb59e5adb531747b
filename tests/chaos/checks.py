"""What has to hold at the end of a run, whatever was done to it. Each check returns what is wrong, in words."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file

from rlhf.rounds.checkpoints import CheckpointStore
from rlhf.rounds.ledger import Ledger, RoundState
from tests.chaos import replay
from tests.chaos.harness import Outcome
from tests.integration.conftest import ROOT
from tests.integration.ranks import run_ranks


def problems(outcome: Outcome, rounds: int, prompts: int) -> list[str]:
    """All that is wrong with the files of a run that ended, and with how it went."""
    found = [f"the run ended by itself: {line}" for line in outcome.unexpected]
    found += [f"never came: {fault}" for fault in outcome.missed]
    found += [f"left over: {command}" for command in outcome.strays]
    ledger = Ledger(outcome.run_dir)
    found += _ledger(ledger, rounds, prompts)
    for round in range(1, rounds + 1):
        found += _sealed(ledger, round, outcome.sealed.get(round))
    found += _metrics(ledger, outcome.run_dir, rounds)
    if problem := CheckpointStore(outcome.run_dir, 1).problem(rounds):
        found.append(f"the last checkpoint: {problem}")
    return found


def _ledger(ledger: Ledger, rounds: int, prompts: int) -> Iterator[str]:
    states = [ledger.state(round) for round in range(1, rounds + 1)]
    if set(states) != {RoundState.PUBLISHED}:
        yield f"not all rounds are published: {states}"
    planned = [uid for round in range(1, rounds + 1) for uid in ledger.plan(round)]
    if len(planned) != len(set(planned)) or len(planned) != rounds * prompts:
        yield f"{len(planned)} prompts planned, {len(set(planned))} distinct, expected {rounds * prompts}"
    if any(ledger.cursor(round) != (round - 1) * prompts for round in range(1, rounds + 1)):
        yield "a cursor is not the number of prompts before its round"


def _sealed(ledger: Ledger, round: int, digest: str | None) -> Iterator[str]:
    """The pairs are those that were sealed first: one for each planned prompt whose responses were not dropped."""
    path, manifest = ledger.folder(round) / "pairs.parquet", ledger.manifest(round)["pairs"]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found == manifest["sha256"] == digest:
        yield f"round {round}: sealed as {digest} at first, its manifest says {manifest['sha256']}, the file is {found}"
    trained = Counter(pq.read_table(path, columns=["uid"]).column("uid").to_pylist())
    planned = set(ledger.plan(round))
    if max(trained.values(), default=0) > 1 or not planned >= trained.keys():
        yield f"round {round}: pairs of {trained}, planned {planned}"
    if planned != trained.keys() and not manifest["metrics"]["rollout/dropped_stale"]:
        yield f"round {round}: no pair of {planned - trained.keys()}"


def _metrics(ledger: Ledger, run_dir: Path, rounds: int) -> Iterator[str]:
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    if [event["step"] for event in steps] != list(range(1, len(steps) + 1)):
        yield f"steps in metrics.jsonl: {[event['step'] for event in steps]}"
    if [event["round"] for event in events if event["event"] == "round"] != list(range(1, rounds + 1)):
        yield "metrics.jsonl does not have each round once, in order"
    for round in range(1, rounds + 1):
        trained = sum(event["train/pairs"] for event in steps if event["round"] == round)
        if trained != ledger.manifest(round)["pairs"]["count"]:
            yield f"round {round}: {trained} pairs trained of {ledger.manifest(round)['pairs']['count']}"


def replayed(outcome: Outcome, world_size: int) -> list[str]:
    """Do the learner's ranks alone, on the sealed pairs, end in the very weights of the run?"""
    run_ranks(str(Path(replay.__file__)), outcome.run_dir, world_size)
    return list(_differences(outcome.run_dir / "policy", outcome.run_dir / "replayed", "the learner alone"))


def undisturbed(outcome: Outcome, folder: Path, config: dict[str, Any]) -> list[str]:
    """Does a whole run that nobody disturbs, given the sealed pairs, end in the very weights of the run?"""
    run_dir, old = folder / config["name"], Ledger(outcome.run_dir)
    new = Ledger(run_dir)
    for round in old.rounds():
        manifest = old.manifest(round)
        shutil.copytree(old.folder(round), new.folder(round), ignore=lambda *_: ["manifest.json"], dirs_exist_ok=True)
        new.commit(round, RoundState.PLANNED, {"uids": manifest["uids"], "cursor": manifest["cursor"]})
        new.commit(round, RoundState.SEALED, {"pairs": manifest["pairs"]})
    shutil.copyfile(outcome.run_dir / "config.yaml", run_dir / "config.yaml")
    file = folder / "undisturbed.yaml"
    document = {**config, "output_dir": str(folder), "generator": {**config["generator"], "replicas": 1}}
    file.write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "rlhf.cli", "train", str(file)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return [f"the undisturbed run failed: {done.stderr[-2000:]}"]
    return list(_differences(outcome.run_dir / "policy", run_dir / "policy", "an undisturbed run"))


def _differences(path: Path, other: Path, whose: str) -> Iterator[str]:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (path, other))
    if ours.keys() != theirs.keys():
        yield f"{whose} has other tensors: {ours.keys() ^ theirs.keys()}"
    different = [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
    if different:
        yield f"{whose} ends in other weights: {len(different)} of {len(ours)} tensors differ, such as {different[0]}"
