"""AOT: Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport".

Quantiles of one distribution are set against the same quantiles of another, which sorts all pairs of a step. Written
per pair: the k-th smallest value of one side meets the k-th smallest of the other, and that other is a constant to it.
So the loss of a step can be taken in any micro-batches on any ranks, once every response has its opposite number:
`aot_matched` and `aot_unpaired_matched` find them from log-probs of the whole step. Without them they are taken from
the n pairs given, which is what TRL does in each micro-batch of each rank. A pair's beta weighs its own responses.
"""

import torch

from rlhf.learning.losses.base import PairInputs
from rlhf.learning.losses.sigmoid import smoothed


def opposite(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """For each of `values` the one of `others` at the same rank; float [n] each."""
    result = torch.empty_like(others)
    result[values.argsort(stable=True)] = others.sort().values
    return result


@torch.no_grad()
def aot_matched(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[n, 1] from summed log-probs [n, 2]: the reference's log (y_w / y_l) that each pair's own has to beat."""
    return opposite(policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]).unsqueeze(1)


@torch.no_grad()
def aot_unpaired_matched(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[n, 2] from summed log-probs [n, 2]: for each chosen response a rejected log-ratio, and the other way round."""
    chosen, rejected = (policy - reference).unbind(1)
    return torch.stack([opposite(chosen, rejected), opposite(rejected, chosen)], 1)


def aot(inputs: PairInputs, *, label_smoothing: float = 0.0, matched: torch.Tensor | None = None) -> torch.Tensor:
    """Smoothed -log sigmoid(beta (log pi(y_w) / pi(y_l) - the reference's at the same rank)), float [n]."""
    if matched is None:
        policy = torch.stack([inputs.policy_chosen, inputs.policy_rejected], 1)
        matched = aot_matched(policy, torch.stack([inputs.reference_chosen, inputs.reference_rejected], 1))
    difference = (inputs.policy_chosen - inputs.policy_rejected) - matched[:, 0]
    return smoothed(inputs.beta * difference, label_smoothing)


def aot_unpaired(
    inputs: PairInputs, *, label_smoothing: float = 0.0, matched: torch.Tensor | None = None
) -> torch.Tensor:
    """Smoothed -log sigmoid(beta (chosen log-ratio - rejected log-ratio at the same rank)), float [n].

    A pair's value is half its chosen response's term and half its rejected one's; their sum has both gradients.
    """
    chosen, rejected = inputs.chosen_ratio, inputs.rejected_ratio
    if matched is None:
        matched = aot_unpaired_matched(torch.stack([chosen, rejected], 1), torch.zeros(len(chosen), 2).to(chosen))
    both = smoothed(inputs.beta * (chosen - matched[:, 0]), label_smoothing)
    both = both + smoothed(inputs.beta * (matched[:, 1] - rejected), label_smoothing)
    return both - 0.5 * both.detach()
