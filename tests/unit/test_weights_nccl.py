"""The nccl transport without a GPU: when it is chosen, what vLLM is told, and the learner's end of the group."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

from actors.engine.llm import EngineSpec, engine_arguments
from actors.engine.nccl import ExportSource, NcclSender, SilentClient, first_failure
from actors.weights.nccl import NcclGroup, update_info
from actors.weights.transport import pick_transport
from rlhf.config import RunConfig
from rlhf.errors import EngineLostError, InputError
from rlhf.learning.parametrisation import Full

GROUP = NcclGroup("10.0.0.1", 29500, 5, True, 1 << 20)


def config(**sync: Any) -> RunConfig:
    return RunConfig(
        name="t",
        policy={"path": "models/x"},
        prompts={"path": "p.jsonl"},
        generator={"tensor_parallel": 2},
        sync=sync,
        cluster={"device": "auto"},
    )


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [
        ("auto", "cuda", "nccl"),
        ("auto", "cpu", "object_store"),
        ("object_store", "cuda", "object_store"),
        ("object_store", "cpu", "object_store"),
        ("nccl", "cuda", "nccl"),
    ],
)
def test_transport_follows_config_and_device(asked: str, device: str, expected: str) -> None:
    assert pick_transport(config(transport=asked), device) == expected


def test_nccl_without_gpus_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"^sync\.transport = 'nccl'.*'cpu'.*object_store or auto$"):
        pick_transport(config(transport="nccl"), "cpu")


# --- what vLLM is told -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transport", "backend"), [("object_store", "rlhf_object_store"), ("nccl", "nccl")])
def test_engines_are_started_with_the_backend_of_their_transport(transport: str, backend: str) -> None:
    spec = EngineSpec("m", "bfloat16", 64, 2, "cuda", 0, False, {}, transport)
    assert engine_arguments(spec)["weight_transfer_config"] == {"backend": backend}


def test_an_engine_that_keeps_its_weights_has_no_backend() -> None:
    spec = EngineSpec("m", "bfloat16", 64, 2, "cuda", 0, False, {}, None)
    assert "weight_transfer_config" not in engine_arguments(spec)


def test_vllm_parses_what_an_engine_is_told() -> None:
    info = NCCLWeightTransferInitInfo(**GROUP.engine_info(3))
    assert (info.master_address, info.master_port, info.nccl_unique_id_bytes) == ("10.0.0.1", 29500, None)
    assert (info.rank_offset, info.world_size, info.packed, info.packed_buffer_size_bytes) == (3, 5, True, 1 << 20)


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


def test_metadata_agrees_with_every_pass_over_the_weights(model: LlamaForCausalLM) -> None:
    source = ExportSource(lambda: Full().export(model), "cpu")
    declared = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    assert declared[0] == ("model.embed_tokens.weight", torch.bfloat16, (40, 16))
    assert len(declared) == 2 * 9 + 2  # 9 tensors a layer, embedding and last norm; the tied head is not sent
    for _ in range(2):
        assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source] == declared


def test_the_table_describes_the_bytes_that_vllm_packs(model: LlamaForCausalLM) -> None:
    sender = NcclSender(lambda: Full().export(model), 0, "cpu")
    table = sender.table()
    info = NCCLWeightTransferUpdateInfo(**update_info([table]))
    packed = pack_tensors(iter(ExportSource(lambda: Full().export(model), None)), lambda item: item[1], 1 << 30)
    assert packed is not None
    assert table.nbytes == packed.packed_tensor.numel() == 2 * sum(p.numel() for p in model.parameters())
    dtypes = [getattr(torch, name) for name in info.dtype_names]
    sizes = [spec.nbytes for spec in table.tensors]
    received = dict(unpack_tensor(packed.packed_tensor, info.names, info.shapes, dtypes, sizes))
    expected = dict(Full().export(model))
    assert received.keys() == expected.keys()
    assert all(torch.equal(received[name], expected[name]) for name in expected)


# --- the learner's end -----------------------------------------------------------------------------------------------


class Counted:
    """An export that counts how many of its tensors were taken."""

    def __init__(self, tensors: int = 6) -> None:
        self.tensors = tensors
        self.taken: list[int] = []

    def __call__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.taken.append(0)
        for index in range(self.tensors):
            self.taken[-1] += 1
            yield f"t{index}", torch.full((3,), float(index))


class Trainer(NCCLTrainerWeightTransferEngine):
    """vLLM's trainer with the network taken out: it goes through the weights until one of them hangs."""

    def __init__(self, source: ExportSource, hang_at: int | None = None, until: threading.Event | None = None) -> None:
        super().__init__(client=SilentClient(), source=source)
        self.hang_at = hang_at
        self.until = until or threading.Event()
        self.shut = False
        self.sent: list[str] = []

    def _broadcast(self, source: Any, meta: Any) -> None:
        for index, (name, _) in enumerate(self._checked_iter(source, meta)):
            if index == self.hang_at:
                assert self.until.wait(20)
            self.sent.append(name)

    def shutdown(self) -> None:
        self.shut = True
        self.until.set()


