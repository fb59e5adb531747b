"""Seeds derived from what they belong to, so that a retry samples the same and nothing else does."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (run seed, prompt uid, round, k, ...); the same parts give the same seed anywhere."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
