"""Placement and memory of a config's actors. Engines, in bytes; P numbers of the model, b bytes of its dtype:

- weights: P b, over tensor parallelism t on GPUs;
- KV cache: `kv_cache_memory_bytes` of the engine arguments, else 512 MiB on a CPU; on a GPU vLLM takes what
  `gpu_memory_utilization` (0.9) leaves, so only the least is shown: one sequence of the longest length,
  2 x layers x (KV heads x head size) x b x tokens / t;
- staging: P b in CPU memory, since a payload is checked whole before it is loaded;
- runtime: interpreter, libraries and thread pools, 1.5 GiB as measured on a CPU.

A learner's formulas are in `rlhf.planning.learner`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import OfflineConfig, RunConfig
from rlhf.config.colocate import sharing_gpu
from rlhf.config.data import Policy
from rlhf.config.judge import EngineJudge, PooledJudge, single_judges
from rlhf.config.learner import Learner
from rlhf.config.system import Cluster
from rlhf.planning.learner import DTYPE_BYTES, GIB, Row, learner_memory
from rlhf.planning.sizes import ModelSize, Shapes, model_size, read_model
from rlhf.planning.trained import trained
from rlhf.planning.turns import TurnPlan, plan_turns, turn_notes, uses_ipc, with_host_copies
from rlhf.rounds.run_directory import cores

MIB = 1 << 20
CPU_KV_CACHE = 512 * MIB
ENGINE_RUNTIME = 3 * GIB // 2
JUDGE_RUNTIME = GIB // 8
OFFLINE_STORE = 512 * MIB
"""Ray's object store where only pairs and reports go through it."""


@dataclass(frozen=True, slots=True)
class RolePlan:
    """Actors of one kind. `memory` maps a part to bytes in one actor, or on each of its GPUs if it has some; `host` is
    then what it takes of CPU memory. `cpus` and `gpus` are for one actor too."""

    name: str
    actors: int
    cpus: int
    gpus: int
    memory: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of one actor, on GPUs of one of them."""
        return sum(self.memory.values())

    @property
    def host_total(self) -> int:
        """Bytes of CPU memory that one actor with GPUs takes."""
        return sum(self.host.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run: roles, the bytes of Ray's object store, the device, and whether Ray is private to the run.

    With `turns` the roles with GPUs share `shared` of them, one actor of a kind on each.
    """

    roles: tuple[RolePlan, ...]
    object_store: int
    device: str
    private: bool
    notes: tuple[str, ...] = field(default=())
    turns: tuple[TurnPlan, ...] = field(default=())
    shared: int = 0

    @property
    def total(self) -> int:
        """Bytes of CPU memory, of all actors and the object store."""
        actors = sum(role.actors * (role.host_total if role.gpus else role.total) for role in self.roles)
        return actors + self.object_store

    @property
    def gpu_total(self) -> int:
        """Bytes of GPU memory, of all actors; of those that take turns, of the largest turn."""
        if self.turns:
            return self.shared * max(turn.total for turn in self.turns)
        return sum(role.actors * role.gpus * role.total for role in self.roles)


def make_plan(config: RunConfig) -> Plan:
    """The placement and memory plan; raises `InputError` if a model or a LoRA layer cannot be found."""
    device = _device(config.cluster)
    size, shapes = read_model(config.policy.path, "policy.path")
    roles = [_generator(config, size, device)]
    roles += [_judge(name, config, judge, device) for name, judge in pools(config).items()]
    row = Row.of(config.learner, config.prompts.max_tokens, config.generator.sampling.max_tokens)
    if config.anchor is not None:
        # Its pairs are not read here; they may be as long as the learner takes them.
        other = longest_row(config.learner, [])
        row = Row(max(row.tokens, other.tokens), max(row.responses, other.responses))
    shares = config.cluster.colocate and device == "cuda"
    learner = sharing_gpu(config.learner) if shares else config.learner
    roles.append(_learner(learner, config.policy, config.cluster, size, shapes, row))
    payload = size.parameters * DTYPE_BYTES[config.policy.dtype]
    private = config.cluster.address == "local"
    # A private Ray gets room for the version being published, the one before, and the rollouts; with sparse updates
    # for a node's copies of both and the patches too.
    store = (6 if config.sync.sparse else 4) * payload + 256 * MIB if private else 2 * payload
    notes = _notes(config.cluster, device) + turn_notes(config, roles, device)
    if config.generator.replicas.elastic:
        notes += (f"generator.replicas {config.generator.replicas}: {roles[0].actors} are counted here",)
    if not shares:
        return Plan(tuple(roles), store, device, private, notes)
    turns = plan_turns(config, roles, payload)
    roles = with_host_copies(config, roles)
    return Plan(tuple(roles), store, device, private, notes, turns, config.learner.world_size)


