"""A named subset on learner ranks: every ZeRO stage gives what a plain torch loop over the subset gives.

The file is also the script of one rank: `python test_learner_trainable.py FOLDER RANK WORLD_SIZE PORT`.
"""

import sys
from pathlib import Path

import pytest
import torch

from tests.integration.plain import plain_steps
from tests.integration.ranks import make_config, make_round, run_ranks, save_tiny_model, zero

SUBSET = {"include": ["*.mlp.*", "*norm*", "lm_head.weight"], "exclude": ["*.0.mlp.up_proj.*"]}
CASES = {
    1: {
        **{f"zero{stage}": zero(stage) for stage in range(4)},
        "recomputed": {"activation_checkpointing": True, "micro_batch_size": 1},
        "ema": {"reference": {"policy": "ema"}},
    },
    2: {f"zero{stage}x2": zero(stage) for stage in (1, 3)},
}
EVERY = [name for cases in CASES.values() for name in cases]


def is_trained(name):
    return (".mlp." in name or "norm" in name or "embed" in name) and ".0.mlp.up_proj" not in name


def run_case(folder, name, settings, rank, world_size, port):
    from rlhf.learning.rank import RankLearner

    def build():
        learner = RankLearner(config, rank, world_size, "cpu")
        learner.start("127.0.0.1", port, 60)
        return learner

    config = make_config(folder / "model", world_size=world_size, **{"trainable": SUBSET, **settings})
    learner = build()
    result = {"initial": dict(learner.export_tensors())}
    result["steps"] = [report.metrics for report in learner.train(make_round(1, 9))]
    result["weights"] = dict(learner.export_tensors())
    result["moments"] = moments(learner._engine._engine.optimizer)
    result["mfu"] = learner.statistics()["perf/mfu"]
    learner.save(folder / f"checkpoint-{name}")
    learner.train(make_round(2, 5))
    result["uninterrupted"] = dict(learner.export_tensors())
    again = build()
    again.load(folder / f"checkpoint-{name}")
    again.train(make_round(2, 5))
    result["resumed"] = dict(again.export_tensors())
    torch.save(result, folder / f"result-{name}-{rank}.pt")


def moments(optimizer):
    """Numbers in AdamW's first moments on this rank."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return sum(state["exp_avg"].numel() for state in inner.state.values())


def main():
    folder, rank, world_size, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    for name, settings in CASES[world_size].items():
        run_case(folder, name, settings, rank, world_size, port)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainable")
    save_tiny_model(folder / "model")
    for world_size in CASES:
        run_ranks(__file__, folder, world_size)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return {
        name: torch.load(folder / f"result-{name}-0.pt", weights_only=False)
        for cases in CASES.values()
        for name in cases
    }


@pytest.fixture(scope="module")
def plain(folder):
    from rlhf.learning.plan import step_batches

    pairs = [pair for pair in make_round(1, 9).pairs if pair.uid != "long"]
    batches = step_batches(len(pairs), 4, 1, 0, 1)
    return plain_steps(folder / "model", [[(1.0, [pairs[i] for i in batch])] for batch in batches], is_trained)


@pytest.mark.parametrize("name", EVERY)
def test_steps_equal_a_plain_loop_over_the_subset(results, plain, name):
    found, (steps, weights) = results[name], plain
    for ours, ((loss,), norm) in zip(found["steps"], steps, strict=True):
        # The average's scores are the start's in the first round, so the loop is the same.
        assert ours["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert ours["train/loss"] == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert found["weights"].keys() == weights.keys() == found["initial"].keys()
    for key, value in weights.items():
        start, end = found["initial"][key], found["weights"][key]
        if is_trained(key):
            change = value - start
            assert change.abs().max() > 1e-3
            assert (end - start - change).norm() <= 1e-3 * change.norm(), key
        else:
            assert torch.equal(start, end), key
            assert torch.equal(start, found["uninterrupted"][key]), key


@pytest.mark.parametrize("name", EVERY)
def test_resume_is_bit_equal(results, name):
    found = results[name]
    assert all(torch.equal(found["resumed"][key], value) for key, value in found["uninterrupted"].items())
    assert any(not torch.equal(found["weights"][key], value) for key, value in found["uninterrupted"].items())


@pytest.mark.parametrize("name", EVERY)
def test_only_the_subset_has_optimizer_state(results, name):
    found = results[name]
    trained = sum(value.numel() for key, value in found["initial"].items() if is_trained(key))
    ranks = 2 if name.endswith("x2") else 1
    assert trained / ranks <= found["moments"] <= trained / ranks + 64  # partitions are padded
    assert trained < 0.8 * sum(value.numel() for value in found["initial"].values())
    assert 0 < found["mfu"] < 1


if __name__ == "__main__":
    main()
