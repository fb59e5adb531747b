"""Reference policies on learner ranks: their log-probs are those of a plain forward of the right weights."""

import pytest
import torch

from tests.integration.ranks import (
    SPLIT,
    load_results,
    make_config,
    make_round,
    models,
    rank_main,
    run_cases,
    start_learner,
    token_logprobs,
)

DECAY = 0.8
EMA = {"reference": {"policy": "ema", "ema_decay": DECAY}}
START = {"reference": {"policy": "round_start"}}
LORA = {"lora": {"rank": 4, "alpha": 12, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["norm"]}}
CASES = {
    1: {
        "initial0": {"zero_stage": 0},
        "initial3": SPLIT,
        **{f"ema{stage}": {**EMA, "zero_stage": stage} for stage in range(4)},
        "ema3-split": {**EMA, **SPLIT},
        "ema-bf16": {**EMA, "dtype": "bfloat16"},
        "ema3-bf16": {**EMA, **SPLIT, "dtype": "bfloat16"},
        "ema-offload": {"reference": {**EMA["reference"], "offload": True}},
        "ema-lora": {**EMA, **LORA},
        "ema3-lora": {**EMA, **LORA, **SPLIT},
        **{f"start{stage}": {**START, "zero_stage": stage} for stage in (2, 3)},
        "start3-split": {**START, **SPLIT},
        "start-lora": {**START, **LORA},
        "start-bf16": {**START, "dtype": "bfloat16"},
        "sft": {"loss": {"type": "sft"}},
    },
    2: {
        **{f"ema{stage}x2": {**EMA, "zero_stage": stage} for stage in (2, 3)},
        "ema3x2-split": {**EMA, **SPLIT},
        "start3x2-split": {**START, **SPLIT},
        "initial3x2": SPLIT,
    },
}
EVERY = [name for cases in CASES.values() for name in cases]
EXACT = [name for name in EVERY if "bf16" not in name and name != "sft"]


def run_case(folder, name, settings, rank, world_size, port):
    def build():
        return start_learner(config, rank, world_size, port)

    def weights():
        return dict(learner.export_tensors())

    def trained():
        """Whole values of the trained parameters, by name."""
        named = list(learner._parametrisation.trainable(learner._model))
        with learner._engine.gather([parameter for _, parameter in named]):
            return {name: parameter.detach().clone() for name, parameter in named}

    def score():
        return learner.reference.score(make_round(1, 5).pairs)

    config = make_config(folder / "model", world_size=world_size, **settings)
    before = models()
    learner = build()
    result = {"models": models() - before, "initial": weights(), "scores": [score()], "trained": [trained()]}
    result["evaluations"] = [evaluations(learner)]
    for _ in learner.steps(make_round(1, 9)):
        result["trained"].append(trained())
    result["weights"] = weights()
    result["scores"].append(score())
    result["evaluations"].append(evaluations(learner))
    result["after_score"] = weights()
    learner.save(folder / f"checkpoint-{name}")
    second = learner.train(make_round(2, 9))
    result["uninterrupted"] = ([report.metrics for report in second], weights(), score())

    learner = build()
    learner.load(folder / f"checkpoint-{name}")
    result["loaded"] = (score(), weights())
    second = learner.train(make_round(2, 9))
    result["resumed"] = ([report.metrics for report in second], weights(), score())

    # A step that is not taken does not move the average.
    scored = learner.reference.score
    learner.reference.score = lambda pairs: torch.full((len(pairs), 2), float("nan"))
    learner.train(make_round(3, 3))
    learner.reference.score = scored
    result["skipped"] = score()
    return result


