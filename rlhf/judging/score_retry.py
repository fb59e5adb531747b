"""Judges again the invalid lines of a scored file, after an endpoint came back, say."""

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from rlhf.errors import InputError
from rlhf.files import rename_durable
from rlhf.judging.health import check_valid_share
from rlhf.judging.identical import differs
from rlhf.judging.score_file import ScoreJob, lock
from rlhf.judging.score_lines import Line, Tally, as_jsonl, make_results, read_lines
from rlhf.judging.stream import CHUNK, judge_chunks
from rlhf.judging.verdicts import invalid_verdict
from rlhf.ports import Judge
from rlhf.records import Comparison, Verdict, VerdictState


@dataclass(frozen=True, slots=True)
class _Written:
    """A line of the output as it is, beside the line of the input that it stands for."""

    raw: bytes
    result: dict[str, Any]
    line: Line

    @property
    def again(self) -> Comparison | None:
        """The comparison if it is to be judged again; a bad line of the input stays what it is."""
        invalid = self.result["state"] == VerdictState.INVALID
        return self.line.comparison if invalid and isinstance(self.line.comparison, Comparison) else None


def written_tally(job: ScoreJob) -> Tally:
    """The lines that are in the output."""
    tally = Tally()
    for item in _written_lines(job):
        tally.add(item.result)
    return tally


def count_again(job: ScoreJob) -> int:
    """How many lines `retry_invalid` judges again."""
    return sum(item.again is not None for item in _written_lines(job))


async def retry_invalid(
    judge: Judge, job: ScoreJob, advance: Callable[[int], None], *, min_valid: float = 0.0, chunk: int = CHUNK
) -> Tally:
    """Judge the output's invalid lines again and count what became of them; all other lines stay byte for byte.

    The new output is written beside the old one and takes its place at the end, whole: until then a stop of any kind
    leaves the old one. `advance` is told how many more lines were judged again. Memory as in `score`.

    Raises `RLHFError`, and leaves the output as it is, where less than `min_valid` of the comparisons among `chunk`
    lines would be valid.
    """
    tally = Tally()
    waiting: deque[list[_Written]] = deque()

    def chunks() -> Iterator[list[Comparison]]:
        lines = _written_lines(job)
        while part := list(islice(lines, chunk)):
            waiting.append(part)
            yield [item.again for item in part if item.again is not None]

    staged = job.output.with_name(job.output.name + ".retry")
    # The new file is locked before it takes the old one's place, so that the output is never without a lock.
    new = job.held.enter_context(staged.open("wb"))
    lock(new, job.output)
    try:
        async with aclosing(judge_chunks(judge, chunks())) as judged:
            async for verdicts in judged:
                part = waiting.popleft()
                _check_share(part, verdicts, min_valid, job)
                again = [item.line for item in part if item.again is not None]
                results = make_results(again, verdicts)
                await asyncio.to_thread(_write, new, part, results)
                for result in results:
                    tally.add(result)
                advance(len(results))
        new.flush()
        os.fsync(new.fileno())
        rename_durable(staged, job.output)
    finally:
        staged.unlink(missing_ok=True)
    return tally


def _written_lines(job: ScoreJob) -> Iterator[_Written]:
    lines = read_lines(job.input, 0, skip_bad=True)
    with job.output.open("rb") as stream:
        for raw, line in zip(stream, lines, strict=False):
            result = _parse(raw)
            if result.get("line") != line.number or result.get("state") not in set(VerdictState):
                raise InputError(
                    f"--output {job.output}: its line for line {line.number} of the input was changed; remove it with "
                    "its .meta.json, or give another --output"
                )
            yield _Written(raw, result, line)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        result = json.loads(raw)
    except ValueError:
        return {}
    return result if isinstance(result, dict) else {}


def _check_share(part: list[_Written], verdicts: list[Verdict], min_valid: float, job: ScoreJob) -> None:
    """Hold a chunk as it would be written to the share that it would have had to reach at first."""
    judged = iter(verdicts)
    whole = [next(judged) if item.again is not None else _old(item) for item in part]
    where = f"--input {job.input}: up to line {part[-1].line.number}"
    check_valid_share([verdict for verdict in whole if verdict and differs(verdict.comparison)], min_valid, where)


def _old(item: _Written) -> Verdict | None:
    """What stands in the output, as far as it counts for the share; None for a bad line, which is no comparison."""
    if not isinstance(item.line.comparison, Comparison):
        return None
    state = VerdictState(item.result["state"])
    if state is VerdictState.INVALID:
        return invalid_verdict(item.line.comparison, str(item.result.get("reason")))
    return Verdict(item.line.comparison, 0.5, 0.5, state)


def _write(new: IO[bytes], part: list[_Written], results: list[dict[str, Any]]) -> None:
    fresh = iter(results)
    for item in part:
        new.write(item.raw if item.again is None else as_jsonl([next(fresh)]))
