"""Training of a named subset of parameters; the others are frozen and have neither gradient nor optimizer state."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from rlhf.config.trainable import Trainable
from rlhf.errors import InputError
from rlhf.learning.parametrisation import Full

SHOWN = 20
"""Names that an error lists at most."""


class Subset(Full):
    """The parameters that the patterns name train, in the checkpoint's own coordinates; all tensors are exported."""

    def __init__(self, options: Trainable, path: str) -> None:
        """`path` is the model's, for messages."""
        self._options = options
        self._path = path

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is, with only the subset trainable; of a tied parameter any name selects, or excludes, it.

        Raises `InputError` for a pattern that fits no parameter, and where none is left.
        """
        names = _names(model)
        included = self._fitting("include", self._options.include, names)
        excluded = self._fitting("exclude", self._options.exclude, names)
        if not included - excluded:
            raise InputError(
                f"learner.trainable.exclude = {list(self._options.exclude)}: no parameter of {self._path} is left to "
                "train; take a pattern out"
            )
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in included - excluded)
        return model

    def trainable(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the subset, a tied one once."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def _fitting(self, key: str, patterns: Sequence[str], names: dict[int, list[str]]) -> set[int]:
        """Ids of the parameters that the patterns name."""
        found: set[int] = set()
        for pattern in patterns:
            fitting = {known for known, own in names.items() if any(fnmatchcase(name, pattern) for name in own)}
            if not fitting:
                # One name stands for those that differ in the layer's number, as a pattern that can be used.
                kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for own in names.values() for name in own)
                raise InputError(
                    f"learner.trainable.{key} = {pattern!r}: fits no parameter of {self._path}; it has "
                    + ", ".join(list(kinds)[:SHOWN])
                )
            found |= fitting
        return found


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
