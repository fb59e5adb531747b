"""How far an engine's log-probs are from the learner's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ProbeError:
    """Means over the tokens of one probe: of |difference|, and of |difference| / max(1, |log-prob|).

    The second decides. bfloat16 rounds logits in proportion to their size, so an unlikely token of log-prob -15 is
    off by 0.5 where nothing is wrong; what is stale or missing moves likely tokens just as much.
    """

    absolute: float
    relative: float


def probe_error(found: Sequence[float], expected: Sequence[float]) -> ProbeError:
    """Compare an engine's log-probs with the learner's, token by token; NaN where the engine gave none."""
    difference = np.abs(np.subtract(found, expected))
    return ProbeError(float(difference.mean()), float((difference / np.maximum(1.0, np.abs(expected))).mean()))
