"""The safety judge: what the guard reads, where its answer is read, and what follows from I(response)."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.judge import SafetyJudge as Config
from rlhf.errors import InputError
from rlhf.judging.safety import SafetyJudge
from rlhf.records import Comparison, Message, VerdictState
from tests.unit.byte_tokenizer import BODY, CHAT, byte_tokenizer

TEMPLATE = "Talk:\n{conversation}\nReply: {response}\nIs it safe?"
TALK = (
    Message(role="user", content="Rain?"),
    Message(role="assistant", content="Yes"),
    Message(role="user", content="Snow?"),
)
LOGPROBS = st.floats(-30, 0)


class Guard:
    """Log-probs of the two answers by a rule over the prompt's text; remembers what it was asked."""

    def __init__(self, rules: dict[str, tuple[float, float]], tokenizer: object) -> None:
        self.rules, self.tokenizer = rules, tokenizer
        self.prompts: list[str] = []
        self.token_ids: list[int] = []

    async def next_logprobs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> np.ndarray:
        texts = [self.tokenizer.decode(list(prompt)) for prompt in prompts]  # type: ignore[attr-defined]
        self.prompts += texts
        self.token_ids = list(token_ids)
        rows = [next(value for key, value in self.rules.items() if key in text) for text in texts]
        return np.array(rows, dtype=float).reshape(len(prompts), 2)


def build(
    rules: dict[str, tuple[float, float]] | None = None, chat: str | None = CHAT, **fields: object
) -> tuple[SafetyJudge, Guard]:
    tokenizer = byte_tokenizer(chat)
    guard = Guard(rules or {}, tokenizer)
    return SafetyJudge(Config(type="safety", path="guard", **fields), guard, tokenizer), guard  # type: ignore[arg-type]


def logs(p: float, rest: float = 1.0) -> tuple[float, float]:
    """Log-probs of the two answers that give P(safe) = p; the guard may spend probability on other tokens."""
    return math.log(p * rest), math.log((1 - p) * rest)


async def test_score_is_the_softmax_over_the_two_answers() -> None:
    judge, guard = build({"help": logs(0.9, 0.01), "harm": logs(0.2)}, template=TEMPLATE)
    [verdict, back] = await judge.compare(
        [Comparison("p", TALK, "help", "harm"), Comparison("p", TALK, "harm", "help")]
    )
    assert (verdict.score_a, verdict.score_b) == (pytest.approx(0.9, abs=1e-12), pytest.approx(0.2, abs=1e-12))
    # logit 0.9 - logit 0.2 = log(9) + log(4), so the odds are 36 to 1
    assert verdict.p_ab == verdict.p_ba == pytest.approx(36 / 37, abs=1e-12)
    assert back.p == pytest.approx(1 / 37, abs=1e-12)
    assert (verdict.state, back.state) == (VerdictState.WIN, VerdictState.LOSE)
    assert guard.token_ids == byte_tokenizer(CHAT)("su", add_special_tokens=False)["input_ids"]
    talk = "User: Rain?\n\nAssistant: Yes\n\nUser: Snow?"
    assert guard.prompts == [
        f"<bos><turn>user\nTalk:\n{talk}\nReply: {reply}\nIs it safe?<end><turn>assistant\n"
        for reply in ("help", "harm")
    ]


@pytest.mark.parametrize(("a", "b"), [(0.51, 0.99), (0.99, 0.51), (0.01, 0.49), (0.5, 1 - 1e-9)])
async def test_responses_of_the_same_kind_tie_exactly(a: float, b: float) -> None:
    judge, _ = build({"one": logs(a), "two": logs(b)}, template=TEMPLATE)
    [verdict] = await judge.compare([Comparison("p", TALK, "one", "two")])
    assert (verdict.p_ab, verdict.p_ba, verdict.state) == (0.5, 0.5, VerdictState.TIE)
    assert verdict.score_a == pytest.approx(a, abs=1e-12)


async def test_threshold_decides_what_is_safe() -> None:
    rules = {"one": logs(0.7), "two": logs(0.6)}
    loose, _ = build(rules, template=TEMPLATE)
    strict, _ = build(rules, template=TEMPLATE, threshold=0.65)
    comparison = Comparison("p", TALK, "one", "two")
    assert [(await judge.compare([comparison]))[0].state for judge in (loose, strict)] == [
        VerdictState.TIE,
        VerdictState.WIN,
    ]
    assert [strict.safe(score) for score in (0.65, 0.6499, 1.0, 0.0)] == [True, False, True, False]


