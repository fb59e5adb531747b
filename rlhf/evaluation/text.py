"""Plain statistics of responses: how long and how varied."""

from collections.abc import Sequence
from itertools import pairwise


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all word bigrams of all texts (Li et al., 2016); words are split at whitespace.

    1.0 is no repetition; 0.0 where no text has two words.
    """
    bigrams = [bigram for text in texts for bigram in pairwise(text.split())]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def mean_length(responses: Sequence[Sequence[int]]) -> float:
    """Mean number of tokens; 0.0 for no responses."""
    return sum(map(len, responses)) / len(responses) if responses else 0.0
