"""Prefers the more positive response: VADER's compound score (Hutto and Gilbert, 2014), no model and no GPU."""

from collections.abc import Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf.config.judge import SentimentJudge as SentimentConfig
from rlhf.judging.pointwise import Answer, Score, bradley_terry, compare_by_score
from rlhf.records import Comparison, Verdict


class SentimentJudge:
    """p(A wins) = sigmoid(scale * (score(A) - score(B))), scores in [-1, 1]; it sees no order, so p_ab = p_ba."""

    def __init__(self, config: SentimentConfig) -> None:
        self._probability = bradley_terry(config.scale)
        self._analyzer = SentimentIntensityAnalyzer()

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order. A blank response has no sentiment: INVALID."""
        return await compare_by_score(comparisons, self._scores, self._probability)

    async def _scores(self, answers: Sequence[Answer]) -> list[Score]:
        return [self._score(answer.response) for answer in answers]

    def _score(self, text: str) -> Score:
        if not text.strip():
            return Score(None, "is blank")
        return Score(float(self._analyzer.polarity_scores(text)["compound"]))
