"""Metrics of a round, put together from what each part measured."""

import time
from collections.abc import Mapping

from rlhf.ports import PairSource
from rlhf.records import SealedRound, SyncReport


class RoundClock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now

    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started


def round_metrics(
    source: PairSource,
    statistics: Mapping[str, float],
    sealed: SealedRound,
    synced: SyncReport,
    clock: RoundClock,
    checkpoint_s: float,
) -> tuple[dict[str, float], list[str]]:
    """The contract's round metrics and the warnings to show with them.

    `timing_s/idle` is the learner's wait for pairs; sampling and judging happen in it when nothing runs ahead.
    """
    metrics, warnings = source.metrics(sealed.round)
    timings = {f"timing_s/{name}": seconds for name, seconds in clock.laps.items()}
    sync = {
        "sync/seconds": synced.seconds,
        "sync/bytes": float(synced.nbytes),
        "sync/changed_fraction": synced.changed_fraction,
        "sync/probe_error": synced.probe_error,
    }
    metrics |= timings | dict(statistics) | sync | staleness(sealed)
    metrics |= {"timing_s/checkpoint": checkpoint_s, "timing_s/total": clock.total()}
    if statistics.get("train/skipped"):
        warnings.append(f"{statistics['train/skipped']:.0f} steps were skipped: their loss or gradient was not finite")
    if statistics.get("pairs/dropped_long"):
        warnings.append(
            f"{statistics['pairs/dropped_long']:.0f} pairs are longer than learner.max_length and were dropped"
        )
    return metrics, warnings


def staleness(sealed: SealedRound) -> dict[str, float]:
    """pairs/staleness_{mean,max}: versions between a response's oldest token and the version being trained."""
    ages = [
        sealed.round - 1 - version for pair in sealed.pairs for version in (pair.chosen_version, pair.rejected_version)
    ]
    return {
        "pairs/staleness_mean": sum(ages) / len(ages) if ages else 0.0,
        "pairs/staleness_max": float(max(ages, default=0)),
    }
