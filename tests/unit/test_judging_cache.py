"""The verdict cache: asked once, in either order, across restarts, kills and damage."""

import asyncio
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from rlhf.config.judge import LLMJudge, PairModelJudge, PooledJudge, SentimentJudge
from rlhf.errors import RLHFError
from rlhf.judging.cache import CachedJudge, comparison_key, folder_fingerprint, judge_identity, mirror
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.records import Comparison, Message, Verdict, VerdictState


class Counting:
    """A judge whose verdict is a function of the texts; it cannot judge a text with `?`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.asked += [(c.a, c.b) for c in comparisons]
        if self.gate:
            await self.gate.wait()
        if self.error:
            raise self.error
        return [verdict_of(c) for c in comparisons]


def verdict_of(c: Comparison) -> Verdict:
    if "?" in c.a + c.b:
        return invalid_verdict(c, "a question")
    seeded = random.Random(f"{c.a}|{c.b}")
    verdict = make_verdict(c, seeded.random(), seeded.random(), len(c.a) / 3, None)
    return replace(verdict, truncated=seeded.random() < 0.5)


def comparison(a: str, b: str, text: str = "Hi", reference: str | None = None, uid: str = "u") -> Comparison:
    return Comparison(uid, (Message(role="user", content=text),), a, b, 3, 5, reference)


def cached(path: Path, identity: str = "j") -> tuple[CachedJudge, Counting]:
    inner = Counting()
    return CachedJudge(inner, path, identity), inner


async def test_a_restart_asks_nothing_again_and_answers_to_the_bit(tmp_path: Path) -> None:
    asked = [comparison("a", "b"), comparison("b", "c"), comparison("d", "c", "Bye"), comparison("a", "b", uid="v")]
    first, inner = cached(tmp_path / "runs" / "verdicts.sqlite")
    verdicts = await first.compare(asked)
    assert verdicts == [verdict_of(item) for item in asked]
    assert inner.asked == [("a", "b"), ("b", "c"), ("d", "c")]
    assert first.hits == 1
    first.close()
    second, silent = cached(tmp_path / "runs" / "verdicts.sqlite")
    assert await second.compare(asked) == verdicts
    assert (silent.asked, second.hits) == ([], 4)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="?"), max_size=4)


@settings(deadline=None, max_examples=60)
@given(asks=st.lists(st.tuples(TEXT, TEXT, st.sampled_from([None, "4"])), max_size=8))
async def test_either_order_answers_the_other(
    asks: list[tuple[str, str, str | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("c") / "v.sqlite"
    first, _ = cached(path)
    there = [comparison(a, b, reference=reference) for a, b, reference in asks]
    back = [comparison(b, a, reference=reference) for a, b, reference in asks]
    verdicts = await first.compare(there)
    first.close()
    second, silent = cached(path)
    mirrored = await second.compare(back)
    assert silent.asked == []
    for verdict, other in zip(verdicts, mirrored, strict=True):
        if verdict.comparison.a == verdict.comparison.b:
            continue
        assert (other.p_ab, other.p_ba) == pytest.approx((1 - verdict.p_ba, 1 - verdict.p_ab), abs=1e-15)
        assert other.p == pytest.approx(1 - verdict.p, abs=1e-15)
        assert (other.score_a, other.score_b) == (verdict.score_b, verdict.score_a)
        assert (other.flipped, other.truncated) == (verdict.flipped, verdict.truncated)
        swapped = {VerdictState.WIN: VerdictState.LOSE, VerdictState.LOSE: VerdictState.WIN}
        assert other.state is swapped.get(verdict.state, verdict.state)
    assert [v.comparison for v in verdicts + mirrored] == there + back
    second.close()


def test_mirroring_twice_gives_the_verdict_back() -> None:
    there = comparison("a", "b")
    verdict = make_verdict(there, 0.75, 0.625, 1.0, -2.0)
    back = replace(there, a="b", b="a")
    assert mirror(verdict, back) == make_verdict(back, 0.375, 0.25, -2.0, 1.0)
    assert mirror(mirror(verdict, back), there) == verdict


def test_keys_tell_apart_all_that_a_verdict_depends_on() -> None:
    base = comparison("a", "b")
    others = [
        replace(base, b="c"),
        replace(base, messages=(Message(role="system", content="Hi"),)),
        replace(base, messages=(*base.messages, Message(role="assistant", content=""))),
        replace(base, reference=""),
        replace(base, reference="a"),
    ]
    keys = [comparison_key("j", base), comparison_key("k", base), *(comparison_key("j", other) for other in others)]
    assert len(set(keys)) == len(keys)
    assert comparison_key("j", replace(base, a="b", b="a", uid="v", index_a=0)) == keys[0]


async def test_what_could_not_be_judged_is_tried_again(tmp_path: Path) -> None:
    judge, inner = cached(tmp_path / "v.sqlite")
    for _ in range(2):
        first, second = await judge.compare([comparison("a?", "b"), comparison("a", "b")])
        assert (first.state, second.state is VerdictState.INVALID) == (VerdictState.INVALID, False)
        assert math.isnan(first.p)
    assert inner.asked == [("a?", "b"), ("a", "b"), ("a?", "b")]


async def test_comparisons_under_way_are_judged_once(tmp_path: Path) -> None:
    judge, inner = cached(tmp_path / "v.sqlite")
    inner.gate = asyncio.Event()
    calls = [
        asyncio.create_task(judge.compare([comparison("a", "b"), comparison("b", "a")])),
        asyncio.create_task(judge.compare([comparison("b", "a", uid="v"), comparison("a", "c")])),
    ]
    await asyncio.sleep(0.01)
    calls[0].cancel()  # the others still get what it asked for
    await asyncio.sleep(0)
    inner.gate.set()
    back, other = await calls[1]
    assert inner.asked == [("a", "b"), ("a", "c")]
    assert back == mirror(verdict_of(comparison("a", "b")), comparison("b", "a", uid="v"))
    assert other == verdict_of(comparison("a", "c"))
    assert judge.hits == 2
    assert await judge.compare([comparison("a", "b")]) == [verdict_of(comparison("a", "b"))]
    assert inner.asked == [("a", "b"), ("a", "c")]


async def test_a_failure_reaches_all_who_wait_and_is_not_remembered(tmp_path: Path) -> None:
    judge, inner = cached(tmp_path / "v.sqlite")
    inner.error = RLHFError("down")
    calls = (judge.compare([comparison("a", "b")]), judge.compare([comparison("b", "a")]))
    assert [str(error) for error in await asyncio.gather(*calls, return_exceptions=True)] == ["down", "down"]
    inner.error = None
    assert await judge.compare([comparison("a", "b")]) == [verdict_of(comparison("a", "b"))]
    assert inner.asked == [("a", "b")] * 2


async def test_two_judges_share_a_file(tmp_path: Path) -> None:
    (one, _), (two, inner), (same, silent) = (cached(tmp_path / "v.sqlite", identity) for identity in "jkj")
    await one.compare([comparison("a", "b")])
    await two.compare([comparison("a", "b")])
    await same.compare([comparison("a", "b")])
    assert (inner.asked, silent.asked) == ([("a", "b")], [])


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.unit.test_judging_cache import cached, comparison

async def main():
    judge, _ = cached(Path(sys.argv[1]))
    for n in range(10**6):
        await judge.compare([comparison(f"a{n}", "b"), comparison(f"c{n}", "b")])
        print(n, flush=True)

asyncio.run(main())
"""


