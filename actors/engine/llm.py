"""vLLM's AsyncLLM behind the few calls that generators and judges need."""

import asyncio
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import numpy as np

from actors.engine.adapters import Adapter, Adapters, AdapterSpec
from actors.engine.plugin import IPC, IPC_TRANSPORT, NCCL, TRANSPORT, register
from actors.engine.scratch import leave_files_with_ray
from actors.engine.sleeping import PARTS, Sleeper
from rlhf import packed
from rlhf.config.colocate import GPU_SHARE
from rlhf.errors import EngineLostError
from rlhf.records import Bucket, Rollout, SampleRequest, VersionSpan

BACKENDS = {NCCL: NCCL, IPC: IPC_TRANSPORT}
"""vLLM's transfer engine by transport; `TRANSPORT` for the others."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine serves and how; `arguments` go to vLLM's engine arguments as they are.

    `transport` brings new weights: "object_store", "nccl", "ipc", or None for an engine that keeps its weights. With
    `adapters` it brings LoRA adapters, which are served beside weights that stay.
    """

    model: str
    dtype: str
    max_length: int
    tensor_parallel: int
    device: str
    seed: int
    trust_remote_code: bool
    arguments: dict[str, Any]
    transport: str | None
    adapters: AdapterSpec | None = None
    sync_s: float = 600.0
    """Seconds in which a payload must have reached a worker."""
    sleeps: bool = False
    """Does the engine share its device, and sleep between its turns?"""


