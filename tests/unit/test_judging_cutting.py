"""Encoding judge prompts: off the event loop, in one call, and no more of a long text than is needed."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.judge import PairModelJudge as PairConfig
from rlhf.config.judge import RewardModelJudge as RewardConfig
from rlhf.judging.cutting import longest_end, max_chars
from rlhf.judging.pair_model import PairModelJudge
from rlhf.judging.reward_model import RewardModelJudge
from rlhf.records import Comparison, Message, Verdict
from tests.unit.byte_tokenizer import CHAT, CONTROL, byte_tokenizer

LIMIT = 256
LONGEST = max(map(len, CONTROL))


class Engine:
    """Any numbers, as a scorer and as a rewarder."""

    async def next_logprobs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> np.ndarray:
        return np.log(np.tile([0.6, 0.4], (len(prompts), 1)))

    async def rewards(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        return np.arange(float(len(prompts)))


class Watch:
    """The real tokenizer's calls: their texts and their threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
        self.calls: list[list[str]] = []
        self.threads: set[int] = set()
        real = type(tokenizer)._encode_plus

        def watched(this: Any, text: Any, *arguments: Any, **options: Any) -> Any:
            self.calls.append([text] if isinstance(text, str) else list(text))
            self.threads.add(threading.get_ident())
            return real(this, text, *arguments, **options)

        monkeypatch.setattr(type(tokenizer), "_encode_plus", watched)

    @property
    def longest(self) -> int:
        return max(len(text) for call in self.calls for text in call)


def judge(kind: str, tokenizer: Any) -> Any:
    if kind == "pair_model":
        return PairModelJudge(PairConfig(type="pair_model", max_length=LIMIT), Engine(), tokenizer)
    return RewardModelJudge(RewardConfig(type="reward_model", path="m", max_length=LIMIT), Engine(), tokenizer)


def comparison(question: str, number: int = 0) -> Comparison:
    return Comparison("p", (Message(role="user", content=question),), f"good {number}", f"bad {number}")


@pytest.mark.parametrize("kind", ["pair_model", "reward_model"])
def test_one_call_for_all_that_fit_and_never_on_the_loop_s_thread(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(CHAT)
    asked = judge(kind, tokenizer)
    watch = Watch(monkeypatch, tokenizer)
    verdicts = asyncio.run(asked.compare([comparison("why?", number) for number in range(9)]))
    assert [len(call) for call in watch.calls] == [18]
    assert threading.get_ident() not in watch.threads
    assert not any(verdict.truncated for verdict in verdicts)


@pytest.mark.parametrize("kind", ["pair_model", "reward_model"])
def test_a_context_of_any_length_is_not_encoded_beyond_what_may_fit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(CHAT)
    asked = judge(kind, tokenizer)
    watch = Watch(monkeypatch, tokenizer)
    [verdict] = asyncio.run(asked.compare([comparison("word " * 400_000)]))
    assert verdict.truncated
    assert verdict.state != "invalid"
    assert watch.longest <= LIMIT * LONGEST
    assert sum(len(text) for call in watch.calls for text in call) < 40 * LIMIT * LONGEST
    assert threading.get_ident() not in watch.threads


@pytest.mark.parametrize("kind", ["pair_model", "reward_model"])
def test_responses_of_any_length_are_refused_unencoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(CHAT)
    asked = judge(kind, tokenizer)
    watch = Watch(monkeypatch, tokenizer)
    long = Comparison("p", (Message(role="user", content="why?"),), "x" * 3_000_000, "y")
    [verdict] = asyncio.run(asked.compare([long]))
    assert (verdict.state, "judge.max_length" in verdict.reason) == ("invalid", True)
    assert all(len(text) < 1000 for call in watch.calls for text in call)


def test_batches_at_the_same_time_are_encoded_as_alone() -> None:
    asked = judge("reward_model", byte_tokenizer(CHAT))
    questions = ["short", "word " * 200, "häufig " * 300]

    async def all_at_once() -> list[list[Verdict]]:
        return await asyncio.gather(*(asked.compare([comparison(text) for text in questions]) for _ in range(8)))

    [alone] = [asyncio.run(asked.compare([comparison(text) for text in questions]))]
    assert [verdict.truncated for verdict in alone] == [False, True, True]
    assert asyncio.run(all_at_once()) == [alone] * 8


@given(st.integers(0, 60), st.integers(-1, 70), st.integers(0, 80))
def test_the_most_that_fits_is_found_and_little_more_is_tried(length: int, fits: int, guess: int) -> None:
    tried: list[int] = []

    def attempt(keep: int) -> int | None:
        tried.append(keep)
        return keep if keep <= fits else None

    found = longest_end(length, guess, attempt)
    assert found == (None if fits < 0 else min(fits, length))
    assert len(tried) == len(set(tried))
    assert max(tried) <= max(2 * max(fits, 0), guess, 1)


def test_no_token_stands_for_more_characters() -> None:
    tokenizer = byte_tokenizer(CHAT)
    assert max_chars(tokenizer, 10) == 10 * LONGEST
    assert all(len(tokenizer.decode([number])) <= LONGEST for number in range(len(tokenizer)))