def evaluations(learner):
    """How often two evaluations in a row asked the reference, both, and one whose reference is scored for it."""
    from rlhf.learning.measure import measure

    pairs, score, asked = make_round(1, 5).pairs, learner.reference.score, []
    learner.reference.score = lambda pairs: asked.append(1) or score(pairs)
    found = [learner.evaluate(pairs) for _ in range(2)]
    learner.reference.score = score
    return len(asked), *found, measure(learner._steps, pairs, score(pairs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_cases(__file__, tmp_path_factory.mktemp("reference"), CASES)


@pytest.fixture(scope="module")
def results(folder):
    return load_results(folder, CASES, alike=("scores",))


def plain_scores(folder, weights, lora=None):
    """Summed log-probs by transformers' own forward, its whole logits, one sequence at a time, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        options = LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            target_modules=lora["target_modules"],
            modules_to_save=["model.norm"],
        )
        get_peft_model(model, options)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    with torch.no_grad():
        return torch.tensor(
            [
                [token_logprobs(model, p.prompt_ids, ids).sum() for ids in (p.chosen_ids, p.rejected_ids)]
                for p in make_round(1, 5).pairs
            ]
        )


def averages(trained):
    """The moving average by hand, in double precision, from the weights after each step."""
    average = {name: value.double() for name, value in trained[0].items()}
    for step in trained[1:]:
        average = {name: DECAY * value + (1 - DECAY) * step[name].double() for name, value in average.items()}
    return {name: value.float() for name, value in average.items()}


@pytest.mark.parametrize("name", EXACT)
def test_log_probs_are_those_of_the_right_weights(folder, results, name):
    found, lora = results[name], CASES[2 if "x2" in name else 1][name].get("lora")
    first, second = found["scores"]
    torch.testing.assert_close(first, plain_scores(folder, found["initial"]), rtol=1e-6, atol=1e-5)
    if name.startswith("initial"):
        expected = plain_scores(folder, found["initial"])
    elif name.startswith("start"):
        expected = plain_scores(folder, found["weights"])
    else:
        assert len(found["trained"]) == 4
        expected = plain_scores(folder, averages(found["trained"]), lora)
    torch.testing.assert_close(second, expected, rtol=1e-6, atol=1e-5)
    # The policy has moved, and so far that its own log-probs would be told from the average's.
    moved = (plain_scores(folder, found["weights"]) - first).abs().max()
    assert moved > 0.1
    if name.startswith("ema"):
        assert 0.05 * moved < (second - first).abs().max() < 0.95 * moved


@pytest.mark.parametrize("name", ["ema-bf16", "ema3-bf16"])
def test_a_bf16_average_is_kept_in_fp32(folder, results, name):
    import math

    saved = torch.load(folder / f"checkpoint-{name}" / "reference-00000.pt", weights_only=True)["average"]
    for key, value in averages(results[name]["trained"]).items():
        shard = saved[f"model.{key}"]
        assert shard.dtype == torch.float32
        torch.testing.assert_close(shard.flatten()[: math.prod(value.shape)], value.flatten(), rtol=1e-6, atol=1e-7)
    first, second = results[name]["scores"]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", EVERY)
def test_scoring_leaves_the_policy_alone(results, name):
    found = results[name]
    assert all(torch.equal(found["after_score"][k], v) for k, v in found["weights"].items())


@pytest.mark.parametrize("name", EVERY)
def test_held_out_pairs_are_measured_against_the_reference_as_it_is(results, name):
    for number, (asked, first, second, fresh) in enumerate(results[name]["evaluations"]):
        assert first == second == fresh
        stays = name.startswith("initial") or name == "sft"
        # The log-probs of a reference that stays are there from the first evaluation on.
        assert asked == ((1, 0)[number] if stays else 2)


@pytest.mark.parametrize("name", EVERY)
def test_only_initial_without_adapters_holds_a_second_model(results, name):
    assert results[name]["models"] == (2 if name.startswith("initial") else 1)


@pytest.mark.parametrize("name", EVERY)
def test_resume_is_bit_equal(results, name):
    found = results[name]
    score, weights = found["loaded"]
    assert torch.equal(score, found["scores"][1])
    assert all(torch.equal(weights[k], v) for k, v in found["weights"].items())
    for resumed, whole in zip(found["resumed"], found["uninterrupted"], strict=True):
        if isinstance(whole, dict):
            assert all(torch.equal(resumed[k], v) for k, v in whole.items())
        else:
            assert torch.equal(resumed, whole) if isinstance(whole, torch.Tensor) else resumed == whole


@pytest.mark.parametrize("name", EVERY)
def test_a_skipped_step_moves_nothing(results, name):
    if name != "sft":  # whose loss has no reference in it that could be NaN
        assert torch.equal(results[name]["skipped"], results[name]["uninterrupted"][2])


@pytest.mark.parametrize("name", [name for name in EXACT if name.startswith("start")])
def test_a_round_starts_at_its_reference(results, name):
    first, *others = results[name]["uninterrupted"][0]
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert first["train/loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert all(abs(step["kl/mean"]) > 1e-3 for step in others)


def test_nothing_is_loaded_for_a_loss_without_a_reference(results):
    assert all(not score.any() for score in results["sft"]["scores"])
    assert "kl/mean" not in results["sft"]["uninterrupted"][0][0]


def test_stages_and_ranks_agree(results):
    for name in ("ema0", "ema1", "ema3", "ema3-split", "ema-offload", "ema2x2", "ema3x2", "ema3x2-split"):
        torch.testing.assert_close(results[name]["scores"][1], results["ema2"]["scores"][1], rtol=1e-6, atol=2e-5)


if __name__ == "__main__":
    rank_main(CASES, run_case)
