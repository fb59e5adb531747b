"""From pairs to tensors: prefix-shared rows or two padded rows a pair, and either of them packed end to end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from rlhf.learning.attention import TRUNK
from rlhf.records import Pair


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one forward pass, and where in them response tokens are predicted.

    Sequence 2i is pair i's chosen response and 2i + 1 its rejected one, which may have no tokens. The last token of a
    response is a target only: as an input it would predict nothing.
    """

    input_ids: torch.Tensor
    """int64 [B, L], padded on the right with 0."""
    position_ids: torch.Tensor | None
    """int64 [B, L]; None counts from 0 in every row."""
    segments: torch.Tensor | None
    """int64 [2, B, L], document and branch of each position (`attention.visible`); None is plain causal attention."""
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


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that see each other: a trunk, and branches after it that do not see one another.

    A branch's positions go on from the trunk's end. `scored` are the responses: the trunk's last position predicts the
    first token of each, and a branch holds all but its last token. Of a response without tokens there is nothing.
    """

    trunk: Sequence[int]
    scored: tuple[Sequence[int], ...]

    @property
    def tokens(self) -> list[int]:
        """What goes into the model."""
        return [*self.trunk, *(token for response in self.scored for token in response[:-1])]

    @property
    def lengths(self) -> list[int]:
        """Input tokens of the trunk and of each branch."""
        return [len(self.trunk), *(max(0, len(response) - 1) for response in self.scored)]

    @property
    def positions(self) -> list[int]:
        """Position of each token."""
        trunk, *branches = self.lengths
        return [*range(trunk), *(trunk + place for length in branches for place in range(length))]

    @property
    def branches(self) -> list[int]:
        """Branch of each token, `TRUNK` for the trunk."""
        return [TRUNK + number for number, length in enumerate(self.lengths) for _ in range(length)]

    @property
    def branched(self) -> bool:
        """Has it two branches with tokens? Otherwise plain causal attention sees the same."""
        return sum(length > 0 for length in self.lengths[1:]) > 1


def build_batch(pairs: Sequence[Pair], *, prefix_sharing: bool, packed: bool = False) -> Batch:
    """Rows of `pairs` on the CPU; `packed` in one row. Each has a prompt, a chosen response, and maybe a rejected one.

    The log-probs of a rejected response without tokens add up to 0.
    """
    documents = []
    for pair in pairs:
        if prefix_sharing or not pair.rejected_ids:
            documents.append(Document(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)))
        else:
            documents += [Document(pair.prompt_ids, (ids,)) for ids in (pair.chosen_ids, pair.rejected_ids)]
    return _lay([documents] if packed else [[document] for document in documents])


def causal_batch(rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """One row and one sequence for each (context, tokens to score)."""
    return _lay([[Document(context, (tokens,))] for context, tokens in rows])


def _lay(rows: Sequence[Sequence[Document]]) -> Batch:
    """Documents end to end in their rows, padded on the right."""
    length = max(sum(sum(document.lengths) for document in row) for row in rows)
    shape = (len(rows), length)
    input_ids, position_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    # Padding is a document of its own: a position with nothing in view would be NaN.
    segments = torch.zeros(2, *shape, dtype=torch.long)
    predict: list[int] = []
    for number, row in enumerate(rows):
        start = 0
        for place, document in enumerate(row, start=1):
            tokens = document.tokens
            span = slice(start, start + len(tokens))
            input_ids[number, span] = torch.tensor(tokens)
            position_ids[number, span] = torch.tensor(document.positions)
            segments[0, number, span] = place
            segments[1, number, span] = torch.tensor(document.branches)
            predict += _predicting(document, number * length + start)
            start += len(tokens)
    scored = [response for row in rows for document in row for response in document.scored]
    # Padding on the right needs no mask: under causal attention no token sees what follows it.
    masked = any(len(row) > 1 or row[0].branched for row in rows)
    lengths = torch.tensor([len(response) for response in scored])
    return Batch(
        input_ids,
        position_ids if masked else None,
        segments if masked else None,
        predict=torch.tensor(predict),
        targets=torch.tensor([token for response in scored for token in response]),
        sequence=torch.repeat_interleave(torch.arange(len(scored)), lengths),
        offset=torch.cat([torch.arange(len(response)) for response in scored]),
        sequences=len(scored),
        longest=int(lengths.max()),
    )


def _predicting(document: Document, start: int) -> Iterable[int]:
    """Places whose hidden states predict the scored tokens, for a document that starts at `start`."""
    trunk, *branches = document.lengths
    branch = start + trunk
    for length, response in zip(branches, document.scored, strict=True):
        if not response:
            continue
        yield start + trunk - 1
        yield from range(branch, branch + length)
        branch += length
