"""DPO steps by torch alone, from the formulas: full logits, one sequence at a time, no DeepSpeed."""

import copy

import torch

from tests.integration.ranks import LEARNER, ROUNDS, token_logprobs

BETA = 0.1


def plain_steps(path, steps, trained=lambda name: True, beta=lambda pair: BETA, stop=None):
    """Round 1 of the model at `path`: each step is a list of (weight, pairs) whose mean losses are added up.

    Only parameters whose name is `trained` have an optimizer. Returns the streams' mean losses and the gradient norm
    of each step, and the weights. `stop` is the number of steps taken, by default all.
    """

    def loss(pair):
        return torch.nn.functional.softplus(-beta(pair) * margin(model, reference, pair))

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    reference = copy.deepcopy(model)
    parameters = [p.requires_grad_(trained(name)) for name, p in model.named_parameters()]
    options = LEARNER["optimizer"]
    groups = [
        {"params": [p for p in parameters if p.requires_grad and (p.dim() == 1) == flat], "weight_decay": decay}
        for flat, decay in ((False, options["weight_decay"]), (True, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=options["lr"], betas=(0.9, 0.95))
    found = []
    for number, streams in enumerate(steps[:stop]):
        for group in optimizer.param_groups:
            group["lr"] = options["lr"] * (1 - (number + 0.5) / len(steps) / ROUNDS)
        losses = [torch.stack([loss(pair) for pair in pairs]).mean() for _, pairs in streams]
        optimizer.zero_grad()
        sum(weight * loss for (weight, _), loss in zip(streams, losses, strict=True)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options["max_grad_norm"])
        optimizer.step()
        found.append(([loss.item() for loss in losses], norm.item()))
    return found, {name: p.detach().clone() for name, p in model.named_parameters()}


def margin(model, reference, pair):
    """h, the difference of both responses' log-ratios."""
    ratios = []
    for ids in (pair.chosen_ids, pair.rejected_ids):
        with torch.no_grad():
            base = token_logprobs(reference, pair.prompt_ids, ids).sum()
        ratios.append(token_logprobs(model, pair.prompt_ids, ids).sum() - base)
    return ratios[0] - ratios[1]
