"""WPO with sampled alignment: Zhou et al. 2024, "Enhancing RLHF with Weighted Preference Optimization", equation 2."""

import torch


@torch.no_grad()
def wpo_weights(aligned: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A weight a pair, float [n]: the product of its two responses' probabilities per token under the policy.

    `aligned` float [n, 2] are sums over each response's tokens of log p - log sum_v p_v^2, `lengths` [n, 2] their
    number. The division by what a token drawn from the policy has in the mean is the paper's sampled alignment, and
    TRL's, so that a response of the policy's own weighs about 1 at any entropy. Sums of log p alone give equation 2.
    """
    return (aligned / lengths).sum(1).exp()
