"""Checks an answer against the prompt's reference: GSM8K's final number, the same text, or a pattern's match."""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from rlhf.config.judge import VerifierJudge as VerifierConfig
from rlhf.errors import InputError
from rlhf.judging.pointwise import Answer, Score, compare_by_score
from rlhf.records import Comparison, Verdict

# Digits with or without thousands separators, then decimals; a sign or a dollar in front, in either order.
_NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z)\]}])-\$?|\$-)?"
    r"(?P<digits>(?<![0-9.])\.[0-9]+|(?:(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|(?<![0-9])[0-9]+)(?:\.[0-9]+)?)"
)
_LATEX = ((r"{,}", ","), (r"\,", ""), (r"\!", ""), (r"\$", "$"), ("−", "-"))

Check = Callable[[str, str], bool]


class VerifierJudge:
    """Scores 1 for the right answer and 0 for a wrong or unreadable one; the right one wins, two alike tie.

    A reference that is missing or cannot be read makes the verdict INVALID: nothing is known of either response.
    """

    def __init__(self, config: VerifierConfig) -> None:
        """Raises `InputError` if `judge.pattern` is no regular expression."""
        self._config = config
        self._pattern = _compile(config)

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order."""
        return await compare_by_score(comparisons, self._scores, lambda a, b: 0.5 * (1.0 + a - b))

    async def _scores(self, answers: Sequence[Answer]) -> list[Score]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> Score:
        if answer.reference is None:
            return Score(None, "cannot be checked: the prompt has no reference")
        expected: object
        found: object
        if self._config.method == "gsm8k":
            expected, found = reference_number(answer.reference), last_number(answer.response)
        else:
            expected, found = self._text(answer.reference) or None, self._given(answer.response)
        if expected is None:
            return Score(None, f"cannot be checked: no answer in the reference {answer.reference[:40]!r}")
        return Score(1.0 if found == expected else 0.0)

    def _given(self, response: str) -> str | None:
        """The answer in a response; None where the pattern matches nowhere."""
        if self._pattern is None:
            return self._text(response)
        matches = list(self._pattern.finditer(response))
        found = matches[-1].group(1 if self._pattern.groups else 0) if matches else None
        return None if found is None else self._text(found)

    def _text(self, text: str) -> str:
        words = " ".join(text.split())
        return words.casefold() if self._config.ignore_case else words


def last_number(text: str) -> Decimal | None:
    """The last number of a text: `1,234`, `$12.50`, `-3`, `7.` and `\\boxed{8}` are numbers; None if there is none."""
    for written, plain in _LATEX:
        text = text.replace(written, plain)
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    value = Decimal(matches[-1]["digits"].replace(",", ""))
    return value.copy_negate() if matches[-1]["sign"] else value


def reference_number(text: str) -> Decimal | None:
    """The number after the last `####`, as GSM8K's answers end; the last number of a text without that mark."""
    return last_number(text.rpartition("####")[2])


def _compile(config: VerifierConfig) -> re.Pattern[str] | None:
    if config.pattern is None:
        return None
    try:
        return re.compile(config.pattern, re.IGNORECASE if config.ignore_case else 0)
    except re.error as error:
        raise InputError(f"judge.pattern = {config.pattern!r}: no regular expression: {error}; repair it") from error
