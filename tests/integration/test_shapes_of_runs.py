"""Other shapes of a run on the real parts: more replicas and ranks, lookahead, the pair judge, real dialogues."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import System

DIALOGUES = [
    f"\n\nHuman: How do I {what}?\n\nAssistant: Why do you ask?\n\nHuman: Just {why}.\n\nAssistant: {{answer}}"
    for what in ("boil an egg", "fold a map", "plant a tree", "mend a shirt", "tune a guitar", "read a poem")
    for why in ("curious", "in case")
]


def write_dialogues(file: Path) -> Path:
    rows = [{"chosen": text.format(answer="Slowly."), "rejected": text.format(answer="No.")} for text in DIALOGUES]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_pair_model_on_dialogues_with_replicas_ranks_lookahead_and_bfloat16(system: System, tmp_path: Path):
    run = system.train(
        f"prompts.path={write_dialogues(tmp_path / 'dialogues.jsonl')}",
        "prompts.format=hh_rlhf",
        "prompts.max_tokens=128",
        "prompts.eval=null",
        "policy.dtype=bfloat16",
        "judge.type=pair_model",
        "judge.max_length=512",
        "judge.engine.kv_cache_memory_bytes=67108864",
        "generator.replicas=2",
        "rounds.lookahead=1",
        "learner.world_size=2",
        "learner.max_length=256",
        "evaluation.every=0",
    )
    assert run.code == 0, run.stderr[-3000:]
    rounds = run.events("round")
    assert [event["round"] for event in rounds] == [1, 2]
    for event in rounds:
        # One comparison a prompt at K = 2, judged in both orders; every one is accounted for.
        assert event["judge/comparisons"] == 4
        assert event["judge/flip_rate"] + event["judge/invalid_rate"] <= 1
        assert event["pairs/kept"] + event["pairs/dropped_tie"] + event["pairs/dropped_invalid"] == 4
        assert event["pairs/staleness_max"] <= 1
    texts = [row["p_ab"] for row in pq.read_table(run.path / "rounds/0001/verdicts.parquet").to_pylist()]
    assert len(texts) == 4
    assert all(0 <= p <= 1 for p in texts)
    # The prompt is the dialogue up to its last assistant turn.
    rollouts = pq.read_table(run.path / "rounds/0001/rollouts.parquet").to_pylist()
    assert len(rollouts) == 8


@pytest.mark.slow
def test_a_round_without_pairs_goes_on_and_says_so(system: System):
    # No sampled text is 2 apart in sentiment: every verdict is a tie.
    run = system.train("pairing.min_margin=0.999", "judge.scale=0.001", "rounds.count=1", "prompts.eval=null")
    assert run.code == 0, run.stderr[-3000:]
    (event,) = run.events("round")
    assert event["pairs/kept"] == 0
    assert event["sync/changed_fraction"] == 0
    assert not run.events("step")
    assert "kept no pair" in run.stdout
    assert run.manifest(1)["state"] == "PUBLISHED"


def test_bad_inputs_leave_nothing_behind(system: System, tmp_path: Path):
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"prompt": "  "}\n{"prompt": "\\n"}\n')
    for override, named in (
        ("policy.path=./no-such-model", "policy.path"),
        (f"prompts.path={blank}", "2 blank"),
        ("prompts.column=question", "'question'"),
        ("generator.samples=1", "generator.samples = 1"),
        ("judge.type=pair_model judge.path=./no-such-judge", "judge.path"),
    ):
        run = system.refused(*override.split(), "prompts.eval=null")
        assert run.code == 2, override
        assert run.stderr.count("\n") == 1
        assert named in run.stderr
        assert not run.path.exists()
