"""Model FLOPs of a preference step, and the peak they are measured against."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rlhf.records import Pair

PEAK_BF16 = {"H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 FLOP/s by a part of the GPU's name, from the makers' data sheets; first match counts."""


class FlopCount:
    """Counts multiply-adds as two, shared prefixes once, recomputation not at all, the head at response tokens only."""

    def __init__(self, model: Any) -> None:
        """`model` is the causal LM, whole (before ZeRO-3 splits it)."""
        embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        self._body = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings)
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
