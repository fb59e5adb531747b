"""From a YAML file and `key.path=value` overrides to a `RunConfig`, or one line that says what to change."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlhf.config.run import RunConfig
from rlhf.errors import InputError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a config.

    `overrides` are `key.path=value`, the value in YAML. An override of a `type` resets its siblings,
    because the fields of one type mean nothing to another.

    Raises `InputError` naming file, key, value and what was expected.
    """
    return validate(apply_overrides(read_yaml(path), overrides, str(path)), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `InputError`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read the config: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of keys at the top level, got {type(data).__name__}")
    return data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    """A copy of `data` with each `key.path=value` set; overrides of a `type` come first."""
    result = _copy(data)
    for keys, value in sorted((_parse(item, source) for item in overrides), key=lambda item: item[0][-1] != "type"):
        node = result
        for depth, key in enumerate(keys[:-1]):
            child = node.get(key)
            if child is None:
                child = node[key] = {}
            elif not isinstance(child, dict):
                raise InputError(
                    f"{source}: override {'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is {child!r}, not a mapping"
                )
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
        raise InputError(_explain(error, source)) from error


def _parse(item: str, source: str) -> tuple[list[str], Any]:
    key, separator, text = item.partition("=")
    keys = key.strip().split(".")
    if not separator or not all(keys):
        raise InputError(f"{source}: override {item!r}: expected key.path=value")
    try:
        return keys, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: override {item!r}: the value is not valid YAML") from error


def _copy(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _copy(value) for key, value in data.items()}
    return [_copy(value) for value in data] if isinstance(data, list) else data


def _explain(error: ValidationError, source: str) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(_location(first["loc"])) or "(whole config)"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = _unknown_key(first["loc"])
    elif first["type"] == "missing":
        message = "required key is missing"
    shown = "" if first["type"] == "missing" or isinstance(first["input"], dict) else f" = {first['input']!r}"
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{source}: {key}{shown}: {message}{others}"


def _location(loc: Iterable[int | str]) -> list[str]:
    """Path of keys; pydantic adds the tag of a union member (`judge.pair_model.path`), which is no key of the file."""
    parts = [str(part) for part in loc]
    if len(parts) > 1 and parts[0] in ("judge", "eval_judge"):
        del parts[1]
    return parts


def _unknown_key(loc: tuple[int | str, ...]) -> str:
    import difflib

    known = _keys_at(loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key; {hint}"


def _keys_at(loc: Iterable[int | str]) -> list[str]:
    schema = RunConfig.model_json_schema()
    node: dict[str, Any] = schema
    for part in loc:
        options = [
            _resolve(option, schema) for option in [node["properties"].get(part, {}), *_members(node, part, schema)]
        ]
        node = next((option for option in options if "properties" in option), node)
    return list(node.get("properties", {}))


def _members(node: dict[str, Any], part: int | str, schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Members of a union at key `part`, or the member whose `type` tag is `part`."""
    here = node["properties"].get(part, {})
    return [*here.get("anyOf", []), *here.get("oneOf", [])]


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    return schema["$defs"][reference.rsplit("/", 1)[-1]] if reference else node
