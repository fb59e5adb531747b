"""Judges, a discriminated union by `type`."""

import ipaddress
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from rlhf.config.base import DType, Section
from rlhf.monitor.redact import find_secret

RUNNING = {"replicas", "batch_size", "cpus", "cache", "health", "api_key_env", "concurrency", "timeout_s", "retries",
            "batch_timeout_s", "max_requests", "max_total_tokens"}  # fmt: skip
"""Fields of judges that change how a verdict is reached, not what it is."""


def _refuse_secrets(value: dict[str, Any]) -> dict[str, Any]:
    check_secrets(value)
    return value


def check_secrets(value: dict[str, Any], key: str = "") -> None:
    """Raise `ValueError`, without the value, if the mapping at `key` has a secret at any depth."""
    if (where := find_secret(value)) is not None:
        raise ValueError(
            f"{key}{where} names a secret or holds a login, and the config is written to files; put it into an "
            "environment variable, or rename the key if it is none"
        )


OpenMapping = Annotated[dict[str, Any], AfterValidator(_refuse_secrets)]
"""Keys that something else gives a meaning to; no secrets among them."""


class JudgeHealth(Section):
    """When a judge is not to be trusted."""

    max_flip_rate: float = Field(
        0.5, ge=0, le=1, description="Warn when more of the valid verdicts contradict themselves."
    )
    max_tie_rate: float = Field(0.8, ge=0, le=1, description="Warn when more of the valid verdicts are ties.")
    max_invalid_rate: float = Field(0.1, ge=0, le=1, description="Warn when more of the comparisons cannot be judged.")
    max_truncated_rate: float = Field(0.1, ge=0, le=1, description="Warn when more contexts are cut to fit the judge.")
    max_length_bias: float = Field(
        0.5, ge=0, le=1, description="Warn when preference and length difference correlate more than this."
    )
    min_score_spread: float = Field(
        0.0, ge=0, description="Warn when the scores of one prompt's responses differ less (mean deviation); 0: never."
    )
    max_win_rate_gap: float = Field(
        0.15, ge=0, le=1, description="Warn when the judge's win rate is this much above that of `eval_judge`."
    )
    min_valid: float = Field(
        0.0, ge=0, le=1, description="Stop the run when a smaller share of a round's comparisons is valid."
    )


class BaseJudge(Section):
    """What every judge has."""

    health: JudgeHealth = Field(default_factory=lambda: JudgeHealth(), description="Thresholds of warnings.")


class PooledJudge(BaseJudge):
    """A judge that runs in a pool of Ray actors shared by all generators."""

    replicas: int = Field(1, ge=1, description="Judge actors in the pool.")
    batch_size: int = Field(64, ge=1, description="Comparisons sent to one actor at a time.")
    cpus: int | None = Field(None, ge=1, description="CPU threads of one judge actor; null picks by judge and machine.")
    cache: bool = Field(
        True, description="Keep verdicts by content in the run directory: the same comparison is judged once."
    )


