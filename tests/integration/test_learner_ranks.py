"""Learner ranks on a tiny Llama: each layout, number of ranks and ZeRO stage gives the answer of a plain torch loop."""

import json

import pytest
import torch

from tests.integration.ranks import (
    LEARNER,
    ROUNDS,
    SHIFT,
    SPLIT,
    load_results,
    make_config,
    make_round,
    rank_main,
    run_cases,
    start_learner,
    token_logprobs,
    zero,
)

CASES = {
    1: {
        "zero0": {"zero_stage": 0},
        "zero1": {"zero_stage": 1},
        "zero2": {},
        "zero3": SPLIT,
        "accumulated": {"micro_batch_size": 1},
        "padded": {"prefix_sharing": False},
        "packed": {"pack_tokens": 60},
        "packed-padded": {"pack_tokens": 60, "prefix_sharing": False},
        "recomputed": {"activation_checkpointing": True},
        "recomputed3": {"activation_checkpointing": True, **SPLIT},
        # Micro-batches of one pair: this is where accumulation in bf16 differs between the stages' code paths.
        **{f"bf16-{stage}": {**zero(stage), "dtype": "bfloat16", "micro_batch_size": 1} for stage in (1, 2, 3)},
    },
    2: {
        **{f"zero{stage}x2": zero(stage) for stage in range(4)},
        "packed-x2": {"pack_tokens": 60},
        "bf16-1x2": {"zero_stage": 1, "dtype": "bfloat16", "micro_batch_size": 1},
    },
}
HALF = [name for cases in CASES.values() for name in cases if name.startswith("bf16")]
EXACT = [name for cases in CASES.values() for name in cases if name not in HALF]
# ---- one rank ----


def run_case(folder, name, settings, rank, world_size, port):
    from transformers import AutoModelForCausalLM

    from rlhf.errors import RLHFError

    def build():
        return start_learner(config, rank, world_size, port)

    def weights():
        return dict(learner.export_tensors())

    config = make_config(folder / "model", world_size=world_size, max_skipped_steps=2, **settings)
    plain = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    done: list[tuple[int, int]] = []
    learner = build()
    result = {"probe": learner.probe([(5, 6, 7, 8), (9, 10)]), "initial": weights()}
    reports = []
    for report in learner.steps(make_round(1, 9, plain)):
        # A report comes when its step has been taken; the round counts once all have.
        done.append((report.step, learner.rounds_done))
        reports.append(report)
    result |= {"steps": [report.metrics for report in reports], "numbers": [(r.round, r.step) for r in reports]}
    result |= {"progress": done, "statistics": learner.statistics(), "weights": weights()}
    learner.save(folder / f"checkpoint-{name}")
    learner.export_hf(folder / f"export-{name}")
    second = learner.train(make_round(2, 5))
    result["uninterrupted"] = ([report.metrics for report in second], weights())

    refused = []
    for wrong in (2, 4):
        try:
            learner.train(make_round(wrong, 2))
        except RLHFError as error:
            refused.append(str(error))
    result["refused"] = refused

    learner = build()
    learner.load(folder / f"checkpoint-{name}")
    result["loaded"] = (learner.rounds_done, weights())
    second = learner.train(make_round(2, 5))
    result["resumed"] = ([report.metrics for report in second], weights())

    result["empty"] = (learner.train(make_round(3, 0)), learner.rounds_done, learner.statistics(), weights())
    score = learner.reference.score
    learner.reference.score = lambda pairs: torch.full((len(pairs), 2), float("nan"))
    result["nan"] = ([report.metrics for report in learner.train(make_round(4, 3))], weights())
    result["nan_statistics"] = learner.statistics()["train/skipped"]
    learner.reference.score = score
    result["after_nan"] = ([report.metrics for report in learner.train(make_round(5, 3))], weights())

    learner.reference.score = lambda pairs: torch.full((len(pairs), 2), float("nan"))
    skipped = []
    try:
        for report in learner.steps(make_round(6, 12)):
            skipped.append(report.metrics["train/skipped"])
    except RLHFError as error:
        result["stopped"] = (skipped, str(error), learner.rounds_done)
    return result


# ---- the tests ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_cases(__file__, tmp_path_factory.mktemp("ranks"), CASES)


