"""Who sees whom in a row that holds more than one sequence, as a mask for the attention implementation in use."""

from typing import Any, Literal

import torch

Attention = Literal["eager", "sdpa", "flex", "flash"]

NAMES: dict[Attention, str] = {"eager": "eager", "sdpa": "sdpa", "flex": "flex_attention", "flash": "flash_attention_2"}
"""What transformers calls them."""

TRUNK = 0
"""The branch that all branches of a document see: the prompt."""


def use(model: Any, attention: Attention) -> None:
    """Switch a transformers model to an implementation; raises ValueError or ImportError where it has none."""
    model.set_attn_implementation(NAMES[attention])
    if model.config._attn_implementation != NAMES[attention]:
        raise ValueError(f"{type(model).__name__} cannot change its attention")


def visible(segments: torch.Tensor) -> torch.Tensor:
    """bool [B, L, L]: may the first position (query) see the second (key)?

    `segments` is int64 [2, B, L], the document and the branch of each position. A position sees what comes before it
    in its document, of the trunk and of its own branch, and itself.
    """
    document, branch = segments
    length = document.shape[1]
    same = document.unsqueeze(2) == document.unsqueeze(1)
    mine = (branch.unsqueeze(1) == TRUNK) | (branch.unsqueeze(2) == branch.unsqueeze(1))
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return same & mine & causal


def dense_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask in the model's dtype, [B, 1, L, L]: 0 where a key is seen, the lowest number elsewhere."""
    hidden = ~visible(segments).unsqueeze(1)
    return torch.zeros(hidden.shape, dtype=dtype, device=segments.device).masked_fill_(hidden, torch.finfo(dtype).min)


def block_mask(segments: torch.Tensor) -> Any:
    """The same as a `BlockMask` for FlexAttention, which skips the blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    document, branch = segments
    rows, length = document.shape

    def seen(b: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same = document[b, query] == document[b, key]
        mine = (branch[b, key] == TRUNK) | (branch[b, query] == branch[b, key])
        return same & mine & (key <= query)

    return create_block_mask(seen, rows, None, length, length, device=str(segments.device))


def mask_for(attention: str, segments: torch.Tensor | None, dtype: torch.dtype) -> Any:
    """The mask under transformers' name of an implementation; None is plain causal attention over each row."""
    if segments is None:
        return None
    return block_mask(segments) if attention == NAMES["flex"] else dense_mask(segments, dtype)
