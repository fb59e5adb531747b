"""How trained parameters relate to the checkpoint's tensors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Makes the parameters whole inside the context, on every rank (ZeRO-3)."""

GROUP_BYTES = 256 * 2**20


class Full:
    """Every parameter trains, in the checkpoint's own coordinates."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is, every parameter trainable."""
        return model.requires_grad_(True)

    def trainable(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer moves, a tied one once."""
        yield from model.named_parameters()

    def export(self, model: nn.Module, gather: Gather | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole CPU tensors, as `save_pretrained` would write them; copies that later steps leave alone.

        Every rank must go through all of it. With ZeRO-3 `gather` makes whole one group of parameters at a time,
        of at most `GROUP_BYTES` or one parameter.
        """
        for group in _groups(checkpoint_parameters(model)):
            with gather([parameter for _, parameter in group]) if gather else nullcontext():
                tensors = [(name, parameter.detach().to("cpu", copy=True)) for name, parameter in group]
            yield from tensors
        for name, buffer in persistent_buffers(model):
            yield name, buffer.detach().to("cpu", copy=True)


def checkpoint_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters under their checkpoint names; of tied ones only the name that `save_pretrained` keeps."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    chosen: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = chosen.get(id(parameter))
        if known is None or (known[0] in tied and name not in tied):
            chosen[id(parameter)] = (name, parameter)
    return list(chosen.values())


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that belong to the checkpoint."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _groups(named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        # A partitioned parameter is empty here; ZeRO-3 keeps the whole's size in `ds_numel`.
        nbytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if group and size + nbytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append((name, parameter))
        size += nbytes
    if group:
        yield group
