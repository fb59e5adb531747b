"""From pairs to tensors: prefix-shared rows, or two padded rows a pair."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from rlhf.records import Pair


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one forward pass, and where in them response tokens are predicted.

    Sequence 2i is pair i's chosen response and 2i + 1 its rejected one. The last token of a response is a target
    only: as an input it would predict nothing.
    """

    input_ids: torch.Tensor
    """int64 [B, L], padded on the right with 0."""
    position_ids: torch.Tensor | None
    """int64 [B, L]; None counts from 0 in every row."""
    attention_mask: torch.Tensor | None
    """Additive mask in the model's dtype [B, 1, L, L]; None is plain causal attention."""
    predict: torch.Tensor
    """int64 [T], positions in the flattened [B * L] whose hidden state predicts a response token."""
    targets: torch.Tensor
    """int64 [T], the tokens predicted there."""
    sequence: torch.Tensor
    """int64 [T], the sequence that each target belongs to."""
    offset: torch.Tensor
    """int64 [T], the target's place in its sequence."""
    sequences: int
    longest: int

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        values.update({name: v.to(device) for name, v in values.items() if isinstance(v, torch.Tensor)})
        return Batch(**values)

    def per_sequence(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the targets [T] laid out by sequence, [sequences, longest], zero where there is no token."""
        # Every place is written once, so this is deterministic on a GPU too, which index_add is not.
        return values.new_zeros(self.sequences, self.longest).index_put((self.sequence, self.offset), values)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each sequence, int64 [sequences]."""
        return self.per_sequence(torch.ones_like(self.targets)).sum(1)

    def sums(self, logprobs: torch.Tensor, tail: float | None = None) -> torch.Tensor:
        """Sum of each response's log-probs: float [sequences / 2, 2], chosen then rejected.

        `tail` weighs the tokens past the length of the pair's shorter response (length desensitising: Liu et al.
        2024, "Length Desensitization in Direct Preference Optimization"); None and 1 are the plain sum.
        """
        if tail is not None:
            shared = self.lengths.view(-1, 2).min(1).values.repeat_interleave(2)
            logprobs = torch.where(self.offset < shared[self.sequence], logprobs, tail * logprobs)
        return self.per_sequence(logprobs).sum(1).view(-1, 2)


def build_batch(pairs: Sequence[Pair], *, prefix_sharing: bool, dtype: torch.dtype = torch.float32) -> Batch:
    """Rows of `pairs` (each with a prompt and two responses of one token or more) on the CPU."""
    return shared_batch(pairs, dtype) if prefix_sharing else padded_batch(pairs)


def shared_batch(pairs: Sequence[Pair], dtype: torch.dtype = torch.float32) -> Batch:
    """One row a pair: prompt, chosen, rejected. The rejected part's positions go on from the prompt's end.

    The mask lets no rejected position see a chosen one, so each response sees exactly what it would see alone.
    """
    spans = [(len(p.prompt_ids), len(p.chosen_ids) - 1, len(p.rejected_ids) - 1) for p in pairs]
    length = max(sum(span) for span in spans)
    input_ids = torch.zeros(len(pairs), length, dtype=torch.long)
    position_ids = torch.zeros(len(pairs), length, dtype=torch.long)
    visible = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(pairs), 1, 1)
    targets = _Targets()
    for row, (pair, (prompt, chosen, rejected)) in enumerate(zip(pairs, spans, strict=True)):
        tokens = pair.prompt_ids + pair.chosen_ids[:-1] + pair.rejected_ids[:-1]
        positions = [*range(prompt + chosen), *range(prompt, prompt + rejected)]
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        position_ids[row, : len(tokens)] = torch.tensor(positions)
        # Rows past the end keep themselves in view: a row with nothing in view would be NaN.
        visible[row, prompt + chosen :, prompt : prompt + chosen] = False
        start = row * length
        # The prompt's last position predicts the first token of both responses.
        last = start + prompt - 1
        targets.add([last, *range(last + 1, last + 1 + chosen)], pair.chosen_ids)
        targets.add([last, *range(last + 1 + chosen, last + 1 + chosen + rejected)], pair.rejected_ids)
    if all(chosen == 0 or rejected == 0 for _, chosen, rejected in spans):
        # One response is a single token, which is no input: nothing is hidden, and plain causal attention is faster.
        return targets.batch(input_ids, None, None)
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
    return targets.batch(input_ids, position_ids, mask)


def padded_batch(pairs: Sequence[Pair]) -> Batch:
    """Two ordinary rows a pair, each a prompt and one response, padded on the right."""
    rows = [(p.prompt_ids, response) for p in pairs for response in (p.chosen_ids, p.rejected_ids)]
    return causal_batch(rows)


def causal_batch(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """One row and one sequence for each (context, tokens to score).

    Padding on the right needs no mask: under causal attention no token sees what follows it.
    """
    length = max(len(context) + len(tokens) - 1 for context, tokens in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    targets = _Targets()
    for row, (context, tokens) in enumerate(rows):
        inputs = [*context, *tokens[:-1]]
        input_ids[row, : len(inputs)] = torch.tensor(inputs)
        first = row * length + len(context) - 1
        targets.add(range(first, first + len(tokens)), tokens)
    return targets.batch(input_ids, None, None)


class _Targets:
    """Collects the predicted tokens, sequence by sequence."""

    def __init__(self) -> None:
        self.predict: list[int] = []
        self.tokens: list[int] = []
        self.lengths: list[int] = []

    def add(self, positions: Sequence[int], tokens: Sequence[int]) -> None:
        self.predict.extend(positions)
        self.tokens.extend(tokens)
        self.lengths.append(len(tokens))

    def batch(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, mask: torch.Tensor | None) -> Batch:
        lengths = torch.tensor(self.lengths)
        return Batch(
            input_ids,
            position_ids,
            mask,
            predict=torch.tensor(self.predict),
            targets=torch.tensor(self.tokens),
            sequence=torch.repeat_interleave(torch.arange(len(self.lengths)), lengths),
            offset=torch.cat([torch.arange(n) for n in self.lengths]),
            sequences=len(self.lengths),
            longest=max(self.lengths),
        )
