import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import OfflineConfig, RunConfig, load_config, load_run
from rlhf.config.load import apply_overrides, validate
from rlhf.errors import InputError

BASE: dict[str, Any] = {"name": "x", "policy": {"path": "p"}, "prompts": {"path": "q"}}
JUDGES = "'sentiment', 'pair_model', 'reward_model', 'llm', 'verifier', 'python', 'safety', 'ensemble'"


def refusal(extra: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        validate(BASE | extra, "c.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def write(folder: Path, text: str) -> Path:
    file = folder / "c.yaml"
    file.write_text(textwrap.dedent(text))
    return file


MINIMAL = """\
    name: x
    policy: {path: p}
    prompts: {path: q}
"""


def test_quickstart_is_what_the_design_says() -> None:
    config = load_config("configs/quickstart.yaml")
    assert (config.rounds.count, config.rounds.prompts, config.generator.samples) == (8, 32, 4)
    assert (config.learner.batch_size, config.learner.zero_stage) == (16, 2)
    assert config.prompts.eval is not None
    assert (config.prompts.eval.count, config.generator.sampling.max_tokens) == (32, 48)
    assert Path(config.prompts.path).is_file()
    assert Path(config.prompts.eval.path).is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"judge": {"type": "pm"}},
            f"c.yaml: judge.type = 'pm': expected one of {JUDGES}",
        ),
        (
            {"judge": {"scale": 2}},
            f"c.yaml: judge.type: required key is missing; expected one of {JUDGES}",
        ),
        (
            {"eval_judge": {"type": 1}},
            f"c.yaml: eval_judge.type = '1': expected one of {JUDGES}",
        ),
        ({"judge": 3}, "c.yaml: judge = 3: expected a mapping of keys"),
        ({"learner": [1]}, "c.yaml: learner = [1]: expected a mapping of keys"),
        (
            {"eval_judge": {"type": "pair_model", "max_lenght": 9}},
            "c.yaml: eval_judge.max_lenght = 9: unknown key; did you mean 'max_length'?",
        ),
        ({"learner": {"otpimizer": {}}}, "c.yaml: learner.otpimizer: unknown key; did you mean 'optimizer'?"),
        ({"policy": {"pth": 3}}, "c.yaml: policy.pth = 3: unknown key; did you mean 'path'? (and 1 more)"),
        ({"policy": {}}, "c.yaml: policy.path: required key is missing"),
        (
            {"judge": {"type": "pair_model", "max_length": 3}},
            "c.yaml: judge.max_length = 3: expected greater than or equal to 16",
        ),
        (
            {"learner": {"optimizer": {"lr": "abc"}}},
            "c.yaml: learner.optimizer.lr = 'abc': expected a valid number, unable to parse string as a number",
        ),
        (
            {"learner": {"optimizer": {"schedule": "cos"}}},
            "c.yaml: learner.optimizer.schedule = 'cos': expected 'constant', 'linear' or 'cosine'",
        ),
        ({"name": True}, "c.yaml: name = True: expected text; put it in quotes"),
        (
            {"learner": {"warp": {"keep": 0.1}}},
            "c.yaml: learner.warp: this key is reserved and has no implementation yet; leave it out",
        ),
        (
            {"sync": {"sparse": True, "transport": "nccl"}},
            "c.yaml: sync.sparse needs sync.transport object_store (or auto) and sync.lora merged: adapters are small, "
            "and other transports send whole weights; set sync.sparse false, or change the two",
        ),
        (
            {"generator": {"samples": 1}},
            "c.yaml: generator.samples = 1: a preference needs at least 2 responses a prompt",
        ),
        (
            {"learner": {"batch_size": 3, "world_size": 2}},
            "c.yaml: learner.batch_size 3 must be a multiple of learner.world_size 2",
        ),
    ],
)
def test_refusals_name_file_key_value_and_expectation(extra: dict[str, Any], message: str) -> None:
    assert refusal(extra) == message


