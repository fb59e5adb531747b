"""The verifier: numbers as GSM8K writes them, exact texts, patterns; and references that reach it from the data."""

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.data import EvalPrompts, Prompts
from rlhf.config.judge import VerifierJudge as Config
from rlhf.data.prompts import load_eval_prompts, load_prompts
from rlhf.errors import InputError
from rlhf.judging.verifier import VerifierJudge, last_number, reference_number
from rlhf.records import Comparison, Verdict, VerdictState
from tests.unit.byte_tokenizer import CHAT, byte_tokenizer

GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k/test-a.jsonl.gz"


async def judged(config: Config, a: str, b: str, reference: str | None) -> Verdict:
    [verdict] = await VerifierJudge(config).compare([Comparison("p", (), a, b, reference=reference)])
    return verdict


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"),
        ("It costs $12.50", "12.50"),
        ("the change is -3", "-3"),
        ("So she owes -$4.25 in all.", "-4.25"),
        ("So she owes $-4.25 in all.", "-4.25"),
        ("minus by its own sign: −8", "-8"),
        ("The answer is 7.", "7"),
        ("\\boxed{42}", "42"),
        ("\\boxed{1{,}234{,}567.5}", "1234567.5"),
        ("\\boxed{\\$1\\,000}", "1000"),
        ("**18** dollars", "18"),
        ("10 - 3 = 7", "7"),
        ("that is 10 - 3", "3"),
        ("that is 10-3", "3"),
        ("(2)-3", "3"),
        (".5", "0.5"),
        ("50%", "50"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("3 of 5 in 2024, that is 0.60", "0.6"),
        ("007", "7"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "####", "five", "$", "-", "1st".replace("1", "")])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


@settings(deadline=None)
@given(number=st.decimals(-(10**9), 10**9, places=2), before=st.text("ab 19.,$\n", max_size=12))
def test_a_number_is_read_as_it_was_written(number: Decimal, before: str) -> None:
    for written in (f"{number}", f"{number:,}", f"${number}", f"\\boxed{{{number:,}}}"):
        assert last_number(f"{before} = {written}.") == number


def test_reference_is_the_number_after_the_mark() -> None:
    assert reference_number("He has 3*4=<<3*4=12>>12 eggs.\n#### 1,012\n") == 1012
    assert reference_number("72") == 72
    assert reference_number("12 eggs\n#### none") is None


@pytest.mark.parametrize(
    ("a", "b", "p", "scores"),
    [
        ("so 72", "so 71", 1.0, (1.0, 0.0)),
        ("no idea", "72.00 eggs", 0.0, (0.0, 1.0)),
        ("72", "#### 72.", 0.5, (1.0, 1.0)),
        ("71", "", 0.5, (0.0, 0.0)),
    ],
)
async def test_the_right_answer_wins(a: str, b: str, p: float, scores: tuple[float, float]) -> None:
    verdict = await judged(Config(type="verifier"), a, b, "6 * 12 = 72\n#### 72")
    assert (verdict.p_ab, verdict.p_ba, verdict.score_a, verdict.score_b) == (p, p, *scores)
    state = {1.0: VerdictState.WIN, 0.0: VerdictState.LOSE, 0.5: VerdictState.TIE}[p]
    assert verdict.state is state


@pytest.mark.parametrize(
    ("method", "reference"), [("gsm8k", None), ("gsm8k", "#### many"), ("exact", None), ("exact", " \n")]
)
async def test_without_a_readable_reference_nothing_is_known(method: str, reference: str | None) -> None:
    verdict = await judged(Config(type="verifier", method=method), "7", "8", reference)  # type: ignore[arg-type]
    assert verdict.state is VerdictState.INVALID
    assert verdict.reason.startswith("response A cannot be checked: ")
    assert (verdict.score_a, verdict.score_b) == (None, None)


async def test_exact_ignores_white_space_and_case_unless_told() -> None:
    loose = Config(type="verifier", method="exact")
    strict = Config(type="verifier", method="exact", ignore_case=False)
    assert (await judged(loose, " new \n York", "York", "New York")).state is VerdictState.WIN
    assert (await judged(strict, " new \n York", "York", "New York")).state is VerdictState.TIE
    assert (await judged(strict, " New \n York", "York", "New York")).state is VerdictState.WIN


