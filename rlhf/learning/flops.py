"""Model FLOPs of a preference step, and the peak they are measured against."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from rlhf.records import Pair

PEAK_BF16 = {"H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 FLOP/s by a part of the GPU's name, from the makers' data sheets; first match counts."""


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys of model configs for the experts of a layer."""
ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""Keys for the experts that one token goes through."""


class FlopCount:
    """Counts multiply-adds as two, shared prefixes once, recomputation not at all, the head at response tokens only,
    and of a mixture's experts those that a token goes through."""

    def __init__(self, model: Any) -> None:
        """`model` is the causal LM, whole (before ZeRO-3 splits it)."""
        embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        share = _active_share(model)
        self._body = sum(
            p.numel() * share(name, p)
            for name, p in model.named_parameters()
            if p.dim() >= 2 and id(p) not in embeddings
        )
        self._head = model.get_output_embeddings().weight.numel()
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        self._attention = 2 * width * config.num_hidden_layers

    def forward(self, pairs: Iterable[Pair]) -> float:
        """FLOPs of one forward pass over `pairs`; a backward pass is twice that."""
        total = 0.0
        for pair in pairs:
            prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
            tokens = prompt + chosen + rejected
            # Each position attends to what it sees: the prompt's triangle once, then each response behind the prompt.
            seen = _triangle(prompt) + sum(prompt * n + _triangle(n) for n in (chosen, rejected))
            total += 2 * (self._body * tokens + self._head * (chosen + rejected) + self._attention * seen)
        return total


def _active_share(model: Any) -> Callable[[str, nn.Parameter], float]:
    """The share of a parameter that one token is multiplied with: below 1 for the experts of a mixture, else 1."""
    config = model.config.get_text_config()
    total, active = (
        next((value for key in keys if isinstance(value := getattr(config, key, None), int) and value), 0)
        for keys in (EXPERTS, ACTIVE)
    )

    def share(name: str, parameter: nn.Parameter) -> float:
        # Named so, or stacked; a shared expert is neither.
        routed = "experts" in name.split(".") or (parameter.dim() == 3 and parameter.shape[0] == total)
        return active / total if active and total and routed else 1.0

    return share


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s that one rank could reach: from the table for a known GPU in bf16, else measured on a matrix product."""
    if device != "cpu" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        known = next((peak for part, peak in PEAK_BF16.items() if part in name), None)
        if known:
            return known
    size = 1024 if device == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product = nn.functional.linear(a, a)
        product[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
