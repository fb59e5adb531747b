"""Compiled layers on a tiny Llama: the steps of an uncompiled learner.

The file is also the script of one rank: `python test_learner_compile.py FOLDER RANK WORLD_SIZE PORT` runs the cases of
the backend that the file FOLDER/backend names.
"""

import sys
from pathlib import Path

import pytest
import torch

from tests.integration.ranks import LEARNER, make_config, make_round, run_ranks, save_tiny_model

CASES = {
    "plain": {},
    "compiled": {"compile": True, "activation_checkpointing": True},
}


def run_case(folder, settings, rank, world_size, port):
    from torch._dynamo.utils import counters

    from rlhf.learning.rank import RankLearner

    counters.clear()
    learner = RankLearner(make_config(folder / "model", micro_batch_size=2, **settings), rank, world_size, "cpu")
    learner.start("127.0.0.1", port, 60)
    result = {"initial": dict(learner.export_tensors()), "at_start": dict(counters["frames"])}
    result["steps"] = [report.metrics for report in learner.train(make_round(1, 9))]
    result["frames"], result["breaks"] = dict(counters["frames"]), dict(counters["graph_break"])
    learner.train(make_round(2, 5))
    result["weights"], result["frames_later"] = dict(learner.export_tensors()), dict(counters["frames"])
    return result


def main():
    from rlhf.learning import compile as compiling

    folder, rank, world_size, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    compiling.BACKEND = (folder / "backend").read_text()
    results = {name: run_case(folder, dict(case), rank, world_size, port) for name, case in CASES.items()}
    torch.save(results, folder / f"results-{rank}.pt")


# ---- the tests ----


@pytest.fixture(scope="module", params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compile")
    save_tiny_model(folder / "model")
    (folder / "backend").write_text(request.param)
    run_ranks(__file__, folder, 1, timeout=500)
    return torch.load(folder / "results-0.pt", weights_only=False)


def test_steps_equal_those_of_an_uncompiled_learner(results):
    found, plain = results["compiled"], results["plain"]
    assert len(found["steps"]) == len(plain["steps"]) == 3
    for ours, theirs in zip(found["steps"], plain["steps"], strict=True):
        for key in ("train/loss", "train/grad_norm", "kl/mean"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key
    for key, value in plain["weights"].items():
        moved = value - plain["initial"][key]
        assert (found["weights"][key] - value).norm() <= 1e-3 * moved.norm(), key
    whole = sum((value - plain["initial"][key]).square().sum() for key, value in plain["weights"].items()).sqrt()
    assert whole > LEARNER["optimizer"]["lr"], "weights that stand still would prove nothing"


def test_the_layers_ran_compiled_and_whole(results):
    found = results["compiled"]
    assert not found["at_start"], "the probe at start would compile for a dtype that no step has"
    # Scoring or training, one row or more, a mask or none (responses of one token): not one for each layer or length.
    assert 2 <= found["frames"]["ok"] == found["frames"]["total"] <= 8
    assert not found["breaks"]
    assert found["frames_later"] == found["frames"], "other lengths are not compiled again"


def test_nothing_is_compiled_unless_asked_for(results):
    assert not results["plain"]["frames_later"]


if __name__ == "__main__":
    main()
