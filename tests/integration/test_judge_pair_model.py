"""The pair-preference judge on real vLLM, in a pool of two actors, against a plain transformers forward pass."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.judging import run_with_judge
from rlhf.config import JudgeRun
from rlhf.ports import Judge
from rlhf.records import Comparison, Message, Verdict

HEADER = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
SINGLE = ["How do I boil an egg?"]
MULTI = ["Can cats swim?", "Most can, few like to.", "And tigers?"]
PAIRS = [("Put it in water for eight minutes.", "I do not know."), ("No.", "Yes, tigers love water!"), ("x", "y z")]


def context(turns: list[str]) -> str:
    """The judge's context written out by hand (METHODS §1)."""
    roles = ("user", "assistant")
    return "\n" + "".join(f"\n<turn> {roles[i % 2]}\n {turn}" for i, turn in enumerate(turns)) + "\n"


def comparisons() -> list[Comparison]:
    roles = ("user", "assistant")
    return [
        Comparison(
            f"{len(turns)}", tuple(Message(role=roles[i % 2], content=turn) for i, turn in enumerate(turns)), a, b
        )
        for turns in (SINGLE, MULTI)
        for a, b in PAIRS
    ]


@torch.no_grad()
def plain_probabilities(model_path: Path) -> list[tuple[float, float]]:
    """p(A wins) with A first and with B first, one prompt at a time, from the logits of the two letters."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    letters = [tokenizer.convert_tokens_to_ids("A"), tokenizer.convert_tokens_to_ids("B")]

    def first_wins(turns: list[str], first: str, second: str) -> float:
        text = f"[CONTEXT] {context(turns)} [RESPONSE A] {first} [RESPONSE B] {second} \n"
        prompt = f"{HEADER}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        return torch.softmax(model(ids).logits[0, -1, letters].double(), -1)[0].item()

    return [(first_wins(turns, a, b), 1.0 - first_wins(turns, b, a)) for turns in (SINGLE, MULTI) for a, b in PAIRS]


def test_vllm_equals_a_plain_forward_pass(tiny_model: Path) -> None:
    config = JudgeRun.model_validate(
        {
            "judge": {
                "type": "pair_model",
                "path": str(tiny_model),
                "dtype": "float32",
                "replicas": 2,
                "batch_size": 2,
                "max_length": 512,
                "engine": {"kv_cache_memory_bytes": 64 << 20},
            },
            "cluster": {"device": "cpu"},
        }
    )

    async def work(judge: Judge) -> tuple[list[Verdict], list[Verdict]]:
        # The second time every prefix is cached.
        return await judge.compare(comparisons()), await judge.compare(comparisons())

    first, second = run_with_judge(config, work)
    expected = plain_probabilities(tiny_model)
    for verdicts in (first, second):
        found = [(verdict.p_ab, verdict.p_ba) for verdict in verdicts]
        assert found == [pytest.approx(pair, abs=1e-4) for pair in expected]
        assert [verdict.comparison for verdict in verdicts] == comparisons()
    orders = [abs(p_ab - p_ba) for p_ab, p_ba in expected]
    assert max(orders) > 0.1, "the order matters to this judge: the test tells both apart"
