"""The ipc transport without a GPU: layout, checksums, what torch and vLLM are told, and both ends in one process.

Where two processes would map one GPU's memory, `Mapped` hands over the buffer itself.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm.distributed.weight_transfer.packed_tensor import PackedBufferImporter

from actors.engine import ipc, ipc_transfer
from actors.engine.ipc import HANDLE, IpcSender, open_shared, share, staging_info
from actors.engine.ipc_transfer import IpcInitInfo, IpcReceiver, IpcTransferEngine, IpcUpdateInfo
from actors.engine.llm import EngineSpec, engine_arguments
from actors.weights.ipc import DeviceBuffer, digest, lay_out, view
from actors.weights.payload import ALIGNMENT
from actors.weights.transport import pick_transport
from rlhf.config import RunConfig
from rlhf.errors import InputError, PayloadError, RLHFError
from rlhf.learning.parametrisation import Full

BUCKET = 1024


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    return AutoModelForCausalLM.from_config(config)


class Mapped:
    """Shared memory of one process: a handle is a number."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def share(self, buffer: torch.Tensor) -> dict[str, Any]:
        self.buffers.append(buffer)
        return {"number": len(self.buffers) - 1}

    def open(self, handle: dict[str, Any], device: int, importer: Any) -> torch.Tensor:
        return self.buffers[handle["number"]]


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> Mapped:
    memory = Mapped()
    monkeypatch.setattr(ipc, "share", memory.share)
    monkeypatch.setattr(ipc_transfer, "open_shared", memory.open)
    return memory


# --- the choice ------------------------------------------------------------------------------------------------------


def config(colocate: bool, **sync: Any) -> RunConfig:
    return RunConfig(name="t", policy={"path": "m"}, prompts={"path": "p"}, sync=sync, cluster={"colocate": colocate})


@pytest.mark.parametrize(
    ("asked", "colocate", "device", "expected"),
    [
        ("auto", True, "cuda", "ipc"),
        ("auto", False, "cuda", "nccl"),
        ("auto", True, "cpu", "object_store"),
        ("auto", False, "cpu", "object_store"),
        ("ipc", True, "cuda", "ipc"),
        ("object_store", True, "cuda", "object_store"),
    ],
)
def test_auto_follows_where_the_roles_are(asked: str, colocate: bool, device: str, expected: str) -> None:
    assert pick_transport(config(colocate, transport=asked), device) == expected


def test_sparse_updates_of_shared_gpus_go_through_the_object_store() -> None:
    assert pick_transport(config(True, sparse=True), "cuda") == "object_store"


def test_ipc_without_gpus_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"^sync\.transport = 'ipc'.*'cpu'.*object_store or auto$"):
        pick_transport(config(True, transport="ipc"), "cpu")


def test_engines_are_started_with_this_backend() -> None:
    spec = EngineSpec("m", "bfloat16", 64, 1, "cuda", 0, False, {}, "ipc", sleeps=True)
    assert engine_arguments(spec)["weight_transfer_config"] == {"backend": "rlhf_ipc"}


def test_vllm_finds_the_backend() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from actors.engine.plugin import register

    register()
    register()
    assert WeightTransferEngineFactory._registry["rlhf_ipc"]() is IpcTransferEngine


# --- checksums and layout --------------------------------------------------------------------------------------------


def plain_digest(data: bytes) -> int:
    """The formula, a word at a time."""
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    mask, total = (1 << 64) - 1, 0
    for start in range(0, len(words), 1 << 20):
        total = total * 0x5851F42D4C957F2D & mask
        for place, word in enumerate(words[start : start + (1 << 20)]):
            product = place * 0x9E3779B97F4A7C15 & mask
            signed = product - (1 << 64) if product >> 63 else product
            total = total + word * (((signed ^ (signed >> 29)) | 1) & mask) & mask
    return total - (1 << 64) if total >> 63 else total


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("words", [1, 7, 1000])
def test_the_digest_is_its_formula(words: int) -> None:
    data = random_bytes(8 * words)
    assert digest(data) == plain_digest(bytes(data.tolist()))


def test_the_digest_tells_parts_apart() -> None:
    data = random_bytes(8 * (2 << 20))
    swapped = torch.cat([data[8 << 20 :], data[: 8 << 20]])
    assert digest(data) != digest(swapped)
    assert digest(data) == digest(data.clone())