@pytest.mark.parametrize(
    ("extra", "keys"),
    [
        ({"learner": {"zero_stage": 0}}, ("learner.zero_stage", "policy.dtype")),
        ({"learner": {"max_length": 100}}, ("prompts.max_tokens", "generator.sampling.max_tokens", "learner.max_len")),
        ({"rounds": {"lookahead": 1, "max_staleness": 0}}, ("rounds.lookahead", "rounds.max_staleness")),
        (
            {"sync": {"transport": "nccl"}, "cluster": {"device": "cpu"}},
            ("sync.transport nccl", "cluster.device cpu"),
        ),
    ],
)
def test_impossible_combinations_name_every_key_and_dump_no_input(extra: dict[str, Any], keys: tuple[str, ...]) -> None:
    message = refusal(extra)
    assert message.startswith("c.yaml: ")
    assert all(key in message for key in keys)
    assert "{" not in message
    assert "whole config" not in message


@pytest.mark.parametrize("extra", [{"rounds": {"count": True}}, {"learner": {"zero_stage": True}}, {"seed": False}])
def test_yaml_booleans_are_no_numbers(extra: dict[str, Any]) -> None:
    section, value = next(iter(extra.items()))
    key = section if not isinstance(value, dict) else f"{section}.{next(iter(value))}"
    assert refusal(extra).startswith(f"c.yaml: {key} = '{'false' if value is False else 'true'}': expected")


def test_an_unknown_key_that_sounds_secret_keeps_its_value_to_itself() -> None:
    message = refusal({"monitor": {"wandb": {"api_key": "hush-hush"}}})
    assert "monitor.wandb.api_key" in message
    assert "hush" not in message


LLM = {"type": "llm", "base_url": "https://h/v1", "model": "m"}
PYTHON = {"type": "python", "function": "m:f"}
ENSEMBLE = {"type": "ensemble", "members": [{"judge": LLM | {"extra_body": {"token": "hush"}}}, {"judge": PYTHON}]}


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ({"judge": LLM | {"extra_body": {"api_key": "hush"}}}, "judge.extra_body: api_key names a secret"),
        ({"eval_judge": LLM | {"extra_body": {"a": [{"X-Api-Key": "hush"}]}}}, "eval_judge.extra_body: a.0.X-Api-Key "),
        ({"judge": LLM | {"extra_body": {"proxy": "http://u:hush@h/"}}}, "judge.extra_body: proxy "),
        ({"judge": PYTHON | {"options": {"db": {"password": 42}}}}, "judge.options: db.password names a secret"),
        ({"judge": {"type": "pair_model", "engine": {"hf_token": "hush"}}}, "judge.engine: hf_token names a secret"),
        ({"judge": ENSEMBLE}, "judge.members.0.judge.extra_body: token names a secret"),
        ({"generator": {"engine": {"hf_token": "hush"}}}, "generator.engine.hf_token names a secret"),
        ({"learner": {"deepspeed": {"comet": {"api_key": "hush"}}}}, "learner.deepspeed.comet.api_key names a secret"),
    ],
)
def test_secrets_are_refused_where_any_key_is_taken(extra: dict[str, Any], where: str) -> None:
    message = refusal(extra)
    assert message.startswith(f"c.yaml: {where}")
    assert "environment variable" in message
    assert "hush" not in message
    assert "42" not in message


def test_what_only_sounds_secret_is_taken() -> None:
    engine = {"hf_token": True, "hf_overrides": {"classifier_from_token": ["no", "yes"]}, "max_num_batched_tokens": 9}
    judge = {"type": "reward_model", "path": "p", "engine": engine}
    other = PYTHON | {"options": {"token_env": "MY_TOKEN", "keywords": ["x"], "eos_token": "</s>", "api_key": None}}
    config: RunConfig = validate(BASE | {"judge": judge, "eval_judge": other}, "c.yaml")
    assert config.judge.model_dump()["engine"] == engine


