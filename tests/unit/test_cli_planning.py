"""The plan of a config: sizes from the headers, engines by hand, every actor counted, offline trainings too."""

import json
import random
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from rlhf import cli
from rlhf.config import OfflineConfig, load_config, load_run
from rlhf.config.learner import Learner
from rlhf.data.preferences import PreferenceExample
from rlhf.errors import InputError
from rlhf.planning import (
    OFFLINE_STORE,
    ModelSize,
    Row,
    engine_memory,
    longest_row,
    make_offline_plan,
    make_plan,
    measure_examples,
    model_size,
    show_plan,
)
from rlhf.records import Message
from tests.unit import byte_tokenizer as bytewise

SIZE = ModelSize(parameters=1000, layers=2, hidden=8, query_hidden=8, kv_hidden=4, intermediate=16, vocabulary=100)


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and an end token."""
    tokenizer = bytewise.byte_tokenizer(None)
    tokenizer.eos_token = "<end>"
    return tokenizer


def tiny_model(folder: Path, tied: bool) -> int:
    """Write a tiny Llama; returns the number of its distinct parameters, counted by torch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(sizes)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_read_from_the_headers(tmp_path: Path, tied: bool) -> None:
    count = tiny_model(tmp_path, tied)
    size = model_size(str(tmp_path), "policy.path")
    assert size == ModelSize(count, 3, hidden=16, query_hidden=16, kv_hidden=8, intermediate=40, vocabulary=300)


def test_a_config_without_sizes_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path, tied=True)
    file = tmp_path / "config.json"
    data = json.loads(file.read_text())
    del data["hidden_size"]
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"policy.path = .*: config.json has no hidden_size or n_embd"):
        model_size(str(tmp_path), "policy.path")


def test_an_engine_by_hand() -> None:
    cpu, nothing = engine_memory(SIZE, "bfloat16", 15, 2, {}, "cpu", staged=True)
    assert (cpu["weights"], cpu["KV cache"], cpu["staging"], nothing) == (2000, 512 << 20, 2000, {})
    gpu, host = engine_memory(SIZE, "bfloat16", 16, 2, {}, "cuda", staged=True)
    assert (gpu["weights"], gpu["KV cache"]) == (1000, 2 * 2 * 4 * 2 * 16 // 2)
    assert ("staging" in gpu, host["staging"]) == (False, 2000)
    asked, host = engine_memory(SIZE, "float32", 16, 1, {"kv_cache_memory_bytes": 7}, "cuda", staged=False)
    assert (asked["weights"], asked["KV cache"], "staging" in host) == (4000, 7, False)


def test_a_plan_counts_every_actor(tmp_path: Path) -> None:
    count = tiny_model(tmp_path, tied=True)
    overrides = [
        f"policy.path={tmp_path}",
        "generator.replicas=3",
        "generator.tensor_parallel=2",
        "cluster.device=cuda",
    ]
    overrides += ["judge.type=pair_model", "eval_judge.type=sentiment", "learner.world_size=2"]
    plan = make_plan(load_config("configs/quickstart.yaml", overrides))
    roles = {role.name: role for role in plan.roles}
    assert {name: (role.actors, role.gpus) for name, role in roles.items()} == {
        "generator": (3, 2),
        "judge": (1, 1),
        "eval_judge": (1, 0),
        "learner": (2, 1),
    }
    assert plan.object_store == 4 * 2 * count + (256 << 20)
    on_gpus = [role for role in plan.roles if role.gpus]
    # The generators' memory is a share on each of two GPUs.
    assert plan.gpu_total == sum(role.actors * role.gpus * sum(role.memory.values()) for role in on_gpus)
    host = sum(role.actors * sum(role.host.values()) for role in on_gpus)
    assert plan.total == host + sum(roles["eval_judge"].memory.values()) + plan.object_store

    plan = make_plan(load_config("configs/quickstart.yaml", [*overrides, "cluster.device=cpu"]))
    assert plan.gpu_total == 0
    assert plan.total == sum(role.actors * sum(role.memory.values()) for role in plan.roles) + plan.object_store


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_has_every_role_and_their_sums(tmp_path: Path, device: str, capsys: pytest.CaptureFixture) -> None:
    tiny_model(tmp_path, tied=True)
    overrides = [f"policy.path={tmp_path}", f"cluster.device={device}", "eval_judge.type=verifier"]
    plan = make_plan(load_config("configs/quickstart.yaml", [*overrides, "learner.world_size=2"]))
    show_plan(plan, ["a note"], Console(width=200))
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in ("generator", "judge", "eval_judge", "learner", "object store", "note: a note")
    )
    assert ("CPU GiB each" in shown) == (device == "cuda")
    last = next(line for line in shown.splitlines() if line.strip("│ ").startswith("all"))
    assert f"{plan.total / 2**30:.2f}" in last
    assert f"{plan.gpu_total / 2**30:.2f}" in last or device == "cpu"


