"""A weight update from the learner's call to serving, part by part, beside a memory copy of the same size.

    python bench/sync.py [--config configs/quickstart.yaml] [--updates 20]

The real learner with DeepSpeed and the real vLLM engine on the `object_store` transport; the parts are clocked inside
the actors, around code that runs unchanged. Needs the small model (`make model`) and a minute or two. The first two
updates are left out: they touch memory for the first time.
"""

import argparse
import asyncio
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from _stopwatch import Stopwatch

import actors.weights.outgoing
import actors.weights.payload
from actors.app import PROBE_TOKENS, PROBES, TOLERANCE
from actors.calls import within
from actors.cluster import ClusterInfo, connect
from actors.engine.llm import EngineSpec, engine_environment
from actors.fleet import GeneratorFleet
from actors.generator import GeneratorActor
from actors.learner import LearnerActor, LearnerGroup
from actors.weights.outgoing import Publishing
from actors.weights.plane import ObjectStorePlane
from rlhf.config import RunConfig, load_config
from rlhf.inputs import Inputs, read_inputs
from rlhf.rounds.controller import publish

WARM_UP = 2
NAME = "generator-0"
PARTS = ("learner's probe", "export", "pack", "checksum", "put", "stage", "load", "resume", "prove")
MOVE = ("export", "pack", "checksum", "put", "stage")


class MeasuredLearner(LearnerActor):
    """Clocks what `manifest` does."""

    def watch(self) -> None:
        """Start the clocks."""
        self._watch = Stopwatch()
        self._watch.wrap(self._learner, "probe", "learner's probe")
        self._watch.wrap(self._learner, "export_tensors", "export")
        self._watch.wrap(actors.weights.payload, "checksum", "checksum")
        self._watch.wrap(actors.weights.outgoing, "pack", "export, pack, checksum")
        self._watch.wrap(ray, "put", "put")

    def lap(self) -> dict[str, float]:
        """Seconds of each part since the last lap."""
        found = self._watch.lap()
        rest = found.pop("export, pack, checksum") - found["export"] - found["checksum"]
        return found | {"pack": rest}

    def copy_s(self, nbytes: int) -> float:
        """Median seconds of a memory copy between buffers that have been touched."""
        source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
        watch = Stopwatch()
        copy = watch.timed(np.copyto, "copy")
        for _ in range(7):
            copy(target, source)
        return statistics.median(watch.seconds["copy"])


class MeasuredGenerator(GeneratorActor):
    """Clocks what `update` does."""

    async def watch(self) -> None:
        """Start the clocks."""
        self._watch = Stopwatch()
        for name in ("stage", "load", "resume"):
            self._watch.wrap(self._engine, name, name)
        self._watch.wrap(self, "_probe", "prove")

    async def lap(self) -> dict[str, float]:
        """Seconds of each part since the last lap."""
        return self._watch.lap()


async def start_generator(config: RunConfig, inputs: Inputs, cluster: ClusterInfo) -> Any:
    """The engine, connected to the cluster."""
    sampling = config.generator.sampling
    spec = EngineSpec(
        model=str(inputs.model.resolve()),
        dtype=config.policy.dtype,
        max_length=config.prompts.max_tokens + sampling.max_tokens,
        tensor_parallel=1,
        device=cluster.device,
        seed=config.seed,
        trust_remote_code=False,
        arguments=config.generator.engine,
        transport="object_store",
    )
    environment = {"env_vars": engine_environment(cluster.device, cluster.threads(config.generator.cpus))}
    options = {"name": NAME, "runtime_env": environment, "max_concurrency": 100, "num_gpus": _gpus(cluster)}
    handle = ray.remote(MeasuredGenerator).options(**options).remote(NAME, spec, inputs.shapes)
    await within(handle.start.remote(), config.cluster.deadlines.start, "loading the engine")
    await handle.watch.remote()
    return handle


async def start_learner(config: RunConfig, inputs: Inputs, cluster: ClusterInfo) -> tuple[Any, LearnerGroup]:
    """One rank and the group around it."""
    environment = {"env_vars": {"OMP_NUM_THREADS": str(cluster.threads(config.learner.cpus))}}
    handle = (
        ray.remote(MeasuredLearner)
        .options(runtime_env=environment, num_gpus=_gpus(cluster))
        .remote(config, 0, 1, cluster.device, Publishing(bucket_bytes=config.sync.bucket_mb << 20))
    )
    probes = [prompt.token_ids[:PROBE_TOKENS] for prompt in inputs.prompts.prompts[:PROBES]]
    group = LearnerGroup([handle], config.cluster.deadlines, probes)
    await group.start()
    await handle.watch.remote()
    return handle, group


def _gpus(cluster: ClusterInfo) -> int:
    return int(cluster.device == "cuda")


async def measure(config: RunConfig, cluster: ClusterInfo, updates: int) -> tuple[list[dict[str, float]], int, float]:
    """Seconds of each update's parts, the payload's bytes, and the seconds of a memory copy of that size."""
    inputs = read_inputs(config)
    generator, (rank, learner) = await asyncio.gather(
        start_generator(config, inputs, cluster), start_learner(config, inputs, cluster)
    )
    fleet = GeneratorFleet({NAME: generator}, {}, 1, _no_restart)
    plane = ObjectStorePlane(fleet, True, TOLERANCE[config.policy.dtype], config.cluster.deadlines.sync)
    system: Any = SimpleNamespace(fleet=fleet, learner=learner, plane=plane)
    laps, nbytes = [], 0
    for version in range(WARM_UP + updates):
        started = time.perf_counter()
        nbytes = (await publish(system, version)).nbytes
        total = time.perf_counter() - started
        laps.append({"call to serving": total} | await rank.lap.remote() | await generator.lap.remote())
    return laps[WARM_UP:], nbytes, await rank.copy_s.remote(nbytes)


async def _no_restart(name: str) -> Any:
    raise RuntimeError(f"{name} did not take a version")


def report(laps: list[dict[str, float]], nbytes: int, copy_s: float) -> str:
    """The table and what follows from it."""
    medians = {name: statistics.median(lap[name] for lap in laps) for name in laps[0]}
    lines = [
        f"{len(laps)} updates of {nbytes / 1e6:.0f} MB\n",
        "| part | median s | least | most |",
        "|" + " --- |" * 4,
    ]
    rest = [lap["call to serving"] - sum(lap[name] for name in PARTS) for lap in laps]
    rows = [(name, [lap[name] for lap in laps]) for name in PARTS]
    rows += [("calls and waits", rest), ("call to serving", [lap["call to serving"] for lap in laps])]
    for name, seconds in rows:
        lines.append(f"| {name} | {statistics.median(seconds):.4f} | {min(seconds):.4f} | {max(seconds):.4f} |")
    move = statistics.median(sum(lap[name] for name in MOVE) for lap in laps)
    bare = medians["put"] + medians["stage"]
    lines += [
        "",
        f"memory copy of the same size       {copy_s:.4f} s",
        f"{' + '.join(MOVE)} {move:.4f} s, {move / copy_s:.1f} copies",
        f"put + stage                        {bare:.4f} s, {bare / copy_s:.1f} copies",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--updates", type=int, default=20)
    options = parser.parse_args()
    config = load_config(options.config)
    with connect("bench-sync", config.cluster, 2 << 30) as cluster:
        print(report(*asyncio.run(measure(config, cluster, options.updates))))


if __name__ == "__main__":
    main()
