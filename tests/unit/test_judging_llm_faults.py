"""The LLM judge on an endpoint that fails: nothing is guessed, nothing hangs, no key is shown."""

import asyncio
import logging
import math
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web

from rlhf.config.judge import LLMJudge as Config
from rlhf.errors import InputError, RLHFError
from rlhf.judging.llm import LLMJudge, client
from rlhf.records import Verdict, VerdictState
from tests.unit.llm_endpoint import A, comparison, completion, error, prefers, reply, serving, user_text

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")


def assert_invalid(verdict: Verdict, part: str) -> None:
    assert verdict.state is VerdictState.INVALID
    assert math.isnan(verdict.p_ab)
    assert part in verdict.reason
    assert len(verdict.reason) <= 160
    assert "\n" not in verdict.reason


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
async def test_passing_fault_is_tried_again(status: int) -> None:
    answers = prefers(A)
    async with serving(lambda body, n: error(status) if n < 4 else answers(body, n)) as endpoint:
        [verdict] = await endpoint.judge(retries=4).compare([comparison()])
    assert verdict.state is VerdictState.WIN
    assert len(endpoint.bodies) == 6


async def test_lasting_fault_is_invalid_after_the_tries() -> None:
    async with serving(lambda body, n: error(503, "overloaded,\ncome back")) as endpoint:
        [verdict] = await endpoint.judge(retries=2).compare([comparison()])
    assert_invalid(verdict, "HTTP 503")
    assert "overloaded, come back" in verdict.reason
    assert len(endpoint.bodies) == 6


async def test_retry_after_holds_back_every_request() -> None:
    times = []
    answers = prefers(A)

    def answer(body: dict[str, Any], n: int) -> Any:
        times.append(time.monotonic())
        return error(429, retry_after="0.4") if n == 0 else answers(body, n)

    async with serving(answer) as endpoint:
        verdicts = await endpoint.judge(concurrency=1).compare([comparison()] * 3)
    assert {verdict.state for verdict in verdicts} == {VerdictState.WIN}
    assert min(times[1:]) - times[0] > 0.35
    assert times[-1] - times[0] < 2


async def test_endless_retry_after_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_RETRY_AFTER_S", 0.2)
    async with serving(lambda body, n: error(503, retry_after="1e9")) as endpoint:
        start = time.monotonic()
        [verdict] = await endpoint.judge(retries=1).compare([comparison()])
    assert_invalid(verdict, "HTTP 503")
    assert 0.15 < time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        (None, None, None),
        ("soon", None, None),
        ("Mon, 99 Jan 99999 00:00:00 GMT", None, None),
        ("nan", None, None),
        ("-3", 0, 0),
        ("2.5", 2.5, 2.5),
        ("1e400", 60, 60),
    ],
)
def test_retry_after_is_read_in_seconds(header: str | None, low: float | None, high: float | None) -> None:
    seconds = client._seconds(header)
    assert seconds is None if low is None or high is None else low <= (seconds or 0) <= high


def test_retry_after_is_read_as_a_date() -> None:
    seconds = client._seconds(formatdate(time.time() + 20, usegmt=True))
    assert seconds is not None
    assert 15 < seconds <= 20
    assert client._seconds(formatdate(time.time() - 20, usegmt=True)) == 0


def raw(text: str, kind: str = "application/json") -> Callable[[], web.Response]:
    return lambda: web.Response(text=text, content_type=kind)


HTML = "<!DOCTYPE html><html><body>Log in</body></html>"


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (raw(HTML, "text/html"), "not a chat completion: '<!DOCTYPE html>"),
        (raw(HTML), "not a chat completion"),
        (raw(""), "not a chat completion"),
        (raw("null"), "not a chat completion"),
        (raw('{"choices": null}'), "not a chat completion"),
        (raw('{"choices": [{}]}'), "not a chat completion"),
        (raw('{"choices": []}'), "no choices"),
        (raw('{"error": {"message": "x"}}'), "not a chat completion"),
        (lambda: completion(None), "no text"),
        (lambda: completion("A"), "not JSON"),
        (lambda: completion('{"winner": "both"}'), "does not say A, B or tie"),
        (lambda: completion("", logprobs={"A": math.nan, "B": -1.0}), "not numbers"),
        (lambda: completion("", logprobs={"Sorry": -0.1}), "neither A nor B"),
        (lambda: completion("", logprobs={"I": -0.001, "A": -12.0, "B": -16.5}), "have 6e-06 of the first token's"),
        (lambda: completion("A", finish_reason="content_filter"), "content filter"),
        (lambda: completion(message={"content": None, "refusal": "I will not."}), "refused: 'I will not.'"),
        (lambda: error(400, "a bad request"), "HTTP 400"),
        (lambda: error(418, "teapot"), "HTTP 418"),
        (lambda: web.Response(status=400, text=HTML, content_type="text/html"), "HTTP 400"),
        (lambda: reply({"detail": [{"loc": ["body"], "msg": "x"}]}, 422), "HTTP 422"),
        (lambda: error(403, "your input was flagged by moderation"), "HTTP 403"),
    ],
)
async def test_reply_that_cannot_be_read_is_invalid_and_not_tried_again(
    answer: Callable[[], web.Response], part: str
) -> None:
    async with serving(lambda body, n: answer()) as endpoint:
        [verdict] = await endpoint.judge(retries=3).compare([comparison()])
    assert_invalid(verdict, part)
    assert len(endpoint.bodies) <= 4  # two orders, once more in JSON where log-probs are missing


