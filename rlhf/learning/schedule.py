"""Learning rate by the fraction of the run done: online, the number of its steps is not known beforehand."""

import math

from rlhf.config.learner import Optimizer
from rlhf.records import SealedRound


def learning_rate(optimizer: Optimizer, fraction: float) -> float:
    """The learning rate when `fraction` (0 to 1) of the run is done.

    Linear from 0 to the peak over `warmup_ratio`, then with x the fraction of the rest that is done: constant 1,
    linear 1 - x, cosine (1 + cos(pi x)) / 2, times the peak.
    """
    fraction = min(max(fraction, 0.0), 1.0)
    warmup = optimizer.warmup_ratio
    if fraction < warmup:
        return optimizer.lr * fraction / warmup
    rest = (fraction - warmup) / (1.0 - warmup)
    decay = {"constant": 1.0, "linear": 1.0 - rest, "cosine": 0.5 * (1.0 + math.cos(math.pi * rest))}
    return optimizer.lr * decay[optimizer.schedule]


def fraction_done(sealed: SealedRound, step: int, steps: int, rounds: int) -> float:
    """Fraction of the run done in the middle of step `step` (from 0) of `steps` in a round.

    A round without a `span` is one of `rounds` equal parts. The middle of the step, so that neither the first step of a
    warm-up nor the last of a decay is taken with rate 0.
    """
    start, end = sealed.span or ((sealed.round - 1) / rounds, sealed.round / rounds)
    return start + (end - start) * (step + 0.5) / steps
