"""torch.compile of a model's decoder layers, each in place: layers of one kind share what is compiled for them."""

import os
import shutil
from typing import Any

from torch import nn

from rlhf.errors import InputError

BACKEND = "inductor"
"""torch.compile's backend."""

RECOMPILES = 64
"""Variants of one layer before it runs uncompiled. Training or scoring, one row or more, a mask or none: eight, and
kinds of layers that share their code multiply them; torch's own limit is 8."""


def compile_layers(model: nn.Module, device: str) -> None:
    """Compile each decoder layer of `model`, a causal LM with or without adapters; weights and names stay.

    Shapes are dynamic, so that rows of any number and length run the same code. Compilation itself happens at the
    first forward and backward pass. Raises `InputError` for a model without layers to be found, and on a CPU where
    there is no C++ compiler.
    """
    layers = decoder_layers(model)
    if not layers:
        raise InputError(
            f"learner.compile = true: found no decoder layers in {type(model).__name__}; set learner.compile: false"
        )
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and BACKEND == "inductor" and shutil.which(compiler) is None:
        raise InputError(
            f"learner.compile = true: on a CPU it needs a C++ compiler, and there is no {compiler}; install one, name "
            "it in the environment variable CXX, or set learner.compile: false"
        )
    for layer in layers:
        layer.compile(backend=BACKEND, dynamic=True, recompile_limit=RECOMPILES)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a transformers model itself treats as units, outermost only: those that it can checkpoint, or
    that its `_no_split_modules` name."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    names: set[str] = set()
    for module in model.modules():
        # Any: an attribute of transformers' models only, a list of class names or None.
        units: Any = getattr(module, "_no_split_modules", None)
        names.update(units or ())
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in names:
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if not inside:
                found[name] = module
    return list(found.values())
