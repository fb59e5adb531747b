"""What a config needs: placement and memory by actor, from the model's config.json and safetensors headers alone.

Formulas, in bytes a process; P parameters, b bytes of `policy.dtype`, w ranks, t tensor parallel:

- weights: P b, over w under ZeRO-3, over t in an engine;
- gradients: P (b + 4 [fp32 accumulation, where b is 2]), over w from ZeRO-2 on;
- optimizer: P (8 [AdamW's two fp32 moments] + 4 [fp32 master, where b is 2]), over w from ZeRO-1 on;
- reference: P b, the frozen initial policy, over w under ZeRO-3;
- activations: T tokens x layers x (8 D + 4 D_kv + 4 I) b, the tensors that a gated decoder layer keeps for its
  backward pass: D hidden, D_kv = KV heads x head size, I intermediate. With activation checkpointing layers x D, and
  one layer in full. T is the largest micro-batch: pairs x (prompt + 2 responses, or twice both when padded);
- head: 3 x min(T, 1024) x V x 4, the fp32 logits of one chunk, its softmax and gradient;
- export: P b, the weights packed for the generators;
- KV cache: `kv_cache_memory_bytes` of the engine arguments, else 512 MiB on a CPU; on a GPU vLLM takes what
  `gpu_memory_utilization` (0.9) leaves, so only the least is shown: one sequence of the longest length,
  2 x layers x D_kv x b x tokens / t;
- staging: P b, an engine checks a payload whole before it is loaded;
- runtime: interpreter, libraries and thread pools (1.5 GiB an engine, as measured on a
  CPU; 1 GiB a learner and 0.5 GiB a judge without a model are round figures).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import RunConfig
from rlhf.config.data import PromptFormat, Prompts
from rlhf.config.judge import EngineJudge, PooledJudge, single_judges
from rlhf.data.formats import resolve_format
from rlhf.data.rows import load_rows
from rlhf.errors import InputError
from rlhf.modelfiles import tensor_shapes
from rlhf.rounds.run_directory import cores

if TYPE_CHECKING:
    from rich.console import Console

MIB, GIB = 1 << 20, 1 << 30
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
HEAD_CHUNK = 1024
CPU_KV_CACHE = 512 * MIB
RUNTIME = {"engine": 3 * GIB // 2, "learner": GIB, "judge": GIB // 2}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The figures of a decoder that memory depends on; `parameters` counts a tied head once."""

    parameters: int
    layers: int
    hidden: int
    kv_hidden: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class RolePlan:
    """Actors of one kind. `memory` maps a part to bytes in one actor; `cpus` and `gpus` are for one actor too."""

    name: str
    actors: int
    cpus: int
    gpus: int
    memory: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of one actor."""
        return sum(self.memory.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run: roles, the bytes of Ray's object store, the device, and the longest pair in tokens."""

    roles: tuple[RolePlan, ...]
    object_store: int
    device: str
    private: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def total(self) -> int:
        """Bytes of all actors and the object store."""
        return sum(role.actors * role.total for role in self.roles) + self.object_store


def make_plan(config: RunConfig) -> Plan:
    """The placement and memory plan; raises `InputError` if a model cannot be read."""
    device, private = _device(config), config.cluster.address == "local"
    size = model_size(config.policy.path, "policy.path")
    judges = _single_judges(config)
    roles = [_generator(config, size, device), *(_judge(name, config, judge, device) for name, judge in judges.items())]
    roles.append(RolePlan("learner", config.learner.world_size, _threads(config, device, config.learner.cpus,
                          config.learner.world_size), int(device == "cuda"), learner_memory(config, size)))  # fmt: skip
    payload = size.parameters * DTYPE_BYTES[config.policy.dtype]
    notes = []
    if not private and config.cluster.device == "auto":
        notes.append(f"cluster.device auto on {config.cluster.address}: the nodes decide; {device} is assumed here")
    # A private Ray gets room for the version being published, the one before, and the rollouts.
    return Plan(tuple(roles), 4 * payload + 256 * MIB if private else 2 * payload, device, private, tuple(notes))


