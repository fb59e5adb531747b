"""Scores a JSONL of comparisons line by line into another one; a restart goes on where the output ends."""

import asyncio
import fcntl
import gzip
import hashlib
import json
import math
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rlhf.data.preferences import alternates, read_prompt
from rlhf.data.prompts import content_hash
from rlhf.errors import InputError
from rlhf.files import write_json
from rlhf.judging.stream import CHUNK, judge_chunks
from rlhf.ports import Judge
from rlhf.records import Comparison, Verdict, VerdictState

OUTPUT_KEYS = ("line", "state", "p", "p_ab", "p_ba", "score_a", "score_b", "truncated", "reason")
_ADVICE = "remove it with its .meta.json, or give another --output"
_HEAD = 1 << 20  # bytes of the input that its fingerprint covers


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """A checked input and an output that ends with a whole line.

    `total` counts the input's lines that are not blank and `bad` those of them that are left and cannot be read;
    `done` counts the lines of the output, which stand for the input up to line `last_line`.
    """

    input: Path
    output: Path
    skip_bad: bool
    total: int
    bad: int
    done: int
    last_line: int


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of the input: its number from 1, its fields, and the comparison or why there is none."""

    number: int
    fields: dict[str, Any]
    comparison: Comparison | str


@contextmanager
def open_job(input: Path, output: Path, identity: str, *, skip_bad: bool = False) -> Iterator[ScoreJob]:
    """Check the whole input and take up an output that an earlier start left, cutting off a torn last line.

    `identity` names the judge: equal identities give equal verdicts. `OUTPUT.meta.json` keeps it beside a fingerprint
    of the input (its size and the SHA-256 of its first MiB). The output is locked until the block ends.

    Raises `InputError` where the input is no file or a line of it is bad (unless `skip_bad`), and where the output
    belongs to another input or judge, was not written here, or is being written by another process.
    """
    _check_paths(input, output)
    meta = output.with_name(output.name + ".meta.json")
    belongs = {"input": _fingerprint(input), "judge": identity}
    if output.exists() and output.stat().st_size:
        _check_same(output, meta, belongs)
    _, last_line, _ = _written(output)
    before, left, bad = _check_input(input, last_line, skip_bad)
    with output.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--output {output}: another process writes it; wait for it or give another file"
            ) from None
        done, same_line, end = _written(output)
        if done != before or same_line != last_line:
            raise InputError(f"--output {output}: its {done} lines do not fit the input's; {_ADVICE}")
        os.truncate(output, end)
        write_json(meta, belongs)
        yield ScoreJob(input, output, skip_bad, before + left, bad, done, last_line)


async def score(judge: Judge, job: ScoreJob, advance: Callable[[int], None], chunk: int = CHUNK) -> dict[str, int]:
    """Score what `job` has left and append it, flushed to disk a chunk at a time; the number of lines by state.

    Each output line holds the input's fields and `OUTPUT_KEYS`: the verdict as in `Verdict` (null for a number that
    does not exist) and the input's line number. Memory is bounded by the chunks under way. `advance` is told how many
    more lines are on disk. Raises `InputError` for a bad line, unless the job skips them.
    """
    counts: Counter[str] = Counter()
    waiting: deque[list[_Line]] = deque()

    def chunks() -> Iterator[list[Comparison]]:
        lines = _read_lines(job.input, job.last_line, job.skip_bad)
        while part := list(islice(lines, chunk)):
            waiting.append(part)
            yield [line.comparison for line in part if isinstance(line.comparison, Comparison)]

    with job.output.open("ab") as output:
        async with aclosing(judge_chunks(judge, chunks())) as judged:
            async for verdicts in judged:
                results = _results(waiting.popleft(), verdicts)
                await asyncio.to_thread(_append, output, results)
                counts.update(result["state"] for result in results)
                advance(len(results))
    return {state.value: counts[state.value] for state in VerdictState}


def _results(lines: Sequence[_Line], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Output objects of a chunk; `verdicts` are those of its good lines."""
    judged = iter(verdicts)
    return [
        _result(line, next(judged)) if isinstance(line.comparison, Comparison) else _bad_result(line) for line in lines
    ]


