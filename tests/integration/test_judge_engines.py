"""Judges on real engines: vLLM's pooling runner against transformers, and the example configs."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import yaml
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from actors.cluster import ClusterInfo
from actors.engine.llm import EngineSpec, engine_environment
from actors.judge_launch import JudgeLauncher
from rlhf.config.judge import (
    EnsembleJudge,
    Judge,
    PairModelJudge,
    PooledJudge,
    RewardModelJudge,
    SafetyJudge,
    single_judges,
)
from rlhf.config.system import Cluster
from rlhf.judging.build import build_judge
from rlhf.judging.ensemble import EnsembleJudge as RunningEnsemble
from rlhf.judging.transformers_engine import TransformersRewarder, TransformersScorer
from rlhf.ports import Judge as RunningJudge
from rlhf.ports import JudgeEngines
from rlhf.records import Comparison, Message, Verdict, VerdictState

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"
EXAMPLES = ROOT / "configs" / "judges"
TALK = (
    Message(role="user", content="Does it rain?"),
    Message(role="assistant", content="It does."),
    Message(role="user", content="Will it snow tomorrow?"),
)
BF16 = 0.1
"""A letter's logit has steps of an eighth in bfloat16."""
PAIRS = [("Yes, a lot of it.", "No."), ("No.", "I hope so, for the children love it!"), ("Ask again.", "No.")]
COMPARISONS = [
    *(Comparison("p", TALK, a, b) for a, b in PAIRS),
    *(Comparison("q", TALK[:1], a, b) for a, b in PAIRS),
]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random reward model with the real tokenizer."""
    path = tmp_path_factory.mktemp("tiny-reward-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        num_labels=1,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForSequenceClassification(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(SMOLLM2).save_pretrained(path)
    return path


@torch.no_grad()
def plain_rewards(path: Path, prompts: list[list[int]]) -> list[float]:
    model = LlamaForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    return [model(torch.tensor([prompt])).logits.item() for prompt in prompts]


class PoolingActor:
    """The pooling engine in a process of its own, as judges have it."""

    def __init__(self, path: str):
        from actors.engine.pooling import PoolingEngine

        arguments = {"kv_cache_memory_bytes": 32 << 20, "max_num_batched_tokens": 512, "max_num_seqs": 16}
        self.engine = PoolingEngine(EngineSpec(path, "float32", 256, 1, "cpu", 0, False, arguments, None))

    async def rewards(self, *batches: list[list[int]]) -> list[np.ndarray]:
        return await asyncio.gather(*(self.engine.rewards(batch) for batch in batches))


class RewardEngines:
    """Engines for `build_judge` of which only the rewarder is asked."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def rewarder(self, config: RewardModelJudge) -> "RewardEngines":
        return self

    async def rewards(self, prompts: list[list[int]]) -> np.ndarray:
        [found] = await self.actor.rewards.remote(prompts)
        return found


async def test_vllm_pooling_equals_transformers(cluster: None, reward_model: Path) -> None:
    environment = {"env_vars": engine_environment("cpu", 1) | {"HF_HUB_OFFLINE": "1"}}
    actor = ray.remote(PoolingActor).options(runtime_env=environment, max_concurrency=100).remote(str(reward_model))

    generator = np.random.default_rng(0)
    lengths = (1, 2, 7, 40, 200, 3)
    prompts = [generator.integers(3, 49152, size=length).tolist() for length in lengths]
    prompts += [[*prompts[3], 2, 2], [*prompts[2], 2, 9], prompts[4][:120] + prompts[3]]  # padding at the end, a prefix
    first, second = await actor.rewards.remote(prompts, prompts[::-1])
    expected = plain_rewards(reward_model, prompts)
    assert first.dtype == np.float64
    np.testing.assert_allclose(first, expected, atol=1e-3, rtol=0)
    np.testing.assert_allclose(second[::-1], expected, atol=1e-3, rtol=0)
    assert np.ptp(expected) > 1.0
    assert np.abs(expected).max() > 1.01  # beyond what an activation would let through

    fields = {"type": "reward_model", "path": str(reward_model), "dtype": "float32", "max_length": 256}
    on_vllm = build_judge(RewardModelJudge(**fields), RewardEngines(actor))  # type: ignore[arg-type]
    plainly = build_judge(RewardModelJudge(**fields, backend="transformers"), LocalEngines())  # type: ignore[arg-type]
    there, here = await on_vllm.compare(COMPARISONS), await plainly.compare(COMPARISONS)
    assert [verdict.p for verdict in there] == pytest.approx([verdict.p for verdict in here], abs=1e-3)
    assert [verdict.state for verdict in there] == [verdict.state for verdict in here]
    assert VerdictState.INVALID not in {verdict.state for verdict in there}


