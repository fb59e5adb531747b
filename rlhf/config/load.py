"""From a YAML file and `key.path=value` overrides to a `RunConfig`, or one line that says what to change."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlhf.config.explain import explain
from rlhf.config.run import RunConfig
from rlhf.config.yamlfile import parse_yaml, read_yaml
from rlhf.errors import InputError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a config.

    `overrides` are `key.path=value`, the value in YAML. An override of a `type` resets its siblings,
    because the fields of one type mean nothing to another.

    Raises `InputError` naming file, key, value and what was expected.
    """
    return validate(apply_overrides(read_yaml(path), overrides, str(path)), str(path))


def apply_overrides(data: dict[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    """A copy of `data` with each `key.path=value` set; overrides of a `type` come first."""
    result = deepcopy(data)
    for keys, value in sorted((_parse(item, source) for item in overrides), key=lambda item: item[0][-1] != "type"):
        node = result
        for depth, key in enumerate(keys[:-1]):
            child = node.get(key)
            if child is None:
                child = node[key] = {}
            elif not isinstance(child, dict):
                parent = ".".join(keys[: depth + 1])
                raise InputError(f"{source}: override {'.'.join(keys)}: {parent} is {child!r}, not a mapping of keys")
            node = child
        if keys[-1] == "type" and node.get("type") != value:
            node.clear()
        node[keys[-1]] = value
    return result


def validate(data: dict[str, Any], source: str) -> RunConfig:
    """Validate a mapping; raises `InputError` with one line for the first problem and a count of the others."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error, data, source, RunConfig)) from error


def _parse(item: str, source: str) -> tuple[list[str], Any]:
    key, separator, text = item.partition("=")
    keys = key.strip().split(".")
    if not separator or not all(keys):
        raise InputError(f"{source}: override {item!r}: expected key.path=value")
    try:
        return keys, parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: override {item!r}: the value is not valid YAML; quote it") from error