@pytest.mark.parametrize(("shared", "row"), [(True, Row(6 + 4 + 3, 4 + 4)), (False, Row(2 * (6 + 4), 4 + 4))])
def test_the_longest_row_is_of_pairs_that_fit(shared: bool, row: Row) -> None:
    learner = Learner(max_length=10, prefix_sharing=shared)
    # The first is too long, the second has the longest row, the third the longest responses.
    assert longest_row(learner, [(7, 4, 1), (6, 4, 3), (1, 4, 4)]) == row
    none = longest_row(learner, [(7, 4, 1)])
    assert none == Row(5 + 10 if shared else 20, 10)


def example(uid: str, prompt: str, chosen: str, row: int) -> PreferenceExample:
    return PreferenceExample(uid, (Message(role="user", content=prompt),), chosen, "r", None, row)


def test_the_longest_example_is_found_by_its_characters() -> None:
    draw = random.Random(0)
    examples = [example(f"{i}", "p" * draw.randrange(90), "c" * draw.randrange(60), i) for i in range(300)]
    tokenizer = ending_tokenizer()
    # The template is so long that it takes most of this.
    learner = Learner(max_length=100, micro_batch_size=2)
    found = measure_examples(learner, examples, tokenizer)
    turns = 1 + len("Human: ") + len("\n\nAssistant:")
    lengths = [(turns + len(e.messages[0]["content"]), len(e.chosen) + 1, len(e.rejected) + 1) for e in examples]
    fitting = [sum(one) for one in lengths if one[0] + max(one[1:]) <= 100]
    assert len(fitting) < 300
    assert found.row.tokens == max(fitting)
    # A token a byte: what is longer in characters is longer in tokens, but for the two responses.
    assert (found.total, found.long) == (300, 300 - len(fitting))
    assert found.encoded < 300


def test_a_pair_of_few_characters_and_many_tokens_counts_as_long() -> None:
    # Long in characters through the response that is not the longer one; the run of pairs that fit is broken twice.
    examples = [example("a", "p", "c" * 200, 0), *(example(f"{n}", "p", "c" * 50, n) for n in range(1, 10))]
    examples += [PreferenceExample("b", examples[0].messages, "c" * 130, "r" * 130, None, 10)]
    found = measure_examples(Learner(max_length=150), examples, ending_tokenizer())
    assert (found.total, found.long, found.encoded) == (11, 2, 11)


def test_pairs_that_are_too_long_are_said_and_refused_where_none_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    path = preferences(tmp_path)
    data = f"preferences.path = {str(tmp_path / 'pairs.jsonl')!r}"
    # Prompts of 25 or 26 tokens; responses of 5, 9, ... 29 with the end token, by the row's number modulo 7.
    with pytest.raises(SystemExit) as caught:
        cli.main(["validate", str(path), "learner.max_length=46"])
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert f"{data}: 5 of 16 pairs to train on are longer than learner.max_length = 46 tokens and left out" in shown
    assert f"{data}: 2 of 4 held-out pairs are longer than" in shown
    with pytest.raises(SystemExit) as caught:
        cli.main(["validate", str(path), "learner.max_length=8"])
    assert caught.value.code
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{data}: all 16 pairs to train on are longer than learner.max_length = 8 tokens; raise it" in shown


