"""The transformers engine: batches give the numbers of single rows; models of another kind are refused."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from rlhf.config.judge import PairModelJudge, RewardModelJudge
from rlhf.errors import InputError
from rlhf.judging import transformers_engine
from rlhf.judging.transformers_engine import TransformersRewarder, TransformersScorer, length_batches

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
PROMPTS = [[5, 6, 7], [9], list(range(3, 40)), [8, 8, 8, 8], [11, 3, 2], [4, 63, 62, 61, 60], [2, 2], [0, 1, 0]]


def save(model: PreTrainedModel, folder: Path) -> str:
    model.float().save_pretrained(folder)
    return str(folder)


def llama(folder: Path, labels: int | None = 1, pad: int | None = 0) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, pad_token_id=pad, num_labels=labels or 2, num_key_value_heads=2)
    return save(LlamaForCausalLM(config) if labels is None else LlamaForSequenceClassification(config), folder)


def scorer(path: str, **fields: object) -> TransformersScorer:
    config = {"type": "pair_model", "path": path, "dtype": "float32", "max_length": 64, "backend": "transformers"}
    return TransformersScorer(PairModelJudge(**config | fields), "cpu")  # type: ignore[arg-type]


def rewarder(path: str, **fields: object) -> TransformersRewarder:
    config = {"type": "reward_model", "path": path, "dtype": "float32", "max_length": 64, "backend": "transformers"}
    return TransformersRewarder(RewardModelJudge(**config | fields), "cpu")  # type: ignore[arg-type]


@torch.no_grad()
def plain_rewards(path: str, prompts: Sequence[Sequence[int]], kind: type[PreTrainedModel]) -> list[float]:
    """Each prompt alone, without padding and without a mask."""
    model = kind.from_pretrained(path, dtype=torch.float32).eval()
    return [model(torch.tensor([list(prompt)])).logits.item() for prompt in prompts]


@pytest.mark.parametrize("budget", [1, 40, 8192])
async def test_log_probs_of_a_batch_are_those_of_single_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    path = llama(tmp_path / "lm", labels=None)
    monkeypatch.setattr(transformers_engine, "BATCH_TOKENS", budget)
    found = await scorer(path).next_logprobs(PROMPTS, [7, 3])
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1)[[7, 3]] for prompt in PROMPTS]
    expected = torch.stack(rows).double().numpy()
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert np.ptp(expected) > 1.0  # far from uniform: a row read at the wrong place would show


@pytest.mark.parametrize("pad", [0, 2, None])
@pytest.mark.parametrize("budget", [1, 40, 8192])
async def test_rewards_of_a_batch_are_those_of_single_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, pad: int | None
) -> None:
    path = llama(tmp_path / "rm", pad=pad)
    monkeypatch.setattr(transformers_engine, "BATCH_TOKENS", budget)
    found = await rewarder(path).rewards(PROMPTS)
    expected = plain_rewards(path, PROMPTS, LlamaForSequenceClassification)
    assert found.shape == (len(PROMPTS),)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert np.ptp(expected) > 0.1


async def test_encoder_rewards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, pad_token_id=0, num_labels=1))
    path = save(model, tmp_path / "bert")
    found = await rewarder(path).rewards(PROMPTS[:-1])
    np.testing.assert_allclose(found, plain_rewards(path, PROMPTS[:-1], BertForSequenceClassification), atol=1e-5)


async def test_nothing_to_score(tmp_path: Path) -> None:
    assert (await scorer(llama(tmp_path / "lm", labels=None)).next_logprobs([], [1, 2])).shape == (0, 2)
    assert (await rewarder(llama(tmp_path / "rm")).rewards([])).shape == (0,)


async def test_event_loop_lives_while_the_model_runs(tmp_path: Path) -> None:
    engine = rewarder(llama(tmp_path / "rm"))
    entered, release = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        entered.set()
        assert release.wait(20)

    engine._model.register_forward_pre_hook(wait)
    tasks = [asyncio.create_task(engine.rewards(PROMPTS[:2])) for _ in range(2)]
    assert await asyncio.to_thread(entered.wait, 20)
    assert not any(task.done() for task in tasks)
    release.set()
    first, second = await asyncio.gather(*tasks)
    np.testing.assert_array_equal(first, second)


@given(lengths=st.lists(st.integers(1, 50), max_size=30), budget=st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    assert [lengths[index] for batch in batches for index in batch] == sorted(lengths, reverse=True)


def test_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    model, pair, classifier = llama(tmp_path / "lm", labels=None), llama(tmp_path / "two", 2), llama(tmp_path / "rm")
    with pytest.raises(InputError, match=rf"^judge\.path = {model}: it is LlamaForCausalLM, a language model without"):
        rewarder(model)
    with pytest.raises(InputError, match=rf"^judge\.path = {pair}: LlamaForSequenceClassification has 2 labels"):
        rewarder(pair)
    with pytest.raises(
        InputError, match=rf"^judge\.path = {classifier}: the checkpoint lacks 1 weights of Llama.*lm_head"
    ):
        scorer(classifier)
    with pytest.raises(InputError, match=r"^judge\.path = .*nothing: cannot read the model's config: "):
        rewarder(str(tmp_path / "nothing"))


def test_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = llama(tmp_path / "rm")
    file = tmp_path / "rm" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "score.weight"}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of LlamaForSequenceClassification \(score\.weight\)"):
        rewarder(path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"max_length": 129}, r"^judge\.max_length = 129: .* takes 128 tokens; set 128 or less$"),
        ({"engine": {"max_num_seqs": 4}}, r"^judge\.engine: has no meaning for judge\.backend = transformers"),
        ({"tensor_parallel": 2}, r"^judge\.tensor_parallel: has no meaning for judge\.backend = transformers"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(tmp_path: Path, fields: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        rewarder(llama(tmp_path / "rm"), **fields)


async def test_weights_are_served_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    path = llama(tmp_path / "rm")
    rounded = rewarder(path, dtype="bfloat16")
    assert {parameter.dtype for parameter in rounded._model.parameters()} == {torch.bfloat16}
    np.testing.assert_allclose(await rounded.rewards(PROMPTS), await rewarder(path).rewards(PROMPTS), atol=0.5)
