"""The LLM judge on an endpoint that works: orders, modes, criteria, budget, concurrency, truncation."""

import asyncio
import math
from typing import Any

import pytest
from aiohttp import web
from pydantic import ValidationError

from rlhf.config.judge import LLMJudge as Config
from rlhf.config.load import load_judge_config
from rlhf.judging.llm import LLMJudge
from rlhf.judging.llm.answers import NO_LOGPROBS
from rlhf.records import VerdictState
from tests.unit.llm_endpoint import A, B, comparison, completion, error, prefers, serving, shown_first, user_text

CRITERIA = [
    {"name": "clear", "description": "It is clear.", "weight": 3.0},
    {"name": "true", "description": "It is true.", "weight": 1.0},
]


def structured(answers: dict[str, str]) -> web.Response:
    pairs = ", ".join(f'"{name}": "{value}"' for name, value in answers.items())
    return completion("{" + pairs + "}")


async def test_soft_verdicts_are_exact_in_both_orders() -> None:
    def answer(body: dict[str, Any], n: int) -> web.Response:
        top = {"A": -0.2, " B": -2.0} if shown_first(body) == A else {"B": -1.0, "A": -3.0, " A": -4.0}
        return completion(logprobs=top)

    async with serving(answer) as endpoint:
        [verdict] = await endpoint.judge().compare([comparison()])
    b_first = math.exp(-3) + math.exp(-4)
    assert verdict.p_ab == pytest.approx(math.exp(-0.2) / (math.exp(-0.2) + math.exp(-2)), abs=1e-12)
    assert verdict.p_ba == pytest.approx(1 - b_first / (b_first + math.exp(-1)), abs=1e-12)
    assert (verdict.state, verdict.truncated, verdict.reason) == (VerdictState.WIN, False, "")


async def test_request_asks_for_one_token_with_its_alternatives() -> None:
    async with serving(prefers(A)) as endpoint:
        await endpoint.judge(seed=7, extra_body={"chat_template_kwargs": {"x": 1}}).compare([comparison()])
    assert sorted(shown_first(body) for body in endpoint.bodies) == [A, B]
    fields = {key: value for key, value in endpoint.bodies[0].items() if key != "messages"}
    assert fields == {
        "model": "m",
        "max_tokens": 1,
        "temperature": 0.0,
        "seed": 7,
        "logprobs": True,
        "top_logprobs": 20,
        "chat_template_kwargs": {"x": 1},
    }


async def test_verdicts_keep_the_order_of_the_comparisons_and_mirror_when_swapped() -> None:
    async with serving(prefers("alpha", logit=1.5)) as endpoint:
        verdicts = await endpoint.judge().compare([comparison(A, B), comparison(B, A)] * 10)
        assert await endpoint.judge().compare([]) == []
    p = 1 / (1 + math.exp(-1.5))
    assert [verdict.p_ab for verdict in verdicts] == pytest.approx([p, 1 - p] * 10)
    assert [verdict.p_ba for verdict in verdicts] == pytest.approx([p, 1 - p] * 10)
    assert {verdict.state for verdict in verdicts[1::2]} == {VerdictState.LOSE}


async def test_judge_that_prefers_the_first_place_ties() -> None:
    async with serving(lambda body, n: completion(logprobs={"A": -0.1, "B": -2.4})) as endpoint:
        [verdict] = await endpoint.judge().compare([comparison()])
    assert verdict.flipped
    assert (verdict.state, verdict.reason) == (VerdictState.TIE, "the two orders contradict")


@pytest.mark.parametrize(
    ("a_first", "b_first", "p_ab", "p_ba", "state"),
    [
        ("A", "B", 1.0, 1.0, "win"),
        ("B", "A", 0.0, 0.0, "lose"),
        ("A", "A", 1.0, 0.0, "tie"),
        ("tie", "tie", 0.5, 0.5, "tie"),
        ("tie", "B", 0.5, 1.0, "win"),  # a tie contradicts no winner
        ("B", "tie", 0.0, 0.5, "lose"),
    ],
)
async def test_structured_verdicts(a_first: str, b_first: str, p_ab: float, p_ba: float, state: str) -> None:
    def answer(body: dict[str, Any], n: int) -> web.Response:
        return structured({"winner": a_first if shown_first(body) == A else b_first})

    async with serving(answer) as endpoint:
        [verdict] = await endpoint.judge(answer="json", max_completion_tokens=33).compare([comparison()])
    assert (verdict.p_ab, verdict.p_ba, verdict.state) == (p_ab, p_ba, state)
    for body in endpoint.bodies:
        schema = body["response_format"]["json_schema"]["schema"]
        assert schema["properties"] == {"winner": {"type": "string", "enum": ["A", "B", "tie"]}}
        assert body["max_tokens"] == 33
        assert "logprobs" not in body


