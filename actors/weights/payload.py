"""Packed weight buffers: many tensors in a few large byte arrays, each tensor with its own checksum."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import xxhash

from rlhf.errors import PayloadError
from rlhf.records import Bucket, TensorSpec

ALIGNMENT = 64
"""Byte alignment of a tensor in its buffer: a cache line, and more than any dtype needs."""


def empty(size: int) -> np.ndarray:
    """A fresh buffer of so many bytes."""
    return np.empty(size, dtype=np.uint8)


def pack(
    tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int, allocate: Callable[[int], np.ndarray] = empty
) -> Iterator[tuple[Bucket, np.ndarray]]:
    """Pack CPU tensors into uint8 buffers of about `bucket_bytes`; a larger tensor gets a buffer of its own.

    Tensors are taken one at a time, so that a gathered ZeRO-3 parameter lives no longer than its copy.
    """
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        nbytes = _aligned(tensor.numel() * tensor.element_size())
        if held and size + nbytes > bucket_bytes:
            yield _pack_one(held, allocate(size))
            held, size = [], 0
        held.append((name, tensor.detach()))
        size += nbytes
    if held:
        yield _pack_one(held, allocate(size))


def unpack(bucket: Bucket, buffer: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the tensors in a buffer; they share its (possibly read-only) memory and must not be written to."""
    for spec in bucket.tensors:
        yield spec.name, _bytes_to_tensor(buffer, spec)


def verify_bucket(bucket: Bucket, buffer: np.ndarray) -> None:
    """Check sizes and checksums of every tensor; raises `PayloadError` naming the first that is wrong."""
    for spec in bucket.tensors:
        if spec.offset + spec.nbytes > len(buffer):
            raise PayloadError(f"weight payload: {spec.name} ends at byte {spec.offset + spec.nbytes} of {len(buffer)}")
        if checksum(buffer[spec.offset : spec.offset + spec.nbytes]) != spec.checksum:
            raise PayloadError(f"weight payload: checksum of {spec.name} does not match the learner's")


def check_complete(buckets: Sequence[Bucket], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the payload holds every expected tensor in its shape and nothing else; raises `PayloadError`.

    vLLM keeps old values of a tensor that is missing, and says nothing.
    """
    specs = [spec for bucket in buckets for spec in bucket.tensors]
    received = {spec.name: spec.shape for spec in specs}
    if len(received) < len(specs):
        twice = next(name for name, count in Counter(spec.name for spec in specs).items() if count > 1)
        raise PayloadError(f"weight payload: {twice} was sent twice")
    if missing := sorted(expected.keys() - received.keys()):
        raise PayloadError(f"weight payload: {len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(received.keys() - expected.keys()):
        raise PayloadError(
            f"weight payload: {len(unknown)} tensors are not in the checkpoint, the first is {unknown[0]}"
        )
    for name, shape in expected.items():
        if received[name] != shape:
            raise PayloadError(f"weight payload: {name} has shape {received[name]}, the checkpoint has {shape}")


def checksum(data: np.ndarray) -> str:
    """128-bit xxHash of a byte array, as hex."""
    return xxhash.xxh3_128_hexdigest(data.data)


def _pack_one(tensors: Sequence[tuple[str, torch.Tensor]], buffer: np.ndarray) -> tuple[Bucket, np.ndarray]:
    specs = []
    offset = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        view = buffer[offset : offset + nbytes]
        if nbytes:
            # Any strides will do: a contiguous tensor of one element may have some that allow no view as bytes.
            torch.from_numpy(view).view(tensor.dtype).view(tensor.shape).copy_(tensor)
        buffer[offset + nbytes : offset + _aligned(nbytes)] = 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name, dtype, tuple(tensor.shape), offset, nbytes, checksum(view)))
        offset += _aligned(nbytes)
    return Bucket(tuple(specs), len(buffer)), buffer


def _bytes_to_tensor(buffer: np.ndarray, spec: TensorSpec) -> torch.Tensor:
    import warnings

    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    data = buffer[spec.offset : spec.offset + spec.nbytes]
    with warnings.catch_warnings():
        # The object store maps buffers read-only; vLLM only copies from them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data).view(getattr(torch, spec.dtype)).view(spec.shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
