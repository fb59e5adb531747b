"""Log-probs of given tokens from hidden states, a chunk of positions at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rlhf.learning.logits import PLAIN, LogitTransform

CHUNK = 512
"""Positions whose logits exist at one time: 512 x 49k in fp32 is 100 MB."""


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chunk: int = CHUNK,
    transform: LogitTransform = PLAIN,
) -> torch.Tensor:
    """log softmax(t(hidden W^T + b)) at `targets`: float32 [T] from hidden [T, D], weight [V, D], targets int64 [T].

    t is the model's `transform` of its logits. The product is taken in the model's dtype, transform and softmax in
    fp32. A chunk's logits are computed again in the backward pass, so memory grows with chunk x V and not with T x V.
    """
    result: torch.Tensor = _TokenLogprobs.apply(hidden, weight, bias, targets, chunk, transform, False)[0]
    return result


def token_logprobs_and_squares(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chunk: int = CHUNK,
    transform: LogitTransform = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and log sum_v p_v^2 at each position, float32 [T] without gradient.

    The second is the log of the probability that two tokens drawn there are the same.
    """
    found: tuple[torch.Tensor, torch.Tensor]
    found = _TokenLogprobs.apply(hidden, weight, bias, targets, chunk, transform, True)
    return found


class _TokenLogprobs(torch.autograd.Function):
    """The gradient is written out: with g the gradient of a log-prob, that of its logits is g (onehot - softmax),
    times the slope of the transform.

    Checkpointing the chunks gives the same numbers, but costs 44 % over keeping all logits (SmolLM2's head, 384
    positions, CPU) where this costs 3 %: it keeps the normaliser and works in place on one fp32 buffer.
    The weight's gradient leaves as one tensor however many chunks there are, which is what ZeRO's hooks count on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk: int,
        transform: LogitTransform,
        with_squares: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        values, normalisers, squares = [], [], []
        for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = transform.apply_(F.linear(part, weight, bias).float())
            normalisers.append(logits.logsumexp(1))
            values.append(logits.gather(1, target.unsqueeze(1)).squeeze(1) - normalisers[-1])
            if with_squares:
                squares.append(logits.mul_(2).logsumexp(1) - 2 * normalisers[-1])
        ctx.chunk, ctx.transform = chunk, transform
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers))
        if not with_squares:
            return torch.cat(values), None
        result = torch.cat(squares)
        ctx.mark_non_differentiable(result)
        return torch.cat(values), result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: torch.Tensor | None = None
        grad_bias: torch.Tensor | None = None
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            g = grad[rows].unsqueeze(1)
            logits = ctx.transform.apply_(F.linear(hidden[rows], weight, bias).float())
            slope = ctx.transform.slope(logits)
            softmax = logits.sub_(normaliser[rows].unsqueeze(1)).exp_()
            step = softmax.mul_(-g).scatter_add_(1, targets[rows].unsqueeze(1), g)
            if ctx.transform != PLAIN:
                step.mul_(slope)
            step = step.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = step @ weight
            if needs_weight:
                grad_weight = _add(grad_weight, step.t() @ hidden[rows])
            if needs_bias:
                grad_bias = _add(grad_bias, step.sum(0))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _add(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """Sums over chunks are kept in fp32; a lone chunk stays as it is."""
    return part if total is None else total.float().add_(part)
