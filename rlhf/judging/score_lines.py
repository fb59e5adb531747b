"""The lines of a scored file: reading those of the input, making those of the output, counting them."""

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rlhf.data.preferences import alternates, read_prompt
from rlhf.data.prompts import content_hash
from rlhf.errors import InputError
from rlhf.records import Comparison, Verdict, VerdictState

OUTPUT_KEYS = ("line", "state", "p", "p_ab", "p_ba", "score_a", "score_b", "truncated", "reason")
_REASONS = 1000  # distinct ones that are counted: a judge may put a number of its own into each
_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input: its number from 1, its fields, and the comparison or why there is none."""

    number: int
    fields: dict[str, Any]
    comparison: Comparison | str


@dataclass(slots=True)
class Tally:
    """Output lines by state, why those that are invalid are, and how many stand for a bad line of the input."""

    states: "Counter[str]" = field(default_factory=Counter)
    reasons: "Counter[str]" = field(default_factory=Counter)
    bad: int = 0

    def add(self, result: dict[str, Any]) -> None:
        """Count an output line."""
        self.states[result["state"]] += 1
        self.bad += "prompt" not in result
        if result["state"] == VerdictState.INVALID:
            reason = " ".join(str(result["reason"]).split())[:_REASON_CHARS] or "none given"
            if reason in self.reasons or len(self.reasons) < _REASONS:
                self.reasons[reason] += 1

    def __str__(self) -> str:
        return ", ".join(f"{count} {state}" for state, count in self.counts.items())

    @property
    def counts(self) -> dict[str, int]:
        """Lines of each state, in the order of `VerdictState`."""
        return {state.value: self.states[state.value] for state in VerdictState}

    @property
    def total(self) -> int:
        """Lines counted."""
        return self.states.total()

    @property
    def invalid(self) -> int:
        """Invalid lines counted."""
        return self.states[VerdictState.INVALID.value]

    def common_reason(self) -> str:
        """The most frequent reason of invalid lines and how often it came; empty without any."""
        if not self.reasons:
            return ""
        reason, count = self.reasons.most_common(1)[0]
        return f"most frequent reason ({count} times): {reason}"


def open_lines(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where it is a .gz."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def read_lines(path: Path, after: int, skip_bad: bool) -> Iterator[Line]:
    """The lines after line number `after` that are not blank; a bad one raises `InputError` unless it is skipped."""
    with open_lines(path) as stream:
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


def _parse(number: int, raw: bytes) -> Line:
    try:
        # utf-8-sig: spreadsheet programs start their files with a byte-order mark.
        fields = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_no_number)
    except ValueError as error:  # of the decoder or of json
        return Line(number, {}, f"not JSON: {error}")
    if not isinstance(fields, dict):
        return Line(number, {}, f"a {type(fields).__name__} where an object of prompt, a and b is due")
    return Line(number, fields, _comparison(fields))


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


def make_results(lines: Sequence[Line], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Output objects of a chunk; `verdicts` are those of its good lines."""
    judged = iter(verdicts)
    return [
        _result(line, next(judged)) if isinstance(line.comparison, Comparison) else _bad_result(line) for line in lines
    ]


def _result(line: Line, verdict: Verdict) -> dict[str, Any]:
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


def _bad_result(line: Line) -> dict[str, Any]:
    reason = f"bad line: {line.comparison}"
    nothing = dict.fromkeys(OUTPUT_KEYS)
    return nothing | {"line": line.number, "state": VerdictState.INVALID.value, "truncated": False, "reason": reason}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def as_jsonl(results: Sequence[dict[str, Any]]) -> bytes:
    """Output objects as lines."""
    text = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    # Half of a surrogate pair in a field that is only kept goes back to the escape it came from.
    return text.encode("utf-8", "backslashreplace")
