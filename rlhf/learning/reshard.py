"""Optimizer state saved by another number of ranks, or under another ZeRO stage, in the places of this one.

A rank holds flat tensors: fp32 masters, and AdamW's two moments beside each. `Piece` says which elements of which
parameter lie where in them. Layouts differ in their pieces only, so that whatever was saved is moved element by element
and no number changes. DeepSpeed's universal checkpoint does the same by way of a folder of files a parameter, and
leaves out ZeRO 0.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rlhf.errors import RLHFError

_GROUPS = ("bf16_groups", "bit16_groups", "fp16_groups")
_FLAT = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
"""DeepSpeed's names of parameters and of flat masters: ZeRO 1 in bf16, ZeRO 1 and 2, ZeRO 3; each has one of both."""

State = MutableMapping[str, Any]
"""What an optimizer keeps beside one tensor: `exp_avg` and `exp_avg_sq` of its shape, `step` a number."""


class Piece(NamedTuple):
    """Elements [start, start + length) of a flattened parameter lie at [offset, offset + length) of a flat tensor,
    which has a number."""

    name: str
    start: int
    length: int
    tensor: int
    offset: int


def as_pieces(values: Sequence[Sequence[Any]]) -> list[Piece]:
    """Pieces of the plain values that a checkpoint has of them."""
    return [Piece(*value) for value in values]


@dataclass(frozen=True, slots=True)
class Shards:
    """What one rank holds of the parameters, and the optimizer's state of each tensor, empty before its first step."""

    tensors: Sequence[torch.Tensor]
    pieces: Sequence[Piece]
    states: Sequence[State] = field(default=())


@torch.no_grad()
def fill(own: Shards, saved: Sequence[Shards]) -> None:
    """Write into `own`, in place, what all ranks of a checkpoint have `saved`; what is padding stays as it is.

    Raises `RLHFError` for a parameter that the checkpoint does not hold whole.
    """
    places: dict[str, list[tuple[Shards, Piece]]] = {}
    for shards in saved:
        for piece in shards.pieces:
            places.setdefault(piece.name, []).append((shards, piece))
    for state in own.states:
        state.clear()
    for piece in own.pieces:
        covered = 0
        for shards, other in places.get(piece.name, ()):
            start = max(piece.start, other.start)
            count = min(piece.start + piece.length, other.start + other.length) - start
            if count <= 0:
                continue
            covered += count
            here = (piece.tensor, piece.offset + start - piece.start, count)
            there = (other.tensor, other.offset + start - other.start, count)
            _copy(own, here, shards, there)
        if covered != piece.length:
            raise RLHFError(
                f"the checkpoint holds {covered} of {piece.length} elements of {piece.name} at {piece.start}: it is of "
                "another model, or of a ZeRO layout that is not known here; load it with the learner.world_size and "
                "learner.zero_stage that saved it"
            )


def optimizer_pieces(optimizer: Any, parameters: Sequence[tuple[str, nn.Parameter]], rank: int) -> list[Piece]:
    """Where a rank's optimizer holds what: torch's own without ZeRO, else one of DeepSpeed's around it."""
    names = {id(parameter): name for name, parameter in parameters}
    groups = _groups(optimizer)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_zero3(groups, names, rank))
    if hasattr(optimizer, "optimizer"):
        return list(_zero12(groups, names))
    whole = enumerate(parameter for group in groups for parameter in group)
    return [Piece(names[id(p)], 0, p.numel(), number, 0) for number, p in whole]


def optimizer_shards(optimizer: Any, parameters: Sequence[tuple[str, nn.Parameter]], rank: int) -> Shards:
    """What a rank's optimizer holds, to be written to. Raises `RLHFError` where it lies on NVMe."""
    if getattr(optimizer, "swap_optimizer", False):
        raise RLHFError(
            "learner.deepspeed: the optimizer's state lies on NVMe, so a checkpoint can only be loaded with the "
            "learner.world_size, learner.zero_stage and learner.offload that saved it; change these back"
        )
    flat = [getattr(optimizer, name) for name in _FLAT if hasattr(optimizer, name)]
    tensors = flat[0] if flat else [parameter for group in _groups(optimizer) for parameter in group]
    state = getattr(optimizer, "optimizer", optimizer).state
    return Shards(tensors, optimizer_pieces(optimizer, parameters, rank), [state[tensor] for tensor in tensors])


