"""Scores a JSONL of comparisons line by line into another one; a restart goes on where the output ends."""

import asyncio
import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rlhf.errors import InputError
from rlhf.files import write_json
from rlhf.judging.health import check_valid_share
from rlhf.judging.identical import differs
from rlhf.judging.score_lines import Line, Tally, as_jsonl, make_results, open_lines, read_lines
from rlhf.judging.stream import CHUNK, judge_chunks
from rlhf.ports import Judge
from rlhf.records import Comparison, Verdict

_ADVICE = "remove it with its .meta.json, or give another --output"
_HEAD = 1 << 20  # bytes of the input that its fingerprint covers


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """A checked input and an output that ends with a whole line.

    `total` counts the input's lines that are not blank and `bad` those of them that are left and cannot be read;
    `done` counts the lines of the output, which stand for the input up to line `last_line`. `held` keeps the output's
    lock until the job ends.
    """

    input: Path
    output: Path
    skip_bad: bool
    total: int
    bad: int
    done: int
    last_line: int
    held: ExitStack = field(repr=False, compare=False)


@contextmanager
def open_job(input: Path, output: Path, identity: str, *, skip_bad: bool = False) -> Iterator[ScoreJob]:
    """Check the whole input and take up an output that an earlier start left, cutting off a torn last line.

    `identity` names the judge: equal identities give equal verdicts. `OUTPUT.meta.json` keeps its SHA-256 beside a
    fingerprint of the input (its size and the SHA-256 of its first MiB). The output is locked until the block ends.

    Raises `InputError` where the input is no file or a line of it is bad (unless `skip_bad`), and where the output
    belongs to another input or judge, was not written here, or is being written by another process.
    """
    _check_paths(input, output)
    meta = output.with_name(output.name + ".meta.json")
    belongs = {"input": _fingerprint(input), "judge": f"sha256:{hashlib.sha256(identity.encode()).hexdigest()}"}
    if output.exists() and output.stat().st_size:
        _check_same(output, meta, belongs)
    _, last_line, _ = _written(output)
    before, left, bad = _check_input(input, last_line, skip_bad)
    with ExitStack() as held:
        lock(held.enter_context(output.open("ab")), output)
        done, same_line, end = _written(output)
        if done != before or same_line != last_line:
            raise InputError(f"--output {output}: its {done} lines do not fit the input's; {_ADVICE}")
        os.truncate(output, end)
        write_json(meta, belongs)
        yield ScoreJob(input, output, skip_bad, before + left, bad, done, last_line, held)


def lock(file: IO[bytes], output: Path) -> None:
    """Lock an open file of the output until it is closed; raises `InputError` if another process writes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--output {output}: another process writes it; wait for it or give another file") from None


async def score(
    judge: Judge, job: ScoreJob, advance: Callable[[int], None], *, min_valid: float = 0.0, chunk: int = CHUNK
) -> Tally:
    """Score what `job` has left and append it, flushed to disk a chunk at a time; the lines written are counted.

    Each output line holds the input's fields and `OUTPUT_KEYS`: the verdict as in `Verdict` (null for a number that
    does not exist) and the input's line number. Memory is bounded by the chunks under way. `advance` is told how many
    more lines are on disk.

    Raises `RLHFError`, and writes nothing of the chunk, where less than `min_valid` of the last `chunk` comparisons
    that the judge was asked about are valid: a judge that is down must not leave a file full of invalid lines.
    Raises `InputError` for a bad line, unless the job skips them.
    """
    tally = Tally()
    waiting: deque[list[Line]] = deque()
    # A last chunk that is short is seen together with the end of the one before it.
    recent: deque[Verdict] = deque(maxlen=chunk)

    def chunks() -> Iterator[list[Comparison]]:
        lines = read_lines(job.input, job.last_line, job.skip_bad)
        while part := list(islice(lines, chunk)):
            waiting.append(part)
            yield [line.comparison for line in part if isinstance(line.comparison, Comparison)]

    with job.output.open("ab") as output:
        async with aclosing(judge_chunks(judge, chunks())) as judged:
            async for verdicts in judged:
                lines = waiting.popleft()
                recent.extend(verdict for verdict in verdicts if differs(verdict.comparison))
                where = f"--input {job.input}: up to line {lines[-1].number}"
                check_valid_share(list(recent), min_valid, where)
                results = make_results(lines, verdicts)
                await asyncio.to_thread(_append, output, as_jsonl(results))
                for result in results:
                    tally.add(result)
                advance(len(results))
    return tally


def _append(output: IO[bytes], lines: bytes) -> None:
    output.write(lines)
    output.flush()
    os.fsync(output.fileno())


def _check_paths(input: Path, output: Path) -> None:
    if not input.is_file():
        raise InputError(f"--input {input}: no such file; give a JSONL file of prompt, a and b")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: no such folder {output.parent}; create it first")
    if output.is_dir() or (output.exists() and output.samefile(input)):
        raise InputError(f"--output {output}: this is the input or a folder; give another file")


def _check_input(path: Path, after: int, skip_bad: bool) -> tuple[int, int, int]:
    """Lines that are not blank up to line `after`, those behind it, and how many of the latter are bad."""
    with open_lines(path) as stream:
        before = sum(bool(raw.strip()) for raw in islice(stream, after))
    left = bad = 0
    for line in read_lines(path, after, skip_bad):
        left += 1
        bad += isinstance(line.comparison, str)
    if not before + left:
        raise InputError(f"--input {path}: there is nothing in it; give one JSON object of prompt, a and b a line")
    return before, left, bad


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_HEAD)).hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256_of_first_mib": digest}


def _written(output: Path) -> tuple[int, int, int]:
    """Whole lines of the output, the input line of the last one, and the bytes they take."""
    count, end, last = 0, 0, b""
    if output.exists():
        with output.open("rb") as stream:
            for raw in stream:
                if raw.endswith(b"\n"):
                    count, end, last = count + 1, end + len(raw), raw
    if not count:
        return 0, 0, 0
    try:
        return count, int(json.loads(last)["line"]), end
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--output {output}: line {count} was not written by this command; {_ADVICE}") from error


def _check_same(output: Path, meta: Path, belongs: dict[str, Any]) -> None:
    """Refuse an output that another input or judge began."""
    if not meta.is_file():
        raise InputError(f"--output {output}: it has no {meta.name}, so it was not written by this command; {_ADVICE}")
    try:
        found = json.loads(meta.read_text(encoding="utf-8"))
        there, judge = {**found["input"], "name": ""}, found["judge"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--output {output}: {meta.name} cannot be read; {_ADVICE}") from error
    # The input may have been moved; its content counts.
    if there != {**belongs["input"], "name": ""}:
        raise InputError(f"--output {output}: it belongs to another input, or the input has changed; {_ADVICE}")
    if judge != belongs["judge"]:
        raise InputError(f"--output {output}: it was scored by another judge; {_ADVICE}")
