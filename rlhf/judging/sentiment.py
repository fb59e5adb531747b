"""Prefers the more positive response: VADER's compound score (Hutto and Gilbert, 2014), no model and no GPU."""

from collections.abc import Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf.config.judge import SentimentJudge as SentimentConfig
from rlhf.judging.verdicts import invalid_verdict, make_verdict, sigmoid
from rlhf.records import Comparison, Verdict


class SentimentJudge:
    """p(A wins) = sigmoid(scale * (score(A) - score(B))), scores in [-1, 1]; it sees no order, so p_ab = p_ba."""

    def __init__(self, config: SentimentConfig) -> None:
        self._scale = config.scale
        self._analyzer = SentimentIntensityAnalyzer()

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order. A blank response has no sentiment: INVALID."""
        texts = {text for comparison in comparisons for text in (comparison.a, comparison.b)}
        scores = {text: self._score(text) for text in texts}
        return [self._verdict(comparison, scores[comparison.a], scores[comparison.b]) for comparison in comparisons]

    def _score(self, text: str) -> float | None:
        return float(self._analyzer.polarity_scores(text)["compound"]) if text.strip() else None

    def _verdict(self, comparison: Comparison, score_a: float | None, score_b: float | None) -> Verdict:
        if score_a is None or score_b is None:
            blank = "A" if score_a is None else "B"
            return invalid_verdict(comparison, f"response {blank} is blank", score_a, score_b)
        p = sigmoid(self._scale * (score_a - score_b))
        return make_verdict(comparison, p, p, score_a, score_b)
