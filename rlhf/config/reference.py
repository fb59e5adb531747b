"""Generates docs/configuration.md and configs/config.schema.json from the models: `python -m rlhf.config.reference`."""

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf.config.run import RunConfig

PAGE = Path("docs/configuration.md")
SCHEMA = Path("configs/config.schema.json")
_INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from rlhf/config; change the models there, not this page. -->

One YAML file describes a run. `rlhf validate CONFIG` prints it with every default filled in.

- Unknown keys, keys that stand twice, wrong types and impossible combinations are refused with exit code 2 and one
  line that names the file, the key, the value and what was expected.
- `key.path=value` after the file name sets a key over the file: `rlhf train configs/quickstart.yaml rounds.count=2
  generator.sampling.max_tokens=64`. The value is YAML. Setting a `type` resets the other keys of its section, because
  the fields of one type mean nothing to another; those overrides are applied first, wherever they stand.
- Paths are relative to the folder that the command is started in, not to the YAML file.
- `null` stands for "chosen from the machine or another key", as each description says.
- Secrets (the W&B key, Hugging Face tokens) come from the environment only.
- Editors with a YAML language server complete and check the keys where the file starts with
  `# yaml-language-server: $schema=config.schema.json` (a path relative to the file).

A run that exists may be resumed with other values of the keys that do not touch what has been sampled or trained
(folders, monitoring, deadlines, replicas, the number of rounds); a change of any other key is refused.
"""
_SYMBOLS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def reference() -> str:
    """The text of docs/configuration.md."""
    blocks, first = [_INTRODUCTION], dict[type[BaseModel], str]()
    for path, model in _sections("", RunConfig):
        if model in first:
            blocks.append(f"## `{path}`\n\nThe keys of `{first[model]}`.\n")
        else:
            first[model] = path
            blocks.append(_block(path, model))
    return "\n".join(blocks)


def schema() -> str:
    """The text of configs/config.schema.json."""
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def write() -> list[Path]:
    """Write both files below the current folder; returns their paths."""
    for path, text in ((PAGE, reference()), (SCHEMA, schema())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [PAGE, SCHEMA]


def _sections(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section below `path`, parents first; a union has one entry a member, under `key (type: name)`."""
    yield path, model
    for name, field in model.model_fields.items():
        members = _models(field.annotation)
        for member in members:
            key = f"{path}.{name}".lstrip(".")
            if len(members) > 1:
                key += f" (type: {get_args(member.model_fields['type'].annotation)[0]})"
            yield from _sections(key, member)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [model for option in get_args(annotation) for model in _models(option)]
    return []


def _block(path: str, model: type[BaseModel]) -> str:
    title = f"## `{path}`" if path else "## Top level"
    rows = ["| key | type | default | description |", "| --- | --- | --- | --- |"]
    rows += [_row(name, field) for name, field in model.model_fields.items()]
    summary = (model.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()
    return "\n".join([title, "", summary, "", *rows, ""])


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _type(field), _default(field), field.description or _literal_only(field))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _literal_only(field: FieldInfo) -> str:
    return "Names the kind of this section." if get_origin(field.annotation) is Literal else ""


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{symbol} {getattr(item, name)}"
        for item in field.metadata
        for name, symbol in _SYMBOLS
        if getattr(item, name, None) is not None
    ]
    return f"{_name(field.annotation)}{' ' + ', '.join(bounds) if bounds else ''}"


def _name(annotation: Any) -> str:
    origin, options = get_origin(annotation), get_args(annotation)
    if annotation is type(None) or annotation is None:
        return "null"
    if origin is Literal:
        return ", ".join(f"`{_yaml(option)}`" for option in options)
    if origin in (Union, types.UnionType):
        models = [option for option in options if _models(option)]
        others = [_name(option) for option in options if option not in models]
        section = "section" if len(_models(annotation)) == 1 else "section by `type`"
        return " or ".join([*([section] if models else []), *others])
    if origin is Annotated:
        return _name(options[0])
    if _models(annotation):
        return "section"
    if origin is tuple:
        return f"list of {_name(options[0])}" + ("" if options[-1] is Ellipsis else f", {len(options)} of them")
    if origin is dict:
        return "mapping"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        value: Any = field.default_factory()  # type: ignore[call-arg]
        if isinstance(value, BaseModel):
            kind = getattr(value, "type", None)
            return f"`type: {kind}`" if kind and len(_models(field.annotation)) > 1 else "its defaults"
        return f"`{_yaml(value)}`"
    return "**required**" if field.default is PydanticUndefined else f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    for written in write():
        print(written)
