"""From preference examples to the rows that a pair-preference judge is trained on (METHODS §1).

A row is a `Pair` whose prompt is the judge's prompt and whose responses are the single tokens `A` and `B`, the right
one chosen. The learner that trains policies trains judges too: its log-probs cover response tokens only, so the loss
is on the answer alone and padding has no part in it.
"""

from collections.abc import Sequence

from rlhf.data.preferences import PreferenceExample
from rlhf.judging.pair_prompt import PairPrompt, format_context
from rlhf.records import Comparison, Pair
from rlhf.rounds.segments import Segments
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
    """The rows of judge training, segment by segment; nothing is encoded before its segment is due."""

    def __init__(
        self, examples: Sequence[PreferenceExample], prompt: PairPrompt, segments: Segments, *, both_orders: bool
    ) -> None:
        """`segments` cuts `examples`; with `both_orders` each makes two rows, else one on a side from the seed."""
        self._examples = examples
        self._prompt = prompt
        self._segments = segments
        self._both = both_orders

    def segment(self, round: int) -> tuple[list[Pair], int]:
        """Rows of segment `round` in training order, and how many of its examples cannot be judged.

        With both orders an example's two rows are neighbours. Uids begin with their place, which keeps the order in
        a sealed file.
        """
        places = self._segments.places(round)
        encoded = encode_examples([self._examples[index] for _, _, index in places], self._prompt)
        rows: list[Pair] = []
        for (place, epoch, index), ids in zip(places, encoded, strict=True):
            if ids is not None:
                uid = self._examples[index].uid
                both = answer_rows(f"{place:08d}-{uid}", ids, self._prompt.answer_ids, round)
                side = derive_seed(self._segments.seed, "side", uid, epoch) % 2
                rows += both if self._both else [both[side]]
        return rows, encoded.count(None)
