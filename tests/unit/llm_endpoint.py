"""An OpenAI-compatible endpoint on a real socket that answers as a test tells it to, faults included."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from rlhf.config.judge import LLMJudge as Config
from rlhf.judging.llm import LLMJudge
from rlhf.records import Comparison, Message

Answer = Callable[[dict[str, Any], int], web.StreamResponse | Awaitable[web.StreamResponse]]
A, B = "The first answer, which is alpha.", "The other answer, which is beta."


class Endpoint:
    """Remembers bodies and headers; `answer(body, n)` makes the answer to request n (from 0)."""

    def __init__(self, answer: Answer) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.url = ""
        self._answer = answer

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        answer = self._answer(body, len(self.bodies) - 1)
        if isinstance(answer, web.StreamResponse):
            return answer
        return await answer

    def judge(self, **fields: Any) -> LLMJudge:
        return LLMJudge(self.config(**fields))

    def config(self, **fields: Any) -> Config:
        return Config.model_validate(
            {"type": "llm", "base_url": self.url, "model": "m", "retries": 1, "timeout_s": 5, **fields}
        )


@asynccontextmanager
async def serving(answer: Answer, port: int = 0) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(answer)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", endpoint.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield endpoint
    finally:
        await runner.cleanup()


def comparison(a: str = A, b: str = B, *turns: str) -> Comparison:
    roles = ("user", "assistant")
    texts = turns or ("What is the first letter?",)
    messages = tuple(Message(role=roles[i % 2], content=text) for i, text in enumerate(texts))
    return Comparison("uid", messages, a, b)


def user_text(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def shown_first(body: dict[str, Any]) -> str:
    """The text between the markers of response A."""
    found = re.search(r"=== (\w+) response A ===\n(.*?)\n=== \1 end of response A ===", user_text(body), re.DOTALL)
    assert found
    return found.group(2)


def completion(
    content: str | None = "A", logprobs: dict[str, float] | None = None, tokens: int = 10, **choice: Any
) -> web.Response:
    """A chat completion; `logprobs` are the first token's."""
    top = [{"token": token, "logprob": value} for token, value in (logprobs or {}).items()]
    listed = {"content": [{"token": content, "logprob": -1.0, "top_logprobs": top}]} if logprobs else None
    message = {"role": "assistant", "content": content}
    whole = {"index": 0, "message": message, "logprobs": listed, "finish_reason": "stop", **choice}
    return reply({"id": "x", "object": "chat.completion", "choices": [whole], "usage": {"total_tokens": tokens}})


def reply(data: Any, status: int = 200, **headers: str) -> web.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.Response(text=json.dumps(data), status=status, content_type="application/json", headers=names)


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> web.Response:
    return reply({"error": {"message": message, "type": "t", "code": code}}, status, **headers)


def prefers(text: str, logit: float = 2.0) -> Answer:
    """Log-probs in favour of the response that holds `text`, wherever it stands."""

    def answer(body: dict[str, Any], n: int) -> web.Response:
        sign = 1 if text in shown_first(body) else -1
        return completion(logprobs={"A": -3 + sign * logit / 2, "B": -3 - sign * logit / 2})

    return answer
