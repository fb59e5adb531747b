"""Scoring a file: what is written, going on after any stop, what is refused, bounded memory."""

import asyncio
import gzip
import hashlib
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config.judge import SentimentJudge as Config
from rlhf.errors import InputError, RLHFError
from rlhf.judging.score_file import open_job, score
from rlhf.judging.score_lines import OUTPUT_KEYS
from rlhf.judging.score_retry import count_again, retry_invalid, written_tally
from rlhf.judging.sentiment import SentimentJudge
from rlhf.judging.verdicts import invalid_verdict
from rlhf.records import Comparison, Verdict

JUDGE = SentimentJudge(Config())
WORDS = ("wonderful", "terrible", "table", "love", "hate", "grün")


def row(number: int, **more: Any) -> dict[str, Any]:
    a, b = WORDS[number % len(WORDS)], WORDS[number // 2 % len(WORDS)]
    return {"prompt": f"question {number}", "a": f"it is {a}", "b": f"{b} it is", "id": number, **more}


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(
    source: Path,
    out: Path,
    judge: Any = JUDGE,
    identity: str = "j",
    chunk: int = 3,
    min_valid: float = 0.0,
    **options: bool,
) -> dict[str, int]:
    with open_job(source, out, identity, **options) as job:
        return asyncio.run(score(judge, job, lambda amount: None, chunk=chunk, min_valid=min_valid)).counts


def retry(source: Path, out: Path, judge: Any = JUDGE, min_valid: float = 0.0) -> dict[str, int]:
    with open_job(source, out, "j") as job:
        return asyncio.run(retry_invalid(judge, job, lambda amount: None, chunk=3, min_valid=min_valid)).counts


class Down:
    """The sentiment judge behind an endpoint that is down from a given comparison on."""

    def __init__(self, after: int = 0) -> None:
        self.left = after

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        up, self.left = comparisons[: self.left], max(0, self.left - len(comparisons))
        down = [invalid_verdict(each, "nobody answers") for each in comparisons[len(up) :]]
        return [*await JUDGE.compare(up), *down]


class Counted:
    """The sentiment judge; counts what it was asked, and fails for good at a given comparison."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked, self.at_once, self.most_at_once, self._fails_at = 0, 0, 0, fails_at

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.asked += len(comparisons)
        self.at_once += len(comparisons)
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.001)
        self.at_once -= len(comparisons)
        if self._fails_at is not None and self.asked > self._fails_at:
            raise RLHFError("the judge is gone")
        return await JUDGE.compare(comparisons)


def test_one_line_each_in_order_with_the_verdict_and_what_was_there(tmp_path: Path) -> None:
    rows = [row(number, extra={"deep": [1, None]}) for number in range(8)]
    talk = (("user", "u"), ("assistant", "v"), ("user", "w"))
    rows[2]["prompt"] = [{"role": role, "content": content} for role, content in talk]
    rows[5]["a"] = " "
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    moved: list[int] = []
    with open_job(source, out, "j") as job:
        assert (job.total, job.done, job.bad) == (8, 0, 0)
        counts = asyncio.run(score(JUDGE, job, moved.append, chunk=3)).counts
    found = read(out)
    expected = asyncio.run(JUDGE.compare([Comparison("", (), each["a"], each["b"]) for each in rows]))
    assert [each["line"] for each in found] == list(range(1, 9))
    for given_, result, verdict in zip(rows, found, expected, strict=True):
        assert {key: result[key] for key in given_} == given_
        assert set(result) == set(given_) | set(OUTPUT_KEYS)
        assert (result["state"], result["reason"]) == (verdict.state, verdict.reason)
        assert (result["score_a"], result["score_b"]) == (verdict.score_a, verdict.score_b)
        if verdict.state != "invalid":
            assert (result["p"], result["p_ab"], result["p_ba"]) == (verdict.p, verdict.p_ab, verdict.p_ba)
    assert (found[5]["state"], found[5]["p"], found[5]["p_ab"]) == ("invalid", None, None)
    assert counts == {state: [each["state"] for each in found].count(state) for state in counts}
    assert sum(counts.values()) == sum(moved) == 8


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 4000), blanks=st.sets(st.integers(0, 11)), chunk=st.integers(1, 5))
def test_cut_anywhere_a_restart_gives_the_same_file(tmp_path: Path, cut: int, blanks: set[int], chunk: int) -> None:
    rows = ["" if number in blanks and number else row(number) for number in range(12)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    for path in (out, tmp_path / "out.jsonl.meta.json"):
        path.unlink(missing_ok=True)
    run(source, out, chunk=chunk)
    whole = out.read_bytes()
    assert len(read(out)) == sum(each != "" for each in rows)
    cut = min(cut, len(whole))
    out.write_bytes(whole[:cut])
    judge = Counted()
    run(source, out, judge, chunk=chunk)
    assert out.read_bytes() == whole
    assert judge.asked == len(read(out)) - whole[:cut].count(b"\n")
    run(source, out, judge := Counted())
    assert judge.asked == 0


def test_a_judge_that_dies_leaves_whole_lines_to_go_on_from(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [row(number) for number in range(40)]), tmp_path / "out.jsonl"
    with pytest.raises(RLHFError, match="the judge is gone"):
        run(source, out, Counted(fails_at=25))
    left = len(read(out))
    assert 0 < left <= 25
    judge = Counted()
    run(source, out, judge)
    assert judge.asked == 40 - left
    assert [each["id"] for each in read(out)] == list(range(40))


def test_a_judge_that_is_down_writes_nothing_of_its_chunk(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [row(number) for number in range(10)]), tmp_path / "out.jsonl"
    with pytest.raises(RLHFError) as caught:
        run(source, out, Down(), min_valid=0.1)
    assert f"--input {source}: up to line 3: only 0.0% of 3 comparisons could be judged" in str(caught.value)
    assert "(3 times): nobody answers" in str(caught.value)
    assert (caught.value.exit_code, out.read_bytes()) == (1, b"")
    # It fails with the 5th: the second chunk has one valid verdict of three, which is too few.
    with pytest.raises(RLHFError, match=r"up to line 6: only 33\.3%"):
        run(source, out, Down(after=4), min_valid=0.5)
    assert [each["state"] == "invalid" for each in read(out)] == [False] * 3
    run(source, out, min_valid=1.0)
    whole = out.read_bytes()
    out.unlink()
    run(source, out)
    assert out.read_bytes() == whole


def test_a_short_last_chunk_is_judged_by_the_lines_before_it_too(tmp_path: Path) -> None:
    rows = [row(number) for number in range(4)]
    rows[3]["a"] = " "
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert run(source, out, min_valid=0.6)["invalid"] == 1
    out.unlink()
    with pytest.raises(RLHFError, match=r"only 66\.7% of 3"):
        run(source, out, min_valid=0.7)


def test_bad_lines_are_no_comparisons(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", ["{", "[]", row(0), "{"]), tmp_path / "out.jsonl"
    assert run(source, out, min_valid=1.0, skip_bad=True)["invalid"] == 3


def test_identical_responses_tie_unasked(tmp_path: Path) -> None:
    rows = [row(0), row(1), row(2) | {"b": row(2)["a"]}]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    run(source, out, judge := Counted())
    assert judge.asked == 2
    assert [(each["id"], each["state"]) for each in read(out)][2] == (2, "tie")
    assert (read(out)[2]["p_ab"], read(out)[2]["p_ba"]) == (0.5, 0.5)
    assert "identical" in read(out)[2]["reason"]
    out.unlink()
    with pytest.raises(RLHFError, match=r"only 0\.0% of 2"):  # they do not hide that the judge is down
        run(source, out, Down(), min_valid=0.1)


def test_invalid_lines_are_judged_again(tmp_path: Path) -> None:
    rows: list[Any] = [row(number) for number in range(11)]
    rows[2] = "{"
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    run(source, out, skip_bad=True)
    whole = out.read_bytes()
    out.unlink()
    assert run(source, out, Down(after=5), skip_bad=True)["invalid"] == 6
    with open_job(source, out, "j") as job:
        assert count_again(job) == 5
        tally = written_tally(job)
    assert (tally.total, tally.invalid, tally.bad) == (11, 6, 1)
    assert tally.common_reason() == "most frequent reason (5 times): nobody answers"
    # Down again: with a share to reach the output stays as it is.
    before = out.read_bytes()
    with pytest.raises(RLHFError, match=r"up to line 9: only 0\.0% of 3 .*\(3 times\): nobody answers"):
        retry(source, out, Down(), min_valid=0.2)
    assert out.read_bytes() == before
    counts = retry(source, out, judge := Counted())
    assert (judge.asked, sum(counts.values()), counts["invalid"]) == (5, 5, 0)
    assert out.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.meta.json"]


def test_judging_again_and_the_rest_under_one_lock(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [row(number) for number in range(7)]), tmp_path / "out.jsonl"
    run(source, out)
    whole = out.read_bytes()
    out.unlink()
    run(source, out, Down(after=1))
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:3]))
    with open_job(source, out, "j") as job:
        assert (job.done, count_again(job)) == (3, 2)
        asyncio.run(retry_invalid(JUDGE, job, lambda amount: None))
        with pytest.raises(InputError, match="another process"):
            run(source, out)
        asyncio.run(score(JUDGE, job, lambda amount: None))
    assert out.read_bytes() == whole
    run(source, out)


def test_an_edited_output_is_not_judged_again(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [row(number) for number in range(4)]), tmp_path / "out.jsonl"
    run(source, out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(InputError, match=r"its line for line 1 of the input was changed"):
        retry(source, out)


def test_the_judge_s_name_is_only_there_as_a_hash(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [row(0)]), tmp_path / "out.jsonl"
    run(source, out, identity='{"extra_body": "private"}')
    text = (tmp_path / "out.jsonl.meta.json").read_text()
    assert "private" not in text
    digest = hashlib.sha256(b'{"extra_body": "private"}').hexdigest()
    assert json.loads(text)["judge"] == f"sha256:{digest}"
    run(source, out, identity='{"extra_body": "private"}')
    with pytest.raises(InputError, match="another judge"):
        run(source, out, identity="other")


def _score_slowly(source: Path, out: Path) -> None:
    class Slow:
        async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            await asyncio.sleep(0.02)
            return await JUDGE.compare(comparisons)

    run(source, out, Slow(), chunk=2)


def test_sigkill_at_some_moment(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [row(number) for number in range(400)]), tmp_path / "out.jsonl"
    child = multiprocessing.get_context("fork").Process(target=_score_slowly, args=(source, out))
    child.start()
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.join()
    before = out.read_bytes()
    assert 0 < before.count(b"\n") < 400
    run(source, out)
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert [each["id"] for each in read(out)] == list(range(400))


def test_memory_is_bounded_by_the_chunks_under_way(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [row(number) for number in range(200)])
    judge = Counted()
    run(source, tmp_path / "out.jsonl", judge, chunk=5)
    assert judge.asked == 200
    assert 5 < judge.most_at_once <= 20


BAD = [
    ("{", "not JSON"),
    ("[1]", "a list where an object"),
    ('{"a": "x", "b": "y"}', "no key 'prompt'"),
    ('{"prompt": "p", "a": "x"}', "no key 'b'"),
    ('{"prompt": "p", "a": 3, "b": "y"}', "'a' is a int"),
    ('{"prompt": 3, "a": "x", "b": "y"}', "'prompt' is neither text"),
    ('{"prompt": [{"role": "assistant", "content": "c"}], "a": "x", "b": "y"}', "'prompt' has to take turns"),
    ('{"prompt": "", "a": "x", "b": "y"}', "'prompt' has to take turns"),
    ('{"prompt": "p", "a": "x", "b": "y", "p": 1}', "the key 'p' is needed for the output"),
    ('{"prompt": "p", "a": "x", "b": "y", "z": NaN}', "NaN is no JSON number"),
    ('{"prompt": "p", "a": "\\ud800", "b": "y"}', "half of a surrogate pair"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_stops_before_anything_is_judged(tmp_path: Path, line: str, message: str) -> None:
    source, out = write(tmp_path / "in.jsonl", [row(0), "", line]), tmp_path / "out.jsonl"
    with pytest.raises(InputError) as caught:
        run(source, out, judge := Counted())
    assert f"{source}: line 3: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (judge.asked, out.exists()) == (0, False)


def test_skip_bad_writes_an_invalid_line(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [*(line for line, _ in BAD), row(0)]), tmp_path / "out.jsonl"
    with open_job(source, out, "j", skip_bad=True) as job:
        assert (job.total, job.bad) == (len(BAD) + 1, len(BAD))
    counts = run(source, out, judge := Counted(), skip_bad=True)
    found = read(out)
    assert (judge.asked, counts["invalid"]) == (1, len(BAD))
    assert [each["line"] for each in found] == list(range(1, len(BAD) + 2))
    for each, (_, message) in zip(found, BAD, strict=False):
        assert (each["state"], each["p"]) == ("invalid", None)
        assert message in each["reason"]


def test_a_kept_field_with_half_a_surrogate_comes_back(tmp_path: Path) -> None:
    line = '{"prompt": "p", "a": "x", "b": "y", "note": "\\ud83d", "ü": "ü"}'
    source, out = write(tmp_path / "in.jsonl", [line]), tmp_path / "out.jsonl"
    run(source, out)
    assert (read(out)[0]["note"], read(out)[0]["ü"]) == ("\ud83d", "ü")


def test_gzip_and_byte_order_mark(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(row(0)).encode() + b"\n"))
    run(source, tmp_path / "out.jsonl")
    assert [each["id"] for each in read(tmp_path / "out.jsonl")] == [0]
    source.write_bytes(source.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be unpacked"):
        run(source, tmp_path / "other.jsonl")


def test_an_output_of_something_else_is_refused_untouched(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [row(number) for number in range(4)]), tmp_path / "out.jsonl"
    run(source, out)
    torn = out.read_bytes()[:-5]
    out.write_bytes(torn)
    other = write(tmp_path / "other.jsonl", [row(number) for number in range(1, 5)])
    for source_, identity, message in ((source, "k", "another judge"), (other, "j", "another input")):
        with pytest.raises(InputError, match=message):
            run(source_, out, identity=identity)
        assert out.read_bytes() == torn
    # the same content under another name goes on
    run(source.rename(tmp_path / "moved.jsonl"), out)
    assert len(read(out)) == 4


@pytest.mark.parametrize("text", ["notes of mine\n", '{"line": "x"}\n', "[]\n", '{"line": 3}\n{"line": 4}\n'])
def test_foreign_lines_are_refused(tmp_path: Path, text: str) -> None:
    source, out = write(tmp_path / "in.jsonl", [row(number) for number in range(4)]), tmp_path / "out.jsonl"
    out.write_text(text)
    with pytest.raises(InputError, match=r"has no out\.jsonl\.meta\.json"):
        run(source, out)
    out.unlink()
    run(source, out)
    out.write_text(text)
    with pytest.raises(InputError, match=r"was not written by this command|do not fit"):
        run(source, out)
    assert out.read_text() == text


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [row(0)]), tmp_path / "out.jsonl"
    with open_job(source, out, "j"), pytest.raises(InputError, match="another process"):
        run(source, out)
    run(source, out)


def test_paths(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [row(0)])
    empty = write(tmp_path / "empty.jsonl", ["", " "])
    for bad, out, message in (
        (tmp_path / "no.jsonl", tmp_path / "o", "no such file"),
        (source, tmp_path / "no" / "o", "no such folder"),
        (source, source, "this is the input"),
        (source, tmp_path, "or a folder"),
        (empty, tmp_path / "o", "there is nothing in it"),
    ):
        with pytest.raises(InputError, match=message):
            run(bad, out)