async def test_pattern_takes_its_last_match() -> None:
    group = Config(type="verifier", method="regex", pattern=r"answer: (\w+)( now)?")
    assert (await judged(group, "ANSWER: b. No, Answer: C now", "answer: b", "c")).state is VerdictState.WIN
    whole = Config(type="verifier", method="regex", pattern=r"[a-d]", ignore_case=False)
    assert (await judged(whole, "a, or b", "b, or a", "b")).state is VerdictState.WIN
    optional = Config(type="verifier", method="regex", pattern=r"x(y)?")
    verdict = await judged(optional, "x", "xy", "y")  # the group took no part in A's match
    assert (verdict.score_a, verdict.score_b) == (0.0, 1.0)


def test_broken_pattern_is_refused() -> None:
    with pytest.raises(InputError, match=r"judge\.pattern = '\(': no regular expression: .*; repair it"):
        VerifierJudge(Config(type="verifier", method="regex", pattern="("))


@settings(deadline=None)
@given(a=st.sampled_from(["7", "8", "seven", ""]), b=st.sampled_from(["7", "8", "#### 7.0"]))
async def test_swapping_the_responses_mirrors_the_verdict(a: str, b: str) -> None:
    there, back = [await judged(Config(type="verifier"), *pair, "7") for pair in ((a, b), (b, a))]
    assert (there.p_ab, there.p_ba) == (1 - back.p_ab, 1 - back.p_ba)
    assert (there.score_a, there.score_b) == (back.score_b, back.score_a)


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_references_come_from_their_column(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(["so 3\n#### 3", 4, 2.5, None, ["x"]])]
    path = write(tmp_path / "a.jsonl", [*rows, {"question": "q9"}])
    config = Prompts(path=path, column="question", reference="answer")
    found = load_prompts(config, byte_tokenizer(CHAT)).prompts
    assert [prompt.reference for prompt in found] == ["so 3\n#### 3", "4", "2.5", None, None, None]
    assert [prompt.messages[0]["content"] for prompt in found] == ["q0", "q1", "q2", "q3", "q4", "q9"]


def test_a_dropped_row_shifts_no_reference(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "answer": str(i)} for i, prompt in enumerate(["a", " ", "a", None, "b"])]
    found = load_prompts(Prompts(path=write(tmp_path / "a.jsonl", rows), reference="answer"), byte_tokenizer(CHAT))
    assert [(prompt.messages[0]["content"], prompt.reference) for prompt in found.prompts] == [("a", "0"), ("b", "4")]


def test_evaluation_takes_the_reference_of_the_same_path_only(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHAT)
    rows: list[dict[str, object]] = [{"prompt": text, "answer": text.upper(), "other": "o"} for text in "abc"]
    path, elsewhere = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows)

    def held_out(**fields: str) -> str | None:
        config = Prompts(path=path, reference="answer", eval=EvalPrompts(count=1, **fields))
        return load_eval_prompts(config, tokenizer).prompts[0].reference

    assert held_out(path=path) == "A"
    assert held_out(path=path, reference="other") == "o"
    assert held_out(path=elsewhere) is None
    assert held_out(path=elsewhere, reference="answer") == "A"
    with pytest.raises(InputError, match=r"^prompts\.eval\.reference = no: .*b\.jsonl has no column 'no'; its columns"):
        held_out(path=elsewhere, reference="no")


def test_unusable_reference_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "list": ["x"]}])
    with pytest.raises(InputError, match=r"^prompts\.reference = anwser: .* no column 'anwser'; .*: prompt, list$"):
        load_prompts(Prompts(path=path, reference="anwser"), byte_tokenizer(CHAT))
    with pytest.raises(InputError, match=r"^prompts\.reference = list: .* holds list values there; expected text"):
        load_prompts(Prompts(path=path, reference="list"), byte_tokenizer(CHAT))


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K file is not here")
def test_every_gsm8k_answer_is_read() -> None:
    with gzip.open(GSM8K, "rt") as file:
        answers = [json.loads(line)["answer"] for line in file]
    assert len(answers) > 100
    for answer in answers:
        number = reference_number(answer)
        assert number is not None
        assert number == last_number(answer)
        assert f"{number:,}" in answer or str(number) in answer
