"""The LoRA adapters of one engine: one a version, each request under the one it began with."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from rlhf.config.adapters import served_rank
from rlhf.errors import InputError

SLOTS = 2
"""Adapters an engine holds: a new version is loaded and proved while requests of the one before go on."""

WORKER = "actors.engine.adapter_worker.AdapterWorker"


@dataclass(frozen=True)
class AdapterSpec:
    """What the adapters of a run have in common; `layers` are the last parts of the adapted layers' names."""

    rank: int
    alpha: int
    layers: tuple[str, ...]

    @classmethod
    def of(cls, rank: int, alpha: int, shapes: Mapping[str, tuple[int, ...]]) -> "AdapterSpec":
        """`shapes` are those of the adapters' tensors, named `<layer>.lora_A.weight`."""
        return cls(rank, alpha, tuple(sorted({name.split(".")[-3] for name in shapes})))

    def arguments(self) -> dict[str, Any]:
        """vLLM's engine arguments. No layer gets room for an adapter that will have none."""
        return {
            "enable_lora": True,
            "max_lora_rank": served_rank(self.rank),
            "max_loras": SLOTS,
            "max_cpu_loras": SLOTS,
            "lora_target_modules": list(self.layers),
            "worker_extension_cls": WORKER,
        }


@dataclass(eq=False)
class Adapter:
    """A version's adapter in the engine. `idle` is set while no request runs under it."""

    version: int
    number: int
    request: Any
    users: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Adapters:
    """Loads versions into vLLM's workers and says which one a request runs under."""

    def __init__(self, llm: Any, spec: AdapterSpec):
        """`llm` is vLLM's AsyncLLM."""
        self._llm = llm
        self._spec = spec
        self._numbers = count(1)
        self._newest: Adapter | None = None
        self._serving: Adapter | None = None
        self._old: list[Adapter] = []

    async def connect(
        self, address: str, namespace: str, holder: str, expected: dict[str, tuple[int, ...]], deadline: float
    ) -> None:
        """Let the workers join the cluster; raises `InputError` for a layer that none of them serves adapters on."""
        table = [(name, list(shape)) for name, shape in expected.items()]
        found = await self._llm.collective_rpc("connect_adapters", args=(address, namespace, holder, table, deadline))
        if strange := [name for name in expected if not any(worker[name] for worker in found)]:
            layers = sorted({name.split(".")[-3] for name in strange})
            raise InputError(
                f"learner.lora.target_modules: vLLM serves no adapter on {', '.join(layers)} of this model (the first "
                f"is {strange[0]}); leave them out or use sync.lora merged"
            )

    async def stage(self, tables: Sequence[Any], verify: bool) -> None:
        """Map and check a payload on every worker; the engine goes on serving."""
        await self._llm.collective_rpc("stage_adapter", args=(list(tables), verify))

    async def load(self, version: int) -> None:
        """Put the staged payload beside the adapters that are there; nothing is sampled under it until `serve`.

        Waits for requests that still run under a version older than the one that is served.
        """
        from vllm.lora.request import LoRARequest

        for adapter in self._old:
            await adapter.idle.wait()
        await self._remove_idle()
        number = next(self._numbers)
        await self._llm.collective_rpc("load_adapter", args=(number, self._spec.rank, self._spec.alpha))
        # vLLM's prefix cache tells adapters apart by name and path, its workers by number: none is used twice. The path
        # is nobody's: a worker that had lost the adapter must fail, and not look for it somewhere.
        name = f"version-{version}-{number}"
        self._newest = Adapter(version, number, LoRARequest(name, number, f"/dev/null/{name}"))
        self._newest.idle.set()

    async def serve(self) -> None:
        """Let new samples run under what was loaded last, and forget what nobody uses any more."""
        if self._serving is not None and self._serving is not self._newest:
            self._old.append(self._serving)
        self._serving = self._newest
        await self._remove_idle()

    @contextmanager
    def sampling(self) -> Iterator[Adapter | None]:
        """The adapter that is served, for one request; None before the first."""
        with self._using(self._serving) as adapter:
            yield adapter

    @contextmanager
    def probing(self) -> Iterator[Adapter | None]:
        """The adapter that was loaded last, served or not, for one request; None before the first."""
        with self._using(self._newest) as adapter:
            yield adapter

    async def held(self) -> list[int]:
        """Numbers of the adapters in the first worker."""
        found: list[list[int]] = await self._llm.collective_rpc("adapters")
        return found[0]

    @contextmanager
    def _using(self, adapter: Adapter | None) -> Iterator[Adapter | None]:
        if adapter is None:
            yield None
            return
        adapter.users += 1
        adapter.idle.clear()
        try:
            yield adapter
        finally:
            adapter.users -= 1
            if not adapter.users:
                adapter.idle.set()

    async def _remove_idle(self) -> None:
        for adapter in [adapter for adapter in self._old if adapter.idle.is_set()]:
            self._old.remove(adapter)
            await self._llm.collective_rpc("remove_adapter", args=(adapter.number,))
