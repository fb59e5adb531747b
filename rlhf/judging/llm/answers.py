"""From an endpoint's reply to p(the first response is the better one); what cannot be read is a reason, not a guess."""

import math
import re
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from rlhf.judging.verdicts import sigmoid

NO_LOGPROBS = "the reply carries no log-probs; use judge.answer: json"
_NEITHER = "neither A nor B is among the likeliest first tokens; a model that thinks first needs judge.answer: json"
_NOT_LOGPROBS = "the reply's log-probs of A and B are not numbers"
_WINNERS = {"a": 1.0, "b": 0.0, "tie": 0.5}
_BLANKS = " \t\r\n▁ĠĊ"  # with the marks that stand for a blank in undecoded tokens
_FENCED = re.compile(r"```\w*\s*(.*?)\s*```", re.DOTALL)
_ROUNDING = 1e-3  # a log-prob may be above zero by this much


class _Token(BaseModel):
    token: str
    logprob: float | None = None


class _Step(BaseModel):
    top_logprobs: list[_Token] | None = None


class _Logprobs(BaseModel):
    content: list[_Step] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(BaseModel):
    total_tokens: int | None = None


class Reply(BaseModel):
    """What is read of a chat completion."""

    choices: list[_Choice]
    usage: _Usage | None = None


def parse_reply(content: bytes) -> Reply | str:
    """The reply in a response body, or why it is none."""
    try:
        return Reply.model_validate_json(content)
    except ValidationError:
        return f"the endpoint's reply is not a chat completion: {quote(content[:400].decode('utf-8', 'replace'))}"


def has_logprobs(reply: Reply) -> bool:
    """Does the reply list alternatives of its first token?"""
    return any(_first_token(choice) for choice in reply.choices[:1])


def letter_probability(reply: Reply, min_mass: float) -> float | str:
    """p(first) as the softmax over the first token's log-probs of `A` and `B`, blanks around them stripped.

    A letter that is not listed is bounded by the smallest listed log-prob, which understates the confidence. Where
    both letters together have less than `min_mass` of the first token's probability the model meant to say something
    else, and their ratio is noise. Returns `NO_LOGPROBS` or another reason when there is no such number.
    """
    choice = _choice(reply)
    if isinstance(choice, str):
        return choice
    top = _first_token(choice)
    if not top:
        return NO_LOGPROBS
    found: dict[str, list[float]] = {"A": [], "B": []}
    for item in top:
        letter = item.token.strip(_BLANKS)
        if letter in found:
            found[letter].append(math.nan if item.logprob is None else item.logprob)
    if not found["A"] and not found["B"]:
        return _NEITHER
    if any(math.isnan(value) or value > _ROUNDING for values in found.values() for value in values):
        return _NOT_LOGPROBS
    finite = [item.logprob for item in top if item.logprob is not None and math.isfinite(item.logprob)]
    if not finite:
        return _NOT_LOGPROBS
    first, second = (_logsumexp(found[letter]) if found[letter] else min(finite) for letter in "AB")
    if first == second == -math.inf:
        return _NOT_LOGPROBS
    mass = math.exp(_logsumexp(found["A"] + found["B"]))
    if mass < min_mass:
        return f"A and B have {mass:.1g} of the first token's probability, less than judge.min_letter_mass {min_mass:g}"
    return sigmoid(first - second)


def winners(reply: Reply, names: Sequence[str]) -> list[float] | str:
    """p(first) of each name from a JSON object `{name: "A" | "B" | "tie"}`: 1, 0 or 0.5; or why it cannot be read.

    A winner in one order and a tie in the other do not contradict each other (only two different winners do): their
    average of 0.75 or 0.25 is a verdict, half as sure as one in which both orders agree.
    """
    choice = _choice(reply)
    if isinstance(choice, str):
        return choice
    text = (choice.message.content or "").rpartition("</think>")[2].strip()
    if not text:
        return "the reply holds no text"
    fenced = _FENCED.fullmatch(text)
    try:
        answer = from_json(fenced.group(1) if fenced else text)
    except ValueError:
        cut = " (cut at judge.max_completion_tokens)" if choice.finish_reason == "length" else ""
        return f"the answer is not JSON{cut}: {quote(text)}"
    found = [answer.get(name) if isinstance(answer, dict) else None for name in names]
    numbers = [_WINNERS.get(value.strip().lower()) if isinstance(value, str) else None for value in found]
    read = [number for number in numbers if number is not None]
    if len(read) < len(names):
        return f"the answer does not say A, B or tie for {quote(names[numbers.index(None)])}: {quote(text)}"
    return read


def answer_schema(names: Sequence[str]) -> dict[str, object]:
    """The JSON schema of the object that `winners` reads."""
    choices = {"type": "string", "enum": ["A", "B", "tie"]}
    return {
        "type": "object",
        "properties": dict.fromkeys(names, choices),
        "required": list(names),
        "additionalProperties": False,
    }


def quote(text: str, limit: int = 60) -> str:
    """A short quotation in one line."""
    line = " ".join(text.split())
    return f"'{line}'" if len(line) <= limit else f"'{line[: limit - 1]}…'"


def _choice(reply: Reply) -> _Choice | str:
    if not reply.choices:
        return "the reply holds no choices"
    choice = reply.choices[0]
    if choice.finish_reason == "content_filter":
        return "the endpoint's content filter stopped the answer"
    if choice.message.refusal:
        return f"the model refused: {quote(choice.message.refusal)}"
    return choice


def _first_token(choice: _Choice) -> list[_Token]:
    steps = (choice.logprobs.content if choice.logprobs else None) or []
    return (steps[0].top_logprobs if steps else None) or []


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    if top == -math.inf:
        return top
    return top + math.log(math.fsum(math.exp(value - top) for value in values))