class LocalEngines:
    """Engines on transformers, whatever the config's backend."""

    def scorer(self, config: Any) -> TransformersScorer:
        return TransformersScorer(config.model_copy(update={"backend": "transformers", "engine": {}}), "cpu")

    def rewarder(self, config: Any) -> Any:
        return TransformersRewarder(config, "cpu")


def example(name: str) -> Judge:
    data = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    assert set(data) <= {"judge", "cluster"}
    return TypeAdapter(Judge).validate_python(data["judge"])


async def judged(config: PooledJudge, engines: JudgeEngines) -> list[Verdict]:
    reference = [Comparison(c.uid, c.messages, c.a, c.b, reference="#### 4") for c in COMPARISONS]
    verdicts = await build_judge(config, engines).compare(reference)
    assert VerdictState.INVALID not in {verdict.state for verdict in verdicts}
    return verdicts


@pytest.mark.parametrize(
    "name", ["sentiment", "verifier", "python", "ensemble", "safety", "pair_model", "reward_model"]
)
async def test_example_configs_judge_on_a_cpu(name: str, reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = example(name)
    assert config.type == name
    for _, judge in single_judges(config):
        if isinstance(judge, RewardModelJudge):  # its model is not fetched by the tests
            judge = judge.model_copy(update={"path": str(reward_model), "max_length": 512})
        verdicts = await judged(judge, LocalEngines())  # type: ignore[arg-type]
        if isinstance(judge, SafetyJudge):
            assert all(0.0 < (verdict.score_a or 0.0) < 1.0 for verdict in verdicts)


async def launched(config: Judge) -> RunningJudge:
    """The judge as a run starts it: placed, in actors, behind its pools."""
    launcher = JudgeLauncher(ClusterInfo("tests", "cpu", private=True), Cluster(device="cpu"), 0, None, lambda _: None)
    return await launcher.start(config, f"example-{config.type}", lambda: None)


async def test_the_ensemble_example_over_its_pools(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = example("ensemble")
    assert isinstance(config, EnsembleJudge)
    judge = await launched(config)
    assert isinstance(judge, RunningEnsemble)
    verdicts = await judge.compare(COMPARISONS)
    opinions = [await judged(member.judge, LocalEngines()) for member in config.members]
    weights = [member.weight for member in config.members]
    expected = [np.average([opinion.p for opinion in each], weights=weights) for each in zip(*opinions, strict=True)]
    assert [verdict.p for verdict in verdicts] == pytest.approx(expected, abs=1e-12)
    assert [verdict.comparison for verdict in verdicts] == COMPARISONS
    assert {(verdict.score_a, verdict.score_b) for verdict in verdicts} == {(None, None)}
    assert np.ptp(expected) > 0.05


@pytest.mark.slow
async def test_the_pair_model_example_on_vllm(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the file says, in bfloat16; test_judge_pair_model has the numbers in float32."""
    monkeypatch.chdir(ROOT)
    config = example("pair_model")
    assert isinstance(config, PairModelJudge)
    assert config.backend == "vllm"
    verdicts = await (await launched(config)).compare(COMPARISONS)
    expected = await judged(config.model_copy(update={"dtype": "float32"}), LocalEngines())
    assert VerdictState.INVALID not in {verdict.state for verdict in verdicts}
    for order in ("p_ab", "p_ba"):
        exact = [getattr(verdict, order) for verdict in expected]
        assert [getattr(verdict, order) for verdict in verdicts] == pytest.approx(exact, abs=BF16)
    assert max(abs(verdict.p_ab - verdict.p_ba) for verdict in expected) > 3 * BF16, "the orders tell them apart"


async def test_the_guard_reads_its_answer_where_the_model_would_give_it() -> None:
    config = example("safety")
    assert isinstance(config, SafetyJudge)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    judge = build_judge(config.model_copy(update={"path": str(SMOLLM2)}), LocalEngines())
    [verdict] = await judge.compare([Comparison("p", TALK[:1], "Yes, take a coat.", "No.")])
    text = (config.template or "").replace("{conversation}", "User: Does it rain?")
    text = text.replace("{response}", "Yes, take a coat.")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([list(ids["input_ids"])])).logits[0, -1].double()
    yes, no = tokenizer("Yes").input_ids[0], tokenizer("No").input_ids[0]
    assert verdict.score_a == pytest.approx(torch.softmax(logits[[yes, no]], -1)[0].item(), abs=1e-4)
