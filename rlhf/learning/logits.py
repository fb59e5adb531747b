"""What a model does to its logits after the LM head, before the softmax: a factor, a cap, or both."""

from dataclasses import dataclass
from typing import Any

import torch

FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_mup_width_multiplier": -1}
"""Keys of model configs that hold a factor of the logits, and the power that it enters with."""
MULTIPLIES = ("hyperclovax",)
"""Beginnings of the model types that multiply by `logits_scaling`; all others (Granite, MiniCPM3) divide by it."""
CAP = "final_logit_softcapping"
"""Gemma's key, and that of all who took it over."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """z -> cap tanh(factor z / cap), or factor z without a cap. Gemma 2 (arXiv 2408.00118), section 2, for the cap."""

    factor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """What a transformers config speaks of. What it does not is found out by `mask_probe.own_error`."""
        text = config.get_text_config()
        factor = 1.0
        for key, power in FACTORS.items():
            factor *= float(getattr(text, key, None) or 1.0) ** power
        scaling = float(getattr(text, "logits_scaling", None) or 1.0)
        factor *= scaling if str(text.model_type).startswith(MULTIPLIES) else 1 / scaling
        cap = getattr(text, CAP, None)
        return cls(factor, float(cap) if cap else None)

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits`, float32 of any shape, transformed in place."""
        if self.factor != 1:
            logits.mul_(self.factor)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, transformed: torch.Tensor) -> torch.Tensor | float:
        """Derivative at the logits that `transformed` was made of: factor (1 - (y / cap)^2); a number without a cap."""
        if self.cap is None:
            return self.factor
        return (transformed / self.cap).square_().neg_().add_(1).mul_(self.factor)


PLAIN = LogitTransform()
"""The logits are the head's product."""
