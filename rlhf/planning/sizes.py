"""The figures of a model that memory depends on, from its config.json and safetensors headers alone."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.modelfiles import find_model, tensor_shapes, untied

Shapes = dict[str, tuple[int, ...]]
"""Shapes of a checkpoint's tensors by name, without a head that is tied to the embedding."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The figures of a decoder that memory depends on; `parameters` counts a tied head once."""

    parameters: int
    layers: int
    hidden: int
    query_hidden: int
    kv_hidden: int
    intermediate: int
    vocabulary: int


def read_model(path: str, key: str) -> tuple[ModelSize, Shapes]:
    """Sizes and tensors of a local model, a cached one, or one on the Hugging Face hub, whose headers are read there.

    Raises `InputError` naming `key` if there is no such model or its config.json lacks a size.
    """
    where, folder = f"{key} = {path!r}", find_model(path, key)
    if folder is not None:
        shapes = tensor_shapes(folder, key)
        return _sizes(json.loads((folder / "config.json").read_text(encoding="utf-8")), shapes, where), shapes
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        data = json.loads(Path(hf_hub_download(path, "config.json")).read_text(encoding="utf-8"))
        files = get_safetensors_metadata(path).files_metadata.values()
    except Exception as error:  # every failure of a lookup on the network has the same remedy
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{where}: no such folder, and no model of that id could be looked up ({reason}); "
            "give a model's folder or a Hugging Face id that can be reached"
        ) from error
    shapes = untied({name: tuple(tensor.shape) for file in files for name, tensor in file.tensors.items()}, data)
    return _sizes(data, shapes, where), shapes


def model_size(path: str, key: str) -> ModelSize:
    """The sizes alone; see `read_model`."""
    return read_model(path, key)[0]


def _sizes(data: dict[str, Any], shapes: Shapes, where: str) -> ModelSize:
    text = data.get("text_config", data)

    def read(*names: str) -> int:
        value = next((text[name] for name in names if isinstance(text.get(name), int)), None)
        if value is None:
            raise InputError(f"{where}: config.json has no {' or '.join(names)}; use a decoder of a known kind")
        return int(value)

    hidden, heads = read("hidden_size", "n_embd"), read("num_attention_heads", "n_head")
    head_size = text.get("head_dim") or hidden // heads
    return ModelSize(
        parameters=sum(map(prod, shapes.values())),
        layers=read("num_hidden_layers", "n_layer"),
        hidden=hidden,
        query_hidden=heads * head_size,
        kv_hidden=(text.get("num_key_value_heads") or heads) * head_size,
        intermediate=text.get("intermediate_size") or text.get("n_inner") or 4 * hidden,
        vocabulary=read("vocab_size"),
    )
