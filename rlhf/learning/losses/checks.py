"""What goes into a loss, checked and brought to one dtype: a shape that broadcasts would be a wrong loss in silence."""

import math
from typing import Any

import torch

from rlhf.config.load import validate
from rlhf.config.loss import LossOptions
from rlhf.errors import InputError

BOUNDED = ("label_smoothing", "gamma", "tau", "rpo_alpha")
"""Options that are numbers; the bounds are those of the config."""


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise `InputError` for an option of loss `name` out of the bounds that the config has for it."""
    numbers = {key: options[key] for key in BOUNDED if options.get(key) is not None}
    validate(numbers, f"preference_loss {name}", LossOptions)
    if name == "exo_pair" and options.get("label_smoothing") == 0:
        raise InputError("preference_loss exo_pair: label_smoothing = 0: its log is taken; use 0.001, say")


def logprobs(name: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four, float32 or float64 [n]: sums reach -1e4, and beta times them is past what halves hold."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1 or tensors[0].dim() != 1:
        raise InputError(
            f"preference_loss {name}: expected four 1-D tensors of one length, got shapes {sorted(shapes)}"
        )
    one, two, three, four = (wide(tensor) for tensor in tensors)
    return one, two, three, four


def positive(name: str, key: str, value: Any, like: torch.Tensor) -> float | torch.Tensor:
    """`value` if it is one positive number, alone or in a tensor, or a tensor with one for each pair, like `like`."""
    if isinstance(value, torch.Tensor):
        if value.shape not in (torch.Size([]), like.shape):
            raise InputError(f"preference_loss {name}: {key} has shape {tuple(value.shape)}, expected one value a pair")
        wrong = value.detach()[~((value > 0) & torch.isfinite(value))]
        if len(wrong):
            raise InputError(f"preference_loss {name}: {key} = {wrong[0].item():g}: expected positive numbers")
        return wide(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise InputError(
            f"preference_loss {name}: {key} = {value}: expected a positive number, or a tensor of them, one a pair"
        )
    return value


def per_pair(
    name: str, key: str, value: torch.Tensor | None, like: torch.Tensor, lowest: float, finite: bool = True
) -> torch.Tensor | None:
    """`value` [n] in the dtype of `like` [n], none of it below `lowest`, and all of it `finite`; None stays."""
    if value is None:
        return None
    if not isinstance(value, torch.Tensor) or value.shape != like.shape:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"preference_loss {name}: {key} has shape {found}, expected {tuple(like.shape)}")
    given = value.detach()
    wrong = given[(given < lowest) | (~torch.isfinite(given) & finite)]
    if len(wrong):
        raise InputError(f"preference_loss {name}: {key} = {wrong[0].item():g}: expected {lowest:g} or more")
    return value.to(like.dtype)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Halves and integers as float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