@pytest.mark.parametrize(
    "change", [lambda d: d[17].add_(1), lambda d: d[:16].copy_(d[:16].roll(8)), lambda d: d[-8:].zero_()]
)
def test_the_digest_finds_what_changed(change: Any) -> None:
    data = random_bytes(4096)
    before = digest(data)
    change(data)
    assert digest(data) != before


def test_every_tensor_has_an_aligned_place_of_its_own(model: LlamaForCausalLM) -> None:
    tensors = dict(Full().export(model))
    buckets = lay_out(tensors.items(), BUCKET)
    assert len(buckets) > 3
    specs = [spec for bucket in buckets for spec in bucket.tensors]
    assert [(spec.name, spec.shape) for spec in specs] == [(n, tuple(t.shape)) for n, t in tensors.items()]
    for bucket in buckets:
        ends = 0
        for spec in bucket.tensors:
            assert spec.offset % ALIGNMENT == 0
            assert spec.offset >= ends
            ends = spec.offset + spec.nbytes
        assert ends <= bucket.nbytes
        assert bucket.nbytes <= BUCKET or len(bucket.tensors) == 1


def test_tensors_of_other_dtypes_and_sizes_can_be_read_back() -> None:
    tensors = {
        "a": torch.arange(3.0),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.tensor(7),
        "d": torch.empty(0, 2),
    }
    (bucket,) = lay_out(tensors.items(), BUCKET)
    buffer = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    for spec in bucket.tensors:
        view(buffer, spec).copy_(tensors[spec.name])
    for spec in bucket.tensors:
        assert torch.equal(view(buffer, spec), tensors[spec.name])
        assert view(buffer, spec).dtype == tensors[spec.name].dtype


# --- what torch is told ----------------------------------------------------------------------------------------------


def test_a_handle_is_plain_values_and_becomes_torchs_arguments_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process's `rebuild_cuda_tensor` gets what `reduce_tensor` gave here, but for its own device."""
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    given: dict[str, Any] = {
        "tensor_cls": torch.Tensor,
        "tensor_size": torch.Size([4096]),
        "tensor_stride": (1,),
        "tensor_offset": 128,
        "storage_cls": torch.storage.TypedStorage,
        "dtype": torch.uint8,
        "storage_device": 5,
        "storage_handle": b"handle",
        "storage_size_bytes": 4224,
        "storage_offset_bytes": 512,
        "requires_grad": False,
        "ref_counter_handle": b"counter",
        "ref_counter_offset": 3,
        "event_handle": b"event",
        "event_sync_required": True,
    }
    assert list(given) == names
    monkeypatch.setattr(reductions, "reduce_tensor", lambda buffer: (None, tuple(given.values())))
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *arguments: dict(zip(names, arguments, strict=True)))
    handle = share(torch.empty(4096, dtype=torch.uint8))
    assert set(handle) == {*HANDLE, "size", "offset"}
    assert {type(value) for value in handle.values()} <= {int, bytes, bool}
    importer = PackedBufferImporter()
    opened: Any = open_shared(handle, 0, importer)
    assert opened == given | {"storage_device": 0}
    # vLLM opens an export once and counts on it.
    assert open_shared(handle, 0, importer) is opened


# --- both ends -------------------------------------------------------------------------------------------------------


def send(sender: IpcSender, receiver: IpcReceiver, verify: bool = True) -> None:
    sender.begin()
    buckets = sender.layout()
    for number, bucket in enumerate(buckets):
        filled = [sender.fill(number)]
        last = number == len(buckets) - 1
        receiver.stage(IpcUpdateInfo(**staging_info(number, bucket, filled, last, verify)))
    sender.end()


