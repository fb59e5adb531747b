"""Which pairs a step takes, and which rank computes which of them in which micro-batch."""

from collections.abc import Iterator, Sequence

import numpy as np

from rlhf.errors import InputError
from rlhf.records import Pair


def drop_long(pairs: Sequence[Pair], max_length: int) -> tuple[list[Pair], int]:
    """The pairs whose prompt and longer response fit in `max_length` tokens, and how many did not.

    Nothing is cut: a shortened response would be another response. Raises `InputError` for an empty prompt or response.
    """
    for pair in pairs:
        if not (pair.prompt_ids and pair.chosen_ids and pair.rejected_ids):
            raise InputError(
                f"round {pair.round}, pair {pair.uid}: the prompt or a response has no tokens; remove the pair"
            )
    kept = [p for p in pairs if len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) <= max_length]
    return kept, len(pairs) - len(kept)


def step_batches(count: int, batch_size: int, epochs: int, seed: int | None, round: int) -> Iterator[list[int]]:
    """Indices of each optimizer step of a round; the last step of an epoch may be smaller.

    The order is a permutation drawn from (seed, round, epoch) alone, so a replayed round takes the same steps.
    Without a seed the pairs are taken as they come.
    """
    for epoch in range(epochs):
        order = list(range(count))
        if seed is not None:
            order = np.random.default_rng([seed, round, epoch]).permutation(count).tolist()
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]


def plan_packed(lengths: Sequence[int], world_size: int, rank: int, budget: int) -> list[list[int]]:
    """This rank's micro-batches of at most `budget` tokens each, as indices into `lengths` (tokens of each pair).

    Pairs go longest first to the rank with the fewest tokens, and there into the first micro-batch with room
    (first-fit decreasing); one that is longer than the budget has a micro-batch of its own. Every rank gets as many
    micro-batches as the one with the most; see `plan_micro_batches` for empty ones.
    """
    shares: list[list[list[int]]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        target = min(range(world_size), key=lambda r: (tokens[r], r))
        tokens[target] += lengths[index]
        for micro in shares[target]:
            if sum(lengths[i] for i in micro) + lengths[index] <= budget:
                micro.append(index)
                break
        else:
            shares[target].append([index])
    count = max(len(share) for share in shares)
    return shares[rank] + [[] for _ in range(count - len(shares[rank]))]


def plan_micro_batches(lengths: Sequence[int], world_size: int, rank: int, micro_batch_size: int) -> list[list[int]]:
    """This rank's micro-batches of a step, as indices into `lengths` (tokens of each pair).

    Pairs go longest first to the rank with the fewest tokens that still has room, so ranks differ by at most one
    pair in number and little in tokens; a rank's micro-batches are runs of similar lengths, longest first, so that
    ranks which wait for each other inside a micro-batch have similar ones. Every rank gets the same number of
    micro-batches: an empty one stands for a zero-weight batch that only keeps the collectives in step.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    shares: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    room = -(-len(lengths) // world_size)
    for index in order:
        target = min((r for r in range(world_size) if len(shares[r]) < room), key=lambda r: (tokens[r], r))
        shares[target].append(index)
        tokens[target] += lengths[index]
    count = -(-room // micro_batch_size)
    mine = shares[rank]
    bounds = [len(mine) * j // count for j in range(count + 1)]
    return [mine[bounds[j] : bounds[j + 1]] for j in range(count)]