async def test_slow_endpoint_is_invalid_after_the_tries() -> None:
    async def answer(body: dict[str, Any], n: int) -> web.Response:
        await asyncio.sleep(3)
        return completion()

    async with serving(answer) as endpoint:
        start = time.monotonic()
        [verdict] = await endpoint.judge(timeout_s=0.2, retries=1).compare([comparison()])
    assert time.monotonic() - start < 2
    assert_invalid(verdict, "did not answer in 0.2 s (judge.timeout_s)")
    assert len(endpoint.bodies) == 4


async def test_endpoint_that_drips_is_slow() -> None:
    ended = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
        while not ended.is_set():
            writer.write(b" ")
            await asyncio.sleep(0.05)
        writer.close()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        start = time.monotonic()
        [verdict] = await judge_at(server.sockets[0].getsockname()[1], timeout_s=0.3, retries=0).compare([comparison()])
        ended.set()
    assert time.monotonic() - start < 2
    assert_invalid(verdict, "did not answer in 0.3 s")


async def test_batch_ends_in_time_and_keeps_what_was_judged() -> None:
    answers = prefers(A)

    async def answer(body: dict[str, Any], n: int) -> Any:
        if "slow" in user_text(body):
            await asyncio.sleep(3)
        return answers(body, n)

    async with serving(answer) as endpoint:
        start = time.monotonic()
        comparisons = [comparison(), comparison(A, "slow"), comparison("slow", "slower")]
        verdicts = await endpoint.judge(batch_timeout_s=1.0, concurrency=2).compare(comparisons)
    assert time.monotonic() - start < 2
    assert verdicts[0].state is VerdictState.WIN
    for verdict in verdicts[1:]:
        assert_invalid(verdict, "not answered in 1 s (judge.batch_timeout_s)")


def judge_at(port: int, **fields: Any) -> LLMJudge:
    url = f"http://127.0.0.1:{port}/v1"
    return LLMJudge(Config.model_validate({"type": "llm", "base_url": url, "model": "m", **fields}))


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def test_refused_connection_is_invalid_after_the_tries() -> None:
    [verdict] = await judge_at(closed_port(), retries=2).compare([comparison()])
    assert_invalid(verdict, "no connection to http://127.0.0.1:")


@pytest.mark.parametrize("fault", ["refused", "dropped"])
async def test_outage_shorter_than_the_back_off_costs_nothing(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.2)
    port, up = closed_port(), asyncio.Event()
    answers = prefers(A)

    async def answer(body: dict[str, Any], n: int) -> Any:
        if not up.is_set():
            raise asyncio.CancelledError  # the server drops the connection
        return answers(body, n)

    async with AsyncExitStack() as stack:
        if fault == "dropped":
            await stack.enter_async_context(serving(answer, port))
        judge = judge_at(port, retries=4, concurrency=16)
        call = asyncio.create_task(judge.compare([comparison()] * 40))
        # It stays down until each of the 80 requests has failed, and more than enough of them a second time.
        async with asyncio.timeout(20):
            while judge._endpoint.budget.requests < 80 + client.MAX_UNANSWERED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        up.set()
        if fault == "refused":
            await stack.enter_async_context(serving(answer, port))
        verdicts = await call
    assert {verdict.state for verdict in verdicts} == {VerdictState.WIN}


async def test_endpoint_that_stays_silent_is_given_up_for_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.1)

    async def answer(body: dict[str, Any], n: int) -> web.Response:
        await asyncio.sleep(5)
        return completion()

    async with serving(answer) as endpoint:
        judge = endpoint.judge(timeout_s=0.1, retries=2, concurrency=4)  # 100 requests, 3 tries each: 7.5 s
        for _ in range(2):
            before = judge._endpoint.budget.requests
            start = time.monotonic()
            verdicts = await judge.compare([comparison()] * 50)
            assert 0.5 <= time.monotonic() - start < 3  # 0.5 s is what one request backs off at most
            for verdict in verdicts:
                assert_invalid(verdict, "")
            assert "did not answer 20 times in a row" in verdicts[-1].reason
            assert client.MAX_UNANSWERED <= judge._endpoint.budget.requests - before < 60


