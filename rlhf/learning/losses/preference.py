"""The public loss function: checks, options that all losses share, weighted sums."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.config.loss import LOSS_FACTS
from rlhf.errors import InputError
from rlhf.learning.losses.base import LossFunction, PairInputs, PreferenceLoss
from rlhf.learning.losses.checks import check_options, logprobs, per_pair, positive
from rlhf.learning.losses.divergence import score_function
from rlhf.learning.losses.exploration import optimism
from rlhf.learning.losses.registry import LOSSES

Term = tuple[str, float, dict[str, Any]]
"""Name, weight and own options of one loss in a sum."""


def preference_loss(
    name: str,
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float | torch.Tensor,
    terms: Sequence[Term] = (),
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    weights: torch.Tensor | None = None,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
    mean_chosen_length: float | torch.Tensor | None = None,
    exploration: str | None = None,
    exploration_alpha: float = 0.0,
    explored: torch.Tensor | None = None,
    **options: Any,
) -> PreferenceLoss:
    """Per-pair losses of the registered loss `name`, with the implicit rewards.

    The four log-probs are float [n], each the sum over a response's tokens in nats; halves are taken as float32. `beta`
    is one positive number or float [n]. Losses without a reference do not read the reference's. Lengths are tokens,
    [n]; losses per token need them. `mean_chosen_length` is taken over the optimizer step, so that likelihood terms are
    a mean over all of its tokens; None is the mean of these pairs. `weights` float [n] multiply the losses (WPO).
    `name` "mix" adds up `terms`. `exploration` "selm" or "xpo" adds `exploration_alpha` times the mean of its term over
    the responses `explored`, bool [n, 2], None being all. `options` are the loss's own, and `rpo_alpha`, the weight of
    an NLL term.

    Returns `(losses, chosen_rewards, rejected_rewards)`, float [n] each; rewards carry beta and no gradient: beta
    times the log-ratio, without a reference beta times the log-prob, of SimPO and ORPO the log-prob per token.
    Raises `InputError` for an unknown name or option, one out of its bounds, a missing length or one below 1, shapes
    that differ, or `exploration` with what it means nothing to.
    """
    if name != "mix":
        _lookup(name)
    elif options or not terms:
        raise InputError(f"preference_loss mix: expected terms and no option of a single loss, got {sorted(options)}")
    tensors = logprobs(
        name, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    inputs = PairInputs(
        *tensors,
        positive(name, "beta", beta, tensors[0]),
        score_function(f_divergence, f_alpha),
        per_pair(name, "chosen_lengths", chosen_lengths, tensors[0], 1),
        per_pair(name, "rejected_lengths", rejected_lengths, tensors[0], 1),
        None if mean_chosen_length is None else positive(name, "mean_chosen_length", mean_chosen_length, tensors[0]),
    )
    # Weights come of the policy: where it is not finite the loss must not be either, so that the step is skipped.
    weights = per_pair(name, "weights", weights, tensors[0], 0, finite=False)
    parts = terms if name == "mix" else [(name, 1.0, options)]
    losses = torch.stack([weight * _single(part, inputs, f_divergence, own) for part, weight, own in parts]).sum(0)
    names = [part for part, _, _ in parts]
    if exploration is not None:
        _check_plain(names, f_divergence, weights, exploration)
        losses = losses + optimism(exploration, exploration_alpha, inputs, explored)
    return PreferenceLoss(losses if weights is None else losses * weights, *_rewards(names, inputs))


def _check_plain(names: Sequence[str], f_divergence: str, weights: torch.Tensor | None, exploration: str) -> None:
    if names != ["sigmoid"] or f_divergence != "reverse_kl" or weights is not None:
        raise InputError(f"preference_loss: exploration = {exploration!r} goes with plain sigmoid only, not {names}")


def _single(name: str, inputs: PairInputs, f_divergence: str, options: dict[str, Any]) -> torch.Tensor:
    function, facts = _lookup(name), LOSS_FACTS[name]
    if f_divergence != "reverse_kl" and not (facts.divergence or name == "sft"):
        raise InputError(f"preference_loss {name}: f_divergence = {f_divergence!r} does not apply; use reverse_kl")
    check_options(name, options)
    own = dict(options)
    nll = own.pop("rpo_alpha", facts.nll)
    known = [key for key in inspect.signature(function).parameters if key != "inputs"]
    unknown = set(own) - set(known) or ({"rpo_alpha"} if nll is not None and facts.nll is None else set())
    if unknown:
        names = known + ([] if facts.nll is None else ["rpo_alpha"])
        raise InputError(
            f"preference_loss {name}: unknown option {min(unknown)!r}; it takes {', '.join(names) or 'none'}"
        )
    losses = function(inputs, **own)
    return losses + nll * inputs.nll() if nll else losses


def _lookup(name: str) -> LossFunction:
    if name not in LOSSES:
        raise InputError(f"learner.loss.type = {name!r}: no such loss; choose one of {', '.join(sorted(LOSSES))}, mix")
    return LOSSES[name]


def _rewards(names: Sequence[str], inputs: PairInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """A mix has the rewards of its losses with a reference, if there are any."""
    if any(LOSS_FACTS[name].reference for name in names):
        chosen, rejected = inputs.chosen_ratio, inputs.rejected_ratio
    elif {"simpo", "orpo"} & set(names):
        chosen, rejected = inputs.averages()
    else:
        chosen, rejected = inputs.policy_chosen, inputs.policy_rejected
    return (inputs.beta * chosen).detach(), (inputs.beta * rejected).detach()
