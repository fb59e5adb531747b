"""The recipes of configs/recipes as tests see them: what their headers claim, and models of the real shapes.

A header draws each node as a row of letters, one for each GPU, and gives the memory of an actor of each role.
"""

import json
import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

FOLDER = Path("configs/recipes")
NAMES = ("one-gpu", "eight-gpus", "four-nodes")
ROLES = {"G": "generator", "J": "judge", "L": "learner"}
SHARDS = 16

QWEN25_1_5B = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}  # fmt: skip
LLAMA3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA33_70B = LLAMA3_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "max_position_embeddings": 131072,
}  # fmt: skip
"""Architectures as their config.json files have them; the vocabularies include the padding of the embedding."""

MODELS = {
    "one-gpu": (QWEN25_1_5B, LLAMA3_8B),
    "eight-gpus": (LLAMA3_8B, LLAMA3_8B),
    "four-nodes": (LLAMA33_70B, LLAMA3_8B),
}
"""Policy and judge of each recipe."""


@dataclass(frozen=True)
class Figures:
    """A line of the memory table: GiB of one GPU and of CPU memory, for one actor."""

    actors: int
    gpus: int
    gpu_gib: float
    cpu_gib: float


@dataclass(frozen=True)
class Header:
    """What a recipe's header claims."""

    nodes: tuple[tuple[str, ...], ...]
    """Of each node the letters of each of its GPUs; several where roles take turns."""
    cpus: int
    """CPUs of a node."""
    node_gib: float
    """CPU memory of a node."""
    memory: dict[str, Figures]
    commands: tuple[str, ...]
    turns: tuple[str, ...]
    """Overrides with which the roles take turns on the same GPUs."""

    def gpus(self) -> list[int]:
        """GPUs of each node."""
        return [len(node) for node in self.nodes]

    def roles(self) -> list[Counter[str]]:
        """GPUs of each node by role."""
        return [Counter(ROLES[letter] for gpu in node for letter in gpu) for node in self.nodes]


def path(name: str) -> str:
    """A recipe's file, from the repository's folder."""
    return str(FOLDER / f"{name}.yaml")


def header(name: str) -> Header:
    """Read the comment that a recipe begins with."""
    lines = []
    for line in Path(path(name)).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    drawn = [line.split(maxsplit=2)[2] for line in lines if re.match(r"node \d", line)]
    cpus, gib = next(m.groups() for line in lines if (m := re.search(r"(\d+) CPUs, (\d+) GiB of CPU memory", line)))
    row = re.compile(r"(generator|judge|learner) +(\d+) +(\d+) +([\d.]+) +([\d.]+)\b")
    found = [match.groups() for line in lines if (match := row.match(line))]
    memory = {role: Figures(int(n), int(gpus), float(gpu), float(cpu)) for role, n, gpus, gpu, cpu in found}
    commands = tuple(line.removeprefix("$ ") for line in lines if line.startswith("$ "))
    turns = next((tuple(line.split()) for line in lines if line.startswith("cluster.colocate=")), ())
    cells = tuple(tuple(cell.replace("+", "") for cell in re.findall(r"[GJL+]+", row)) for row in drawn)
    return Header(cells, int(cpus), float(gib), memory, commands, turns)


def write_model(folder: Path, architecture: dict[str, Any]) -> str:
    """A checkpoint of this architecture whose weights are holes: files as long as the real ones take no space."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in architecture.items() if key != "model_type"}
    config = AutoConfig.for_model(architecture["model_type"], **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if architecture["tie_word_embeddings"] else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(architecture))
    (folder / "tokenizer.json").write_text("{}")
    names = sorted(shapes)
    for shard in range(SHARDS):
        _write_shard(folder / f"model-{shard:05}.safetensors", {name: shapes[name] for name in names[shard::SHARDS]})
    return str(folder)


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