@pytest.mark.parametrize("value", ["sk-hush-hush", "hush hush", "9hush", "hush\n", ["sk-hush"], {"hush": 1}, 5])
def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(value: Any) -> None:
    data = BASE | {"judge": LLM | {"api_key_env": value}}
    with pytest.raises(InputError) as caught:
        validate(data, "c.yaml")
    assert str(caught.value).startswith("c.yaml: judge.api_key_env: expected the name of an environment variable")
    assert "hush" not in f"{caught.value}{caught.value.__cause__}"


@pytest.mark.parametrize("url", ["https://u:hush@h/v1", "htps://u:hush@h/v1", "u:hush@h/v1", "h/v1?key=hush"])
def test_a_login_in_an_url_is_refused_and_not_shown(url: str) -> None:
    message = refusal({"judge": LLM | {"base_url": url}})
    assert "judge.base_url" in message
    assert "hush" not in message


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"judge": LLM | {"batch_timeout_s": 1800}}, "judge.batch_timeout_s 1800"),
        ({"eval_judge": LLM | {"batch_timeout_s": 2000}}, "eval_judge.batch_timeout_s 2000"),
        ({"judge": LLM, "cluster": {"deadlines": {"judge": 600}}}, "judge.batch_timeout_s 900"),
        (
            {"judge": {"type": "ensemble", "members": [{"judge": PYTHON}, {"judge": LLM | {"batch_timeout_s": 1e4}}]}},
            "judge.members.1.judge.batch_timeout_s 10000",
        ),
    ],
)
def test_a_batch_must_end_before_the_wait_for_it(extra: dict[str, Any], key: str) -> None:
    message = refusal(extra)
    assert message.startswith(f"c.yaml: {key} must be less than cluster.deadlines.judge ")


@pytest.mark.parametrize(
    ("judge", "eval_judge"),
    [
        ({"type": "sentiment"}, {"type": "sentiment"}),
        ({"type": "sentiment"}, {"type": "sentiment", "replicas": 2, "cache": True, "health": {"min_valid": 0.5}}),
        ({"type": "pair_model"}, {"type": "pair_model", "path": "p"}),
        (LLM, LLM | {"retries": 9, "api_key_env": "OTHER"}),
        (
            {"type": "ensemble", "members": [{"judge": PYTHON}, {"judge": {"type": "pair_model"}}]},
            {"type": "ensemble", "members": [{"judge": PYTHON}, {"judge": {"type": "pair_model", "replicas": 2}}]},
        ),
    ],
)
def test_a_judge_that_judges_itself_is_refused(judge: dict[str, Any], eval_judge: dict[str, Any]) -> None:
    assert refusal({"judge": judge, "eval_judge": eval_judge}).startswith("c.yaml: eval_judge is the same as judge: ")


@pytest.mark.parametrize(
    ("judge", "eval_judge"),
    [
        ({"type": "sentiment"}, PYTHON),
        ({"type": "pair_model"}, {"type": "pair_model", "path": "q"}),
        (LLM, LLM | {"rubric": "Be brief."}),
        (
            {"type": "ensemble", "members": [{"judge": PYTHON}, {"judge": LLM}]},
            {"type": "ensemble", "members": [{"judge": PYTHON}, {"judge": LLM, "weight": 2}]},
        ),
    ],
)
def test_another_judge_may_evaluate(judge: dict[str, Any], eval_judge: dict[str, Any]) -> None:
    assert validate(BASE | {"judge": judge, "eval_judge": eval_judge}, "c.yaml").eval_judge is not None


def test_a_long_value_is_cut() -> None:
    assert len(refusal({"name": "a" * 3000})) < 250


