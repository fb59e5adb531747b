import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from rlhf.config import reference


def test_the_reference_page_is_up_to_date() -> None:
    assert Path("docs/configuration.md").read_text() == reference.reference(), "run `make docs`"


@pytest.mark.parametrize("path", reference.SCHEMAS, ids=str)
def test_the_schemas_are_up_to_date(path: Path) -> None:
    assert path.read_text() == reference.schema(reference.SCHEMAS[path]), "run `make docs`"


@pytest.mark.parametrize("top", reference.SCHEMAS.values(), ids=lambda model: model.__name__)
def test_every_key_has_a_description_and_a_row(top: type[BaseModel]) -> None:
    page = reference.reference()
    for path, model in reference._sections("", top):
        for name, field in model.model_fields.items():
            assert field.description or name == "type", f"{path}.{name}"
            assert f"| `{name}` |" in page


def test_rows_show_types_bounds_and_defaults() -> None:
    page = reference.reference()
    assert "| `path` | text | **required** | Hugging Face id or local folder of the policy" in page
    assert "| `top_p` | number > 0, ≤ 1 | `1` |" in page
    assert "| `zero_stage` | `0`, `1`, `2`, `3` | `2` |" in page
    assert "| `betas` | list of number, 2 of them | `[0.9, 0.95]` |" in page
    assert "| `eval_judge` | section by `type` or null | `null` |" in page
    assert "\\|2p - 1\\|" in page


@pytest.mark.parametrize("config", sorted(Path("configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_name_their_schema_and_satisfy_it(config: Path) -> None:
    first, _, _ = config.read_text().partition("\n")
    named = Path(os.path.normpath(config.parent / first.removeprefix("# yaml-language-server: $schema=")))
    assert named in reference.SCHEMAS, first
    jsonschema.validate(yaml.safe_load(config.read_text()), json.loads(named.read_text()))


def test_the_schema_refuses_an_unknown_key() -> None:
    data = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    data["rounds"]["cuont"] = 3
    with pytest.raises(jsonschema.ValidationError, match="cuont"):
        jsonschema.validate(data, json.loads(reference.schema()))
