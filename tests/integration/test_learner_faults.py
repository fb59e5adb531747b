"""A learner whose numbers are not finite: its steps end, its measurements say nothing rather than something wrong.

The file is also the script of one rank: `python test_learner_faults.py FOLDER RANK WORLD_SIZE PORT`.
"""

import math

import pytest
import torch

from tests.integration.ranks import load_results, make_config, make_round, rank_main, run_cases, start_learner

CASES = {1: {"faults": {"zero_stage": 0, "max_skipped_steps": 2, "batch_size": 2, "micro_batch_size": 2}}}
NAN = float("nan")


def run_case(folder, name, settings, rank, world_size, port):
    from rlhf.errors import InputError, RLHFError

    learner = start_learner(make_config(folder / "model", **settings), rank, world_size, port)
    pairs = make_round(9, 5).pairs[:2]
    result = {"start": learner.evaluate(pairs), "steps": []}
    score, learner.reference.score = learner.reference.score, lambda pairs: torch.full((len(pairs), 2), NAN)
    try:
        for sealed in (make_round(1, 1), make_round(2, 11)):
            for report in learner.steps(sealed):
                result["steps"].append(report.metrics)
    except RLHFError as error:
        result["stopped"] = str(error)
    learner.reference.score = score
    with torch.no_grad():
        for parameter in learner._model.parameters():
            parameter.fill_(NAN)
    result["broken"] = learner.evaluate(pairs)
    try:
        raw = {"deepspeed": {"zero_optimization": {"stge": 1}}}
        start_learner(make_config(folder / "model", **settings | raw), rank, world_size, port)
    except InputError as error:
        result["refused"] = str(error)
    return result


# ---- the tests ----


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = run_cases(__file__, tmp_path_factory.mktemp("faults"), CASES)
    return load_results(folder, CASES, ())["faults"]


def test_a_run_of_steps_that_cannot_be_taken_ends_the_training(found):
    # One step of the first round, then one of six of the second.
    assert [step["train/skipped"] for step in found["steps"]] == [1.0, 1.0]
    assert "2 steps in a row had a loss or gradient that is not finite" in found["stopped"]
    assert "learner.max_skipped_steps = 2" in found["stopped"]


def test_steps_that_are_not_finite_report_no_reward(found):
    for step in found["steps"]:
        assert not {"train/loss", "rewards/margins", "rewards/accuracies"} & step.keys()
        assert math.isfinite(step["logps/chosen"])


def test_before_training_all_pairs_are_ties_and_count_half(found):
    assert found["start"]["rewards/accuracies"] == 0.5
    assert found["start"]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_weights_that_are_not_finite_measure_nothing(found):
    assert found["broken"] == {}


def test_what_deepspeed_refuses_names_the_overrides(found):
    assert found["refused"].startswith("learner.deepspeed: DeepSpeed refuses its config: ")
    assert "stge" in found["refused"]
    assert "\n" not in found["refused"]


if __name__ == "__main__":
    rank_main(CASES, run_case)
