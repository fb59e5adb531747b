"""LoRA on learner ranks: every ZeRO stage, rank count and layout gives what a plain peft and torch loop gives."""

import copy

import pytest
import torch

from tests.integration.ranks import (
    LEARNER,
    ROUNDS,
    SPLIT,
    load_results,
    make_config,
    make_round,
    models,
    rank_main,
    run_cases,
    start_learner,
    token_logprobs,
    zero,
)

LORA = {"rank": 4, "alpha": 12, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
SAVED = {**LORA, "modules_to_save": ["norm"]}
CASES = {
    1: {
        **{f"zero{stage}": zero(stage) for stage in range(4)},
        "accumulated": {"micro_batch_size": 1},
        "padded": {"prefix_sharing": False},
        "recomputed": {"activation_checkpointing": True},
        "recomputed3": {"activation_checkpointing": True, **SPLIT},
        "saved": {"lora": SAVED},
        "saved3": {"lora": SAVED, **SPLIT},
        "dropout": {"lora": {**LORA, "dropout": 0.3}},
        "bf16": {"dtype": "bfloat16"},
    },
    2: {f"zero{stage}x2": zero(stage) for stage in range(4)},
}
EVERY = [name for cases in CASES.values() for name in cases]
PLAIN = [name for name in EVERY if name not in ("saved", "saved3", "dropout", "bf16")]


def run_case(folder, name, settings, rank, world_size, port):
    def build():
        return start_learner(config, rank, world_size, port)

    def weights():
        return dict(learner.export_tensors())

    config = make_config(folder / "model", world_size=world_size, **{"lora": LORA, **settings})
    before = models()
    learner = build()
    result = {"models": models() - before, "initial": weights()}
    result["steps"] = [report.metrics for report in learner.train(make_round(1, 9))]
    result["statistics"] = learner.statistics()
    result["weights"] = weights()
    result["adapters"] = dict(learner.export_adapters())
    result["moments"] = moments(learner._engine._engine.optimizer)
    result["trainable"] = [getattr(p, "ds_numel", p.numel()) for p in learner._model.parameters() if p.requires_grad]
    result["reference"] = learner.reference.score(make_round(1, 9).pairs)
    result["after_reference"] = weights()
    learner.save(folder / f"checkpoint-{name}")
    learner.export_hf(folder / f"export-{name}")
    second = learner.train(make_round(2, 5))
    result["uninterrupted"] = ([report.metrics for report in second], weights())
    result["probe"] = learner.probe([(5, 6, 7, 8), (9, 10)])

    learner = build()
    learner.load(folder / f"checkpoint-{name}")
    result["loaded"] = weights()
    second = learner.train(make_round(2, 5))
    result["resumed"] = ([report.metrics for report in second], weights())
    return result


def moments(optimizer):
    """Numbers in AdamW's first moments on this rank."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return sum(state["exp_avg"].numel() for state in inner.state.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_cases(__file__, tmp_path_factory.mktemp("lora"), CASES)


@pytest.fixture(scope="module")
def results(folder):
    return load_results(folder, CASES, alike=("steps", "weights"))


def base_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def plain_loop(folder):
    """Round 1 by peft and torch alone: full logits, one sequence at a time, AdamW over what peft lets train."""
    from peft import LoraConfig, get_peft_model

    from rlhf.learning.plan import step_batches

    reference = base_model(folder)
    torch.manual_seed(0)
    options = LoraConfig(r=4, lora_alpha=12, target_modules=LORA["target_modules"])
    model = get_peft_model(copy.deepcopy(reference), options)
    lr = LEARNER["optimizer"]["lr"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    pairs = [pair for pair in make_round(1, 9).pairs if pair.uid != "long"]
    batches = list(step_batches(len(pairs), 4, 1, 0, 1))
    steps = []
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - (number + 0.5) / len(batches) / ROUNDS)
        losses = []
        for pair in (pairs[i] for i in batch):
            ratios = []
            for ids in (pair.chosen_ids, pair.rejected_ids):
                with torch.no_grad():
                    base = token_logprobs(reference, pair.prompt_ids, ids).sum()
                ratios.append(token_logprobs(model, pair.prompt_ids, ids).sum() - base)
            losses.append(torch.nn.functional.softplus(-0.1 * (ratios[0] - ratios[1])))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, LEARNER["optimizer"]["max_grad_norm"])
        optimizer.step()
        steps.append((loss.item(), norm.item()))
    merged = {name: p.detach().clone() for name, p in model.merge_and_unload().named_parameters()}
    return steps, merged, sum(p.numel() for p in trained)


@pytest.mark.parametrize("name", PLAIN)
def test_steps_equal_peft_and_torch(results, plain_loop, name):
    found, (steps, merged, _) = results[name], plain_loop
    assert len(found["steps"]) == len(steps)
    for ours, (loss, norm) in zip(found["steps"], steps, strict=True):
        assert ours["train/loss"] == pytest.approx(loss, rel=1e-6, abs=1e-6)
        assert ours["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert found["weights"].keys() == merged.keys()
    for key, value in merged.items():
        change = value - found["initial"][key]
        ours = found["weights"][key] - found["initial"][key]
        if any(target in key for target in LORA["target_modules"]):
            assert change.abs().max() > 1e-3, "weights that stand still would prove nothing"
            assert (ours - change).abs().max() <= 1e-6, key
        else:
            assert not change.any()
            assert not ours.any(), key


@pytest.mark.parametrize("name", EVERY)
def test_starts_at_the_base_bit_for_bit(folder, results, name):
    base = base_model(folder).state_dict()
    base.pop("lm_head.weight")
    initial = results[name]["initial"]
    assert initial.keys() == base.keys()
    assert all(torch.equal(initial[key], value.to(initial[key].dtype)) for key, value in base.items())


@pytest.mark.parametrize("name", EVERY)
def test_only_adapters_have_optimizer_state(results, plain_loop, name):
    found = results[name]
    wanted = plain_loop[2] + (32 if "saved" in name else 0)
    assert sum(found["trainable"]) == wanted
    world_size = 2 if name.endswith("x2") else 1
    share = wanted if name.startswith("zero0") else wanted / world_size
    assert share <= found["moments"] <= share + 100  # ZeRO pads


@pytest.mark.parametrize("name", EVERY)
def test_the_reference_is_the_base_and_no_second_model(folder, results, name):
    found, model = results[name], base_model(folder)
    assert found["models"] == 1
    if name == "bf16":
        model = model.bfloat16()
    with torch.no_grad():
        expected = [
            [token_logprobs(model, pair.prompt_ids, ids).sum().item() for ids in (pair.chosen_ids, pair.rejected_ids)]
            for pair in make_round(1, 9).pairs
        ]
    tolerance = {"rtol": 0, "atol": 1.0} if name == "bf16" else {"rtol": 1e-6, "atol": 1e-5}
    torch.testing.assert_close(found["reference"], torch.tensor(expected), **tolerance)
    assert all(torch.equal(found["after_reference"][k], v) for k, v in found["weights"].items())


@pytest.mark.parametrize("name", EVERY)
def test_resume_is_bit_equal(results, name):
    found = results[name]
    assert all(torch.equal(found["loaded"][k], v) for k, v in found["weights"].items())
    assert found["resumed"][0] == found["uninterrupted"][0]
    assert all(torch.equal(found["resumed"][1][k], v) for k, v in found["uninterrupted"][1].items())
    assert any(not torch.equal(found["loaded"][k], v) for k, v in found["resumed"][1].items())


@pytest.mark.parametrize("name", ["saved", "saved3"])
def test_modules_to_save_train_in_full(results, name):
    found = results[name]
    moved = {key for key, value in found["weights"].items() if not torch.equal(value, found["initial"][key])}
    assert "model.norm.weight" in moved
    assert "model.layers.0.input_layernorm.weight" not in moved
    for key, value in results["saved"]["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_the_adapters_alone_are_whole_and_make_the_merged_weights(folder, results, name):
    found, base = results[name], base_model(folder).state_dict()
    layers = [key for key in found["weights"] if any(target in key for target in LORA["target_modules"])]
    adapters = {key.removeprefix("base_model.model."): value for key, value in found["adapters"].items()}
    parts = {f"{layer.removesuffix('.weight')}.lora_{part}.weight" for layer in layers for part in "AB"}
    assert adapters.keys() == parts
    for layer in layers:
        a, b = (adapters[f"{layer.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        assert a.shape[0] == b.shape[1] == LORA["rank"]
        dtype = found["weights"][layer].dtype
        merged = (base[layer].to(dtype).float() + 3 * (b.float() @ a.float())).to(dtype)
        torch.testing.assert_close(found["weights"][layer], merged, rtol=0, atol=0 if dtype.itemsize == 2 else 1e-6)


def test_mismatch_is_not_measured_through_dropout(results):
    assert "mismatch/kl" not in results["dropout"]["statistics"]
    assert results["dropout"]["steps"] != results["zero2"]["steps"]


@pytest.mark.parametrize("name", ["zero2", "zero3x2", "bf16", "saved"])
def test_the_exported_folder_is_a_plain_checkpoint(folder, results, name):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    path, weights = folder / f"export-{name}", results[name]["weights"]
    saved = load_file(path / "model.safetensors")
    assert saved.keys() == load_file(folder / "model" / "model.safetensors").keys()
    assert all(torch.equal(saved[key], value) for key, value in weights.items())
    assert not list(path.glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", PLAIN)
def test_the_probe_is_that_of_the_published_weights(folder, results, name):
    model = base_model(folder)
    model.load_state_dict(results[name]["uninterrupted"][1], strict=False)
    for ids, row in zip([(5, 6, 7, 8), (9, 10)], results[name]["probe"], strict=True):
        with torch.no_grad():
            assert row == pytest.approx(token_logprobs(model, ids[:1], ids[1:]).tolist(), abs=1e-5)


if __name__ == "__main__":
    rank_main(CASES, run_case)
