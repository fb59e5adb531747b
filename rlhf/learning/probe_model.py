"""A small fp32 model of the policy's own kind and weights, for the probes at start: its first layers only."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhf.learning.compile import decoder_layers
from rlhf.learning.policy import PolicyModule

FEWEST = 4
"""Layers that are taken in any case: some models leave out positions or windows in every fourth, and say so nowhere."""
NAMED = ("window", "sliding", "rope", "attention_type", "chunk")
"""Parts of the names of attributes that tell apart layers of one class."""


def probe_model(module: PolicyModule) -> PolicyModule:
    """A copy of `module` in fp32 and evaluation mode, on its device, with its first layers up to one of each kind.

    `module` keeps its parameters, bit for bit. A model whose layers are not found is copied whole.
    """
    memo: dict[int, Any] = {}
    layers = _layer_list(module)
    count = 0
    if layers is not None:
        count = _needed(layers, _listed(module.model.config, "layer_types"))
        memo[id(layers)] = nn.ModuleList(copy.deepcopy(list(layers[:count]), memo))
    probe = copy.deepcopy(module, memo)
    if layers is not None:
        text = probe.model.config.get_text_config()
        for key in ("layer_types", "mlp_layer_types"):
            if kinds := _listed(text, key):
                setattr(text, key, list(kinds[:count]))
        text.num_hidden_layers = count
    return probe.float_parameters().eval()


def own_logprobs(probe: PolicyModule, batch: Any) -> torch.Tensor:
    """What `probe(batch)` is to be, by the model's own forward with its own head: float32 [T]."""
    head = probe.head
    linear = nn.Linear(1, 1, device="meta")
    linear.weight, linear.bias = head.weight, head.bias
    linear.out_features, linear.in_features = head.weight.shape
    probe.model.set_output_embeddings(linear)
    try:
        logits = probe.model(input_ids=batch.input_ids, use_cache=False).logits
    finally:
        probe.model.set_output_embeddings(head)
    chosen = logits.flatten(0, 1).index_select(0, batch.predict).float()
    return chosen.log_softmax(1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)


def _layer_list(module: PolicyModule) -> nn.ModuleList | None:
    """The list of the language model's decoder layers, if there is one."""
    layers = {id(layer) for layer in decoder_layers(module.model)}
    count = getattr(module.model.config.get_text_config(), "num_hidden_layers", 0)
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    return next((part for part in lists if count and all(id(layer) in layers for layer in part)), None)


def _needed(layers: nn.ModuleList, types: Sequence[str] | None) -> int:
    """How many of the first layers have one of each kind among them."""
    kinds = [(types[index] if types else None, _kind(layer)) for index, layer in enumerate(layers)]
    return min(len(layers), max(FEWEST, 1 + max(kinds.index(kind) for kind in set(kinds))))


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Classes of a layer's parts, and what they say of windows and positions."""
    found: list[Any] = []
    for part in layer.modules():
        found.append(type(part))
        for name, value in sorted(vars(part).items()):
            if any(word in name for word in NAMED) and isinstance(value, int | float | str | None):
                found.append((name, value))
    return tuple(found)


def _listed(config: Any, key: str) -> Sequence[str] | None:
    """A config's list with one entry a layer."""
    found = getattr(config.get_text_config(), key, None)
    return found if isinstance(found, list | tuple) else None
