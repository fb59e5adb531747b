"""Moving optimizer state between layouts: every element arrives at its place, whatever the ranks and the stages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import RLHFError
from rlhf.learning.reshard import Piece, Shards, fill, fill_named

LAYOUTS = st.tuples(st.sampled_from(["whole", "flat", "each"]), st.integers(1, 4))
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def value(parameter: int, element: int, kind: int = 0) -> float:
    """A number that only this element of this parameter has; `kind` 1 and 2 are its moments."""
    return parameter * 1000.0 + element + kind / 4


def truth(sizes: list[int], kind: int = 0) -> list[torch.Tensor]:
    return [torch.tensor([value(p, e, kind) for e in range(size)]) for p, size in enumerate(sizes)]


def layout(kind: str, ranks: int, sizes: list[int]) -> list[Shards]:
    """What each rank holds, all NaN: whole parameters, ZeRO 1 and 2's cut of one long row, or ZeRO 3's cut of each."""
    found = []
    for rank in range(ranks):
        if kind == "whole":
            tensors = [torch.full((size,), torch.nan) for size in sizes]
            pieces = [Piece(f"p{n}", 0, size, n, 0) for n, size in enumerate(sizes)]
        elif kind == "flat":
            part = -(-sum(sizes) // ranks)
            tensors, pieces, before = [torch.full((part,), torch.nan)], [], 0
            for n, size in enumerate(sizes):
                low, high = max(before, rank * part), min(before + size, (rank + 1) * part)
                if low < high:
                    pieces.append(Piece(f"p{n}", low - before, high - low, 0, low - rank * part))
                before += size
        else:
            parts = [-(-size // ranks) for size in sizes]
            tensors, pieces, offset = [torch.full((sum(parts),), torch.nan)], [], 0
            for n, (size, part) in enumerate(zip(sizes, parts, strict=True)):
                low, high = min(size, rank * part), min(size, (rank + 1) * part)
                pieces.append(Piece(f"p{n}", low, high - low, 0, offset))
                offset += part
        found.append(Shards(tensors, pieces, [{} for _ in tensors]))
    return found


def written(kind: str, ranks: int, sizes: list[int], step: int | None) -> list[Shards]:
    """The same, with every element's own value in it."""
    found = layout(kind, ranks, sizes)
    for shards in found:
        for number, tensor in enumerate(shards.tensors):
            if step is not None:
                shards.states[number].update(step=torch.tensor(float(step)))
                for key in ("exp_avg", "exp_avg_sq"):
                    shards.states[number][key] = torch.full_like(tensor, torch.nan)
        for name, start, length, number, offset in shards.pieces:
            kinds = [shards.tensors[number]] + [shards.states[number][key] for key in ("exp_avg", "exp_avg_sq") if step]
            for kind_number, tensor in enumerate(kinds):
                for element in range(length):
                    tensor[offset + element] = value(int(name[1:]), start + element, kind_number)
    return found


def check(shards: Shards, sizes: list[int], step: int | None) -> None:
    """Each element of each piece is its own, and no moment is left unset, padding included."""
    for name, start, length, number, offset in shards.pieces:
        expected = [truth(sizes, kind)[int(name[1:])][start : start + length] for kind in range(3)]
        assert torch.equal(shards.tensors[number][offset : offset + length], expected[0])
        if step is None:
            assert shards.states[number] == {}
        elif length:
            state = shards.states[number]
            assert torch.equal(state["exp_avg"][offset : offset + length], expected[1])
            assert torch.equal(state["exp_avg_sq"][offset : offset + length], expected[2])
            assert state["step"].item() == step
            assert not torch.isnan(torch.cat([state["exp_avg"], state["exp_avg_sq"]])).any()


@settings(deadline=None, max_examples=150)
@given(SIZES, LAYOUTS, LAYOUTS, st.sampled_from([None, 7]))
def test_every_element_arrives_from_any_layout_in_any_other(
    sizes: list[int], source: tuple[str, int], target: tuple[str, int], step: int | None
) -> None:
    saved = written(*source, sizes, step)
    # Without ZeRO all ranks hold the same, and one of them saves it.
    saved = saved[:1] if source[0] == "whole" else saved
    for own in layout(*target, sizes):
        for state in own.states:
            state["of"] = "the step before"
        fill(own, saved)
        check(own, sizes, step)


def test_what_is_read_is_left_alone_and_copied() -> None:
    saved = written("flat", 2, [5, 3], 4)
    (own,) = layout("each", 1, [5, 3])
    fill(own, saved)
    own.states[0]["exp_avg"].zero_()
    own.states[0]["step"] += 1
    for shards in saved:
        check(shards, [5, 3], 4)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_missing_is_named_by_its_parameter(lost: int) -> None:
    saved = written("each", 2, [10], 4)
    del saved[lost]
    (own,) = layout("whole", 1, [10])
    with pytest.raises(RLHFError, match=r"holds 5 of 10 elements of p0 at 0: .*learner\.world_size.*zero_stage"):
        fill(own, saved)


def test_a_parameter_that_the_checkpoint_does_not_have_is_named() -> None:
    (own,) = layout("whole", 1, [4, 2])
    with pytest.raises(RLHFError, match="holds 0 of 2 elements of p1"):
        fill(own, written("flat", 2, [4], None))


def test_a_tensor_a_parameter_by_name() -> None:
    """As an average of the weights is kept: ZeRO 3's padded partitions, or whole tensors of any shape."""
    weights = {"a": torch.arange(15.0).view(3, 5), "b": torch.arange(100.0, 104.0)}
    halves = []
    for rank in range(2):
        parts = {
            name: torch.nn.functional.pad(w.flatten(), (0, w.numel() % 2)).chunk(2)[rank] for name, w in weights.items()
        }
        cut = [Piece("b", 2 * rank, 2, 0, 0), Piece("a", 8 * rank, 8 - rank, 1, 0)]
        halves.append((parts, cut))
    own = {name: torch.zeros_like(w) for name, w in weights.items()}
    fill_named(own, [Piece("a", 0, 15, 0, 0), Piece("b", 0, 4, 1, 0)], halves)
    assert all(torch.equal(own[name], w) for name, w in weights.items())