@pytest.mark.parametrize("offline", [True, False])
def test_a_preference_set_has_no_reference_at_the_rounds_start(tmp_path: Path, offline: bool) -> None:
    path = preferences(tmp_path)
    if not offline:
        document = yaml.safe_load(path.read_text())
        del document["preferences"]
        document |= {"prompts": {"path": "p"}, "judge": {"type": "sentiment"}, "rounds": {"count": 1}}
        path.write_text(yaml.safe_dump(document))
        overrides = ["learner.reference.policy=round_start", "learner.max_length=2048"]
        assert load_run(str(path), overrides).learner.reference.policy == "round_start"
        return
    with pytest.raises(InputError, match=r"learner\.reference\.policy = round_start: .*use initial or ema$"):
        load_run(str(path), ["learner.reference.policy=round_start"])


def preferences(folder: Path) -> Path:
    rows = [{"prompt": f"Say {n}", "chosen": "yes " * (n % 7 + 1), "rejected": "no"} for n in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model(folder / "model", tied=True)
    ending_tokenizer().save_pretrained(folder / "model")
    config = folder / "offline.yaml"
    data = {"path": str(folder / "pairs.jsonl"), "held_out_count": 4}
    learner = {"batch_size": 4, "micro_batch_size": 2, "max_length": 256}
    document = {"name": "x", "policy": {"path": str(folder / "model")}, "preferences": data, "learner": learner}
    config.write_text(yaml.safe_dump(document | {"cluster": {"device": "cpu"}}))
    return config


def test_an_offline_training_is_planned_for_its_longest_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = preferences(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(["validate", str(path), "learner.world_size=2", "learner.micro_batch_size=1"])
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert "16 pairs to train on in 4 steps, 4 held out" in shown
    config = load_run(str(path), ["learner.world_size=2", "learner.micro_batch_size=1"])
    assert isinstance(config, OfflineConfig)
    turns = 1 + len("Human: Say 13\n\nAssistant:")
    plan = make_offline_plan(config, Row(turns + 4 * 7 + 1 + 3, 4 * 7 + 1 + 3))
    (role,) = plan.roles
    assert (role.name, role.actors, plan.object_store) == ("learner", 2, OFFLINE_STORE)
    assert f"{role.total / 2**30:.2f}" in shown
    assert f"{plan.total / 2**30:.2f}" in shown
    longer = make_offline_plan(config, Row(turns + 400, 200)).roles[0].memory
    assert longer["activations"] > 3 * role.memory["activations"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "learner.lora={target_modules: [q_prj]}",
            "has no 'q_prj' that can be taken; choose among down_proj, gate_proj",
        ),
        ("learner.lora={modules_to_save: [nrm]}", "learner.lora.modules_to_save = ['nrm']"),
        ("policy.path=./none", "policy.path = './none': no model there"),
        ("preferences.path=none.jsonl", "preferences.path = none.jsonl: no such file"),
    ],
)
def test_validate_refuses_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture, override: str, message: str
) -> None:
    path = preferences(tmp_path)
    online = tmp_path / "online.yaml"
    model = tmp_path / "model"
    online.write_text(
        yaml.safe_dump({"name": "x", "policy": {"path": str(model)}, "prompts": {"path": "prompts.jsonl"}})
    )
    capsys.readouterr()
    for config in (path, online) if "lora" in override else (path,):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
        arguments = ["validate", str(config), override]
        if config is online:
            arguments.append(f"prompts.path={tmp_path / 'prompts.jsonl'}")
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        captured = capsys.readouterr()
        assert caught.value.code == 2
        assert message in captured.err
        assert (captured.out, captured.err.count("\n")) == ("", 1)
