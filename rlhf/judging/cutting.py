"""Cutting a text from the left until it fits a judge, without encoding more of it than is needed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

CHARS_PER_TOKEN = 4
"""First guess of how much fits; a wrong one costs a few more encodings."""


def max_chars(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> int:
    """Characters that `max_length` tokens can stand for at most: a longer text need not be encoded to be refused.

    A tokenizer that makes one token of any run of blanks could take more; such a text is cut before its time.
    """
    return max_length * max(map(len, tokenizer.get_vocab()))


def longest_end(length: int, guess: int, attempt: Callable[[int], T | None]) -> T | None:
    """What `attempt(keep)` gives for the largest `keep` up to `length` at which it gives anything; None if 0 does not.

    `attempt` is taken to succeed up to some `keep` and to fail beyond it. The search goes up from `guess` by doubling
    and then bisects, so `keep` is never more than twice of what fits, or `guess`. It is a search over characters,
    since the tokens of a cut text are not the tail of the whole text's tokens.
    """
    best = attempt(0)
    if best is None or length == 0:
        return best
    good, bad, keep = 0, length + 1, min(max(guess, 1), length)
    while bad - good > 1:
        result = attempt(keep)
        if result is None:
            bad = keep
        else:
            best, good = result, keep
        keep = min(2 * keep, length) if bad > length else (good + bad) // 2
    return best