def learner_memory(config: RunConfig, size: ModelSize) -> dict[str, int]:
    """Bytes of one learner rank, by part (formulas at the top)."""
    learner, p, b = config.learner, size.parameters, DTYPE_BYTES[config.policy.dtype]
    ranks = learner.world_size

    def sharded(total: int, from_stage: int) -> int:
        return -(-total // ranks) if learner.zero_stage >= from_stage else total

    prompt, response = config.prompts.max_tokens, config.generator.sampling.max_tokens
    a_pair = prompt + 2 * response if learner.prefix_sharing else 2 * (prompt + response)
    tokens = learner.micro_batch_size * a_pair
    a_layer = tokens * (8 * size.hidden + 4 * size.kv_hidden + 4 * size.intermediate) * b
    kept = tokens * size.hidden * b
    activations = size.layers * kept + a_layer if learner.activation_checkpointing else size.layers * a_layer
    return {
        "weights": sharded(p * b, 3),
        "gradients": sharded(p * (b + 4 if b == 2 else b), 2),
        "optimizer": sharded(p * (12 if b == 2 else 8), 1),
        "reference": sharded(p * b, 3),
        "activations": activations,
        "head": 3 * min(2 * learner.micro_batch_size * response, HEAD_CHUNK) * size.vocabulary * 4,
        "export": p * b,
        "runtime": RUNTIME["learner"],
    }


def engine_memory(
    size: ModelSize,
    dtype: str,
    longest: int,
    tensor_parallel: int,
    arguments: dict[str, Any],
    device: str,
    staged: bool,
) -> dict[str, int]:
    """Bytes of one vLLM engine, a tensor-parallel share of it on GPUs (formulas at the top)."""
    weights = size.parameters * DTYPE_BYTES[dtype]
    share = tensor_parallel if device == "cuda" else 1
    least = 2 * size.layers * size.kv_hidden * DTYPE_BYTES[dtype] * longest // share
    cache = int(arguments.get("kv_cache_memory_bytes") or (CPU_KV_CACHE if device == "cpu" else least))
    memory = {"weights": weights // share, "KV cache": cache, "runtime": RUNTIME["engine"]}
    return memory | ({"staging": weights} if staged else {})


def model_size(path: str, key: str) -> ModelSize:
    """Sizes of a local model, a cached one, or one on the Hugging Face hub, whose headers are read remotely.

    Raises `InputError` naming `key` if there is no such model or its config.json lacks a size.
    """
    folder = find_model(path, key)
    if folder is not None:
        shapes = tensor_shapes(folder, key)
        parameters = sum(_product(shape) for shape in shapes.values())
        return _sizes(json.loads((folder / "config.json").read_text(encoding="utf-8")), parameters, f"{key} = {path!r}")
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        data = json.loads(Path(hf_hub_download(path, "config.json")).read_text(encoding="utf-8"))
        parameters = sum(get_safetensors_metadata(path).parameter_count.values())
    except Exception as error:  # every failure of a lookup on the network has the same remedy
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{key} = {path!r}: no such folder, and no model of that id could be looked up ({reason}); "
            "give a model's folder or a Hugging Face id that can be reached"
        ) from error
    return _sizes(data, parameters, f"{key} = {path!r}")


def find_model(path: str, key: str) -> Path | None:
    """The folder of a local or cached model; None for a hub id that is not on this machine."""
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(
            f"{key} = {path!r}: no model there (config.json and *.safetensors); give a model's folder or a "
            "Hugging Face id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return cached if (cached / "config.json").is_file() and any(cached.glob("*.safetensors")) else None


def check_inputs(config: RunConfig) -> list[str]:
    """Check that models, tokenizer and prompts exist; returns notes on what could not be checked.

    Raises `InputError` for the first thing that is missing.
    """
    notes = []
    models = {"policy.path": config.policy.path}
    for name, judge in _single_judges(config).items():
        if isinstance(judge, EngineJudge) and judge.path:
            models[f"{name}.path"] = judge.path
    for key, path in models.items():
        folder = find_model(path, key)
        if folder is None:
            notes.append(f"{key} = {path!r} is not on this machine: its weights and tokenizer are fetched at the start")
        elif not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(f"{key} = {path!r}: the folder has no tokenizer; save the model's tokenizer into it")
    prompts = config.prompts
    _check_rows(prompts.path, prompts.split, prompts.name, prompts.column, prompts.format, "prompts")
    if prompts.eval is not None:
        held_out = prompts.eval
        # The rule of load_eval_prompts: what describes the training data describes the same data only.
        source = prompts if held_out.path == prompts.path else Prompts(path=held_out.path)
        column, format = held_out.column or source.column, held_out.format or source.format
        _check_rows(held_out.path, held_out.split or prompts.split, source.name, column, format, "prompts.eval")
    return notes


def show_plan(plan: Plan, notes: list[str], console: "Console") -> None:
    """Print the placement table, the memory of an actor of each role by part, and what was not checked."""
    from rich.table import Table

    table = Table(title=f"Placement and memory ({plan.device})", title_justify="left")
    for column in ("role", "actors", "CPUs each", "GPUs each", "GiB each", "of which"):
        table.add_column(column, justify="left" if column in ("role", "of which") else "right")
    for role in plan.roles:
        parts = ", ".join(f"{part} {amount / GIB:.2f}" for part, amount in role.memory.items() if amount >= 5 * MIB)
        table.add_row(role.name, str(role.actors), str(role.cpus), str(role.gpus), f"{role.total / GIB:.2f}", parts)
    table.add_row("object store", "", "", "", f"{plan.object_store / GIB:.2f}", "weights on their way, rollouts")
    table.add_section()
    table.add_row("all", "", "", "", f"{plan.total / GIB:.2f}", "an estimate: allocators keep some more")
    console.print(table)
    free = _free_memory()
    if plan.private and plan.device == "cpu" and plan.total > free:
        notes = [
            *notes,
            f"about {plan.total / GIB:.1f} GiB are needed and {free / GIB:.1f} GiB are free on this machine",
        ]
    for note in (*notes, *plan.notes):
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


def _generator(config: RunConfig, size: ModelSize, device: str) -> RolePlan:
    generator = config.generator
    longest = config.prompts.max_tokens + generator.sampling.max_tokens
    memory = engine_memory(
        size, config.policy.dtype, longest, generator.tensor_parallel, generator.engine, device, staged=True
    )
    threads = _threads(config, device, generator.cpus, generator.replicas)
    gpus = generator.tensor_parallel if device == "cuda" else 0
    return RolePlan("generator", generator.replicas, threads, gpus, memory)


def _judge(name: str, config: RunConfig, judge: PooledJudge, device: str) -> RolePlan:
    if not isinstance(judge, EngineJudge):
        return RolePlan(name, judge.replicas, judge.cpus or 1, 0, {"runtime": RUNTIME["judge"]})
    size = model_size(judge.path or config.policy.path, f"{name}.path")
    memory = engine_memory(
        size, judge.dtype, judge.max_length + 1, judge.tensor_parallel, judge.engine, device, staged=False
    )
    threads = _threads(config, device, judge.cpus, judge.replicas)
    return RolePlan(name, judge.replicas, threads, judge.tensor_parallel if device == "cuda" else 0, memory)


def _single_judges(config: RunConfig) -> dict[str, PooledJudge]:
    """Every pool of judges by its config key."""
    tops = {"judge": config.judge} | ({"eval_judge": config.eval_judge} if config.eval_judge else {})
    return {key: judge for name, top in tops.items() for key, judge in single_judges(top, name)}


def _threads(config: RunConfig, device: str, asked: int | None, share: int) -> int:
    """Threads of an actor: as asked, else the local machine's cores shared among `share` actors, else 4."""
    if asked is not None:
        return asked
    return max(1, cores() // share) if config.cluster.address == "local" and device == "cpu" else 4


def _device(config: RunConfig) -> str:
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _check_rows(path: str, split: str, name: str | None, column: str, format: PromptFormat, key: str) -> None:
    rows = load_rows(path, split=split, name=name, key=key)
    resolve_format(rows, column=column, format=format, key=key, path=path)


def _sizes(data: dict[str, Any], parameters: int, where: str) -> ModelSize:
    text = data.get("text_config", data)

    def read(*names: str) -> int:
        value = next((text[name] for name in names if isinstance(text.get(name), int)), None)
        if value is None:
            raise InputError(f"{where}: config.json has no {' or '.join(names)}; use a decoder of a known kind")
        return int(value)

    hidden, heads = read("hidden_size", "n_embd"), read("num_attention_heads", "n_head")
    head_size = text.get("head_dim") or hidden // heads
    return ModelSize(
        parameters=parameters,
        layers=read("num_hidden_layers", "n_layer"),
        hidden=hidden,
        kv_hidden=(text.get("num_key_value_heads") or heads) * head_size,
        intermediate=text.get("intermediate_size") or text.get("n_inner") or 4 * hidden,
        vocabulary=read("vocab_size"),
    )


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
