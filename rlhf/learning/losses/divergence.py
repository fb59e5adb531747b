"""f-divergences from the reference: Wang et al. 2023, "Beyond Reverse KL" (f-DPO).

The score of a response is f'(pi / pi_ref) instead of log (pi / pi_ref).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from rlhf.errors import InputError

LARGEST_EXPONENT = 40.0
"""exp(40) = 2e17, whose square is still finite in fp32; beyond it the score is constant and gives no gradient."""


def score_function(name: str, alpha: float = 0.5) -> Callable[[torch.Tensor], torch.Tensor]:
    """f' as a function of log-ratios u, float [n] to float [n]. Raises `InputError` for an unknown name.

    reverse_kl u; forward_kl 1 - e^-u; js log 2 + log sigmoid(u); alpha (e^((alpha - 1) u) - 1) / (alpha - 1), which
    is reverse_kl at alpha = 1.
    """
    if name == "reverse_kl" or (name == "alpha" and abs(alpha - 1) < 1e-6):
        return lambda ratio: ratio
    if name == "forward_kl":
        # 1 - e^-u is the alpha divergence of order 0.
        return lambda ratio: _power(ratio, -1.0)
    if name == "js":
        return lambda ratio: math.log(2) + F.logsigmoid(ratio)
    if name == "alpha":
        return lambda ratio: _power(ratio, alpha - 1)
    raise InputError(f"f_divergence = {name!r}: expected one of reverse_kl, forward_kl, js, alpha")


def _power(ratio: torch.Tensor, order: float) -> torch.Tensor:
    """(e^(order u) - 1) / order; `expm1` keeps the digits of small ratios."""
    return torch.expm1((order * ratio).clamp(max=LARGEST_EXPONENT)) / order