def make_offline_plan(config: OfflineConfig, row: Row) -> Plan:
    """The plan of a training on a preference set whose longest pair is `row`; raises `InputError` as `make_plan`."""
    size, shapes = read_model(config.policy.path, "policy.path")
    device, private = _device(config.cluster), config.cluster.address == "local"
    roles = (_learner(config.learner, config.policy, config.cluster, size, shapes, row),)
    return Plan(roles, OFFLINE_STORE, device, private, _notes(config.cluster, device))


def longest_row(learner: Learner, pairs: Sequence[tuple[int, int, int]]) -> Row:
    """The longest of the pairs (tokens of prompt, chosen, rejected) that fit in `learner.max_length`, in its layout.

    Tokens and responses are the largest of any; without a pair that fits, those of the longest that could.
    """
    fitting = [(p, c, r) for p, c, r in pairs if p + max(c, r) <= learner.max_length]
    if not fitting:
        return Row.of(learner, learner.max_length // 2, learner.max_length - learner.max_length // 2)
    prompts = 1 if learner.prefix_sharing else 2
    rows = ((prompts * p + c + r) if learner.prefix_sharing else 2 * (p + max(c, r)) for p, c, r in fitting)
    return Row(max(rows), max(c + r for _, c, r in fitting))


def engine_memory(
    size: ModelSize,
    dtype: str,
    longest: int,
    tensor_parallel: int,
    arguments: dict[str, Any],
    device: str,
    staged: bool,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of one vLLM engine: a tensor-parallel share of it on GPUs and CPU memory beside it, else all and nothing.

    See the formulas at the top.
    """
    weights = size.parameters * DTYPE_BYTES[dtype]
    share = tensor_parallel if device == "cuda" else 1
    least = 2 * size.layers * size.kv_hidden * DTYPE_BYTES[dtype] * longest // share
    cache = int(arguments.get("kv_cache_memory_bytes") or (CPU_KV_CACHE if device == "cpu" else least))
    memory = {"weights": weights // share, "KV cache": cache, "runtime": ENGINE_RUNTIME}
    staging = {"staging": weights} if staged else {}
    return (memory, staging | {"runtime": ENGINE_RUNTIME}) if device == "cuda" else (memory | staging, {})


def pools(config: RunConfig) -> dict[str, PooledJudge]:
    """Every pool of judges by its config key."""
    tops = {"judge": config.judge} | ({"eval_judge": config.eval_judge} if config.eval_judge else {})
    return {key: judge for name, top in tops.items() for key, judge in single_judges(top, name)}


def _learner(learner: Learner, policy: Policy, cluster: Cluster, size: ModelSize, shapes: Shapes, row: Row) -> RolePlan:
    device = _device(cluster)
    what = trained(learner, shapes, size.vocabulary, policy.path)
    memory = learner_memory(learner, policy.dtype, size, what, row, device)
    threads = _threads(cluster, device, learner.cpus, learner.world_size)
    return RolePlan("learner", learner.world_size, threads, int(device == "cuda"), memory.device, memory.host)


def _generator(config: RunConfig, size: ModelSize, device: str) -> RolePlan:
    generator = config.generator
    longest = config.prompts.max_tokens + generator.sampling.max_tokens
    memory, host = engine_memory(
        size, config.policy.dtype, longest, generator.tensor_parallel, generator.engine, device,
        staged=not uses_ipc(config, device),
    )  # fmt: skip
    actors = generator.replicas.most(config.cluster.address == "local")
    threads = _threads(config.cluster, device, generator.cpus, actors)
    gpus = generator.tensor_parallel if device == "cuda" else 0
    return RolePlan("generator", actors, threads, gpus, memory, host)


def _judge(name: str, config: RunConfig, judge: PooledJudge, device: str) -> RolePlan:
    if not isinstance(judge, EngineJudge):
        return RolePlan(name, judge.replicas, judge.cpus or 1, 0, {"runtime": JUDGE_RUNTIME})
    size = model_size(judge.path or config.policy.path, f"{name}.path")
    memory, host = engine_memory(
        size, judge.dtype, judge.max_length + 1, judge.tensor_parallel, judge.engine, device, staged=False
    )
    threads = _threads(config.cluster, device, judge.cpus, judge.replicas)
    return RolePlan(name, judge.replicas, threads, judge.tensor_parallel if device == "cuda" else 0, memory, host)


def _threads(cluster: Cluster, device: str, asked: int | None, share: int) -> int:
    """Threads of an actor: as asked, else the local machine's cores shared among `share` actors, else 4."""
    if asked is not None:
        return asked
    return max(1, cores() // share) if cluster.address == "local" and device == "cpu" else 4


def _device(cluster: Cluster) -> str:
    if cluster.device != "auto":
        return cluster.device
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def _notes(cluster: Cluster, device: str) -> tuple[str, ...]:
    if cluster.address == "local" or cluster.device != "auto":
        return ()
    return (f"cluster.device auto on {cluster.address}: the nodes decide; {device} is assumed here",)
