"""LoRA by peft: adapters in place of full weights, exported merged under the checkpoint's own names.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3: W + (alpha / rank) B A.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rlhf.config.data import Policy
from rlhf.config.lora import Lora
from rlhf.errors import InputError
from rlhf.learning.parametrisation import (
    Entry,
    Gather,
    Mask,
    checkpoint_parameters,
    export_entries,
    persistent_buffers,
)

BASE = ".base_layer."
SAVED = ".modules_to_save.default."
ORIGINAL = ".original_module."
PEFT = "base_model.model."
"""What peft's checkpoints put before a module's name."""


class LowRank:
    """Adapters train (and modules listed to be trained in full); the base is frozen."""

    def __init__(self, options: Lora, path: str) -> None:
        """`path` is the model's, for messages."""
        self._options = options
        self._path = path

    def wrap(self, model: Any) -> Any:
        """The same model with adapters put into it: log-probs do not change until they train.

        Raises `InputError` naming the layers that exist where a name fits none.
        """
        from peft import LoraConfig, get_peft_model

        options = self._options
        heads = (model.get_output_embeddings(), model.get_input_embeddings())
        linear = [name for name, module in model.named_modules() if _is_linear(module) and module not in heads]
        targets = linear
        if options.target_modules != "all-linear":
            targets = self._find("target_modules", options.target_modules, linear)
        others = [name for name, module in model.named_modules() if name and module not in heads]
        inside = {name for target in targets for name in _with_parents(target)}
        whole = [name for name in others if name not in inside and _holds_parameters(model.get_submodule(name))]
        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=targets,
            modules_to_save=self._find("modules_to_save", options.modules_to_save, whole) or None,
            bias=options.bias,
        )
        # Adapters in the model's own dtype: ZeRO holds their fp32 masters.
        get_peft_model(model, config, autocast_adapter_dtype=False)
        return model

    def trainable(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the adapters, and of what trains in full."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def export(self, model: nn.Module, gather: Gather | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole CPU tensors of the checkpoint with the adapters merged; see `Full.export`.

        The merge is taken in fp32 and rounded once to the dtype of the weight.
        """
        layers = {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        entries = []
        for name, parameter in checkpoint_parameters(model):
            plain = _checkpoint_name(name)
            if plain is None:
                continue
            layer = layers.get(plain)
            entries.append(Entry.plain(plain, parameter) if layer is None else _merged(plain, layer))
        buffers = ((_checkpoint_name(name), buffer) for name, buffer in persistent_buffers(model))
        yield from export_entries(entries, [(name, buffer) for name, buffer in buffers if name], gather)

    def adapters(self, model: nn.Module, gather: Gather | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole CPU tensors of the adapters alone, as peft's own checkpoint names them; see `Full.export`.

        A layer's product is still to be scaled by alpha / rank. What trains in full is not among them.
        """
        entries = [Entry.plain(name, parameter) for name, parameter in adapter_parameters(model)]
        return export_entries(entries, (), gather)

    def mask_gradients(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Mask]]:
        """Nothing is masked."""
        return iter(())

    @contextmanager
    def initial(self, model: nn.Module) -> Iterator[None]:
        """Inside the context the model is the one that was wrapped: adapters off, trained modules as they were."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def _find(self, key: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
        """Full names among `known` that end with the parts `wanted`."""
        found: dict[str, None] = {}
        for part in wanted:
            fitting = [name for name in known if name == part or name.endswith(f".{part}")]
            if not fitting:
                ends = ", ".join(sorted({name.rpartition(".")[2] for name in known} - {""}))
                raise InputError(
                    f"learner.lora.{key} = {list(wanted)}: {self._path} has no {part!r} that can be taken; choose "
                    f"among {ends}"
                )
            found |= dict.fromkeys(fitting)
        return list(found)


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters of a wrapped model under the names of peft's checkpoints: A [rank, in], then B [out, rank]."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            (adapter,) = module.active_adapters
            for part in ("lora_A", "lora_B"):
                yield f"{PEFT}{name}.{part}.weight", getattr(module, part)[adapter].weight


def adapter_shapes(policy: Policy, options: Lora) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapters that a policy gets, from its config alone: no weight is read or made.

    Raises `InputError` as `LowRank.wrap` does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(policy.path, trust_remote_code=policy.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=policy.trust_remote_code)
        LowRank(options, policy.path).wrap(model)
    return {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model)}


def _merged(name: str, layer: Any) -> Entry:
    """A layer's weight with its adapter."""
    (adapter,) = layer.active_adapters
    weight, a, b = layer.base_layer.weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    def value() -> torch.Tensor:
        delta = (b.detach().float() @ a.detach().float()) * layer.scaling[adapter]
        merged: torch.Tensor = weight.detach().float() + (delta.t() if layer.fan_in_fan_out else delta)
        return merged.to(weight.dtype)

    return Entry(name, (weight, a, b), value)


def _checkpoint_name(name: str) -> str | None:
    """The name without what peft puts into it; None for what is not in the checkpoint."""
    if ".lora_" in name or ORIGINAL in name:
        return None
    return name.replace(BASE, ".").replace(SAVED, ".")


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _with_parents(name: str) -> Iterator[str]:
    """`name` and the modules around it, which hold its parameters too."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])