def test_numbers_become_text_and_text_numbers(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL.replace("name: x", "name: 42") + "    learner: {optimizer: {lr: 3e-5}}\n")
    config = load_config(file, ["generator.engine.swap_fraction=1e-2"])
    assert config.name == "42"
    assert config.learner.optimizer.lr == 3e-5
    # No model converts what goes to vLLM as it is: there, too, 1e-2 must be a number.
    assert config.generator.engine == {"swap_fraction": 0.01}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (MINIMAL + "    name: y\n", ":4:5: not valid YAML: the key 'name' stands twice"),
        (MINIMAL + "    rounds: {count: 1, count: 2}\n", ":4:24: not valid YAML: the key 'count' stands twice"),
        (MINIMAL + "    rounds: {count: 1\n", "not valid YAML"),
        ("", ": the config is empty; it needs at least name, policy.path and prompts.path"),
        ("- 1\n", ": expected a mapping of keys at the top level, got list"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, where: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(file)
    assert where in str(caught.value)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_yaml_anchors_may_be_merged_over(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL + "    rounds: &r {count: 3}\n    evaluation: {<<: {every: 2}, every: 1}\n")
    assert load_config(file).evaluation.every == 1


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the config: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a UTF-8 text file"):
        load_config(tmp_path / "b.yaml")


def test_overrides_reach_deep_and_create_sections() -> None:
    data = apply_overrides(BASE, ["learner.optimizer.lr=1e-6", "rounds.count=2", "name=hh"], "c.yaml")
    config: RunConfig = validate(data, "c.yaml")
    assert (config.learner.optimizer.lr, config.rounds.count, config.name) == (1e-6, 2, "hh")
    assert "learner" not in BASE


def test_an_override_of_a_type_resets_its_siblings_and_comes_first() -> None:
    data = BASE | {"judge": {"type": "sentiment", "scale": 2.0, "replicas": 3}}
    changed = apply_overrides(data, ["judge.max_length=64", "judge.type=pair_model"], "c.yaml")
    assert changed["judge"] == {"type": "pair_model", "max_length": 64}
    kept = apply_overrides(data, ["judge.type=sentiment"], "c.yaml")
    assert kept["judge"] == data["judge"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds.count", "c.yaml: override 'rounds.count': expected key.path=value"),
        ("=3", "c.yaml: override '=3': expected key.path=value"),
        ("a..b=3", "c.yaml: override 'a..b=3': expected key.path=value"),
        ("name.x=3", "c.yaml: override name.x: name is 'x', not a mapping of keys"),
        ("name=[", "c.yaml: override 'name=[': the value is not valid YAML; quote it"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        apply_overrides(BASE, [override], "c.yaml")
    assert str(caught.value) == message


@given(
    st.integers(0, 2**32 - 1),
    st.floats(1e-8, 1e-2),
    st.integers(1, 64),
    st.sampled_from(["sentiment", "pair_model"]),
)
def test_the_resolved_config_loads_to_itself(seed: int, lr: float, count: int, judge: str) -> None:
    overrides = [f"seed={seed}", f"learner.optimizer.lr={lr!r}", f"rounds.count={count}", f"judge.type={judge}"]
    config: RunConfig = validate(apply_overrides(BASE, overrides, "c.yaml"), "c.yaml")
    assert (config.seed, config.learner.optimizer.lr, config.rounds.count) == (seed, lr, count)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\npolicy: {path: p}\ndata: {path: d}\n", "run `rlhf judge train"),
        (
            "name: x\npolicy: {path: p}\npreferences: {path: d}\nprompts: {path: q}\n",
            "leave out prompts, or preferences",
        ),
        ("name: x\npolicy: {path: p}\npreferences: {path: d}\nrefrence: 1\n", "refrence"),
    ],
)
def test_what_train_cannot_take_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_run(write(tmp_path, text))
    assert message in str(caught.value)


def test_preferences_make_an_offline_training(tmp_path: Path) -> None:
    file = write(tmp_path, "name: x\npolicy: {path: p}\npreferences: {path: d}\n")
    assert isinstance(load_run(file, ["learner.loss.type=sft"]), OfflineConfig)
    assert isinstance(load_run(write(tmp_path, MINIMAL)), RunConfig)
