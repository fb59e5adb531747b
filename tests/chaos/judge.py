"""The judge of the chaos runs: deterministic, slow enough to be killed at work, and it says when it works."""

import hashlib
import time
from pathlib import Path
from typing import Any

CALL_S = 0.02


def prefer(messages: list[dict[str, Any]], a: str, b: str, reference: str | None, note: str) -> float:
    """p(A wins) by the digests of both texts; touches the file `note`."""
    Path(note).touch()
    time.sleep(CALL_S)
    return 0.9 if _rank(a) > _rank(b) else 0.1


def _rank(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
