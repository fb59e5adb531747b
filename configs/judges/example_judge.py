"""A judge of one's own: `judge: {type: python, function: configs.judges.example_judge:brevity}`."""

from collections.abc import Sequence


def brevity(messages: Sequence[dict[str, str]], response: str, reference: str | None, words: int = 30) -> float:
    """Best at `words` words, worse by one for each word more or less; an empty response is the worst."""
    count = len(response.split())
    return -float(abs(count - words)) if count else -1000.0