def weight_pieces(parameters: Sequence[tuple[str, nn.Parameter]], rank: int) -> list[Piece]:
    """The pieces of this rank's parameters themselves, a tensor each: ZeRO-3's partitions, else all of each."""
    return [
        _partition(name, parameter, rank, number, 0)
        if hasattr(parameter, "ds_tensor")
        else Piece(name, 0, parameter.numel(), number, 0)
        for number, (name, parameter) in enumerate(parameters)
    ]


def read_shards(folder: Path, stage: int, pieces: Sequence[Sequence[Piece]]) -> list[Shards]:
    """The optimizer state of DeepSpeed's checkpoint in `folder`, mapped from its files; `pieces` are its ranks' own.

    With stage 0 every rank held the same, and one file has it.
    """
    if stage == 0:
        content = _read(folder, "mp_rank_00_model_states.pt")
        state, module = content["optimizer"]["state"], content["module"]
        return [Shards([module[piece.name] for piece in pieces[0]], pieces[0], _states(state, len(pieces[0])))]
    found = []
    for rank, own in enumerate(pieces):
        content = _read(folder, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        tensors = content["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
        state = content["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"]
        found.append(Shards(tensors, own, _states(state, len(tensors))))
    return found


def fill_named(
    own: Mapping[str, torch.Tensor],
    pieces: Sequence[Piece],
    saved: Sequence[tuple[Mapping[str, torch.Tensor], Sequence[Piece]]],
) -> None:
    """`fill` for one tensor a parameter, by name: `own` in the layout `pieces`, `saved` by each rank in its own."""

    def shards(tensors: Mapping[str, torch.Tensor], layout: Sequence[Piece]) -> Shards:
        return Shards([tensors[piece.name] for piece in layout], [p._replace(tensor=n) for n, p in enumerate(layout)])

    fill(shards(own, pieces), [shards(tensors, layout) for tensors, layout in saved])


def _copy(own: Shards, here: tuple[int, int, int], saved: Shards, there: tuple[int, int, int]) -> None:
    """One run of elements, of the tensor and of all that is beside it."""
    _part(own.tensors, here).copy_(_part(saved.tensors, there))
    if not own.states:
        return
    state, tensor = own.states[here[0]], own.tensors[here[0]]
    for key, value in saved.states[there[0]].items():
        if not isinstance(value, torch.Tensor):
            state[key] = value
        elif value.dim() == 0:
            state[key] = value.to(tensor.device, copy=True)
        else:
            if key not in state:
                state[key] = torch.zeros_like(tensor)
            _part([state[key]], (0, *here[1:])).copy_(_part([value], (0, *there[1:])))


def _part(tensors: Sequence[torch.Tensor], place: tuple[int, int, int]) -> torch.Tensor:
    number, offset, count = place
    return tensors[number].detach().view(-1).narrow(0, offset, count)


def _groups(optimizer: Any) -> list[list[nn.Parameter]]:
    """The parameters group by group, in the order of the flat tensors and of the optimizer's state."""
    for name in _GROUPS:
        if hasattr(optimizer, name):
            groups: list[list[nn.Parameter]] = getattr(optimizer, name)
            return groups
    return [group["params"] for group in optimizer.param_groups]


def _zero12(groups: Sequence[Sequence[Any]], names: Mapping[int, str]) -> Iterator[Piece]:
    """ZeRO 1 and 2: a group's parameters end to end, cut into equal partitions wherever that falls."""
    for number, group in enumerate(groups):
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                ours, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                yield Piece(names[id(parameter)], ours.start, ours.numel, number, flat.start)


def _zero3(groups: Sequence[Sequence[Any]], names: Mapping[int, str], rank: int) -> Iterator[Piece]:
    """ZeRO 3: each parameter cut into equal partitions, this rank's of a group end to end."""
    for number, group in enumerate(groups):
        offset = 0
        for parameter in group:
            yield _partition(names[id(parameter)], parameter, rank, number, offset)
            offset += parameter.ds_tensor.ds_numel


def _partition(name: str, parameter: Any, rank: int, tensor: int, offset: int) -> Piece:
    """A rank's partition of a parameter; the last ones are cut short by its end, what follows there is padding."""
    size = parameter.ds_tensor.ds_numel
    start = min(rank * size, parameter.ds_numel)
    return Piece(name, start, min(size, parameter.ds_numel - start), tensor, offset)


def _states(state: Mapping[int, State], count: int) -> list[State]:
    return [state.get(number, {}) for number in range(count)]


def _read(folder: Path, pattern: str) -> Any:
    (file,) = folder.glob(pattern)
    # DeepSpeed's archives hold its own classes, so they cannot be read as weights only; the manifest has their hashes.
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)
