"""CPU offload on a tiny Llama: the steps of a learner that keeps all where it computes, skipped ones and resume too.

The file is also the script of one rank: `python test_learner_offload.py FOLDER RANK WORLD_SIZE PORT` runs its cases.
"""

import sys
from pathlib import Path

import pytest
import torch

from tests.integration.ranks import LEARNER, make_config, make_round, run_ranks, save_tiny_model

CPU = {"device": "cpu"}
BF16 = {"dtype": "bfloat16"}
PLAIN = {"plain": {}, **{f"plain-bf16-{stage}": {"zero_stage": stage, **BF16} for stage in (1, 2)}}
OFFLOADED = {
    "optimizer-1": {"zero_stage": 1, "offload": {"optimizer": True}},
    "raw-2": {"deepspeed": {"zero_optimization": {"offload_optimizer": CPU}}},
    "both-3": {"zero_stage": 3, "offload": {"optimizer": True, "parameters": True}},
    "parameters-3": {"zero_stage": 3, "offload": {"parameters": True}},
    **{f"bf16-{stage}": {"zero_stage": stage, "offload": {"optimizer": True}, **BF16} for stage in (1, 2)},
}
CASES = PLAIN | OFFLOADED
RANKS = 2


def run_case(folder, settings, rank, world_size, port):
    from rlhf.learning.rank import RankLearner

    def build():
        learner = RankLearner(config, rank, world_size, "cpu")
        learner.start("127.0.0.1", port, 60)
        return learner

    def weights():
        return {key: value.float() for key, value in learner.export_tensors()}

    config = make_config(folder / "model", world_size=world_size, micro_batch_size=1, **settings)
    learner = build()
    zero = learner._engine.config["zero_optimization"]
    result = {"initial": weights(), "zero": zero}
    result["steps"] = [report.metrics for report in learner.train(make_round(1, 7))]
    result["weights"] = weights()
    score, learner.reference.score = learner.reference.score, lambda pairs: torch.full((len(pairs), 2), float("nan"))
    result["skipped"] = ([report.metrics["train/skipped"] for report in learner.train(make_round(2, 2))], weights())
    learner.reference.score = score
    if not settings.keys() & {"offload", "deepspeed"}:
        return result
    learner.save(folder / "checkpoint")
    result["after"] = ([report.metrics for report in learner.train(make_round(3, 5))], weights())
    learner = build()
    learner.load(folder / "checkpoint")
    result["resumed"] = ([report.metrics for report in learner.train(make_round(3, 5))], weights())
    return result


def main():
    folder, rank, world_size, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    results = {name: run_case(folder, dict(case), rank, world_size, port) for name, case in CASES.items()}
    torch.save(results, folder / f"results-{rank}.pt")


# ---- the tests ----


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    save_tiny_model(folder / "model")
    run_ranks(__file__, folder, RANKS)
    return torch.load(folder / "results-0.pt", weights_only=False)


def same_steps(ours, plain, tolerance):
    assert len(ours) == len(plain) > 0
    for a, b in zip(ours, plain, strict=True):
        assert a["train/skipped"] == b["train/skipped"] == 0
        for key in ("train/loss", "train/grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize("name", OFFLOADED)
def test_steps_equal_those_without_offload(results, name):
    # In bf16 the stages round in places of their own, so each has a base.
    found, plain = results[name], results[f"plain-{name}" if name.startswith("bf16") else "plain"]
    same_steps(found["steps"], plain["steps"], 1e-6)
    for key, value in plain["weights"].items():
        moved = value - plain["initial"][key]
        assert (found["weights"][key] - value).norm() <= 1e-3 * moved.norm(), key
    whole = sum((value - plain["initial"][key]).square().sum() for key, value in plain["weights"].items()).sqrt()
    assert whole > LEARNER["optimizer"]["lr"], "weights that stand still would prove nothing"


@pytest.mark.parametrize("name", OFFLOADED)
def test_a_step_that_is_not_finite_is_skipped_and_the_next_is_taken(results, name):
    """DeepSpeed's own offloaded ZeRO 1 and 2 in bf16 keep the gradients of such a step and skip every later one."""
    found = results[name]
    skipped, weights = found["skipped"]
    assert skipped == [1.0]
    assert all(torch.equal(weights[key], value) for key, value in found["weights"].items())
    same_steps(found["after"][0], found["resumed"][0], 0.0)
    assert any(not torch.equal(found["after"][1][key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", OFFLOADED)
def test_resume_is_bit_equal(results, name):
    (steps, weights), (again, resumed) = results[name]["after"], results[name]["resumed"]
    assert steps == again
    assert all(torch.equal(resumed[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", OFFLOADED)
def test_deepspeed_is_told(results, name):
    zero = results[name]["zero"]
    assert zero.get("offload_optimizer") == (None if name == "parameters-3" else CPU)
    assert zero.get("offload_param") == (CPU if zero["stage"] == 3 else None)


if __name__ == "__main__":
    main()