def opened(sender: NcclSender, **options: Any) -> Trainer:
    trainer = Trainer(sender._source, **options)
    sender._engine = trainer
    return trainer


def test_a_whole_sending_leaves_the_group_open_for_the_next() -> None:
    export = Counted()
    sender = NcclSender(export, 0, "cpu")
    trainer = opened(sender)
    for _ in range(2):
        sender.send([], 10)
    assert trainer.sent == 2 * [f"t{index}" for index in range(6)]
    assert not trainer.shut
    assert export.taken == [6, 6, 6]  # once for the table, then each sending


def test_a_sending_past_its_deadline_is_broken_and_its_ranks_stay_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engine.nccl.GRACE_S", 0.1)
    export = Counted()
    sender = NcclSender(export, 0, "cpu")
    trainer = opened(sender, hang_at=2)
    with pytest.raises(EngineLostError, match="not done within 0 s"):
        sender.send([], 0.2)
    assert trainer.shut
    assert trainer.sent == ["t0", "t1", "t2"]  # nothing more is enqueued on a broken group
    assert export.taken == [6, 6]  # the other ranks gather every tensor and wait for this one
    with pytest.raises(EngineLostError, match="not open"):
        sender.send([], 1)


def test_a_sender_that_only_is_slow_stops_by_itself_before_the_group_is_broken() -> None:
    sender = NcclSender(Counted(), 0, "cpu")
    until = threading.Event()
    trainer = opened(sender, hang_at=2, until=until)
    threading.Timer(1.0, until.set).start()
    started = time.monotonic()
    with pytest.raises(EngineLostError, match="not done within"):
        sender.send([], 0.2)
    assert trainer.sent == ["t0", "t1", "t2"]
    assert time.monotonic() - started < 2.5  # less than the grace that a hanging one gets


def test_what_fails_before_the_first_tensor_still_gathers_all() -> None:
    export = Counted()
    sender = NcclSender(export, 0, "cpu")
    # vLLM's own trainer, without its group: it refuses before it touches the weights.
    sender._engine = NCCLTrainerWeightTransferEngine(client=SilentClient(), source=sender._source)
    with pytest.raises(EngineLostError, match=r"AssertionError: trainer_init\(\) must be called"):
        sender.send([], 10)
    assert export.taken == [6, 6]


def test_other_ranks_only_gather() -> None:
    export = Counted()
    sender = NcclSender(export, 1, "cpu")
    sender.open(GROUP, [], 10)  # meets nobody: only rank 0 is in the group
    sender.send([], 10)
    assert export.taken == [6, 6]


def test_joining_without_a_gpu_fails_at_once() -> None:
    with pytest.raises(EngineLostError, match="accelerator"):
        NcclSender(Counted(), 0, "cpu").open(GROUP, [], 60)


def test_a_meeting_that_nobody_comes_to_ends_at_its_deadline_and_does_not_come_back() -> None:
    late = threading.Event()
    left = threading.Event()

    class Waiting(NcclSender):
        def _join(self, group: NcclGroup) -> NCCLTrainerWeightTransferEngine:
            assert late.wait(20)
            engine = Trainer(self._source, until=left)
            return engine

    sender = Waiting(Counted(), 0, "cpu")
    with pytest.raises(EngineLostError, match="group of 5: not done within 0 s"):
        sender.open(GROUP, [], 0.3)
    late.set()
    assert left.wait(10)  # the group that came about too late is left again
    assert sender._engine is None


def test_a_failing_call_of_an_engine_ends_the_wait() -> None:
    """Real Ray calls: one that ends well says nothing, one that fails ends the wait with its reason."""

    @ray.remote
    def call(seconds: float, error: str | None) -> float:
        time.sleep(seconds)
        if error:
            raise EngineLostError(error)
        return 1.0

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        calls = [call.remote(0, None), call.remote(0.3, "generator-1: no memory")]
        started = time.monotonic()
        assert first_failure(calls, 60, threading.Event()) == "generator-1: no memory"
        assert time.monotonic() - started < 30
        assert first_failure(calls[:1], 0.5, threading.Event()) == "not done within 0 s"
        done = threading.Event()
        done.set()
        assert first_failure(calls[:1], 60, done) is None
    finally:
        ray.shutdown()
