"""Asks a language model behind an OpenAI-compatible endpoint, in both orders."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from rlhf.config.judge import LLMJudge as LLMConfig
from rlhf.errors import RLHFError
from rlhf.judging.llm.answers import NO_LOGPROBS, Reply, has_logprobs, letter_probability, winners
from rlhf.judging.llm.client import Batch, Endpoint, Failure
from rlhf.judging.llm.prompt import Conversation, JudgePrompt, Question, combine, cut_conversations
from rlhf.judging.llm.requests import Dialect, letter_fields, structured_fields
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.records import Comparison, Verdict

MAX_REASON = 160


@dataclass(frozen=True, slots=True)
class _Orders:
    """p(A wins) for each question, with A shown first and with B shown first."""

    ab: list[float]
    ba: list[float]


class LLMJudge:
    """Soft verdicts from the log-probs of `A` and `B`, or hard ones from structured answers.

    With criteria each is a question of its own and METHODS §7 combines them. What brings no readable answer is
    INVALID. Use it from one event loop.
    """

    def __init__(self, config: LLMConfig) -> None:
        """Raises `InputError` if the variable that `api_key_env` names is not set. Opens no connection."""
        self._config = config
        self._endpoint = Endpoint(config)
        self._prompt = JudgePrompt(config)
        self._dialect = Dialect()
        self._names = [question.name for question in self._prompt.questions]
        self._logprobs_seen = self._logprobs_missed = self._logprobs_refused = False

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order, within `batch_timeout_s` seconds.

        Raises `RLHFError` where every comparison fails alike: a bad key, an unknown model, no credit, before this
        judge had any answer from its endpoint. After that such a refusal is an INVALID verdict as any other failure,
        so that what a batch paid for is kept; `health.min_valid` says when the run stops.
        """
        batch = self._endpoint.batch()
        tasks = [asyncio.create_task(self._judge(comparison, batch)) for comparison in comparisons]
        if not tasks:
            return []
        try:
            await asyncio.wait(tasks, timeout=self._config.batch_timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):  # a cancellation is none
                raise result
        late = f"not answered in {self._config.batch_timeout_s:g} s (judge.batch_timeout_s)"
        return [
            result if isinstance(result, Verdict) else invalid_verdict(comparison, late)
            for comparison, result in zip(comparisons, results, strict=True)
        ]

    async def _judge(self, comparison: Comparison, batch: Batch) -> Verdict:
        outcome = await self._both_orders(comparison, Conversation(comparison.messages), batch)
        truncated = False
        if isinstance(outcome, Failure) and outcome.too_long:
            outcome = await self._shortened(comparison, batch)
            truncated = isinstance(outcome, _Orders)
        if isinstance(outcome, Failure):
            if outcome.fatal:
                raise RLHFError(outcome.reason)
            return invalid_verdict(comparison, _shorten(outcome.reason))
        questions = self._prompt.questions
        verdict = make_verdict(comparison, combine(outcome.ab, questions), combine(outcome.ba, questions))
        details = _details(questions, outcome) if self._config.criteria else ""
        reason = "; ".join(part for part in (verdict.reason, details) if part)
        return replace(verdict, reason=_shorten(reason), truncated=truncated)

    async def _shortened(self, comparison: Comparison, batch: Batch) -> _Orders | Failure:
        """The answer on as much of the conversation's end as the server takes, found by bisection."""
        candidates = cut_conversations(comparison)
        best: _Orders | Failure = Failure("the responses alone do not fit the context of judge.model")
        low, high = 0, len(candidates)  # those before `low` are too long, `high` fits
        while low < high:
            middle = (low + high) // 2
            outcome = await self._both_orders(comparison, candidates[middle], batch)
            if isinstance(outcome, Failure) and outcome.too_long:
                low = middle + 1
            elif isinstance(outcome, Failure):
                return outcome
            else:
                best, high = outcome, middle
        return best

    async def _both_orders(self, comparison: Comparison, conversation: Conversation, batch: Batch) -> _Orders | Failure:
        a_first, b_first = await asyncio.gather(
            self._ask(conversation, comparison.a, comparison.b, batch),
            self._ask(conversation, comparison.b, comparison.a, batch),
        )
        if isinstance(a_first, list) and isinstance(b_first, list):
            return _Orders(a_first, [1.0 - p for p in b_first])
        return _worst([a_first, b_first])

    async def _ask(self, conversation: Conversation, first: str, second: str, batch: Batch) -> list[float] | Failure:
        """p(first) for each question."""
        if self._soft:
            outcome = await self._ask_letters(conversation, first, second, batch)
            if isinstance(outcome, list) or self._config.answer == "logprobs" or not _lacks_logprobs(outcome):
                return outcome
            if outcome.no_logprobs:
                self._logprobs_refused = True
            elif self._logprobs_seen:
                return outcome  # the server gives log-probs, this one reply has none
            self._logprobs_missed = True
        fields = structured_fields(self._config, self._names)
        reply = await self._send(self._prompt.structured(conversation, first, second), fields, batch)
        read = reply if isinstance(reply, Failure) else winners(reply, self._names)
        return Failure(read) if isinstance(read, str) else read

    @property
    def _soft(self) -> bool:
        """Are log-probs asked for? A refusal ends that; a reply without any does not once another has brought some."""
        if self._config.answer != "auto":
            return self._config.answer == "logprobs"
        return not self._logprobs_refused and (self._logprobs_seen or not self._logprobs_missed)

    async def _ask_letters(
        self, conversation: Conversation, first: str, second: str, batch: Batch
    ) -> list[float] | Failure:
        async def ask(question: Question) -> float | Failure:
            messages = self._prompt.letter(conversation, first, second, question)
            reply = await self._send(messages, letter_fields(self._config), batch)
            if isinstance(reply, Failure):
                return reply
            read = letter_probability(reply, self._config.min_letter_mass)
            self._logprobs_seen = self._logprobs_seen or has_logprobs(reply)
            return Failure(read) if isinstance(read, str) else read

        outcomes = await asyncio.gather(*(ask(question) for question in self._prompt.questions))
        read = [outcome for outcome in outcomes if isinstance(outcome, float)]
        return read if len(read) == len(outcomes) else _worst(outcomes)

    async def _send(self, messages: list[dict[str, str]], fields: dict[str, Any], batch: Batch) -> Reply | Failure:
        while True:
            sent = self._dialect.apply(messages, fields)
            outcome = await self._endpoint.ask(*sent, batch)
            if isinstance(outcome, Reply) or not self._dialect.learn(*sent, outcome):
                return outcome


def _worst(outcomes: Sequence[object]) -> Failure:
    """The failure that says most about what to do next."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    return max(failures, key=lambda failure: (failure.fatal, failure.too_long, _lacks_logprobs(failure)))


def _lacks_logprobs(failure: Failure) -> bool:
    return failure.no_logprobs or failure.reason == NO_LOGPROBS


def _details(questions: Sequence[Question], orders: _Orders) -> str:
    """p(A wins) of each criterion in both orders."""
    rows = zip(questions, orders.ab, orders.ba, strict=True)
    return ", ".join(f"{question.name} {ab:.2f}/{ba:.2f}" for question, ab, ba in rows)


def _shorten(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= MAX_REASON else f"{line[: MAX_REASON - 1]}…"
