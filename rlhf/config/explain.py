"""One line about a config that does not validate: file, key, value, what was expected."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlhf.monitor.redact import names_secret

_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
"""Wider than `names_secret`: of a key that nobody knows, little is lost with its value."""
_LONGEST_VALUE = 80
_MAPPING = "expected a mapping of keys"
_TEXTS = {
    "missing": "required key is missing",
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "dict_type": _MAPPING,
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "string_type": "expected text; put it in quotes",
}


def explain(error: ValidationError, data: Any, source: str, model: type[BaseModel]) -> str:
    """The first problem of `data` with `model`, in one line without an input dump, and a count of the others."""
    problems = error.errors(include_url=False)
    first = min(problems, key=_rank)
    keys, shown, message = _describe(first, data, model)
    # The validators of whole sections name their keys themselves.
    named = first["type"] == "value_error" and message.startswith(f"{keys[0] if keys else ''}.")
    where = "" if named or not keys else f"{'.'.join(keys)}{shown}: "
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return " ".join(f"{source}: {where}{message}{others}".split())


def _rank(problem: ErrorDetails) -> int:
    """An unknown key is often the misspelling of one that is reported as missing: show it first."""
    return 0 if problem["type"] == "extra_forbidden" else 1


def _describe(problem: ErrorDetails, data: Any, model: type[BaseModel]) -> tuple[list[str], str, str]:
    kind, loc = problem["type"], problem["loc"]
    keys = _location(loc, data)
    if kind.startswith("union_tag"):
        tags = ", ".join(repr(tag) for tag in _tags(loc, model))
        shown = "" if kind == "union_tag_not_found" else f" = {problem['ctx']['tag']!r}"
        missing = "required key is missing; " if kind == "union_tag_not_found" else ""
        return [*keys, "type"], shown, f"{missing}expected one of {tags}"
    if kind == "extra_forbidden":
        value = "" if _SECRET.search(keys[-1]) else _shown(problem["input"])
        return keys, value, _unknown_key(loc, model)
    if kind == "literal_error" and problem["ctx"]["expected"] == "False":
        return keys, _shown(problem["input"]), "this feature is reserved and has no implementation yet; leave it out"
    message = _TEXTS.get(kind) or problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    message = message.replace("Tuple should have", "expected")
    hidden = kind == "missing" or names_secret(keys[-1].removesuffix("_env") if keys else "", problem["input"])
    return keys, "" if hidden else _shown(problem["input"]), message


def _shown(value: Any) -> str:
    if isinstance(value, dict | BaseModel):
        return ""
    text = repr(value)
    return f" = {text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + '…'}"


def _location(loc: Sequence[int | str], data: Any) -> list[str]:
    """Path of keys; pydantic adds the tag of a union member (`judge.pair_model.path`), which is no key of the file."""
    keys: list[str] = []
    node = data
    for index, part in enumerate(loc):
        is_mapping = isinstance(node, dict)
        if is_mapping and 0 < index < len(loc) - 1 and part not in node and node.get("type") == part:
            continue
        keys.append(str(part))
        if is_mapping:
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part]
    return keys


def _unknown_key(loc: Sequence[int | str], model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    known = list(_node(loc[:-1], schema).get("properties", {}))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key; {hint}"


def _tags(loc: Sequence[int | str], model: type[BaseModel]) -> list[str]:
    """Values of `type` that the union at `loc` takes."""
    schema = model.model_json_schema()
    here = _node(loc[:-1], schema)["properties"][str(loc[-1])]
    return [str(_tag(member)) for member in _members(here, schema) if _tag(member)]


def _node(loc: Sequence[int | str], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of the section at `loc`, whose parts are keys and tags of union members."""
    candidates = [schema]
    for part in loc:
        found = [
            member
            for candidate in candidates
            for member in _members(candidate.get("properties", {}).get(part, {}), schema)
        ]
        if not found:
            found = [member for member in candidates if _tag(member) == part]
        candidates = found
    return next((candidate for candidate in candidates if "properties" in candidate), {})


def _members(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections that a key may hold: the schema behind a reference, or every member of a union."""
    if "$ref" in node:
        return [schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]]
    return [found for option in (*node.get("anyOf", ()), *node.get("oneOf", ())) for found in _members(option, schema)]


def _tag(node: dict[str, Any]) -> Any:
    return node.get("properties", {}).get("type", {}).get("const")