class Engine:
    """One vLLM engine. Every method is a coroutine of the caller's event loop."""

    def __init__(self, spec: EngineSpec):
        register()
        self._salt = 0
        self._calls = count()
        self._finished = 0
        self._sync_s = spec.sync_s
        self._transport = spec.transport
        self._engine = start_engine(engine_arguments(spec))
        self._adapters = Adapters(self._engine, spec.adapters) if spec.adapters else None
        self._sleeper = Sleeper(self._engine, spec.device == "cuda")

    def shutdown(self) -> None:
        """Stop the engine's processes."""
        self._engine.shutdown()

    @property
    def awake(self) -> bool:
        """Can it sample?"""
        return self._sleeper.awake

    async def sleep(self, level: int) -> None:
        """Give the device's memory back; see `actors.engine.sleeping`."""
        with naming_death():
            await self._sleeper.sleep(level)

    async def wake(self, parts: Collection[str] = PARTS) -> None:
        """Take the device's memory again."""
        with naming_death():
            await self._sleeper.wake(parts)

    async def sample(self, request: SampleRequest, k: int, sampling: dict[str, Any], name: str) -> Rollout:
        """Sample response `k` of a request with its own seed."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(**sampling, seed=request.seeds[k], logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)
        with self._adapters.sampling() if self._adapters else nullcontext() as adapter:
            final = await self._run(request.prompt.token_ids, params, name, adapter)
        output = final.outputs[0]
        token_ids = packed.token_ids(output.token_ids)
        versions = [(_version(span.version), span.start, span.end) for span in output.weight_versions or ()]
        if adapter:
            # A request keeps the adapter that it began with; vLLM knows of the base weights' versions only.
            versions = [(adapter.version, 0, len(token_ids))]
        return Rollout(
            uid=request.prompt.uid,
            k=k,
            token_ids=token_ids,
            logprobs=packed.logprobs(
                step[token].logprob for step, token in zip(output.logprobs or (), token_ids, strict=True)
            ),
            text=output.text,
            finish_reason=output.finish_reason or "unknown",
            versions=tuple(VersionSpan(*span) for span in versions),
        )

    def tokens(self) -> int:
        """Tokens sampled so far, those of requests that still run included; for signs of life."""
        running = self._engine.output_processor.request_states.values()
        return self._finished + sum(state.detokenizer.num_output_tokens() for state in running if state.detokenizer)

    async def next_logprobs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> np.ndarray:
        """Log-probs of `token_ids` as the next token of each prompt: float64 [len(prompts), len(token_ids)]."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, logprob_token_ids=list(token_ids))
        # Requests of a call that was cancelled may still be ending: no name is used twice.
        call = next(self._calls)

        async def score(index: int, prompt: Sequence[int]) -> list[float]:
            final = await self._run(prompt, params, f"score-{call}-{index}")
            found = final.outputs[0].logprobs[0]
            return [found[token].logprob if token in found else float("nan") for token in token_ids]

        rows = await asyncio.gather(*(score(index, prompt) for index, prompt in enumerate(prompts)))
        return np.asarray(rows, dtype=np.float64).reshape(len(prompts), len(token_ids))

    async def sequence_logprobs(self, token_ids: Sequence[int], name: str) -> tuple[float, ...]:
        """Log-prob of each token after the first, by one forward pass over the sequence, under what was loaded last."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        with self._adapters.probing() if self._adapters else nullcontext() as adapter:
            final = await self._run(token_ids, params, name, adapter)
        found = final.prompt_logprobs or []
        return tuple(row[token].logprob for row, token in zip(found[1:], token_ids[1:], strict=True))

    async def connect(self, address: str, namespace: str, holder: str, expected: dict[str, tuple[int, ...]]) -> None:
        """Let the engine's workers join the cluster as receivers of weights, or tell them alone what to expect.

        `expected` holds every tensor of a payload. Raises `InputError` for adapters that vLLM cannot serve.
        """
        if self._adapters:
            await self._adapters.connect(address, namespace, holder, expected, self._sync_s)
            return
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        info: dict[str, Any] = {"expected": [(name, list(shape)) for name, shape in expected.items()]}
        if self._transport != IPC:
            info |= {"address": address, "namespace": namespace, "holder": holder, "deadline": self._sync_s}
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def stage(self, buckets: Sequence[Bucket], verify: bool) -> None:
        """Map and check a payload on every worker; the engine goes on serving."""
        tables = [[asdict(spec) for spec in bucket.tensors] for bucket in buckets]
        with naming_death():
            if self._adapters:
                await self._adapters.stage(tables, verify)
            else:
                await self._stage(tables, verify)

    async def stage_bucket(self, info: dict[str, Any]) -> None:
        """Let every worker take a copy of one bucket, as `actors.engine.ipc.staging_info` describes it."""
        with naming_death():
            await self._apart(info)

    async def _stage(self, tables: list[list[dict[str, Any]]], verify: bool) -> None:
        await self._apart({"phase": "stage", "verify": verify, "buckets": tables})

    async def _apart(self, info: dict[str, Any]) -> None:
        """A phase that leaves the model alone, in an update session of its own."""
        await self._engine.start_weight_update()
        try:
            await self._phase(info)
        except Exception:
            # The worker that refused has ended vLLM's update session itself, the others still have to.
            with suppress(Exception):
                await self._engine.finish_weight_update()
            raise
        await self._engine.finish_weight_update()

    async def load(self, version: int) -> None:
        """Put the staged payload in place of the old weights; sampling pauses until `resume`.

        Adapters are put beside the old ones: sampling goes on under these until `serve`.
        """
        if self._adapters:
            await self._adapters.load(version)
        else:
            await self._swap(version, {"phase": "load"})

    async def open_nccl(self, info: dict[str, Any]) -> None:
        """Let the engine's workers join an NCCL group, in place of an earlier one; waits until all have met."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.shutdown_weight_transfer_engine()
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def receive(self, version: int, info: dict[str, Any]) -> None:
        """Put what the NCCL group's sender broadcasts in place of the old weights; sampling pauses until `resume`."""
        await self._swap(version, info)

    async def _swap(self, version: int, info: dict[str, Any]) -> None:
        await self._engine.pause_generation(mode="keep", clear_cache=False)
        await self._engine.start_weight_update()
        await self._phase(info)
        await self._engine.finish_weight_update(weight_version=str(version))
        # Prefixes cached under the old weights are stale. The reset does nothing while paused sequences hold blocks,
        # hence also a salt per version.
        self._salt = version
        await self._engine.reset_prefix_cache()

    async def discard(self) -> None:
        """Forget a staged payload."""
        with naming_death():
            await self._apart({"phase": "discard"})

    async def resume(self) -> None:
        """Let sampling go on after `load`."""
        if not self._adapters:
            await self._engine.resume_generation()

    async def serve(self) -> None:
        """What was loaded last has been proved: new samples run under it."""
        if self._adapters:
            await self._adapters.serve()

    async def _phase(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=info))

    async def _run(self, token_ids: Sequence[int], params: Any, name: str, adapter: Adapter | None = None) -> Any:
        from vllm.inputs import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=list(token_ids), cache_salt=str(self._salt))
        final: Any = None
        lora = adapter.request if adapter else None
        with naming_death():
            async for output in self._engine.generate(prompt, params, request_id=name, lora_request=lora):
                final = output
        if final is None:
            raise RuntimeError(f"vLLM ended request {name} without an output")
        self._finished += len(final.outputs[0].token_ids)
        return final


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """vLLM's arguments for a spec; `spec.arguments` win."""
    arguments: dict[str, Any] = {
        "model": spec.model,
        "dtype": spec.dtype,
        "max_model_len": spec.max_length,
        "tensor_parallel_size": spec.tensor_parallel,
        "seed": spec.seed,
        "trust_remote_code": spec.trust_remote_code,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if spec.device == "cpu":
        arguments |= {
            "enforce_eager": True,
            # Seeded requests fail with chunked prefill on a CPU.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, spec.max_length),
            "max_num_seqs": 128,
            "kv_cache_memory_bytes": 512 << 20,
        }
    if spec.adapters:
        arguments |= spec.adapters.arguments()
    elif spec.transport:
        arguments["weight_transfer_config"] = {"backend": BACKENDS.get(spec.transport, TRANSPORT)}
    if spec.sleeps and spec.device == "cuda":
        arguments |= {"enable_sleep_mode": True, "gpu_memory_utilization": GPU_SHARE}
    return arguments | spec.arguments


def start_engine(arguments: dict[str, Any]) -> Any:
    """vLLM's `AsyncLLM` with `arguments`; inside a Ray actor its files lie with Ray's."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    leave_files_with_ray()
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def engine_environment(device: str, cpus: int) -> dict[str, str]:
    """Environment of an actor that holds an engine; it has to stand before vLLM is imported."""
    environment = {"OMP_NUM_THREADS": str(cpus), "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        # With the worker inside the engine's process its threads are not bound to one core. The small functions that
        # vLLM compiles at first use would need a C++ compiler on the machine and 5 s, for nothing gained.
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",
        }
    return environment


@contextmanager
def naming_death() -> Iterator[None]:
    """The death of an engine's own process, which its actor survives, becomes an `EngineLostError`."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineLostError("vLLM's engine process died") from error


def _version(label: str) -> int:
    return 0 if label == "default" else int(label)
