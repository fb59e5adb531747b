"""One endpoint: bounded concurrency, retries with back-off, a budget; every fault becomes a `Failure`."""

import asyncio
import math
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
    Omit,
)
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, stop_after_attempt, wait_exponential_jitter

from rlhf.config.judge import LLMJudge as LLMConfig
from rlhf.errors import InputError
from rlhf.judging.llm.answers import Reply, parse_reply, quote

BACKOFF_S = 0.5
MAX_BACKOFF_S = 20.0
MAX_RETRY_AFTER_S = 60.0
MAX_UNANSWERED = 20
"""Tries in a row without any HTTP answer after which the rest of a batch may be given up."""

_RETRIED = {408, 409, 425, 429}
_FATAL = {301, 302, 303, 307, 308, 401, 402, 403, 404}
_OUT_OF_CREDIT = re.compile("insufficient_quota|exceeded your current quota")
_MODERATED = re.compile("moderat|flagged|content.?(filter|policy|management)")
_NO_LOGPROBS = re.compile("logprob")
_TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size)|max_model_len|reduce the length|too long|too many (input |prompt )?tokens"
    r"|(input|prompt|request).{0,40}exceeds?.{0,40}(token|context|length)"
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer. `status` is None when there was no HTTP answer; `said` is the server's message in lower
    case. `fatal`: every later request would fail alike, and no request has ever been answered here."""

    reason: str
    status: int | None = None
    said: str = ""
    retry: bool = False
    retry_after_s: float | None = None
    fatal: bool = False

    @property
    def too_long(self) -> bool:
        """The prompt does not fit the model's context."""
        return self.status == 413 or (self.status in (400, 422) and bool(_TOO_LONG.search(self.said)))

    @property
    def no_logprobs(self) -> bool:
        """The server refuses log-probs."""
        return self.status in (400, 403, 422) and not self.too_long and bool(_NO_LOGPROBS.search(self.said))


class Batch:
    """What the requests of one `compare` call share: it is given up when nothing answers at all, or all are refused."""

    def __init__(self, patience_s: float) -> None:
        """`patience_s`: silence of a shorter time is left to the requests' own tries, however many they are."""
        self.down = asyncio.Event()
        self.fatal: Failure | None = None
        self._patience_s = patience_s
        self._unanswered = 0
        self._silent_since = 0.0

    def note(self, outcome: Reply | Failure) -> None:
        """Count tries in a row without an HTTP answer; one that is fatal ends the batch."""
        now = asyncio.get_running_loop().time()
        if isinstance(outcome, Reply) or outcome.status is not None:
            self._unanswered = 0
        else:
            self._unanswered += 1
            if self._unanswered == 1:
                self._silent_since = now
        if isinstance(outcome, Failure) and outcome.fatal:
            self.fatal = outcome
        silent = self._unanswered >= MAX_UNANSWERED and now - self._silent_since >= self._patience_s
        if self.fatal or silent:
            self.down.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, or until the batch is given up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.down.wait()


class Budget:
    """Requests (tries included) and tokens that one judge actor may still use: its share of the run's bounds."""

    def __init__(self, config: LLMConfig) -> None:
        self.requests = self.tokens = 0
        self._max_requests = config.max_requests and config.max_requests // config.replicas
        self._max_tokens = config.max_total_tokens and config.max_total_tokens // config.replicas

    def exhausted(self) -> str | None:
        """Which bound is reached, if any."""
        if self._max_requests is not None and self.requests >= self._max_requests:
            return f"judge.max_requests is used up ({self.requests} requests)"
        if self._max_tokens is not None and self.tokens >= self._max_tokens:
            return f"judge.max_total_tokens is used up ({self.tokens} tokens)"
        return None


