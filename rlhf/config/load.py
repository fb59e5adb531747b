"""From a YAML file and `key.path=value` overrides to a `RunConfig`, or one line that says what to change."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rlhf.config.explain import explain
from rlhf.config.judge import with_path
from rlhf.config.judging import JudgeRun, JudgeTraining
from rlhf.config.offline import OfflineConfig
from rlhf.config.run import RunConfig
from rlhf.config.yamlfile import parse_yaml, read_yaml
from rlhf.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig | OfflineConfig:
    """Read and validate what `rlhf train` takes: with a `preferences` section an offline training, else a run.

    Raises `InputError` as `load_config` does, and where both prompts and preferences are given.
    """
    source = str(path)
    data = apply_overrides(read_yaml(path), overrides, source)
    if "data" in data and "prompts" not in data:
        raise InputError(f"{source}: data: this is the config of a judge's training; run `rlhf judge train {source}`")
    if data.get("preferences") is None:
        return validate(data, source)
    online = [key for key in ("prompts", "rounds", "generator", "judge", "eval_judge", "pairing") if data.get(key)]
    if online:
        raise InputError(
            f"{source}: preferences and {online[0]} are both given; a run samples its pairs from prompts or takes them "
            f"from a preference set: leave out {online[0]}, or preferences"
        )
    return validate(data, source, OfflineConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a config.

    `overrides` are `key.path=value`, the value in YAML. An override of a `type` resets its siblings,
    because the fields of one type mean nothing to another.

    Raises `InputError` naming file, key, value and what was expected.
    """
    return validate(apply_overrides(read_yaml(path), overrides, str(path)), str(path))


def load_judge_config(path: str | Path, overrides: Sequence[str] = ()) -> JudgeRun:
    """The judge of a YAML file that has a `judge` section; of a run's config, its judge, seed and cluster are taken.

    Raises `InputError` as `load_config` does.
    """
    source = str(path)
    data = apply_overrides(read_yaml(path), overrides, source)
    if "policy" in data:
        run: RunConfig = validate(data, source)
        # A judge without a path takes the policy, in a run and here.
        return JudgeRun(name=run.name, seed=run.seed, judge=with_path(run.judge, run.policy.path), cluster=run.cluster)
    return validate(data, source, JudgeRun)


def load_judge_training(path: str | Path, overrides: Sequence[str] = ()) -> JudgeTraining:
    """The config of `rlhf judge train`; raises `InputError` as `load_config` does."""
    return validate(apply_overrides(read_yaml(path), overrides, str(path)), str(path), JudgeTraining)


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


def validate(data: dict[str, Any], source: str, model: type[Model] = RunConfig) -> Model:  # type: ignore[assignment]
    """Validate a mapping; raises `InputError` with one line for the first problem and a count of the others."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error, data, source, model)) from error


def _parse(item: str, source: str) -> tuple[list[str], Any]:
    key, separator, text = item.partition("=")
    keys = key.strip().split(".")
    if not separator or not all(keys):
        raise InputError(f"{source}: override {item!r}: expected key.path=value")
    try:
        return keys, parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: override {item!r}: the value is not valid YAML; quote it") from error
