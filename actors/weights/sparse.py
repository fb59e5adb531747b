"""Sparse updates: the 16-bit words of a packed buffer that changed since the version before.

At the learning rates of preference training most bf16 weights do not move in a round: 1-8 % of them change. A patch
holds the gap before each changed word, one byte a gap below 255 (255 continues it), and the words' new values.
"""

from dataclasses import dataclass

import numpy as np

from rlhf.errors import PayloadError

ESCAPE = 255
"""A gap byte that stands for 255 unchanged words and continues the gap."""
HEADER = 2 * 8
"""Bytes of the header: number of changed words, number of gap bytes."""


@dataclass(frozen=True, slots=True)
class Patch:
    """The encoded difference of two buffers of equal length, and how many of their words differ."""

    data: np.ndarray
    changed: int
    words: int


def encode(old: np.ndarray, new: np.ndarray) -> Patch:
    """The patch that makes `new` of `old`: uint8 arrays of one even length, as `payload.pack` makes them."""
    before, after = old.view(np.uint16), new.view(np.uint16)
    places = np.flatnonzero(before != after)
    gaps = np.diff(places, prepend=-1) - 1
    escapes = gaps // ESCAPE
    encoded = np.full(len(gaps) + int(escapes.sum()), ESCAPE, dtype=np.uint8)
    encoded[np.cumsum(escapes + 1) - 1] = gaps % ESCAPE
    header = np.array([len(places), len(encoded)], dtype=np.int64)
    data = np.concatenate([header.view(np.uint8), encoded, after[places].view(np.uint8)])
    return Patch(data, len(places), len(after))


def apply(base: np.ndarray, patch: np.ndarray) -> None:
    """Write a patch into `base`, uint8 and writable; raises `PayloadError` for a patch that does not fit.

    Whether the result is the learner's is for its checksums to say.
    """
    count, length = (int(value) for value in patch[:HEADER].view(np.int64)) if len(patch) >= HEADER else (-1, 0)
    if count < 0 or length < 0 or HEADER + length + 2 * count != len(patch):
        raise PayloadError("weight patch: its header does not agree with its length")
    encoded = patch[HEADER : HEADER + length]
    ends = np.flatnonzero(encoded != ESCAPE)
    if len(ends) != count:
        raise PayloadError(f"weight patch: {len(ends)} gaps for {count} values")
    if not count:
        return
    # The sum of the gap bytes so far, plus one for each changed word before: the word's own place.
    places = np.cumsum(encoded, dtype=np.int64)[ends] + np.arange(count)
    words = base.view(np.uint16)
    if places[-1] >= len(words):
        raise PayloadError(f"weight patch: word {places[-1]} of {len(words)}")
    # A copy: the values may start at an odd byte.
    words[places] = np.frombuffer(patch[HEADER + length :].tobytes(), dtype=np.uint16)