@pytest.mark.parametrize("refusal", [None, 400, 403, 422])
async def test_auto_goes_over_to_json_where_there_are_no_log_probs(refusal: int | None) -> None:
    def answer(body: dict[str, Any], n: int) -> web.Response:
        if "response_format" in body:
            return structured({"winner": "A" if shown_first(body) == A else "B"})
        return error(refusal, "Logprobs are not available for this model") if refusal else completion("A")

    async with serving(answer) as endpoint:
        judge = endpoint.judge()
        [first] = await judge.compare([comparison()])
        asked = len(endpoint.bodies)
        [second] = await judge.compare([comparison()])
    assert (first.p_ab, first.p_ba, second.p_ab, second.p_ba) == (1.0, 1.0, 1.0, 1.0)
    assert asked <= 4
    assert all("response_format" in body for body in endpoint.bodies[asked:])
    assert len(endpoint.bodies) == asked + 2


@pytest.mark.parametrize("odd", [0, 1, 2, 3])
async def test_one_reply_without_log_probs_does_not_end_soft_verdicts(odd: int) -> None:
    answers = prefers(A)

    async def answer(body: dict[str, Any], n: int) -> Any:
        if "response_format" in body:
            return structured({"winner": "A" if shown_first(body) == A else "B"})
        await asyncio.sleep(0 if n == odd else 0.1)
        return completion("") if n == odd else answers(body, n)

    async with serving(answer) as endpoint:
        judge = endpoint.judge()
        early = await judge.compare([comparison()])
        later = await judge.compare([comparison()])
        last = await judge.compare([comparison()])
    soft = pytest.approx(1 / (1 + math.exp(-2)))
    assert (last[0].p_ab, last[0].p_ba) == (soft, soft)
    asked = sum("response_format" in body for body in endpoint.bodies)
    if odd < 2:  # before any log-probs were seen, this order alone is asked in JSON
        assert sorted([early[0].p_ab, early[0].p_ba]) == [soft, 1.0]
        assert later[0].p == soft
        assert asked == 1
    else:
        assert (later[0].state, later[0].reason) == (VerdictState.INVALID, NO_LOGPROBS)
        assert asked == 0


@pytest.mark.parametrize(
    "message",
    [
        "Invalid value: 'top_logprobs' must be at most 5.",
        "Requested sample logprobs of 20, which is greater than max allowed: 5",
    ],
)
async def test_server_that_lists_five_alternatives_is_asked_for_five(message: str) -> None:
    answers = prefers(A)

    def answer(body: dict[str, Any], n: int) -> Any:
        return error(400, message) if body["top_logprobs"] > 5 else answers(body, n)

    async with serving(answer) as endpoint:
        judge = endpoint.judge(retries=0)
        verdicts = [*await judge.compare([comparison()]), *await judge.compare([comparison()])]
    assert [verdict.p for verdict in verdicts] == pytest.approx([1 / (1 + math.exp(-2))] * 2)
    assert sorted(body["top_logprobs"] for body in endpoint.bodies) == [5, 5, 5, 5, 20, 20]


async def test_server_that_lists_none_is_asked_in_json_after_five() -> None:
    def answer(body: dict[str, Any], n: int) -> web.Response:
        if "response_format" in body:
            return structured({"winner": "tie"})
        return error(400, "top_logprobs is not supported")

    async with serving(answer) as endpoint:
        [verdict] = await endpoint.judge(retries=0).compare([comparison()])
    assert (verdict.state, verdict.p) == (VerdictState.TIE, 0.5)
    assert len(endpoint.bodies) == 6


async def test_logprobs_mode_never_goes_over_to_json() -> None:
    async with serving(lambda body, n: completion("A")) as endpoint:
        [verdict] = await endpoint.judge(answer="logprobs").compare([comparison()])
    assert (verdict.state, verdict.reason) == (
        VerdictState.INVALID,
        "the reply carries no log-probs; use judge.answer: json",
    )
    assert len(endpoint.bodies) == 2