class Endpoint:
    """Sends chat requests; used from one event loop."""

    def __init__(self, config: LLMConfig) -> None:
        """Raises `InputError` if the variable that should hold the key does not."""
        self.budget = Budget(config)
        self._model = config.model
        self._url = config.base_url
        self._timeout_s = config.timeout_s
        self._retries = config.retries
        self._answered = False
        self._slots = asyncio.Semaphore(config.concurrency)
        self._resume_at = 0.0
        self._key = _read_key(config.api_key_env)
        # The library's own variables (OPENAI_API_KEY, _ORG_ID, _PROJECT_ID) are not meant for this endpoint.
        self._headers: dict[str, str | Omit] = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        if not self._key:
            self._headers["Authorization"] = Omit()
        local = urlsplit(config.base_url).scheme == "http"  # plain http only to this machine: past any proxy
        self._client = AsyncOpenAI(
            base_url=config.base_url,
            api_key=self._key or "none",
            timeout=config.timeout_s,
            max_retries=0,  # done here, where each try is counted
            http_client=DefaultAsyncHttpxClient(trust_env=not local, follow_redirects=False),
        )

    def batch(self) -> Batch:
        """A batch that is as patient as one request that backs off through all its tries."""
        waits = (BACKOFF_S * 2.0 ** min(n, 30) + BACKOFF_S for n in range(self._retries))
        return Batch(sum(min(wait, MAX_BACKOFF_S) for wait in waits))

    async def ask(self, messages: list[dict[str, str]], fields: dict[str, Any], batch: Batch) -> Reply | Failure:
        """The reply to one chat request, or why there is none after all tries."""
        backoff = wait_exponential_jitter(BACKOFF_S, MAX_BACKOFF_S, jitter=BACKOFF_S)

        def wait(state: RetryCallState) -> float:
            outcome = _outcome(state)
            after = outcome.retry_after_s if isinstance(outcome, Failure) else None
            return backoff(state) if after is None else after

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._retries + 1),
            wait=wait,
            sleep=batch.sleep,
            retry=retry_if_result(lambda outcome: isinstance(outcome, Failure) and outcome.retry),
            retry_error_callback=_outcome,
        )
        outcome: Reply | Failure = await retrying(self._try, messages, fields, batch)
        return outcome

    async def _try(self, messages: list[dict[str, str]], fields: dict[str, Any], batch: Batch) -> Reply | Failure:
        async with self._slots:
            # A server that asks for patience asks all requests for it.
            await batch.sleep(self._resume_at - asyncio.get_running_loop().time())
            if batch.fatal:
                return batch.fatal
            if batch.down.is_set():
                return Failure(f"{self._url} did not answer {MAX_UNANSWERED} times in a row; the batch was given up")
            if bound := self.budget.exhausted():
                return Failure(bound)
            self.budget.requests += 1
            outcome = await self._send(messages, fields)
        batch.note(outcome)
        if isinstance(outcome, Failure) and outcome.retry_after_s:
            resume_at = asyncio.get_running_loop().time() + outcome.retry_after_s
            self._resume_at = max(self._resume_at, resume_at)
        return outcome

    async def _send(self, messages: list[dict[str, str]], fields: dict[str, Any]) -> Reply | Failure:
        try:
            # The library's timeout is between two bytes: a server that drips would never reach it.
            async with asyncio.timeout(self._timeout_s):
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=self._model,
                    messages=messages,  # type: ignore[arg-type]
                    extra_headers=self._headers,
                    extra_body=fields,
                )
        except (TimeoutError, APITimeoutError):
            return Failure(f"{self._url} did not answer in {self._timeout_s:g} s (judge.timeout_s)", retry=True)
        except APIConnectionError as error:
            why = type(error.__cause__ or error).__name__
            return Failure(f"no connection to {self._url} ({why})", retry=True)
        except APIStatusError as error:
            response, message = error.response, self._message(error)
            return self._refusal(response.status_code, message, response.headers.get("retry-after"))
        reply = parse_reply(self._without_key(raw.content))
        if isinstance(reply, str):
            return Failure(reply, status=raw.status_code)
        self._answered = True
        self.budget.tokens += (reply.usage and reply.usage.total_tokens) or 0
        return reply

    def _refusal(self, status: int, message: str, retry_after: str | None) -> Failure:
        said = message.lower()
        credit = status == 429 and bool(_OUT_OF_CREDIT.search(said))
        if status in _FATAL or credit:
            # No word of the server's here: it may hold parts of a key. A single text that it will not have, and
            # log-probs that it will not give, are no reason to stop. Nor is anything once a request was answered: the
            # config is right then, what was judged is worth keeping, and judge.health.min_valid says how much is due.
            one_text = status == 403 and bool(_MODERATED.search(said) or _NO_LOGPROBS.search(said))
            fatal = not self._answered and not one_text
            reason = f"judge.base_url {self._url}, judge.model {self._model!r}: HTTP {status}, {_meaning(status)}"
            return Failure(reason, status, said, fatal=fatal)
        retry = status in _RETRIED or status >= 500
        reason = f"HTTP {status} from {self._url}: {quote(message, 90)}"
        return Failure(reason, status, said, retry, _seconds(retry_after) if retry else None)

    def _message(self, error: APIStatusError) -> str:
        """The server's error message with its code, without the key."""
        body = error.body
        if isinstance(body, dict):
            message = body.get("message") or body.get("detail") or body
            text = str(message) + (f" ({body['code']})" if isinstance(body.get("code"), str) else "")
        else:
            text = str(body or "")
        return self._without_key(text.encode("utf-8", "replace"))[:2000].decode("utf-8", "replace")

    def _without_key(self, content: bytes) -> bytes:
        return content.replace(self._key.encode(), b"[redacted]") if self._key else content


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    # Keys have small letters and names of variables have none: where it has, it may be the key, and is not repeated.
    shown = f"the environment variable {variable!r}" if variable == variable.upper() else "the variable that it names"
    if not key:
        raise InputError(f"judge.api_key_env: {shown} is not set; put the key into it")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"judge.api_key_env: {shown} does not hold a key: it has blanks or characters that no HTTP header can carry"
        )
    return key


def _meaning(status: int) -> str:
    if status in (401, 403):
        return "the key is missing, wrong or not allowed to use this model (judge.api_key_env)"
    if status in (402, 429):
        return "the account has no credit left"
    if status == 404:
        return "no such model or path"
    return "a redirect; set judge.base_url to where it leads"


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After`, which is seconds or a date, in seconds from now and capped; None where there is none to read."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _outcome(state: RetryCallState) -> Any:
    """What the last try gave: a fault is a result here, never an exception."""
    assert state.outcome is not None
    return state.outcome.result()