def ends(model: LlamaForCausalLM) -> tuple[IpcSender, IpcReceiver, dict[str, torch.Tensor]]:
    expected = dict(Full().export(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    return (
        IpcSender(lambda: Full().export(model), "cpu", BUCKET),
        IpcReceiver(shapes, torch.device("cpu")),
        expected,
    )


def test_every_tensor_arrives_through_two_buffers(model: LlamaForCausalLM, mapped: Mapped) -> None:
    sender, receiver, expected = ends(model)
    for _ in range(2):
        mapped.buffers.clear()
        send(sender, receiver)
        # The whole payload went through two buckets' memory, and none of it is held by the learner any more.
        assert [len(buffer) for buffer in mapped.buffers] == 2 * [max(b.nbytes for b in sender.layout())]
        assert sum(b.nbytes for b in sender.layout()) > 4 * BUCKET
        mapped.buffers[0].zero_()
        received = dict(receiver.tensors())
        assert received.keys() == expected.keys()
        assert all(torch.equal(received[name], expected[name]) for name in expected)
    assert sender._buffers == []


def test_a_buffer_that_is_overwritten_too_early_is_found(model: LlamaForCausalLM, mapped: Mapped) -> None:
    sender, receiver, _ = ends(model)
    sender.begin()
    first = sender.fill(0)
    sender.fill(1)
    sender.fill(2)  # in the first one's place
    info = staging_info(0, sender.layout()[0], [first], False, True)
    with pytest.raises(PayloadError, match=r"checksum of bucket 0, from model\.embed_tokens\.weight on"):
        receiver.stage(IpcUpdateInfo(**info))
    receiver.stage(IpcUpdateInfo(**info | {"verify": False}))


def test_a_payload_that_is_not_whole_is_refused_at_its_end(model: LlamaForCausalLM, mapped: Mapped) -> None:
    sender, receiver, expected = ends(model)
    sender.begin()
    info = staging_info(0, sender.layout()[0], [sender.fill(0)], True, True)
    missing = len(expected) - len(sender.layout()[0].tensors)
    with pytest.raises(PayloadError, match=f"{missing} tensors are missing"):
        receiver.stage(IpcUpdateInfo(**info))


def test_buckets_out_of_order_are_refused_and_a_first_one_starts_over(model: LlamaForCausalLM, mapped: Mapped) -> None:
    sender, receiver, expected = ends(model)
    sender.begin()
    zeroth, first = (staging_info(n, sender.layout()[n], [sender.fill(n)], False, True) for n in (0, 1))
    with pytest.raises(PayloadError, match="bucket 1 came, bucket 0 is next"):
        receiver.stage(IpcUpdateInfo(**first))
    receiver.stage(IpcUpdateInfo(**zeroth))
    receiver.stage(IpcUpdateInfo(**first))
    send(sender, receiver)
    assert dict(receiver.tensors()).keys() == expected.keys()


def test_an_engine_without_a_rank_on_its_gpu_says_so(model: LlamaForCausalLM, mapped: Mapped) -> None:
    sender, receiver, _ = ends(model)
    sender.begin()
    elsewhere = [DeviceBuffer("GPU-7", 0, {}, 0)]
    with pytest.raises(PayloadError, match="no learner rank is on this engine's GPU cpu, but on GPU-7"):
        receiver.stage(IpcUpdateInfo(**staging_info(0, sender.layout()[0], elsewhere, False, True)))


def test_a_sender_that_has_not_begun_and_weights_that_changed_shape_are_errors() -> None:
    shapes = iter([(2, 3), (2, 3), (3, 2)])

    def export() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(next(shapes))

    sender = IpcSender(export, "cpu", BUCKET)
    sender.layout()
    with pytest.raises(RLHFError, match="no sending has begun"):
        sender.fill(0)


def test_weights_that_do_not_fit_the_layout_are_an_error(mapped: Mapped) -> None:
    shapes = iter([(2, 3), (3, 2)])

    def export() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(next(shapes))

    sender = IpcSender(export, "cpu", BUCKET)
    sender.begin()
    with pytest.raises(RLHFError, match=r"bucket 0: a \(3, 2\) came where a was expected"):
        sender.fill(0)


# --- inside vLLM's worker --------------------------------------------------------------------------------------------


class Loaded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.received: dict[str, torch.Tensor] = {}


def test_the_worker_loads_only_what_was_staged_whole(
    model: LlamaForCausalLM, mapped: Mapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, _, expected = ends(model)
    engine = IpcTransferEngine.__new__(IpcTransferEngine)
    engine.device = torch.device("cpu")
    loads: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(engine, "_load", lambda receiver: loads.append(dict(receiver.tensors())))
    shapes = [(name, list(tensor.shape)) for name, tensor in expected.items()]
    engine.init_transfer_engine(engine.parse_init_info({"expected": shapes}))
    assert isinstance(engine.parse_init_info({"expected": shapes}), IpcInitInfo)
    sender.begin()
    buckets = sender.layout()
    for number, bucket in enumerate(buckets):
        assert loads == []
        last = number == len(buckets) - 1
        info = staging_info(number, bucket, [sender.fill(number)], last, True)
        engine.receive_weights(engine.parse_update_info(info))
    engine.receive_weights(engine.parse_update_info({"phase": "load"}))
    assert len(loads) == 1
    assert all(torch.equal(loads[0][name], expected[name]) for name in expected)
    # Nothing is kept that the cache needs.
    assert dict(engine._receiver.tensors()) == {}
