"""Freed memory goes back to the system."""

import sys
from pathlib import Path

import pytest

from rlhf import heap
from rlhf.heap import EVERY, trim, trim_seldom


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no such call")
def test_gaps_between_blocks_that_stay_are_given_back() -> None:
    blocks = [bytes(60_000) for _ in range(2_000)]  # 120 MB, too small for mappings of their own
    kept = blocks[::20]
    del blocks
    before = resident()
    trim()
    assert resident() < before - 80_000_000
    assert len(kept) == 100


def test_what_is_freed_each_round_goes_back_with_every_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[None] = []
    monkeypatch.setattr(heap, "trim", lambda: trims.append(None))
    counts = []
    for _ in range(3 * EVERY):
        trim_seldom()
        counts.append(len(trims))
    assert counts[-1] == 3
    assert max(counts.count(n) for n in (1, 2)) == EVERY
