"""Memory of one learner rank.

Formulas, in bytes; P numbers of the model, A of them (or of its adapters) that train, X added for that, b bytes of
`policy.dtype`, w ranks, s the ZeRO stage, T tokens of the largest micro-batch:

- weights: (P + X) b, over w with s = 3; there another min(P + X, `stage3_max_live_parameters` = 1e9) b while they are
  gathered, with w > 1;
- optimizer: A (8 [AdamW's two fp32 moments] + 4 [fp32 masters, which ZeRO keeps for float32 too]), over w from s = 1;
- gradients: 4 A in fp32, over w from s = 2; from s = 1 a bucket of 4 min(A, `reduce_bucket_size` = 5e7) and, but for
  bfloat16 with s = 2, a flat copy of the rank's share, 4 A / w;
- reference: `initial` is a frozen copy, P b, over w with s = 3. None with LoRA (the adapters are off), with
  `round_start`, and for losses without a reference. `ema` is an average in fp32, 4 A (over w with s = 3), and while it
  scores the policy's own weights beside it, A b;
- activations: T x layers x (6 D + 2 Q + 2 K + 4 I) b, and 2 D b more in bfloat16, whose norms keep an fp32 copy of
  their input: what a gated decoder layer keeps for its backward pass (tests count it on a model). D is the hidden size,
  Q query heads x head size, I the intermediate size, K = Q where a mask is needed (prefix_sharing, pack_tokens: keys
  and values are repeated for all heads), else KV heads x head size. With LoRA 2 D less, since frozen norms keep
  nothing, and rank x adapters more; they count as if every layer had one. With activation checkpointing layers x D, and
  one layer in full. T is pairs x (prompt + 2 responses, or twice both when padded), or `pack_tokens` where a pair fits;
- mask: (b + 1) L for each of the T tokens, rows of L, where one is needed;
- head: min(R, 512) x V x (8 [fp32 logits and their softmax] + b, in bfloat16) of the R response tokens of a
  micro-batch, a chunk at a time, and the head's gradient, 4 V D;
- export: P b, the weights packed for the generators or for a checkpoint's folder;
- start, with s = 3: every rank reads the whole model into CPU memory before it is split, (P + X) b, and with a frozen
  reference a second time. It is over before training begins, so only what that is above the rest of it counts;
- runtime: interpreter, libraries and thread pools, 0.8 GiB on a CPU as measured.

The peak is the state (weights, optimizer, reference, runtime), activations, head, and the larger of gradients, export
and what the reference needs to score. On a CPU activations count one and a half times: glibc gives them back with holes
between them, in which the next micro-batch, whose tensors have other sizes, does not fit (measured: 1.1 to 2).

On GPUs some of it lies in CPU memory: what `learner.offload` and DeepSpeed's own `offload_optimizer` (optimizer and,
from s = 2, gradients) and `offload_param` (weights; of the gathered ones those in use stay) put there, the reference
with `reference.offload` (on the GPU again while it scores), the export. What goes to NVMe is in neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.config.learner import Learner
from rlhf.planning.sizes import ModelSize
from rlhf.planning.trained import Trained

GIB = 1 << 30
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
HEAD_CHUNK = 512
BUCKET = 50_000_000
LIVE_PARAMETERS = 1_000_000_000
CPU_HOLES = 0.5
RUNTIME = 4 * GIB // 5


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of the longest pair in the learner's layout, and of its two responses."""

    tokens: int
    responses: int

    @classmethod
    def of(cls, learner: Learner, prompt: int, response: int) -> "Row":
        """The longest pair of prompts and responses of so many tokens at most."""
        return cls((prompt if learner.prefix_sharing else 2 * prompt) + 2 * response, 2 * response)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by part: where the process computes, and on a GPU's host; the second is empty on a CPU."""

    device: dict[str, int]
    host: dict[str, int]