def _result(line: _Line, verdict: Verdict) -> dict[str, Any]:
    return line.fields | {
        "line": line.number,
        "state": verdict.state.value,
        "p": _number(verdict.p),
        "p_ab": _number(verdict.p_ab),
        "p_ba": _number(verdict.p_ba),
        "score_a": _number(verdict.score_a),
        "score_b": _number(verdict.score_b),
        "truncated": verdict.truncated,
        "reason": verdict.reason,
    }


def _bad_result(line: _Line) -> dict[str, Any]:
    reason = f"bad line: {line.comparison}"
    nothing = dict.fromkeys(OUTPUT_KEYS)
    return nothing | {"line": line.number, "state": VerdictState.INVALID.value, "truncated": False, "reason": reason}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _append(output: IO[bytes], results: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    # Half of a surrogate pair in a field that is only kept goes back to the escape it came from.
    output.write(text.encode("utf-8", "backslashreplace"))
    output.flush()
    os.fsync(output.fileno())


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _read_lines(path: Path, after: int, skip_bad: bool) -> Iterator[_Line]:
    """The lines after line number `after` that are not blank; a bad one raises `InputError` unless it is skipped."""
    with _open(path) as stream:
        try:
            for number, raw in enumerate(stream, 1):
                if number <= after or not raw.strip():
                    continue
                line = _parse(number, raw)
                if isinstance(line.comparison, str) and not skip_bad:
                    raise InputError(
                        f"--input {path}: line {number}: {line.comparison}; repair it, or use --skip-bad to write it "
                        "as invalid"
                    )
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"--input {path}: cannot be unpacked: {error}; repair the file") from error


def _parse(number: int, raw: bytes) -> _Line:
    try:
        # utf-8-sig: spreadsheet programs start their files with a byte-order mark.
        fields = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_no_number)
    except ValueError as error:  # of the decoder or of json
        return _Line(number, {}, f"not JSON: {error}")
    if not isinstance(fields, dict):
        return _Line(number, {}, f"a {type(fields).__name__} where an object of prompt, a and b is due")
    return _Line(number, fields, _comparison(fields))


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _comparison(fields: dict[str, Any]) -> Comparison | str:
    """The comparison of a line, or what is wrong with it."""
    if taken := [key for key in OUTPUT_KEYS if key in fields]:
        return f"the key {taken[0]!r} is needed for the output; rename it"
    if missing := [key for key in ("prompt", "a", "b") if key not in fields]:
        return f"no key {missing[0]!r}"
    if wrong := [key for key in ("a", "b") if not isinstance(fields[key], str)]:
        return f"{wrong[0]!r} is a {type(fields[wrong[0]]).__name__}, not text"
    messages = read_prompt(fields["prompt"])
    if messages is None:
        return "'prompt' is neither text nor a list of {role, content}"
    if not alternates(messages) or not all(turn["content"].strip() for turn in messages):
        return "'prompt' has to take turns of user and assistant, none empty, up to a last user turn"
    if not all(map(_is_unicode, (fields["a"], fields["b"], *(turn["content"] for turn in messages)))):
        return "a text holds half of a surrogate pair, which is no character"
    reference = fields.get("reference")
    return Comparison(
        uid=content_hash(messages),
        messages=messages,
        a=fields["a"],
        b=fields["b"],
        reference=None if reference is None else str(reference),
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_paths(input: Path, output: Path) -> None:
    if not input.is_file():
        raise InputError(f"--input {input}: no such file; give a JSONL file of prompt, a and b")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: no such folder {output.parent}; create it first")
    if output.is_dir() or (output.exists() and output.samefile(input)):
        raise InputError(f"--output {output}: this is the input or a folder; give another file")


def _check_input(path: Path, after: int, skip_bad: bool) -> tuple[int, int, int]:
    """Lines that are not blank up to line `after`, those behind it, and how many of the latter are bad."""
    with _open(path) as stream:
        before = sum(bool(raw.strip()) for raw in islice(stream, after))
    left = bad = 0
    for line in _read_lines(path, after, skip_bad):
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
