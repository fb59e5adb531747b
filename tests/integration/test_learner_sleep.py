"""A learner that sleeps between rounds trains on as one that does not, and gives out and saves the same meanwhile.

The file is also the script of one rank. DeepSpeed's own moves run, from CPU memory to CPU memory: what they lose or
leave behind is lost here too, but for the device.
"""

import pytest

from rlhf.config.colocate import learner_sleeps
from rlhf.config.learner import Learner
from tests.integration.ranks import load_results, make_config, make_round, rank_main, run_cases, same

LORA = {"lora": {"rank": 4, "alpha": 12, "target_modules": ["q_proj", "v_proj"]}}
BF16 = {"dtype": "bfloat16"}
CASES = {
    2: {
        "half-2": {"zero_stage": 2, **BF16},
        "half-1": {"zero_stage": 1, **BF16},
        "half-1-offload": {"zero_stage": 1, "offload": {"optimizer": True}, **BF16},
        "full-1": {"zero_stage": 1},
        "full-3": {"zero_stage": 3},
        "lora-2": {"zero_stage": 2, **LORA, **BF16},
    },
}
NAMES = list(CASES[2])


def run_case(folder, name, settings, rank, world_size, port):
    from rlhf.learning.rank import RankLearner

    config = make_config(folder / "model", world_size=world_size, micro_batch_size=2, **settings)

    def build():
        learner = RankLearner(config, rank, world_size, "cpu")
        learner.start("127.0.0.1", port, 60)
        return learner

    def weights(learner):
        return {key: value.clone() for key, value in learner.export_tensors()}

    def rounds(learner, *numbers):
        return [report.metrics for number in numbers for report in learner.train(make_round(number, 5))]

    learner = build()
    result = {"awake": (rounds(learner, 1, 2, 3), weights(learner))}
    learner = build()
    engine = learner._engine
    result["can"] = engine.can_sleep
    steps = rounds(learner, 1)
    before = weights(learner)
    engine.sleep()
    engine.sleep()
    result["forgotten"] = not any(getattr(p, "_hp_mapping", None) for p in engine._engine.module.parameters())
    result["exported"] = (before, weights(learner))
    learner.save(folder / f"checkpoint-{name}")
    engine.wake()
    steps += rounds(learner, 2)
    engine.sleep()
    engine.wake()
    engine.wake()
    steps += rounds(learner, 3)
    result["slept"] = (steps, weights(learner))
    learner = build()
    learner.load(folder / f"checkpoint-{name}")
    result["resumed"] = (rounds(learner, 2, 3), weights(learner))
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = run_cases(__file__, tmp_path_factory.mktemp("sleep"), CASES)
    return load_results(folder, CASES, ("awake", "slept", "resumed", "exported"))


@pytest.mark.parametrize("name", NAMES)
def test_rounds_after_a_sleep_are_those_without_one(results, name):
    assert same(results[name]["slept"], results[name]["awake"])
    assert len({step["train/loss"] for step in results[name]["awake"][0]}) > 3


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_given_out_while_it_sleeps(results, name):
    before, asleep = results[name]["exported"]
    assert same(asleep, before)
    assert not same(before, results[name]["awake"][1])


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_written_in_its_sleep_is_a_checkpoint(results, name):
    steps, weights = results[name]["resumed"]
    assert same(weights, results[name]["awake"][1])
    assert same(
        [step["train/loss"] for step in steps],
        [step["train/loss"] for step in results[name]["slept"][0][-len(steps) :]],
    )


@pytest.mark.parametrize("name", NAMES)
def test_which_learners_sleep_is_what_the_plan_says(results, name):
    settings = {key: value for key, value in CASES[2][name].items() if key != "dtype"}
    dtype = CASES[2][name].get("dtype", "float32")
    assert results[name]["can"] == learner_sleeps(Learner(**settings), dtype)
    # Moved for real: DeepSpeed drops its views of what leaves.
    assert results[name]["forgotten"] or not results[name]["can"]


if __name__ == "__main__":
    rank_main(CASES, run_case)
