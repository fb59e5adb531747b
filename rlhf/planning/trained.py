"""What of a model trains, from the names and shapes of its checkpoint's tensors.

LoRA's names are looked up here as `rlhf.learning.lora` does it in the model itself: modules are what tensors are named
after, linear layers those with a matrix `weight` that is no embedding and no LM head.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from rlhf.config.learner import Learner
from rlhf.config.lora import Lora
from rlhf.errors import InputError


@dataclass(frozen=True, slots=True)
class Trained:
    """Numbers that train, numbers that are added to the model for it, and what an adapter keeps of each token."""

    numbers: int
    added: int = 0
    kept: float = 0.0
    """Numbers of the model's dtype a token, over all adapters: their inner activations, and dropped-out inputs."""


def trained(learner: Learner, shapes: Mapping[str, tuple[int, ...]], vocabulary: int, path: str) -> Trained:
    """All parameters, a named subset, or adapters; raises `InputError` as `lora_layers` does."""
    if learner.lora:
        return _adapters(learner.lora, shapes, vocabulary, path)
    if learner.trainable:
        include, exclude = learner.trainable.include, learner.trainable.exclude
        return Trained(sum(prod(s) for name, s in shapes.items() if _fits(name, include) and not _fits(name, exclude)))
    return Trained(sum(map(prod, shapes.values())))


def lora_layers(
    options: Lora, shapes: Mapping[str, tuple[int, ...]], vocabulary: int, path: str
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of the linear layers that get an adapter, by name, and names of the modules that train in full.

    Raises `InputError` naming those that exist where a name fits none; `path` is the model's, for the message.
    """
    linear = {name.rpartition(".")[0]: shape for name, shape in shapes.items() if _is_linear(name, shape, vocabulary)}
    targets = list(linear)
    if options.target_modules != "all-linear":
        targets = _find("target_modules", options.target_modules, targets, path)
    heads = {name.rpartition(".")[0] for name, shape in shapes.items() if _is_head(name, shape, vocabulary)}
    modules = dict.fromkeys(part for name in shapes for part in _with_parents(name.rpartition(".")[0]))
    inside = {part for target in targets for part in _with_parents(target)}
    whole = [name for name in modules if name not in inside and name not in heads]
    saved = _find("modules_to_save", options.modules_to_save, whole, path)
    return {name: linear[name] for name in targets}, saved


def _adapters(options: Lora, shapes: Mapping[str, tuple[int, ...]], vocabulary: int, path: str) -> Trained:
    targets, saved = lora_layers(options, shapes, vocabulary, path)
    adapters = sum(options.rank * (a + b) for a, b in targets.values())
    # peft keeps the starting weights beside those that train, which is what the reference sees.
    copies = sum(prod(shape) for name, shape in shapes.items() if any(name.startswith(f"{part}.") for part in saved))
    kept = float(options.rank * len(targets))
    if options.dropout:
        # The dropped-out input, and a mask of a byte a number.
        kept += 1.5 * sum(inputs for _, inputs in targets.values())
    return Trained(adapters + copies, adapters + copies, kept)


def _find(key: str, wanted: Sequence[str], known: Sequence[str], path: str) -> list[str]:
    found: dict[str, None] = {}
    for part in wanted:
        # A checkpoint of the model without its head has names that lack the first part of the module's.
        fitting = [name for name in known if f".{name}".endswith(f".{part}") or part.endswith(f".{name}")]
        if not fitting:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in known} - {""}))
            raise InputError(
                f"learner.lora.{key} = {list(wanted)}: {path} has no {part!r} that can be taken; choose among {ends}"
            )
        found |= dict.fromkeys(fitting)
    return list(found)


def _is_linear(name: str, shape: tuple[int, ...], vocabulary: int) -> bool:
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    positions = not _in_a_layer(name) and ("embed" in last or last == "wpe")
    return kind == "weight" and len(shape) == 2 and not positions and not _is_head(name, shape, vocabulary)


def _is_head(name: str, shape: tuple[int, ...], vocabulary: int) -> bool:
    """The embedding of tokens or the LM head: a row for each token, and in no layer."""
    return len(shape) == 2 and shape[0] == vocabulary and not _in_a_layer(name)


def _in_a_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])
