"""The fields of a request, fitted to what the server takes: endpoints differ in names and in what they refuse."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.config.judge import LLMJudge as LLMConfig
from rlhf.judging.llm.answers import answer_schema
from rlhf.judging.llm.client import Failure

TOP_LOGPROBS = 20
FEW_LOGPROBS = 5
"""Asked for where the server finds `TOP_LOGPROBS` too many: a bound of several servers, enough for two letters."""
Fields = dict[str, Any]
Messages = list[dict[str, str]]


def letter_fields(config: LLMConfig) -> Fields:
    """One token with its likeliest alternatives; greedy, so that the list holds the top tokens and no other."""
    return _common(config, 1) | {"logprobs": True, "top_logprobs": TOP_LOGPROBS}


def structured_fields(config: LLMConfig, names: Sequence[str]) -> Fields:
    """An answer bound to the JSON schema of the names."""
    schema = {"name": "verdict", "strict": True, "schema": answer_schema(names)}
    common = _common(config, config.max_completion_tokens)
    return common | {"response_format": {"type": "json_schema", "json_schema": schema}}


def _common(config: LLMConfig, limit: int) -> Fields:
    seed = {} if config.seed is None else {"seed": config.seed}
    return {"temperature": 0.0, "max_tokens": limit, **seed, **config.extra_body}


def _drop(name: str) -> Callable[[Fields], None]:
    return lambda fields: fields.pop(name, None) and None


def _rename_limit(fields: Fields) -> None:
    fields["max_completion_tokens"] = fields.pop("max_tokens")


_FIELD_FIXES: dict[str, tuple[re.Pattern[str], Callable[[Fields], None]]] = {
    "max_tokens": (re.compile("max_completion_tokens"), _rename_limit),
    "temperature": (re.compile("temperature"), _drop("temperature")),
    "seed": (re.compile(r"\bseed\b"), _drop("seed")),
    "response_format": (re.compile("response_format|json_schema|structured|grammar"), _drop("response_format")),
}
_TOO_MANY = re.compile(r"top_?logprobs|logprobs.*\d", re.DOTALL)
_SYSTEM = re.compile(r"system (role|message|prompt|instruction)|roles? must alternate|conversation roles")


class Dialect:
    """What one server was found to refuse; later requests do without."""

    def __init__(self) -> None:
        self._refused: set[str] = set()

    def apply(self, messages: Messages, fields: Fields) -> tuple[Messages, Fields]:
        """The request without what the server refuses."""
        fields = dict(fields)
        for name, (_, fix) in _FIELD_FIXES.items():
            if name in self._refused and name in fields:
                fix(fields)
        if "top_logprobs" in self._refused and "top_logprobs" in fields:
            fields["top_logprobs"] = FEW_LOGPROBS
        if "system" in self._refused and messages[0]["role"] == "system":
            system, user, *rest = messages
            messages = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        return messages, fields

    def learn(self, messages: Messages, fields: Fields, failure: Failure) -> bool:
        """Did the server refuse something of this request that it can do without? Then the request is worth another
        try; each try does without one thing more, so there is an end to it."""
        if failure.no_logprobs and fields.get("top_logprobs") == TOP_LOGPROBS and _TOO_MANY.search(failure.said):
            self._refused.add("top_logprobs")
            return True
        if failure.status not in (400, 422) or failure.too_long or failure.no_logprobs:
            return False
        found = {name for name, (said, _) in _FIELD_FIXES.items() if name in fields and said.search(failure.said)}
        if messages[0]["role"] == "system" and _SYSTEM.search(failure.said):
            found.add("system")
        self._refused |= found
        return bool(found)
