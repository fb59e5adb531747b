"""Log-probs of given tokens from hidden states, a chunk of positions at a time."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Positions whose logits exist at one time: 1024 x 49k in fp32 is 200 MB."""


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """log softmax(hidden W^T + b) at `targets`: float32 [T] from hidden [T, D], weight [V, D], targets int64 [T].

    The product is taken in the model's dtype, the softmax in fp32. With gradients on, a chunk's logits are computed
    again in the backward pass, so memory grows with chunk x V and not with T x V.
    """
    # Reentrant checkpoints would hand the weight's gradient over once a chunk, and ZeRO takes it once a pass.
    parts = [
        checkpoint(_chunk_logprobs, part, weight, bias, target, use_reentrant=False)
        if torch.is_grad_enabled()
        else _chunk_logprobs(part, weight, bias, target)
        for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def _chunk_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias).float()
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
