"""Whole runs of the real system: vLLM, DeepSpeed and Ray on a tiny random model."""

import hashlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import System

ROUND_METRICS = {
    *(f"rollout/{name}" for name in ("tokens", "tokens_per_s", "length_mean", "truncated_rate")),
    *(f"judge/{name}" for name in ("comparisons", "flip_rate", "tie_rate", "invalid_rate")),
    *(f"judge/{name}" for name in ("length_bias", "score_mean")),
    *(f"pairs/{name}" for name in ("kept", "dropped_tie", "dropped_invalid", "staleness_mean", "staleness_max")),
    *(f"sync/{name}" for name in ("seconds", "bytes", "changed_fraction")),
    *(f"timing_s/{n}" for n in ("generate", "judge", "reference", "learn", "sync", "checkpoint", "idle", "total")),
    *(f"perf/{name}" for name in ("learner_tokens_per_s", "mfu", "peak_memory_gb")),
    "mismatch/kl",
    "mismatch/max",
}  # fmt: skip
STEP_METRICS = {
    *(f"train/{name}" for name in ("loss", "grad_norm", "lr", "pairs")),
    *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
    "logps/chosen",
    "logps/rejected",
    "kl/mean",
    "loss/beta",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path):
    """One whole run that the tests below look at."""
    run = System(tmp_path_factory.mktemp("run"), tiny_model).train()
    assert run.code == 0, run.stderr[-3000:]
    return run


def test_every_round_is_sealed_trained_and_published(finished):
    uids = []
    for round in (1, 2):
        manifest = finished.manifest(round)
        assert manifest["state"] == "PUBLISHED"
        assert manifest["version"] == round
        uids += manifest["uids"]
        folder = finished.path / "rounds" / f"{round:04d}"
        digest = hashlib.sha256((folder / "pairs.parquet").read_bytes()).hexdigest()
        assert digest == manifest["pairs"]["sha256"]
        assert pq.read_table(folder / "rollouts.parquet").num_rows == 8
    assert len(uids) == len(set(uids)) == 8


def test_metrics_have_the_contract_names(finished):
    rounds, steps, evals = finished.events("round"), finished.events("step"), finished.events("eval")
    assert [event["round"] for event in rounds] == [1, 2]
    assert all(event.keys() >= ROUND_METRICS for event in rounds)
    assert steps
    assert all(event.keys() >= STEP_METRICS for event in steps)
    assert [event["step"] for event in steps] == list(range(1, len(steps) + 1))
    assert [event["round"] for event in evals] == [0, 1, 2]
    assert evals[-1].keys() >= {"eval/win_rate", "eval/win_rate_low", "eval/win_rate_high", "eval/score"}


def test_engine_and_learner_agree_after_every_update(finished):
    # In float32 the same tokens under the same version: within 1e-4, embeddings and tied head included.
    for event in finished.events("round"):
        assert 0 < event["sync/probe_error"] < 1e-4
        assert 0 < event["mismatch/max"] < 1e-4


def test_weights_moved_and_were_saved_for_transformers(finished, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = load_file(tiny_model / "model.safetensors")
    after = load_file(finished.path / "policy" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    model = AutoModelForCausalLM.from_pretrained(finished.path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(finished.path / "policy")
    assert torch.equal(model.get_input_embeddings().weight, after["model.embed_tokens.weight"])
    assert tokenizer("hello")["input_ids"]


def test_pairs_hold_the_sampled_tokens(finished):
    folder = finished.path / "rounds" / "0001"
    sampled = {
        (row["uid"], tuple(row["token_ids"])): row for row in pq.read_table(folder / "rollouts.parquet").to_pylist()
    }
    pairs = pq.read_table(folder / "pairs.parquet").to_pylist()
    assert pairs
    for pair in pairs:
        for side in ("chosen", "rejected"):
            rollout = sampled[pair["uid"], tuple(pair[f"{side}_ids"])]
            assert rollout["text"] == pair[side]
            assert rollout["logprobs"] == pair[f"{side}_logprobs"]
            # A truncated response gets no forged end token, a finished one keeps the one that was sampled.
            assert (rollout["token_ids"][-1] == 2) == (rollout["finish_reason"] == "stop")


def test_a_finished_run_is_not_run_again(finished, tiny_model):
    before = (finished.path / "metrics.jsonl").read_bytes()
    again = System(finished.path.parents[1], tiny_model).train()
    assert again.code == 0
    assert "done" in again.stdout + again.stderr
    assert (finished.path / "metrics.jsonl").read_bytes() == before


def test_a_run_directory_of_another_config_is_refused(finished, tiny_model):
    other = System(finished.path.parents[1], tiny_model).train("learner.loss.beta=0.3")
    assert other.code == 2
    assert "learner.loss.beta was 0.1 when this run began and is 0.3 now" in other.stderr
