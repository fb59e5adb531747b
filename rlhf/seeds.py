"""Seeds derived from what they belong to, so that a retry samples the same and nothing else does."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (run seed, prompt uid, round, k, ...); the same parts give the same seed anywhere."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def derive_seeds(*parts: int | str, count: int) -> tuple[int, ...]:
    """`derive_seed(*parts, k)` for k = 0 to `count` - 1; what the parts share is hashed once."""
    shared = hashlib.blake2b("".join(f"{type(part).__name__}:{part}\x1f" for part in parts).encode(), digest_size=8)
    seeds = []
    for k in range(count):
        own = shared.copy()
        own.update(b"int:%d" % k)
        seeds.append(int.from_bytes(own.digest(), "big") >> 1)
    return tuple(seeds)
