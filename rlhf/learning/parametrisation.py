"""How trained parameters relate to the checkpoint's tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Makes the parameters whole inside the context, on every rank (ZeRO-3)."""

Mask = Callable[[torch.Tensor], torch.Tensor]
"""From a parameter's whole gradient to what is left of it."""

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
        of at most `GROUP_BYTES` or one entry.
        """
        entries = [Entry.plain(name, parameter) for name, parameter in checkpoint_parameters(model)]
        return export_entries(entries, persistent_buffers(model), gather)

    def mask_gradients(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Mask]]:
        """Nothing is masked."""
        return iter(())


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the checkpoint: the parameters that have to be whole for it, and how it comes of them."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    value: Callable[[], torch.Tensor]

    @classmethod
    def plain(cls, name: str, parameter: nn.Parameter) -> "Entry":
        """A parameter as it is."""
        return cls(name, (parameter,), parameter.detach)


def export_entries(
    entries: Sequence[Entry], buffers: Iterable[tuple[str, torch.Tensor]], gather: Gather | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and CPU copies of `entries`, gathered group by group, then of `buffers`."""
    for group in _groups(entries):
        with gather([parameter for entry in group for parameter in entry.parameters]) if gather else nullcontext():
            tensors = [(entry.name, entry.value().to("cpu", copy=True)) for entry in group]
        yield from tensors
    for name, buffer in buffers:
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


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    size = 0
    for entry in entries:
        # A partitioned parameter is empty here; ZeRO-3 keeps the whole's size in `ds_numel`.
        nbytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in entry.parameters)
        if group and size + nbytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(entry)
        size += nbytes
    if group:
        yield group
