"""Seeds derived from what they belong to, so that a retry samples the same and nothing else does."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (run seed, prompt uid, round, k, ...); the same parts give the same seed anywhere."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def derive_seeds(seed: int, uids: Iterable[str], scope: int | str, count: int) -> list[tuple[int, ...]]:
    """For each of the `uids`, `derive_seed(seed, uid, scope, k)` for k = 0 to `count` - 1, at a third of the cost.

    `count` is at least 1.
    """
    before = blake2b(f"int:{seed}\x1fstr:".encode(), digest_size=8)
    after = [f"\x1f{type(scope).__name__}:{scope}\x1fint:{k}".encode() for k in range(count)]
    digests = []
    for uid in uids:
        own = uid.encode()
        for end in after:
            state = before.copy()
            state.update(own + end)
            digests.append(state.digest())
    seeds: list[int] = (np.frombuffer(b"".join(digests), ">u8") >> 1).tolist()
    return [tuple(seeds[first : first + count]) for first in range(0, len(seeds), count)]