@settings(deadline=None)
@given(one=st.tuples(LOGPROBS, LOGPROBS), two=st.tuples(LOGPROBS, LOGPROBS), threshold=st.floats(0.01, 0.99))
async def test_swapping_the_responses_mirrors_the_verdict(
    one: tuple[float, float], two: tuple[float, float], threshold: float
) -> None:
    judge, _ = build({"one": one, "two": two}, template=TEMPLATE, threshold=threshold)
    there, back = await judge.compare([Comparison("p", TALK, "one", "two"), Comparison("p", TALK, "two", "one")])
    assert there.p == pytest.approx(1 - back.p, abs=1e-12)
    assert (there.score_a, there.score_b) == (back.score_b, back.score_a)
    assert there.score_a is not None
    assert there.score_b is not None
    kinds = judge.safe(there.score_a), judge.safe(there.score_b)
    assert there.state is {(True, False): VerdictState.WIN, (False, True): VerdictState.LOSE}.get(
        kinds, VerdictState.TIE
    )


@pytest.mark.parametrize(
    ("one", "p"),
    [((0.0, -math.inf), 1.0), ((-math.inf, 0.0), 0.5), ((0.0, -800.0), 1.0), ((-math.inf, -math.inf), None)],
)
async def test_certain_and_missing_answers(one: tuple[float, float], p: float | None) -> None:
    judge, _ = build({"one": one, "two": logs(0.2)}, template=TEMPLATE)
    [verdict] = await judge.compare([Comparison("p", TALK, "one", "two")])
    if p is None:
        assert (verdict.state, verdict.reason) == (VerdictState.INVALID, "response A has no finite score: nan")
    else:
        assert verdict.p == p


async def test_guard_with_a_template_of_its_own() -> None:
    judge, guard = build({"": (0.0, 0.0)})
    await judge.compare([Comparison("p", TALK, "No", "No")])
    assert guard.prompts == [
        "<bos><turn>user\nRain?<end><turn>assistant\nYes<end><turn>user\nSnow?<end><turn>assistant\nNo<end>"
        "<turn>assistant\n"
    ]


async def test_guard_without_any_chat_template() -> None:
    judge, guard = build({"": (0.0, 0.0)}, chat=None, template="{conversation}|{response}|")
    await judge.compare([Comparison("p", TALK[:1], "No", "No")])
    assert guard.prompts == ["<bos>User: Rain?|No|"]


async def test_fields_spelled_out_in_a_text_stay_as_they_are() -> None:
    judge, guard = build({"": (0.0, 0.0)}, chat=None, template="{conversation}|{response}")
    messages = (Message(role="user", content="Use {response}"),)
    await judge.compare([Comparison("p", messages, "{conversation}", "{conversation}")])
    assert guard.prompts == ["<bos>User: Use {response}|{conversation}"]


async def test_context_is_cut_from_the_left_and_never_the_response() -> None:
    judge, guard = build({"": (0.0, 0.0)}, chat=None, template="{conversation}|{response}|", max_length=20)
    [verdict, long] = await judge.compare(
        [Comparison("p", TALK, "No", "No"), Comparison("p", TALK, "No" * 10, "No" * 10)]
    )
    assert guard.prompts == ["<bos>User: Snow?|No|"]
    assert verdict.truncated
    assert long.state is VerdictState.INVALID
    assert long.reason == "response A alone is longer than judge.max_length=20 tokens"


@pytest.mark.parametrize(
    ("fields", "chat", "reason"),
    [
        ({"template": "{response}?"}, CHAT, "judge.template = '{response}?': it lacks {conversation}; "),
        ({"template": "{conversation}?"}, CHAT, "judge.template = '{conversation}?': it lacks {response}; "),
        ({}, None, "judge.path = byte-judge: the tokenizer has no chat template; set judge.template"),
        ({}, "{{ messages[0]['content'] }}", "judge.path = byte-judge: the chat template turns a question"),
        ({"unsafe": "severe"}, CHAT, "judge.safe = 'safe', judge.unsafe = 'severe': both start with the token 's'; "),
        ({"safe": ""}, CHAT, "judge.safe = '': not a text of its own after "),
        ({"template": TEMPLATE}, BODY, "judge.path = byte-judge: the prompt ends with "),
    ],
)
def test_guard_that_cannot_answer_is_refused(fields: dict[str, str], chat: str | None, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        build(chat=chat, **fields)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


async def test_no_comparisons_need_no_engine() -> None:
    judge, guard = build(template=TEMPLATE)
    assert await judge.compare([]) == []
    assert guard.prompts == []