@pytest.fixture(scope="module")
def results(folder):
    return load_results(folder, CASES, alike=("steps", "statistics", "weights", "stopped"))


@pytest.fixture(scope="module")
def plain_loop(folder):
    """Round 1 by a plain torch loop: full logits, one sequence at a time, no DeepSpeed, written from the formulas."""
    import copy

    from transformers import AutoModelForCausalLM

    from rlhf.learning.plan import step_batches

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    reference = copy.deepcopy(model)
    options = LEARNER["optimizer"]
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=options["lr"],
        betas=(0.9, 0.95),
        fused=False,
    )
    pairs = [pair for pair in make_round(1, 9).pairs if pair.uid != "long"]
    steps = []
    batches = list(step_batches(len(pairs), 4, 1, 0, 1))
    for number, batch in enumerate(batches):
        lr = options["lr"] * (1 - (number + 0.5) / len(batches) / ROUNDS)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rewards, logps = [], []
        for pair in (pairs[i] for i in batch):
            for ids in (pair.chosen_ids, pair.rejected_ids):
                logps.append(token_logprobs(model, pair.prompt_ids, ids).sum())
                with torch.no_grad():
                    rewards.append(0.1 * (logps[-1] - token_logprobs(reference, pair.prompt_ids, ids).sum()))
        wanted = torch.stack(logps).view(-1, 2)
        reward = torch.stack(rewards).view(-1, 2)
        base = wanted.detach() - reward / 0.1
        loss = torch.nn.functional.softplus(-0.1 * ((wanted - base)[:, 0] - (wanted - base)[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options["max_grad_norm"])
        optimizer.step()
        mean = reward.mean(0).tolist()
        steps.append(
            {
                "train/loss": loss.item(),
                "train/grad_norm": norm.item(),
                "train/lr": lr,
                "train/pairs": len(batch),
                "train/skipped": 0.0,
                "rewards/chosen": mean[0],
                "rewards/rejected": mean[1],
                "rewards/margins": mean[0] - mean[1],
                "rewards/accuracies": (reward[:, 0] > reward[:, 1]).float().mean().item(),
                "logps/chosen": wanted[:, 0].mean().item(),
                "logps/rejected": wanted[:, 1].mean().item(),
                "kl/mean": reward.mean().item() / 0.1,
                "loss/beta": 0.1,
            }
        )
    return steps, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", EXACT)
def test_steps_equal_a_plain_loop(results, plain_loop, name):
    found, (expected, weights) = results[name], plain_loop
    assert [step.keys() for step in found["steps"]] == [step.keys() for step in expected]
    for number, (ours, plain) in enumerate(zip(found["steps"], expected, strict=True)):
        # Before the first update every reward is 0 up to rounding, and its sign is noise.
        keys = [k for k in plain if not (number == 0 and k == "rewards/accuracies")]
        assert {k: ours[k] for k in keys} == pytest.approx({k: plain[k] for k in keys}, rel=1e-5, abs=2e-5)
        assert ours["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-6, abs=1e-6)
    assert found["weights"].keys() == weights.keys()
    for key, value in weights.items():
        change = value - found["initial"][key]
        ours = found["weights"][key] - found["initial"][key]
        moved = change.square().mean().sqrt()
        assert moved > 0.3 * LEARNER["optimizer"]["lr"], "weights that stand still would prove nothing"
        assert (ours - change).norm() <= 1e-3 * change.norm(), key


@pytest.mark.parametrize("name", HALF)
def test_bf16_steps_follow_the_plain_loop(results, plain_loop, name):
    found, (expected, weights) = results[name], plain_loop
    for ours, plain in zip(found["steps"], expected, strict=True):
        assert ours["train/loss"] == pytest.approx(plain["train/loss"], abs=0.02)
        assert ours["train/grad_norm"] == pytest.approx(plain["train/grad_norm"], rel=0.1)
    for key, value in weights.items():
        change, ours = (
            value - found["initial"][key].float(),
            found["weights"][key].float() - found["initial"][key].float(),
        )
        # As far as in fp32 and in the same direction: an optimizer step too many or too few would be off by a third.
        assert ((ours * change).sum() / change.square().sum()).item() == pytest.approx(1.0, abs=0.15), key


@pytest.mark.parametrize("name", EXACT)
def test_steps_equal_those_of_one_rank(results, name):
    ours, base = results[name], results["zero2"]
    for a, b in zip(ours["steps"], base["steps"], strict=True):
        for key in ("train/loss", "train/grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-6), key
    for key, value in base["weights"].items():
        change = value - base["initial"][key]
        assert (ours["weights"][key] - value).norm() <= 1e-3 * change.norm(), key


@pytest.mark.parametrize("name", [*EXACT, *HALF])
def test_resume_is_bit_equal(results, name):
    found = results[name]
    rounds_done, loaded = found["loaded"]
    assert rounds_done == 1
    assert all(torch.equal(loaded[k], v) for k, v in found["weights"].items())
    assert found["resumed"][0] == found["uninterrupted"][0]
    assert all(torch.equal(found["resumed"][1][k], v) for k, v in found["uninterrupted"][1].items())
    assert any(not torch.equal(loaded[k], v) for k, v in found["resumed"][1].items())


@pytest.mark.parametrize("name", [*EXACT, *HALF])
def test_bad_rounds(results, name):
    found = results[name]
    early, late = found["refused"]
    assert "round 2 has already been trained" in early
    assert "round 4 comes too early" in late

    reports, rounds_done, statistics, weights = found["empty"]
    assert (reports, rounds_done) == ([], 3)
    assert statistics["pairs/dropped_long"] == 0.0
    assert all(torch.equal(weights[k], v) for k, v in found["resumed"][1].items())

    (skipped,), after = found["nan"]
    assert skipped["train/skipped"] == 1.0
    assert found["nan_statistics"] == 1.0
    assert found["statistics"]["train/skipped"] == 0.0
    assert "train/loss" not in skipped
    assert all(torch.equal(after[k], v) for k, v in weights.items())

    (next_step,), moved = found["after_nan"]
    assert next_step["train/skipped"] == 0.0
    assert next_step["train/grad_norm"] > 0
    assert all(torch.isfinite(v).all() for v in moved.values())
    assert any(not torch.equal(moved[k], v) for k, v in after.items())


@pytest.mark.parametrize("name", EXACT)
def test_a_run_of_steps_that_are_not_finite_stops_the_learner(results, name):
    # Of three steps two in a row stop it; the one of round 4 did not, which was followed by one that was taken.
    skipped, message, rounds_done = results[name]["stopped"]
    assert (skipped, rounds_done) == ([1.0, 1.0], 5)
    assert message.startswith("learner: 2 steps in a row had a loss or gradient that is not finite")


@pytest.mark.parametrize("name", EXACT)
def test_round_statistics_and_probe(folder, results, name):
    from transformers import AutoModelForCausalLM

    found = results[name]
    assert found["numbers"] == [(1, 1), (1, 2), (1, 3)]
    assert found["progress"] == [(1, 0), (2, 0), (3, 0)]
    statistics = found["statistics"]
    assert statistics["mismatch/kl"] == pytest.approx(SHIFT, abs=1e-5)
    assert statistics["mismatch/max"] == pytest.approx(SHIFT, abs=1e-4)
    assert statistics["pairs/dropped_long"] == 1.0
    assert all(statistics[key] > 0 for key in ("timing_s/reference", "timing_s/learn", "perf/learner_tokens_per_s"))
    assert 0 < statistics["perf/mfu"] < 1
    assert statistics["perf/peak_memory_gb"] > 0.05

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for ids, row in zip([(5, 6, 7, 8), (9, 10)], found["probe"], strict=True):
        with torch.no_grad():
            assert row == pytest.approx(token_logprobs(model, ids[:1], ids[1:]).tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["zero2", "zero3x2", "bf16-2"])
def test_exported_folder_loads(folder, results, name):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder / f"export-{name}"
    saved, weights = load_file(path / "model.safetensors"), results[name]["weights"]
    assert saved.keys() == weights.keys() == load_file(folder / "model" / "model.safetensors").keys()
    assert all(torch.equal(saved[k], v) and saved[k].dtype == v.dtype for k, v in weights.items())
    assert weights["model.norm.weight"].dtype == (torch.bfloat16 if name in HALF else torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])
    assert (path / "generation_config.json").is_file()
    assert AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(["w3", "w5"]) == [3, 5]
    config = json.loads((path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True


if __name__ == "__main__":
    rank_main(CASES, run_case)