async def test_connection_that_breaks_off_is_tried_again() -> None:
    answers = prefers(A)

    async def answer(body: dict[str, Any], n: int) -> Any:
        if n < 2:
            raise asyncio.CancelledError  # the server drops the connection
        return answers(body, n)

    async with serving(answer) as endpoint:
        [verdict] = await endpoint.judge(retries=2).compare([comparison()])
    assert verdict.state is VerdictState.WIN


@pytest.mark.parametrize(
    ("status", "message"), [(401, "bad key"), (402, "pay"), (403, "no"), (404, "unknown"), (429, "insufficient_quota")]
)
async def test_fault_that_all_comparisons_share_stops_the_run(status: int, message: str) -> None:
    async def answer(body: dict[str, Any], n: int) -> web.Response:
        if n:
            await asyncio.sleep(0.5)
        return error(status, f"{message}: {KEY}")

    async with serving(answer) as endpoint:
        judge = endpoint.judge(api_key_env="TEST_JUDGE_KEY", retries=5, concurrency=2)
        with pytest.raises(RLHFError) as caught:
            await judge.compare([comparison()] * 20)
    assert not isinstance(caught.value, InputError)
    assert len(endpoint.bodies) <= 2
    text = str(caught.value)
    assert endpoint.url in text
    assert "'m'" in text
    assert f"HTTP {status}" in text
    assert KEY not in text
    assert "\n" not in text
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "bad key"), (402, "pay"), (403, "denied"), (404, "unknown"), (429, "insufficient_quota"), (307, "moved")],
)
async def test_refusal_after_an_answer_is_invalid_and_keeps_what_was_judged(status: int, message: str) -> None:
    answers = prefers(A)
    async with serving(lambda body, n: answers(body, n) if n in (0, 1, 4, 5) else error(status, message)) as endpoint:
        judge = endpoint.judge(concurrency=1, retries=3)
        verdicts = [*await judge.compare([comparison()] * 2), *await judge.compare([comparison()])]
    assert [verdict.state for verdict in verdicts] == ["win", "invalid", "win"]
    assert_invalid(verdicts[1], f"HTTP {status}")
    assert message not in verdicts[1].reason
    assert len(endpoint.bodies) == 6


async def test_redirect_is_not_followed() -> None:
    def answer(body: dict[str, Any], n: int) -> web.Response:
        return web.Response(status=307, headers={"Location": "http://127.0.0.1:1/v1/chat/completions"})

    async with serving(answer) as endpoint:
        with pytest.raises(RLHFError, match="HTTP 307, a redirect"):
            await endpoint.judge().compare([comparison()])


async def test_key_is_sent_and_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown = []
    for answer in (
        lambda body, n: error(400, f"the key {KEY} is odd", KEY),
        lambda body, n: error(500, KEY),
        lambda body, n: web.Response(text=f"<html>{'x' * 40} {KEY}"),
        lambda body, n: completion(KEY),
        lambda body, n: completion(message={"content": None, "refusal": "y" * 45 + KEY}),
    ):
        async with serving(answer) as endpoint:
            judge = endpoint.judge(api_key_env="TEST_JUDGE_KEY")
            shown += [verdict.reason for verdict in await judge.compare([comparison()])]
        assert {headers["Authorization"] for headers in endpoint.headers} == {f"Bearer {KEY}"}
    assert len(shown) == 5
    assert all(KEY[:12] not in text for text in [*shown, caplog.text])


async def test_without_a_key_none_is_sent() -> None:
    async with serving(prefers(A)) as endpoint:
        await endpoint.judge().compare([comparison()])
    assert len(endpoint.headers) == 2
    assert all("Authorization" not in headers for headers in endpoint.headers)


def test_name_that_may_be_a_key_itself_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"judge\.api_key_env") as caught:
        judge_at(1, api_key_env="gsk_a1B2c3D4e5F6")
    assert "gsk_" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "key\x07", "schlüssel"])
def test_variable_without_a_usable_key_is_refused(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("TEST_JUDGE_KEY")
    if value is not None:
        monkeypatch.setenv("TEST_JUDGE_KEY", value)
    with pytest.raises(InputError, match=r"judge\.api_key_env") as caught:
        judge_at(1, api_key_env="TEST_JUDGE_KEY")
    assert "TEST_JUDGE_KEY" in str(caught.value)
    assert not (value or "").strip() or str(value) not in str(caught.value)


async def test_stopped_call_leaves_no_task_behind() -> None:
    async def answer(body: dict[str, Any], n: int) -> web.Response:
        await asyncio.sleep(3)
        return completion()

    async with serving(answer) as endpoint:
        judge = endpoint.judge(concurrency=1)
        before = asyncio.all_tasks()
        call = asyncio.create_task(judge.compare([comparison()] * 5))
        await asyncio.sleep(0.1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        left = {task for task in asyncio.all_tasks() - before if "LLMJudge" in repr(task)}
        assert not left
        assert not judge._endpoint._slots.locked()
