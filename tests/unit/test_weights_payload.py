"""Packed weight buffers: exact to the bit for every dtype and shape, and no damaged or incomplete payload passes."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.weights.payload import ALIGNMENT, check_complete, checksum, pack, unpack, verify_bucket
from rlhf.errors import PayloadError
from rlhf.records import Bucket

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
LAYOUTS = ["contiguous", "transposed", "strided", "offset", "expanded"]
FEW = settings(max_examples=60, deadline=None)

Named = list[tuple[str, torch.Tensor]]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
    """Random bytes (NaN patterns included) seen through a layout that need not be contiguous."""
    inner = {"transposed": shape[::-1], "strided": (*shape, 2), "offset": (3, *shape), "expanded": shape}.get(
        layout, shape
    )
    generator = torch.Generator().manual_seed(seed)
    size = int(np.prod(inner, dtype=int)) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
    tensor = (raw.bool() if dtype == torch.bool else raw.view(dtype)).view(inner)
    if layout == "transposed":
        return tensor.permute(list(reversed(range(tensor.dim()))))
    if layout == "strided":
        return tensor[..., 1]
    if layout == "offset":
        return tensor[1]
    if layout == "expanded" and shape and shape[0]:
        return tensor[:1].expand(shape)
    return tensor


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.clone(memory_format=torch.contiguous_format).untyped_storage())


@st.composite
def tensors(draw: st.DrawFn) -> Named:
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=6))
    return [
        (
            f"layer.{index}",
            random_tensor(
                shape, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 9))
            ),
        )
        for index, shape in enumerate(shapes)
    ]


def read_only(packed: Sequence[tuple[Bucket, np.ndarray]]) -> None:
    """As the object store hands them out."""
    for _, buffer in packed:
        buffer.flags.writeable = False


@FEW
@given(named=tensors(), bucket_bytes=st.sampled_from([1, 64, 100, 500, 5000]))
def test_unpacked_is_what_was_packed(named: Named, bucket_bytes: int) -> None:
    packed = list(pack(named, bucket_bytes))
    read_only(packed)
    for bucket, buffer in packed:
        verify_bucket(bucket, buffer)
    back = [item for bucket, buffer in packed for item in unpack(bucket, buffer)]
    assert [name for name, _ in back] == [name for name, _ in named]
    for (_, found), (_, expected) in zip(back, named, strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert raw(found) == raw(expected)
    check_complete([bucket for bucket, _ in packed], {name: tuple(tensor.shape) for name, tensor in named})


@FEW
@given(named=tensors(), bucket_bytes=st.sampled_from([1, 64, 100, 500, 5000]))
def test_buffers_stay_under_the_size_and_do_not_overlap(named: Named, bucket_bytes: int) -> None:
    for bucket, buffer in pack(named, bucket_bytes):
        assert buffer.dtype == np.uint8
        assert bucket.nbytes == len(buffer)
        assert len(buffer) <= max(bucket_bytes, 0) or len(bucket.tensors) == 1
        end = 0
        for spec in bucket.tensors:
            assert spec.offset % ALIGNMENT == 0
            assert spec.offset >= end
            end = spec.offset + spec.nbytes
        assert end <= len(buffer)


def test_a_tensor_larger_than_a_buffer_gets_its_own() -> None:
    named = [("a", torch.ones(2)), ("big", torch.arange(1000)), ("b", torch.ones(3)), ("c", torch.ones(1))]
    packed = list(pack(named, bucket_bytes=256))
    assert [[spec.name for spec in bucket.tensors] for bucket, _ in packed] == [["a"], ["big"], ["b", "c"]]
    [(name, big)] = unpack(*packed[1])
    assert name == "big"
    assert torch.equal(big, torch.arange(1000))


def test_zero_dimensional_and_empty_tensors() -> None:
    named = [("scalar", torch.tensor(2.5, dtype=torch.bfloat16)), ("none", torch.empty(0, 4)), ("after", torch.ones(1))]
    [(bucket, buffer)] = pack(named, 4096)
    verify_bucket(bucket, buffer)
    back = dict(unpack(bucket, buffer))
    assert (back["scalar"].shape, back["scalar"].item()) == ((), 2.5)
    assert back["none"].shape == (0, 4)
    assert torch.equal(back["after"], torch.ones(1))


def test_parameters_that_require_gradients_are_packed() -> None:
    parameter = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    [(bucket, buffer)] = pack([("w", parameter.t())], 4096)
    [(_, back)] = unpack(bucket, buffer)
    assert not back.requires_grad
    assert back.tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_a_payload_is_a_copy_and_the_same_weights_give_the_same_bytes() -> None:
    """Padding included: nothing of the process' memory travels with the weights."""
    weights = torch.arange(5, dtype=torch.float32)
    [(bucket, first)] = pack([("w", weights)], 4096)
    weights += 1
    assert next(unpack(bucket, first))[1].tolist() == [0, 1, 2, 3, 4]
    weights -= 1
    [(_, second)] = pack([("w", weights)], 4096)
    assert first.tobytes() == second.tobytes()
    assert first[20:].tolist() == [0] * 44