async def test_criteria_are_asked_one_by_one_and_weighted() -> None:
    logits = {("clear", A): 1.0, ("clear", B): -0.4, ("true", A): -2.0, ("true", B): 0.3}

    def answer(body: dict[str, Any], n: int) -> web.Response:
        name = "clear" if "It is clear." in user_text(body) else "true"
        return completion(logprobs={"A": logits[name, shown_first(body)] - 5, "B": -5.0})

    async with serving(answer) as endpoint:
        [verdict] = await endpoint.judge(criteria=CRITERIA, min_letter_mass=0).compare([comparison()])
    assert len(endpoint.bodies) == 4
    p = {key: 1 / (1 + math.exp(-logit)) for key, logit in logits.items()}
    ab = (3 * (2 * p["clear", A] - 1) + (2 * p["true", A] - 1)) / 4
    ba = -(3 * (2 * p["clear", B] - 1) + (2 * p["true", B] - 1)) / 4
    assert (2 * verdict.p_ab - 1, 2 * verdict.p_ba - 1) == (pytest.approx(ab), pytest.approx(ba))
    assert verdict.reason == "clear 0.73/0.60, true 0.12/0.43"


async def test_criteria_in_json_take_one_request_an_order() -> None:
    def answer(body: dict[str, Any], n: int) -> web.Response:
        assert list(body["response_format"]["json_schema"]["schema"]["properties"]) == ["clear", "true"]
        a_first = {"clear": "tie", "true": "A"}
        return structured(a_first if shown_first(body) == A else {"clear": "B", "true": "A"})

    async with serving(answer) as endpoint:
        [verdict] = await endpoint.judge(criteria=CRITERIA, answer="json").compare([comparison()])
    assert len(endpoint.bodies) == 2
    assert (verdict.p_ab, verdict.p_ba) == ((3 * 0.5 + 1) / 4, 3 / 4)


async def test_one_unreadable_criterion_makes_the_verdict_invalid() -> None:
    def answer(body: dict[str, Any], n: int) -> web.Response:
        return completion(logprobs={"A" if "It is clear." in user_text(body) else "Well": -1.0, "The": -2.0})

    async with serving(answer) as endpoint:
        [verdict] = await endpoint.judge(criteria=CRITERIA).compare([comparison()])
    assert verdict.state is VerdictState.INVALID
    assert math.isnan(verdict.p)


async def test_concurrency_is_bounded_over_all_calls() -> None:
    active, most = 0, 0

    async def answer(body: dict[str, Any], n: int) -> web.StreamResponse:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.01)
        active -= 1
        return completion(logprobs={"A": -1.0, "B": -2.0})

    async with serving(answer) as endpoint:
        judge = endpoint.judge(concurrency=3)
        calls = [judge.compare([comparison()] * 4) for _ in range(3)]
        assert [len(verdicts) for verdicts in await asyncio.gather(*calls)] == [4, 4, 4]
    assert most == 3


async def test_requests_stop_at_the_budget_and_tries_count() -> None:
    answers = prefers(A)

    async with serving(lambda body, n: error(503) if n < 2 else answers(body, n)) as endpoint:
        judge = endpoint.judge(max_requests=15, replicas=2, concurrency=1, retries=3)
        verdicts = await judge.compare([comparison()] * 6)
    assert len(endpoint.bodies) == 7
    invalid = [verdict for verdict in verdicts if verdict.state is VerdictState.INVALID]
    assert 0 < len(invalid) < 6
    assert {verdict.reason for verdict in invalid} == {"judge.max_requests is used up (7 requests)"}


async def test_tokens_stop_at_the_budget_as_the_server_counts_them() -> None:
    async with serving(lambda body, n: completion(logprobs={"A": -1.0, "B": -2.0}, tokens=40)) as endpoint:
        verdicts = await endpoint.judge(max_total_tokens=100, concurrency=1).compare([comparison()] * 3)
    assert len(endpoint.bodies) == 3
    assert [verdict.state for verdict in verdicts].count(VerdictState.INVALID) == 2
    assert verdicts[-1].reason == "judge.max_total_tokens is used up (120 tokens)"


def context_of(limit: int, message: str = "This model's maximum context length is 9 tokens.") -> Any:
    answers = prefers("alpha")

    def answer(body: dict[str, Any], n: int) -> Any:
        size = len(user_text(body))
        return error(400, message, "context_length_exceeded") if size > limit else answers(body, n)

    return answer