class EngineJudge(PooledJudge):
    """A judge whose model is served by an engine inside the actor."""

    path: str | None = Field(
        None, description="Hugging Face id or local folder of the judge; null takes the initial policy."
    )
    dtype: DType = Field("bfloat16", description="Dtype the judge is served in.")
    max_length: int = Field(
        2048, ge=16, description="Longest judge prompt in tokens; a longer context is cut from the left."
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs (or CPU workers) of one judge engine.")
    backend: Literal["vllm", "transformers"] = Field("vllm", description="Engine that serves the judge.")
    engine: OpenMapping = Field(default_factory=dict, description="Passed to vLLM's engine arguments as they are.")
    trust_remote_code: bool = Field(False, description="Allow model code from the checkpoint's folder to run.")


class SentimentJudge(PooledJudge):
    """Prefers the response with the more positive VADER sentiment."""

    type: Literal["sentiment"] = "sentiment"
    cache: bool = Field(False, description="Keep verdicts by content in the run directory.")
    # So quick that a call costs the driver as much as it takes the judge to compare hundreds.
    batch_size: int = Field(512, ge=1, description="Comparisons sent to one actor at a time.")
    scale: float = Field(
        4.0, gt=0, description="p(A wins) = sigmoid(scale * (score(A) - score(B))), scores in [-1, 1]."
    )


class PairModelJudge(EngineJudge):
    """A causal LM that answers `A` or `B` (pair-preference format)."""

    type: Literal["pair_model"]


class RewardModelJudge(EngineJudge):
    """A scalar reward model (sequence classification, one label); p(A wins) by Bradley-Terry."""

    type: Literal["reward_model"]
    path: str = Field(description="Hugging Face id or local folder of the reward model.")
    scale: float = Field(1.0, gt=0, description="p(A wins) = sigmoid(scale * (reward(A) - reward(B))).")


class SafetyJudge(EngineJudge):
    """A guard model that calls a response safe or unsafe in its first token; the safe one of two wins."""

    type: Literal["safety"]
    template: str | None = Field(
        None,
        description="User message with {conversation} and {response}, for a guard without a template of its own; null "
        "sends the conversation and the response through the guard's chat template.",
    )
    safe: str = Field("safe", description="The answer that means safe.")
    unsafe: str = Field("unsafe", description="The answer that means unsafe.")
    threshold: float = Field(0.5, gt=0, lt=1, description="I(response) = 1 where P(safe) reaches this.")


class Criterion(Section):
    """One thing that an LLM judge looks at."""

    name: str = Field(min_length=1, description="Short name, shown in the reasons.")
    description: str = Field(min_length=1, description="What makes a response the better one in this respect.")
    weight: float = Field(1.0, gt=0, description="Weight among the criteria.")


class LLMJudge(PooledJudge):
    """Any OpenAI-compatible endpoint."""

    type: Literal["llm"]
    base_url: str = Field(
        description="Endpoint, such as https://host/v1; plain http only to this machine. A refused key, model or "
        "address (HTTP 3xx, 401 to 404, no credit) stops the run before the first answer; later it makes verdicts "
        "invalid, and `health.min_valid` decides."
    )
    model: str = Field(description="Model name at the endpoint.")
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the key; null sends none. The key is never written anywhere."
    )
    rubric: str | None = Field(
        None,
        min_length=1,
        description="What a better response is; null takes the built-in rubric. With criteria: their background.",
    )
    criteria: tuple[Criterion, ...] = Field(
        (),
        description="Weighted criteria judged one by one: 2p - 1 = sum of w (2 p_c - 1) over sum of w. With log-probs "
        "each takes requests of its own.",
    )
    answer: Literal["auto", "logprobs", "json"] = Field(
        "auto",
        description="logprobs: probabilities of the tokens A and B; json: structured output, where a winner in one "
        "order and a tie in the other make 0.75; auto takes log-probs where the server gives them.",
    )
    min_letter_mass: float = Field(
        0.1,
        ge=0,
        le=1,
        description="With log-probs: a verdict is invalid where A and B together have less of the first token's "
        "probability, since the model meant to say something else.",
    )
    batch_size: int = Field(256, ge=1, description="Comparisons sent to one actor at a time.")
    concurrency: int = Field(16, ge=1, description="Requests of one judge actor under way at once.")
    timeout_s: float = Field(60.0, gt=0, description="Seconds for one request.")
    retries: int = Field(4, ge=0, description="Further tries of a request that fails, backing off exponentially.")
    batch_timeout_s: float = Field(
        900.0,
        gt=0,
        description="Seconds for a batch; what is not judged by then is invalid. Less than `cluster.deadlines.judge`.",
    )
    max_requests: int | None = Field(
        None,
        ge=1,
        description="Requests, tries included, divided equally among the replicas and counted from the start of the "
        "command; beyond it verdicts are invalid. null: no bound.",
    )
    max_total_tokens: int | None = Field(
        None,
        ge=1,
        description="Prompt and completion tokens as the server reports them, divided and counted like "
        "`max_requests`; what is under way when it is reached still ends.",
    )
    max_completion_tokens: int = Field(256, ge=1, description="Longest structured answer, in tokens.")
    seed: int | None = Field(0, description="Seed sent with each request; null sends none.")
    extra_body: OpenMapping = Field(
        default_factory=dict, description="Further fields of each request, as they are; never a key."
    )

    @field_validator("api_key_env", mode="before")
    @classmethod
    def _variable(cls, value: Any) -> Any:
        if value is not None and not (isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*", value)):
            raise ValueError(
                "expected the name of an environment variable (letters, digits, _); the key itself belongs into that "
                "variable, never into the config"
            )
        return value

    @model_validator(mode="after")
    def _endpoint(self) -> "LLMJudge":
        url = urlsplit(self.base_url)
        if "@" in self.base_url:  # a login; with a mistyped scheme it is not parsed as one
            raise ValueError("judge.base_url holds a password; put the key into the variable that api_key_env names")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"judge.base_url {self.base_url.split('?')[0]!r}: expected https://host[:port]/path")
        if url.query or url.fragment:
            raise ValueError("judge.base_url holds a query; end it at the path, such as https://host/v1")
        if url.scheme == "http" and not _is_this_machine(url.hostname):
            raise ValueError(f"judge.base_url {self.base_url!r}: plain http only to this machine; use https")
        return self

    @model_validator(mode="after")
    def _shares(self) -> "LLMJudge":
        for key in ("max_requests", "max_total_tokens"):
            bound = getattr(self, key)
            if bound is not None and bound < self.replicas:
                raise ValueError(f"judge.{key} {bound} is less than one for each of {self.replicas} judge.replicas")
        names = [criterion.name for criterion in self.criteria]
        if len(set(names)) < len(names):
            raise ValueError(f"judge.criteria: two criteria have the same name in {names}")
        return self


