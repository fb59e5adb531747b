"""Does the model give the same log-probs on prefix-shared rows as on ordinary ones? Tried once, at start."""

from collections.abc import Iterable
from typing import Any

import torch

from rlhf.learning.batch import padded_batch, shared_batch
from rlhf.learning.policy import PolicyModule, in_float32
from rlhf.records import Pair

TOLERANCE = 1e-3
"""Largest fp32 difference of a log-prob: rounding stays under 1e-4, a mask not honoured moves it far more."""


def prefix_sharing_error(module: PolicyModule, max_length: int) -> float:
    """Largest |log-prob difference|, prefix-shared against padded, over a small made-up pair in fp32.

    A model that attends through a sliding window would lose the window under an own mask, so where the window is
    shorter than `max_length` the pair is made long enough to notice. A model that cannot take the mask at all
    counts as infinitely wrong.
    """
    vocab = module.model.config.vocab_size
    window = min(_windows(module.model.config), default=max_length)
    prompt = window if window < max_length else 8
    tokens = torch.randint(vocab, (prompt + 13,), generator=torch.Generator().manual_seed(0)).tolist()
    pair = _pair(tokens[:prompt], tokens[prompt : prompt + 7], tokens[prompt + 7 :])
    device = next(module.parameters()).device
    with torch.no_grad(), in_float32(module):
        expected = module(padded_batch([pair]).to(device))
        try:
            shared = module(shared_batch([pair]).to(device))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return float("inf")
    error = (shared - expected).abs().max().item()
    return error if error == error else float("inf")


def _windows(config: Any) -> Iterable[int]:
    """Attention windows and chunks that a config speaks of, under whatever name."""
    for name, value in config.to_dict().items():
        named = "window" in name or "attention_chunk" in name
        if named and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield value


def _pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    ids = [tuple(part) for part in (prompt, chosen, rejected)]
    return Pair("probe", 0, ids[0], ids[1], ids[2], "", "", "", 1.0, 0, 0)
