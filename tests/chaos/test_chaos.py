"""Runs of the real system on two nodes that are killed and damaged, from a seed. The long ones are `make chaos`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checks import problems, replayed, undisturbed
from tests.chaos.cluster import TwoNodes
from tests.chaos.disk import Disk
from tests.chaos.harness import Harness, Outcome
from tests.chaos.schedule import UNRELAYED, Fault, Kind, Moment, schedule
from tests.chaos.summary import summarise
from tests.integration.conftest import ROOT

PROMPTS = 4
RANKS = 2
SEEDS = range(6)
OUT = ROOT / "build" / "chaos"

RELAYED = (Kind.RELAY, Kind.GENERATOR, Kind.ENGINE, Kind.LEARNER_0, Kind.CONTROLLER, Kind.NODE)
"""What can happen around a relay."""

SHORT = (
    Fault(Kind.ENGINE, Moment.SAMPLING, 1, 0.1, 0.0),
    Fault(Kind.JUDGE, Moment.JUDGING, 2, 0.0, 0.0),
    Fault(Kind.LEARNER_1, Moment.TRAINING, 3, 0.05, 0.0),
    Fault(Kind.FLIPPED_SEALED, Moment.PUBLISHING, 4, 0.1, 0.5),
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path / "disk") as disk:
        yield disk


def config(
    model: Path, folder: Path, disk: Disk, rounds: int, generators: int = 2, lookahead: int = 0
) -> dict[str, Any]:
    """The tiny run: all threads and places set, no evaluation, every second round saved."""
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": f"Tell me about the number {n}."} for n in range(rounds * PROMPTS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "chaos",
        "output_dir": str(disk.path),
        "policy": {"path": str(model), "dtype": "float32"},
        "prompts": {"path": str(prompts), "max_tokens": 64},
        "rounds": {"count": rounds, "prompts": PROMPTS, "lookahead": lookahead},
        "generator": {
            "replicas": generators,
            "samples": 2,
            "cpus": 1,
            "sampling": {"max_tokens": 24},
            "engine": {"kv_cache_memory_bytes": 64 << 20},
        },
        "judge": {
            "type": "python",
            "function": "tests.chaos.judge:prefer",
            "kind": "compare",
            "batch_size": 2,
            "cache": lookahead > 0,
            "options": {"note": str(folder / "judged")},
        },
        "pairing": {"min_margin": 0.0},
        "learner": {
            "world_size": RANKS,
            "cpus": 1,
            "batch_size": 2,
            "micro_batch_size": 1,
            "max_length": 128,
            "optimizer": {"lr": 1e-3},
        },
        "checkpoint": {"every": 2},
        "evaluation": {"every": 0},
        "cluster": {
            "device": "cpu",
            "grows": True,  # the second node may be on its way
            "restarts": {"budget": 1000},
            "deadlines": {"start": 600, "generate": 240, "token": 60, "learn": 180, "sync": 120, "checkpoint": 120},
        },
    }


def disturb(
    folder: Path, document: dict[str, Any], disk: Disk, faults: Sequence[Fault], command: str = "rlhf.cli"
) -> tuple[Outcome, list[str]]:
    with TwoNodes() as cluster:
        outcome = Harness(cluster, folder, document, disk, command).run(faults)
        return outcome, problems(outcome, document["rounds"]["count"], PROMPTS)


def note(name: str, outcome: Outcome, wrong: list[str], summaries: list[dict[str, Any]]) -> None:
    """Keep a run's summary for the end of the session, and as a file."""
    summaries.append(summarise(name, outcome, wrong))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(summaries[-1], indent=1) + "\n")


@pytest.mark.timeout(900)
def test_an_engine_a_judge_a_learner_and_the_controller_die_and_nothing_is_lost(tmp_path, tiny_model, disk, summaries):
    # More rounds than faults: a moment that is not seen in its round is seen in a later one.
    document = config(tiny_model, tmp_path, disk, rounds=10, generators=1)
    outcome, wrong = disturb(tmp_path, document, disk, SHORT)
    wrong += replayed(outcome, RANKS)
    note("short", outcome, wrong, summaries)
    assert wrong == []
    assert (outcome.starts, len(outcome.injections)) == (2, len(SHORT))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_fault_once_at_random_moments(seed: int, tmp_path: Path, tiny_model: Path, disk: Disk, summaries):
    """One after the other, each run gets every kind of fault; odd seeds sample one round ahead and keep verdicts."""
    kinds = [kind for kind in UNRELAYED if disk.can_fill or kind != Kind.FULL_DISK]
    rounds = 3 * len(kinds) // 2 + 4
    document = config(tiny_model, tmp_path, disk, rounds, lookahead=seed % 2)
    outcome, wrong = disturb(tmp_path, document, disk, schedule(seed, len(kinds), kinds))
    wrong += replayed(outcome, RANKS)
    wrong += undisturbed(outcome, tmp_path / "undisturbed", document)
    note(f"seed-{seed}", outcome, wrong, summaries)
    assert wrong == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [14, 21])  # with them relays are hit while they carry samples
def test_relays_and_those_around_them_die(seed: int, tmp_path: Path, tiny_model: Path, disk: Disk, summaries):
    """Twice each kind; the odd seed samples one round ahead."""
    document = config(tiny_model, tmp_path, disk, rounds=22, lookahead=seed % 2)
    # Relays at once, before what they carry has arrived.
    faults = [
        replace(fault, delay_s=0.0) if fault.kind == Kind.RELAY else fault
        for fault in schedule(seed, 2 * len(RELAYED), RELAYED)
    ]
    outcome, wrong = disturb(tmp_path, document, disk, faults, "tests.chaos.relayed")
    wrong += replayed(outcome, RANKS)
    wrong += undisturbed(outcome, tmp_path / "undisturbed", document)
    note(f"relayed-{seed}", outcome, wrong, summaries)
    assert wrong == []
    hit = [injection for injection in outcome.injections if injection.fault.kind == Kind.RELAY]
    told = (tmp_path / "stderr").read_text() + (tmp_path / "stdout").read_text()
    assert len(hit) == 2 <= told.count("relay-0 is started again")
    assert any({"sampling", "judging"} & set(injection.found) for injection in hit)
