"""Generates docs/configuration.md and the JSON schemas of configs/: `python -m rlhf.config.reference`."""

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf.config.generator import Replicas
from rlhf.config.judging import JudgeRun, JudgeTraining
from rlhf.config.offline import OfflineConfig
from rlhf.config.run import RunConfig

PAGE = Path("docs/configuration.md")
SCHEMAS: dict[Path, type[BaseModel]] = {
    Path("configs/config.schema.json"): RunConfig,
    Path("configs/offline.schema.json"): OfflineConfig,
    Path("configs/judge-train.schema.json"): JudgeTraining,
    Path("configs/judges/judge.schema.json"): JudgeRun,
}
_OTHERS = (
    ("`rlhf train` on a preference set", OfflineConfig),
    ("`rlhf judge train`", JudgeTraining),
    ("`rlhf judge score` and `rlhf judge bench`", JudgeRun),
)
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
- A section that stands in several places (a judge, for one) is described once, where it comes first.

A run that exists may be resumed with other values of the keys that do not touch what has been sampled or trained
(folders, monitoring, deadlines, replicas, the number of rounds); a change of any other key is refused.
"""
_SYMBOLS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def reference() -> str:
    """The text of docs/configuration.md."""
    seen: set[type[BaseModel]] = set()
    blocks = [_INTRODUCTION, *_blocks(RunConfig, seen)]
    for title, model in _OTHERS:
        blocks += [f"# {title}\n", *_blocks(model, seen)]
    return "\n".join(blocks)


def _blocks(top: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """A block for each section that is not in `seen` yet."""
    for path, model in _sections("", top):
        if model not in seen:
            seen.add(model)
            yield _block(path, model)


def schema(model: type[BaseModel] = RunConfig) -> str:
    """The text of a model's JSON schema."""
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def write() -> list[Path]:
    """Write all files below the current folder; returns their paths."""
    texts = {PAGE: reference()} | {path: schema(model) for path, model in SCHEMAS.items()}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _sections(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section below `path`, parents first; a union has one entry a member, under `key (type: name)`."""
    yield path, model
    for name, field in model.model_fields.items():
        members = _models(field.annotation)
        for member in members:
            key = f"{path}.{name}".lstrip(".") + ("[]" if get_origin(field.annotation) is tuple else "")
            if len(members) > 1:
                key += f" (type: {get_args(member.model_fields['type'].annotation)[0]})"
            yield from _sections(key, member)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, tuple):
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
    taken = [item.json_schema_input_type for item in field.metadata if isinstance(item, BeforeValidator)]
    shown = [annotation for annotation in taken if annotation is not PydanticUndefined]
    return f"{_name(shown[0] if shown else field.annotation)}{' ' + ', '.join(bounds) if bounds else ''}"


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
    if origin is tuple:
        return f"list of {_name(options[0])}" + ("" if options[-1] is Ellipsis else f", {len(options)} of them")
    if _models(annotation):
        return "section"
    if origin is dict:
        return "mapping"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        value: Any = field.default_factory()  # type: ignore[call-arg]
        if isinstance(value, BaseModel):
            if isinstance(value, Replicas):
                return f"`{value}`"
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