def learner_memory(
    learner: Learner, dtype: str, size: ModelSize, what: Trained, row: Row, device: str = "cpu"
) -> Memory:
    """Bytes of one rank on `device`, "cpu" or "cuda"; see the formulas above."""
    b, zero, cuda = DTYPE_BYTES[dtype], _zero_section(learner), device == "cuda"
    stage, ranks = learner.zero_stage, learner.world_size

    def shared(total: int, from_stage: int) -> int:
        return -(-total // ranks) if stage >= from_stage else total

    weights = shared((size.parameters + what.added) * b, 3)
    live = int(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))
    optimizer = shared(what.numbers * (12 if stage or b == 2 else 8), 1)
    gradients = shared(4 * what.numbers, 2)
    bucket = 4 * min(what.numbers, int(zero.get("reduce_bucket_size", BUCKET))) if stage else 0
    flat = 0 if stage == 0 or (stage == 2 and b == 2) else -(-4 * what.numbers // ranks)
    parts = {
        "weights": _Part(weights, _offload(learner.offload.parameters, zero, "offload_param")),
        "gathered weights": _Part(min(size.parameters + what.added, live) * b if stage == 3 and ranks > 1 else 0),
        "optimizer": _Part(optimizer, _offload(learner.offload.optimizer, zero, "offload_optimizer")),
    }
    moved = parts["optimizer"].place
    gradient_parts = [_Part(bucket + (0 if moved and stage >= 2 else gradients + flat))]
    if moved and stage >= 2:
        gradient_parts.append(_Part(gradients, moved))
    held, scoring = _reference(learner, b, size, what)
    parts["reference"] = _Part(shared(held, 3), "cpu" if learner.reference.offload else "")
    scoring = shared(scoring, 3)
    activations = _activations(learner, b, size, what, row)
    chunk = min(row.responses * learner.micro_batch_size, HEAD_CHUNK)
    parts["activations"] = _Part(activations if cuda else int((1 + CPU_HOLES) * activations))
    parts["head"] = _Part(chunk * size.vocabulary * (10 if b == 2 else 8) + 4 * size.vocabulary * size.hidden)
    found = _laid_out(parts, gradient_parts, scoring, size.parameters * b, cuda)
    whole = (size.parameters + what.added) * b * (2 if learner.reference.policy == "initial" and held else 1)
    return _with_start(found, whole, cuda) if stage == 3 else found


@dataclass(frozen=True, slots=True)
class _Part:
    size: int
    place: str = ""
    """Where it is offloaded to: cpu, nvme, or empty."""


def _laid_out(parts: Mapping[str, _Part], gradients: list[_Part], scoring: int, export: int, cuda: bool) -> Memory:
    """Sums by place; of gradients, the reference's scoring and the export only the largest is there at one time."""
    if not cuda:
        here = {name: part.size for name, part in parts.items() if part.place != "nvme"}
        all_gradients = sum(part.size for part in gradients if part.place != "nvme")
        beside = {"gradients": all_gradients, "reference": scoring, "export": export}
        return Memory(_with_largest(here, beside) | {"runtime": RUNTIME}, {})
    here = {name: part.size for name, part in parts.items() if not part.place}
    there = {name: part.size for name, part in parts.items() if part.place == "cpu"}
    # What is offloaded comes back while it is used.
    back = scoring or there.get("reference", 0)
    here = _with_largest(here, {"gradients": sum(p.size for p in gradients if not p.place), "reference": back})
    there = _with_largest(there, {"gradients": sum(p.size for p in gradients if p.place == "cpu"), "export": export})
    return Memory(here | {"runtime": RUNTIME}, there | {"runtime": RUNTIME})


def _with_start(found: Memory, whole: int, cuda: bool) -> Memory:
    """With what is `whole` in CPU memory while a rank starts, as far as that is more than lies there afterwards."""
    afterwards = found.host if cuda else found.device
    more = whole - sum(size for name, size in afterwards.items() if name != "runtime")
    if more <= 0:
        return found
    return Memory(found.device, found.host | {"start": more}) if cuda else Memory(found.device | {"start": more}, {})


def _with_largest(parts: dict[str, int], beside: dict[str, int]) -> dict[str, int]:
    name = max(beside, key=lambda key: beside[key])
    return parts | {name: parts.get(name, 0) + beside[name]}


def _reference(learner: Learner, b: int, size: ModelSize, what: Trained) -> tuple[int, int]:
    """Bytes that the reference holds for good, and while it scores, before any sharding."""
    policy = learner.reference.policy if learner.loss.needs_reference else "none"
    if policy == "ema":
        return 4 * what.numbers, b * what.numbers
    return (size.parameters * b if policy == "initial" and not learner.lora else 0), 0


def _activations(learner: Learner, b: int, size: ModelSize, what: Trained, row: Row) -> int:
    masked = learner.prefix_sharing or learner.pack_tokens is not None
    length = row.tokens if learner.pack_tokens is None else max(learner.pack_tokens, row.tokens)
    tokens = length * (learner.micro_batch_size if learner.pack_tokens is None else 1)
    keys = size.query_hidden if masked else size.kv_hidden
    a_token = 6 * size.hidden + 2 * size.query_hidden + 2 * keys + 4 * size.intermediate
    a_token += 2 * size.hidden if b == 2 else 0
    a_token -= 2 * size.hidden if learner.lora else 0
    adapters = what.kept / size.layers
    kept = size.layers * size.hidden if learner.activation_checkpointing else 0
    layers = 1 if learner.activation_checkpointing else size.layers
    return int(tokens * ((kept + layers * (a_token + adapters)) * b + ((b + 1) * length if masked else 0)))


def _zero_section(learner: Learner) -> Mapping[str, Any]:
    """DeepSpeed's `zero_optimization` among the raw overrides."""
    found = learner.deepspeed.get("zero_optimization")
    return found if isinstance(found, Mapping) else {}


def _offload(asked: bool, zero: Mapping[str, Any], key: str) -> str:
    """Where a part is offloaded to: cpu, nvme, or nowhere. The raw overrides win."""
    section = zero.get(key)
    place = section.get("device", "none") if isinstance(section, Mapping) else "cpu" if asked else "none"
    return "" if place == "none" else str(place)
