"""From preference examples to the rows that a pair-preference judge is trained on (METHODS §1).

A row is a `Pair` whose prompt is the judge's prompt and whose responses are the single tokens `A` and `B`, the right
one chosen. The learner that trains policies trains judges too: its log-probs cover response tokens only, so the loss
is on the answer alone and padding has no part in it.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rlhf.data.preferences import PreferenceExample
from rlhf.judging.pair_prompt import PairPrompt, format_context
from rlhf.records import Comparison, Pair
from rlhf.seeds import derive_seed


def comparison(example: PreferenceExample) -> Comparison:
    """The chosen response as A against the rejected one as B."""
    return Comparison(example.uid, example.messages, example.chosen, example.rejected)


def encode_examples(examples: Sequence[PreferenceExample], prompt: PairPrompt) -> list[list[list[int]] | None]:
    """Token ids of each example with the chosen response first and with it second; a long context is cut from the left.

    None where the responses alone are too long or a text spells out a control token. One call of the tokenizer for
    all that fit.
    """
    items = [comparison(example) for example in examples]
    usable = [item for item in items if prompt.control_token(item) is None]
    texts = [
        prompt.render(format_context(item.messages), first, second)
        for item in usable
        for first, second in ((item.a, item.b), (item.b, item.a))
    ]
    ids = prompt.encode(texts) if texts else []
    orders = {item.uid: ids[2 * place : 2 * place + 2] for place, item in enumerate(usable)}

    def fitting(item: Comparison) -> list[list[int]] | None:
        found = orders.get(item.uid)
        return found if found is None or prompt.fits(found) else prompt.truncate(item)

    return [fitting(item) for item in items]


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
    asked for. Nothing is encoded before its segment is due.
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
        """`batch_size` rows a step, `steps` steps a segment."""
        self._examples = examples
        self._prompt = prompt
        self._both = both_orders
        self._seed = seed
        self._epochs = epochs
        self._per_segment = steps * (batch_size // 2 if both_orders else batch_size)

    @property
    def segments(self) -> int:
        """Number of segments over all epochs."""
        return -(-len(self._examples) * self._epochs // self._per_segment)

    def segment(self, round: int) -> tuple[list[Pair], int]:
        """Rows of segment `round` (from 1) in training order, and how many examples could not be judged.

        With both orders an example's two rows are neighbours. Uids begin with their place, which keeps the order in
        a sealed file.
        """
        size, start = len(self._examples), (round - 1) * self._per_segment
        orders = lru_cache(self._order)  # a segment touches one or two epochs
        places = [
            (place, place // size, self._examples[orders(place // size)[place % size]])
            for place in range(start, min(start + self._per_segment, size * self._epochs))
        ]
        rows: list[Pair] = []
        encoded = encode_examples([example for _, _, example in places], self._prompt)
        for (place, epoch, example), ids in zip(places, encoded, strict=True):
            if ids is not None:
                both = answer_rows(f"{place:08d}-{example.uid}", ids, self._prompt.answer_ids, round)
                side = derive_seed(self._seed, "side", example.uid, epoch) % 2
                rows += both if self._both else [both[side]]
        return rows, encoded.count(None)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._examples))
