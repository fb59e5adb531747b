import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from rlhf.config import reference
from rlhf.config.run import RunConfig


def test_the_reference_page_is_up_to_date() -> None:
    assert Path("docs/configuration.md").read_text() == reference.reference(), "run `make docs`"


def test_the_schema_is_up_to_date() -> None:
    assert Path("configs/config.schema.json").read_text() == reference.schema(), "run `make docs`"


def test_every_key_has_a_description_and_a_row() -> None:
    page = reference.reference()
    for path, model in reference._sections("", RunConfig):
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


@pytest.mark.parametrize("config", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_name_the_schema_and_satisfy_it(config: Path) -> None:
    text = config.read_text()
    assert text.startswith("# yaml-language-server: $schema=config.schema.json\n")
    jsonschema.validate(yaml.safe_load(text), json.loads(reference.schema()))


def test_the_schema_refuses_an_unknown_key() -> None:
    data = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    data["rounds"]["cuont"] = 3
    with pytest.raises(jsonschema.ValidationError, match="cuont"):
        jsonschema.validate(data, json.loads(reference.schema()))
