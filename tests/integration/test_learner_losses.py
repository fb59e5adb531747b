"""Losses that look beyond a pair, through the learner's ranks: any layout gives one answer."""

import math

import pytest
import torch

from tests.integration.ranks import SPLIT, make_config, make_round, rank_main, run_cases, start_learner, token_logprobs

LOSSES = {
    "sorted": {"type": "mix", "terms": [{"type": "aot"}, {"type": "aot_unpaired", "weight": 0.5}, {"type": "sft"}]},
    "weighted": {"type": "sigmoid", "use_weighting": True},
    "shifted": {"type": "bco_pair", "reward_shift": True, "ld_alpha": 0.3},
    "per_token": {"type": "simpo", "beta": 2.0, "rpo_alpha": 0.5},
    "tuned": {"type": "sft"},
}
WITHOUT_REFERENCE = ("per_token", "tuned")
LAYOUTS = {
    1: {"whole": {}, "accumulated": {"micro_batch_size": 1, "prefix_sharing": False}},
    2: {"zero2": {"micro_batch_size": 1}, "zero3": SPLIT},
}
CASES = {
    world_size: {
        f"{name}-{layout}": {**settings, "loss": loss}
        for layout, settings in layouts.items()
        for name, loss in LOSSES.items()
    }
    for world_size, layouts in LAYOUTS.items()
}


def run_case(folder, name, learner, rank, world_size, port):
    def build():
        return start_learner(make_config(folder / "model", world_size=world_size, **learner), rank, world_size, port)

    one = build()
    steps = [report.metrics for report in one.train(make_round(1, 9))]
    one.save(folder / f"checkpoint-{name}")
    steps += [report.metrics for report in one.train(make_round(2, 5))]
    result = {"steps": steps, "weights": dict(one.export_tensors()), "statistics": one.statistics()}
    if learner["loss"].get("reward_shift"):
        again = build()
        again.load(folder / f"checkpoint-{name}")
        result["resumed"] = [report.metrics for report in again.train(make_round(2, 5))]
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_cases(__file__, tmp_path_factory.mktemp("losses"), CASES)


def load(folder, name, layout, rank=0):
    return torch.load(folder / f"result-{name}-{layout}-{rank}.pt", weights_only=False)


@pytest.mark.parametrize("name", LOSSES)
def test_every_layout_gives_one_answer(folder, name):
    whole = load(folder, name, "whole")
    for layout in ("accumulated", "zero2", "zero3"):
        other = load(folder, name, layout)
        # Before the first update every margin is 0: its sign, and so the accuracy, is that of the last bit.
        for first in (whole["steps"][0], other["steps"][0]):
            first.pop("rewards/accuracies", None)
        for one, two in zip(whole["steps"], other["steps"], strict=True):
            assert one == pytest.approx(two, rel=2e-5, abs=2e-5), layout
        for key, tensor in whole["weights"].items():
            # Adam divides by the gradient's own size: an element that has next to none moves by its rounding, and with
            # 3e-3 a step five steps could take it much further than this.
            torch.testing.assert_close(
                other["weights"][key], tensor, rtol=0, atol=5e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
    losses = [step["train/loss"] for step in whole["steps"]]
    assert len(losses) == 5
    assert len(set(losses)) == len(losses)
    assert ("kl/mean" in whole["steps"][0]) == (name not in WITHOUT_REFERENCE)


@pytest.mark.parametrize("name", LOSSES)
def test_throughput_counts_each_token_once_in_any_layout(folder, name):
    pairs = [pair for pair in make_round(2, 5).pairs if pair.uid != "long"]
    tokens = sum(
        len(pair.prompt_ids) + len(pair.chosen_ids) + (0 if name == "tuned" else len(pair.rejected_ids))
        for pair in pairs
    )
    for layout in ("whole", "accumulated", "zero2", "zero3"):
        found = load(folder, name, layout)["statistics"]
        seconds = found["timing_s/reference"] + found["timing_s/learn"]
        assert found["perf/learner_tokens_per_s"] * seconds == pytest.approx(tokens), layout


def test_fine_tuning_reports_nothing_of_the_rejected_responses(folder):
    for steps in (load(folder, "tuned", layout)["steps"] for layout in ("whole", "accumulated", "zero2", "zero3")):
        of_responses = {name for step in steps for name in step if name.startswith(("rewards/", "logps/"))}
        assert of_responses == {"rewards/chosen", "logps/chosen"}


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_report_alike(folder, name):
    for layout in LAYOUTS[2]:
        assert load(folder, name, layout)["steps"] == load(folder, name, layout, rank=1)["steps"]


@pytest.mark.parametrize("layout", ["whole", "zero3"])
def test_a_running_shift_is_resumed_exactly(folder, layout):
    found = load(folder, "shifted", layout)
    assert found["resumed"] == found["steps"][-len(found["resumed"]) :]


def test_the_first_steps_loss_is_that_of_the_models_full_logits(folder):
    """Before the first update policy and reference are one: log 2 weighted by WPO's weights, taken from all logits."""
    from transformers import AutoModelForCausalLM

    from rlhf.learning.plan import step_batches

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    pairs = [pair for pair in make_round(1, 9).pairs if pair.uid != "long"]
    first = [pairs[i] for i in next(step_batches(len(pairs), 4, 1, 0, 1))]

    def alignment(prompt, response):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            squares = logits.softmax(-1).square().sum(-1).log()
            return (token_logprobs(model, prompt, response) - squares).mean().item()

    weights = [math.exp(sum(alignment(p.prompt_ids, ids) for ids in (p.chosen_ids, p.rejected_ids))) for p in first]
    expected = math.log(2) * sum(weights) / len(weights)
    assert load(folder, "weighted", "whole")["steps"][0]["train/loss"] == pytest.approx(expected, rel=1e-4)

    def plain(pair):
        return -token_logprobs(model, pair.prompt_ids, pair.chosen_ids).sum().item()

    tokens = sum(len(pair.chosen_ids) for pair in first)
    found = load(folder, "sorted", "whole")["steps"][0]
    # At the start the sorted log-ratios are those of the reference; the unpaired ones are all 0.
    assert found["train/loss"] == pytest.approx(1.5 * math.log(2) + sum(map(plain, first)) / tokens, rel=1e-5)


if __name__ == "__main__":
    rank_main(CASES, run_case)