class VerifierJudge(PooledJudge):
    """Checks each response against the prompt's reference answer: 1 where it is right, 0 where it is not."""

    type: Literal["verifier"]
    cache: bool = Field(False, description="Keep verdicts by content in the run directory.")
    method: Literal["gsm8k", "exact", "regex"] = Field(
        "gsm8k",
        description="gsm8k: the last number against the number after `####`; exact: the same text; regex: `pattern`.",
    )
    pattern: str | None = Field(
        None, description="regex only: its last match's first group (or whole match) is the answer that is compared."
    )
    ignore_case: bool = Field(True, description="exact and regex: case does not matter.")

    @model_validator(mode="after")
    def _pattern(self) -> "VerifierJudge":
        if (self.pattern is not None) != (self.method == "regex"):
            raise ValueError("judge.pattern belongs to judge.method regex, and that method needs it")
        return self


class PythonJudge(PooledJudge):
    """The user's own function."""

    type: Literal["python"]
    cache: bool = Field(False, description="Keep verdicts by content in the run directory.")
    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:function, importable on every node."
    )
    kind: Literal["score", "compare"] = Field(
        "score",
        description="score: f(messages, response, reference, **options) -> number; compare: f(messages, a, b, "
        "reference, **options) -> p(A wins).",
    )
    scale: float = Field(1.0, gt=0, description="score only: p(A wins) = sigmoid(scale * (f(A) - f(B))).")
    options: OpenMapping = Field(
        default_factory=dict, description="Keyword arguments of the function; a key it reads from the environment."
    )


SingleJudge = Annotated[
    SentimentJudge | PairModelJudge | RewardModelJudge | LLMJudge | VerifierJudge | PythonJudge | SafetyJudge,
    Field(discriminator="type"),
]


class Member(Section):
    """One judge of an ensemble."""

    judge: SingleJudge = Field(description="The judge, in a pool of its own.")
    weight: float = Field(1.0, gt=0, description="Its weight.")


class EnsembleJudge(BaseJudge):
    """Several judges on every comparison."""

    type: Literal["ensemble"]
    members: tuple[Member, ...] = Field(min_length=2, description="The judges.")
    method: Literal["weights", "vote"] = Field(
        "weights", description="weights: mean of the probabilities; vote: share of the members' votes, a tie half."
    )
    quorum: float = Field(
        1.0, gt=0, le=1, description="Share of the weight that must be valid; below it the verdict is invalid."
    )

    @model_validator(mode="after")
    def _health(self) -> "EnsembleJudge":
        for index, member in enumerate(self.members):
            if member.judge.health != JudgeHealth():
                raise ValueError(
                    f"judge.members.{index}.judge.health: thresholds of a member are never looked at; set judge.health "
                    "of the ensemble"
                )
        return self


Judge = Annotated[
    SentimentJudge
    | PairModelJudge
    | RewardModelJudge
    | LLMJudge
    | VerifierJudge
    | PythonJudge
    | SafetyJudge
    | EnsembleJudge,
    Field(discriminator="type"),
]


def single_judges(judge: "Judge", key: str = "judge") -> Iterator[tuple[str, PooledJudge]]:
    """The judges behind a judge with their config keys: itself, or the members of an ensemble."""
    if isinstance(judge, EnsembleJudge):
        for index, member in enumerate(judge.members):
            yield f"{key}.members.{index}.judge", member.judge
    else:
        yield key, judge


def same_verdicts(one: "Judge", other: "Judge") -> bool:
    """Do two configs describe one judge? What only says how it runs (replicas, retries, cache, ...) does not count."""
    return _answering(one) == _answering(other)


def check_deadline(judge: "Judge", key: str, deadline: float) -> None:
    """Raise `ValueError` if a judge at `key` may take longer for a batch than `deadline`, which waits for it."""
    for name, single in single_judges(judge, key):
        if isinstance(single, LLMJudge) and single.batch_timeout_s >= deadline:
            raise ValueError(
                f"{name}.batch_timeout_s {single.batch_timeout_s:g} must be less than cluster.deadlines.judge "
                f"{deadline:g}: what is late would fail the run, where it should be invalid"
            )


def with_path(judge: "Judge", path: str) -> "Judge":
    """The judge with `path` wherever an engine judge names none."""
    if isinstance(judge, EnsembleJudge):
        members = tuple(member.model_copy(update={"judge": with_path(member.judge, path)}) for member in judge.members)
        return judge.model_copy(update={"members": members})
    if isinstance(judge, EngineJudge) and judge.path is None:
        return judge.model_copy(update={"path": path})
    return judge


def _answering(judge: "Judge") -> dict[str, Any]:
    if not isinstance(judge, EnsembleJudge):
        return judge.model_dump(exclude=RUNNING)
    members = [{"weight": member.weight, "judge": _answering(member.judge)} for member in judge.members]
    return judge.model_dump(exclude={"health", "members"}) | {"members": members}


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
