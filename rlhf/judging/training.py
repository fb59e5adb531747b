"""From preference examples to the rows that a pair-preference judge is trained on (METHODS §1).

A row is a `Pair` whose prompt is the judge's prompt and whose responses are the single tokens `A` and `B`, the right
one chosen. The learner that trains policies trains judges too: its log-probs cover response tokens only, so the loss
is on the answer alone and padding has no part in it.
"""

from collections.abc import Sequence

import numpy as np

from rlhf.data.preferences import PreferenceExample
from rlhf.judging.pair_prompt import PairPrompt, format_context
from rlhf.records import Comparison, Pair
from rlhf.seeds import derive_seed


def comparison(example: PreferenceExample) -> Comparison:
    """The chosen response as A against the rejected one as B."""
    return Comparison(example.uid, example.messages, example.chosen, example.rejected)


def encode_orders(example: PreferenceExample, prompt: PairPrompt) -> list[list[int]] | None:
    """Token ids with the chosen response first, then with it second; a long context is cut from the left.

    None where the responses alone are too long or a text spells out a control token.
    """
    item = comparison(example)
    if prompt.control_token(item):
        return None
    orders = prompt.encode_orders(item, format_context(item.messages))
    return orders if prompt.fits(orders) else prompt.truncate(item)


def answer_rows(uid: str, orders: Sequence[Sequence[int]], answers: tuple[int, int], round: int) -> tuple[Pair, Pair]:
    """Both rows of an example: the chosen response first (answer `A`), then second (answer `B`)."""

    def row(order: int) -> Pair:
        return Pair(
            uid=f"{uid}-{'ab'[order]}",
            round=round,
            prompt_ids=tuple(orders[order]),
            chosen_ids=(answers[order],),
            rejected_ids=(answers[1 - order],),
            prompt="",
            chosen="AB"[order],
            rejected="BA"[order],
            p_chosen=1.0,
            chosen_version=round - 1,
            rejected_version=round - 1,
        )

    return row(0), row(1)


class JudgeRows:
    """The training rows of all epochs, cut into segments of a fixed number of optimizer steps.

    The order of an epoch and the side of each pair are drawn from the seed, so a segment is the same whenever it is
    asked for.
    """

    def __init__(
        self,
        examples: Sequence[PreferenceExample],
        prompt: PairPrompt,
        *,
        both_orders: bool,
        seed: int,
        epochs: int,
        batch_size: int,
        steps: int,
    ) -> None:
        """`batch_size` rows a step, `steps` steps a segment; `dropped` counts the examples that cannot be judged."""
        encoded = [(example.uid, encode_orders(example, prompt)) for example in examples]
        self._usable = [(uid, orders) for uid, orders in encoded if orders is not None]
        self.dropped = len(encoded) - len(self._usable)
        self._answers = prompt.answer_ids
        self._both = both_orders
        self._seed = seed
        self._epochs = epochs
        self._per_segment = steps * (batch_size // 2 if both_orders else batch_size)

    def __len__(self) -> int:
        """Usable examples."""
        return len(self._usable)

    @property
    def segments(self) -> int:
        """Number of segments over all epochs."""
        return -(-len(self._usable) * self._epochs // self._per_segment)

    def segment(self, round: int) -> list[Pair]:
        """Rows of segment `round` (from 1) in training order; with both orders, an example's two rows are neighbours.

        Their uids begin with their place, which keeps the order in a sealed file.
        """
        size = len(self._usable)
        start = (round - 1) * self._per_segment
        rows: list[Pair] = []
        for place in range(start, min(start + self._per_segment, size * self._epochs)):
            epoch, offset = divmod(place, size)
            uid, orders = self._usable[self._order(epoch)[offset]]
            both = answer_rows(f"{place:08d}-{uid}", orders, self._answers, round)
            rows += both if self._both else [both[derive_seed(self._seed, "side", uid, epoch) % 2]]
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._usable))