TURNS = ("oldest " * 30, "old " * 30, "middle " * 30, "late " * 30, "last question?")


async def test_oldest_turns_go_first_until_the_server_takes_it() -> None:
    async with serving(lambda body, n: error(500)) as endpoint:
        await endpoint.judge(retries=0).compare([comparison(A, B, *TURNS)])
    limit = len(user_text(endpoint.bodies[0])) - len(TURNS[0]) + 40
    async with serving(context_of(limit)) as endpoint:
        [verdict] = await endpoint.judge().compare([comparison(A, B, *TURNS)])
    fitting = [user_text(body) for body in endpoint.bodies if len(user_text(body)) <= limit]
    shown = max(fitting, key=len)
    assert (verdict.state, verdict.truncated) == (VerdictState.WIN, True)
    assert verdict.p == pytest.approx(1 / (1 + math.exp(-2)))
    assert "oldest" not in shown
    assert all(text.strip() in shown for text in TURNS[1:])
    assert sum(len(text) == len(shown) for text in fitting) == 2
    assert all(A in text and B in text for text in fitting)
    assert len(endpoint.bodies) <= 10


async def test_single_long_question_keeps_its_end() -> None:
    question = "start " + "x" * 4000 + " finish"
    async with serving(context_of(2500)) as endpoint:
        [verdict] = await endpoint.judge().compare([comparison(A, B, question)])
    shown = max((user_text(body) for body in endpoint.bodies if len(user_text(body)) <= 2500), key=len)
    assert (verdict.state, verdict.truncated) == (VerdictState.WIN, True)
    assert "finish" in shown
    assert "start" not in shown


async def test_responses_are_never_cut() -> None:
    async with serving(context_of(50, "prompt is too long")) as endpoint:
        [verdict] = await endpoint.judge().compare([comparison(A, B, *TURNS)])
    assert (verdict.state, verdict.truncated) == (VerdictState.INVALID, False)
    assert verdict.reason == "the responses alone do not fit the context of judge.model"
    assert all(A in user_text(body) and B in user_text(body) for body in endpoint.bodies)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        ("temperature", "Unsupported value: 'temperature' does not support 0.0 with this model."),
        ("seed", "Extra inputs are not permitted: seed"),
        ("response_format", "response_format json_schema is not supported"),
    ],
)
async def test_judge_does_without_what_the_server_refuses(field: str, message: str) -> None:
    def answer(body: dict[str, Any], n: int) -> web.Response:
        return error(400, message) if field in body else structured({"winner": "tie"})

    async with serving(answer) as endpoint:
        judge = endpoint.judge(answer="json", retries=0)
        verdicts = [*await judge.compare([comparison()]), *await judge.compare([comparison()])]
    assert [verdict.p for verdict in verdicts] == [0.5, 0.5]
    assert len(endpoint.bodies) == 6
    assert ("max_completion_tokens" in endpoint.bodies[-1]) == (field == "max_tokens")


async def test_system_message_joins_the_question_where_the_template_has_none() -> None:
    answers = prefers(A)

    def answer(body: dict[str, Any], n: int) -> Any:
        system = body["messages"][0]["role"] == "system"
        return error(400, "System role not supported") if system else answers(body, n)

    async with serving(answer) as endpoint:
        [verdict] = await endpoint.judge().compare([comparison()])
    assert verdict.state is VerdictState.WIN
    assert endpoint.bodies[-1]["messages"][0]["content"].startswith("You are an impartial judge")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"base_url": "http://example.com/v1"}, "plain http"),
        ({"base_url": "https://u:p@example.com/v1"}, "api_key_env"),
        ({"base_url": "https://example.com/v1?key=1"}, "query"),
        ({"base_url": "example.com"}, "expected https"),
        ({"max_requests": 2, "replicas": 3}, "max_requests 2"),
        ({"criteria": [CRITERIA[0], CRITERIA[0]]}, "same name"),
        ({"rubric": ""}, "rubric"),
    ],
)
def test_configs_that_cannot_work_are_refused(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        Config.model_validate({"type": "llm", "base_url": "https://example.com/v1", "model": "m", **fields})


def test_example_config_builds_a_judge() -> None:
    config = load_judge_config("configs/judges/llm.yaml").judge
    assert isinstance(config, Config)
    LLMJudge(config)