def test_what_was_answered_before_a_kill_is_known_after_it(tmp_path: Path) -> None:
    path = tmp_path / "v.sqlite"
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=root) as writer:
        assert writer.stdout is not None
        answered = [int(writer.stdout.readline()) for _ in range(40)][-1]
        os.kill(writer.pid, signal.SIGKILL)
    judge, inner = cached(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = [comparison(f"{side}{n}", "b") for n in range(answered + 1) for side in "ac"]
        assert asyncio.run(judge.compare(asked)) == [verdict_of(item) for item in asked]
    assert inner.asked == []


async def filled(path: Path, count: int = 400) -> list[Comparison]:
    judge, _ = cached(path)
    asked = [comparison(f"a{n}", "b" * 20) for n in range(count)]
    await judge.compare(asked)
    judge.close()
    return asked


@pytest.mark.parametrize("damage", ["not a database", "truncated", "garbled", "empty"])
async def test_a_damaged_file_is_put_aside(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "v.sqlite"
    asked = await filled(path)
    data = bytearray(path.read_bytes())
    if damage == "not a database":
        data = bytearray(b"<html>" * 2000)
    elif damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "garbled":
        data[4096:] = random.Random(0).randbytes(len(data) - 4096)
    else:
        data.clear()
    path.write_bytes(data)
    (tmp_path / "v.sqlite-journal").write_bytes(b"stale")
    alerts: list[str] = []
    inner = Counting()
    judge = CachedJudge(inner, path, "j", alerts.append)
    assert await judge.compare(asked) == [verdict_of(item) for item in asked]
    assert await judge.compare(asked) == [verdict_of(item) for item in asked]
    assert len(inner.asked) == len(asked)
    if damage != "empty":  # no bytes are a new file
        [alert] = alerts
        assert ("damaged" in alert, "\n" in alert) == (True, False)
        assert (tmp_path / "v.sqlite.damaged").read_bytes()[:6] == bytes(data[:6])
    judge.close()
    again, silent = cached(path)
    await again.compare(asked)
    assert silent.asked == []


async def test_a_verdict_that_rotted_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "v.sqlite"
    asked = await filled(path, 1)
    with sqlite3.connect(path) as connection:
        [(value,)] = connection.execute("SELECT value FROM verdicts").fetchall()
        changed = json.loads(value)
        changed[1] = 0.123
        connection.execute("UPDATE verdicts SET value = ?", (json.dumps(changed),))
    judge, inner = cached(path)
    with pytest.warns(UserWarning, match="the verdict cache is damaged .a verdict fails its checksum"):
        assert await judge.compare(asked) == [verdict_of(asked[0])]
    assert len(inner.asked) == 1


async def test_a_full_disk_costs_the_cache_only(tmp_path: Path) -> None:
    path = tmp_path / "v.sqlite"
    kept = await filled(path, 3)
    inner, alerts = Counting(), list[str]()
    judge = CachedJudge(inner, path, "j", alerts.append)
    connection = judge._store._connection
    assert connection is not None
    connection.execute("PRAGMA max_page_count = 3")
    more = [comparison(f"m{n}", "b") for n in range(400)]
    for _ in range(2):
        assert await judge.compare(more) == [verdict_of(item) for item in more]
    assert len(inner.asked) == 800
    [alert] = alerts
    assert all(word in alert for word in (str(path), "full", "uncached")), alert
    assert "\n" not in alert
    # Space again: what was kept is there, and new verdicts are kept.
    connection.execute("PRAGMA max_page_count = 100000")
    judge._store._resume_at = 0.0
    for _ in range(2):
        assert await judge.compare([*kept, *more]) == [verdict_of(item) for item in [*kept, *more]]
    assert len(inner.asked) == 1200
    assert len(alerts) == 1
    judge.close()


@pytest.mark.parametrize("when", ["at the start", "later"])
async def test_a_locked_file_neither_stops_nor_blocks(when: str, tmp_path: Path) -> None:
    path = tmp_path / "v.sqlite"
    asked = await filled(path, 10)
    inner, alerts = Counting(), list[str]()
    with sqlite3.connect(path, isolation_level=None) as other:
        judge = CachedJudge(inner, path, "j", alerts.append) if when == "later" else None
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        judge = judge or CachedJudge(inner, path, "j", alerts.append)
        for _ in range(3):
            assert await judge.compare(asked) == [verdict_of(item) for item in asked]
        assert time.monotonic() - started < 5.0
        other.execute("ROLLBACK")
    other.close()
    assert len(inner.asked) == 30
    [alert] = alerts
    assert "locked" in alert
    judge._store._resume_at = 0.0
    assert await judge.compare(asked) == [verdict_of(item) for item in asked]
    assert len(inner.asked) == 30, "the file is used again once it is free"
    judge.close()


async def test_a_file_that_cannot_be_used_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "v.sqlite").mkdir()
    with pytest.raises(sqlite3.OperationalError):
        cached(tmp_path / "v.sqlite")
    assert (tmp_path / "v.sqlite").is_dir()


@pytest.mark.parametrize(
    ("config", "changes", "same"),
    [
        (SentimentJudge(), {"scale": 2.0}, False),
        (SentimentJudge(), {"replicas": 3, "batch_size": 2, "cpus": 1, "cache": True}, True),
        (LLMJudge(type="llm", base_url="https://h/v1", model="m"), {"rubric": "Be kind."}, False),
        (LLMJudge(type="llm", base_url="https://h/v1", model="m"), {"model": "n"}, False),
        (
            LLMJudge(type="llm", base_url="https://h/v1", model="m"),
            {"concurrency": 1, "timeout_s": 1.0, "retries": 0, "max_requests": 9, "max_total_tokens": 9,
             "batch_timeout_s": 1.0, "api_key_env": "KEY"},
            True,
        ),
        (PairModelJudge(type="pair_model", path="org/model"), {"path": "org/other"}, False),
        (PairModelJudge(type="pair_model", path="org/model"), {"max_length": 99}, False),
    ],
)  # fmt: skip
def test_identity_is_what_changes_verdicts(config: PooledJudge, changes: dict[str, object], same: bool) -> None:
    changed = type(config).model_validate(config.model_dump() | changes)
    assert (judge_identity(changed) == judge_identity(config)) is same


def test_identity_follows_the_model_not_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1234")
    config = PairModelJudge(type="pair_model", path=str(folder))
    before = judge_identity(config)
    folder.rename(tmp_path / "two")
    moved = PairModelJudge(type="pair_model", path=str(tmp_path / "two"))
    assert judge_identity(moved) == before
    (tmp_path / "two" / "README.md").write_text("words")
    assert judge_identity(moved) == before
    (tmp_path / "two" / "config.json").write_text("[]")
    edited = judge_identity(moved)
    weights = tmp_path / "two" / "model.safetensors"
    weights.write_bytes(b"5678")  # as large, trained anew
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert len({before, edited, judge_identity(moved)}) == 3
    (tmp_path / "two" / "adapter.json").write_text("{}")
    assert folder_fingerprint(tmp_path / "two") not in judge_identity(config)