def test_tensors_are_taken_one_buffer_at_a_time() -> None:
    taken: list[int] = []

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(6):
            taken.append(index)
            yield str(index), torch.zeros(16)

    buffers = pack(source(), bucket_bytes=128)
    next(buffers)
    assert len(taken) <= 3


def test_no_tensors_no_buffers() -> None:
    assert list(pack([], 4096)) == []


@FEW
@given(data=st.data())
def test_any_single_flipped_bit_within_a_tensor_is_caught_and_named(data: st.DataObject) -> None:
    named = data.draw(tensors().filter(lambda items: any(tensor.numel() for _, tensor in items)))
    [(bucket, buffer)] = pack(named, 10**6)
    spec = data.draw(st.sampled_from([spec for spec in bucket.tensors if spec.nbytes]))
    position = spec.offset + data.draw(st.integers(0, spec.nbytes - 1))
    buffer[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(PayloadError, match=f"checksum of {spec.name} does not match"):
        verify_bucket(bucket, buffer)


def test_every_byte_of_a_small_payload_is_covered() -> None:
    [(bucket, buffer)] = pack([("a", torch.arange(9)), ("b", torch.arange(5, dtype=torch.uint8))], 10**6)
    for spec in bucket.tensors:
        for position in range(spec.offset, spec.offset + spec.nbytes):
            buffer[position] ^= 0x10
            with pytest.raises(PayloadError, match=f"checksum of {spec.name} "):
                verify_bucket(bucket, buffer)
            buffer[position] ^= 0x10
    verify_bucket(bucket, buffer)


def test_tensors_that_changed_places_are_caught() -> None:
    [(bucket, buffer)] = pack([("q", torch.ones(16)), ("k", torch.zeros(16))], 10**6)
    swapped = np.concatenate([buffer[64:], buffer[:64]])
    with pytest.raises(PayloadError, match="checksum of q "):
        verify_bucket(bucket, swapped)


@pytest.mark.parametrize("length", [0, 64, 71])
def test_a_short_buffer_is_caught(length: int) -> None:
    [(bucket, buffer)] = pack([("a", torch.ones(16)), ("b", torch.ones(2))], 10**6)
    with pytest.raises(PayloadError, match=f" of {length}$"):
        verify_bucket(bucket, buffer[:length])


def _buckets() -> list[Bucket]:
    named = [("a.weight", torch.ones(2, 3)), ("b.weight", torch.ones(4)), ("c.weight", torch.tensor(1.0))]
    return [bucket for bucket, _ in pack(named, 64)]


EXPECTED = {"a.weight": (2, 3), "b.weight": (4,), "c.weight": ()}


def test_a_complete_payload_over_several_buffers_passes() -> None:
    assert len(_buckets()) == 3
    check_complete(_buckets(), EXPECTED)


@pytest.mark.parametrize("lost", range(3))
def test_a_missing_tensor_is_named(lost: int) -> None:
    buckets = _buckets()
    [spec] = buckets.pop(lost).tensors
    with pytest.raises(PayloadError, match=rf"1 tensors are missing, the first is {spec.name}$"):
        check_complete(buckets, EXPECTED)


def test_an_empty_payload_is_missing_everything() -> None:
    with pytest.raises(PayloadError, match=r"3 tensors are missing, the first is a\.weight"):
        check_complete([], EXPECTED)


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(PayloadError, match=r"1 tensors are not in the checkpoint, the first is b\.weight"):
        check_complete(_buckets(), {name: shape for name, shape in EXPECTED.items() if name != "b.weight"})


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1)])
def test_a_wrong_shape_is_named_with_both(shape: tuple[int, ...]) -> None:
    """Also where the number of elements agrees."""
    with pytest.raises(PayloadError) as error:
        check_complete(_buckets(), EXPECTED | {"a.weight": shape})
    assert f"a.weight has shape (2, 3), the checkpoint has {shape}" in str(error.value)


def test_a_tensor_sent_twice_is_refused() -> None:
    """Which of the two an engine keeps is nobody's to guess."""
    buckets = _buckets()
    with pytest.raises(PayloadError, match=r"a\.weight"):
        check_complete([*buckets, dataclasses.replace(buckets[0])], EXPECTED)


def test_the_checksum_is_xxh3_128() -> None:
    """Pinned against the published test vector of the empty input, and equal for equal bytes in any array."""
    assert checksum(np.empty(0, np.uint8)) == "99aa06d3014798d86001c324468d497f"
    data = np.arange(100, dtype=np.uint8)
    assert checksum(data) == checksum(data.copy()) != checksum(data[:99])
