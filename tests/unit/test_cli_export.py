import json
from pathlib import Path

import pytest
import yaml

from rlhf.config import load_config
from rlhf.errors import InputError
from rlhf.exporting import config_digest, export_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory as a finished run leaves it, with a policy of two small files."""
    folder = tmp_path / "runs" / "quickstart"
    policy = folder / "policy"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    (policy / "model.safetensors").write_bytes(b"\x00" * 16)
    resolved = load_config("configs/quickstart.yaml").model_dump(mode="json")
    document = {**resolved, "versions": {"torch": "2.13.0"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    events = [
        {"event": "eval", "round": 0, "step": None, "time": 1.0, "eval/win_rate": 0.5},
        {"event": "round", "round": 8, "step": None, "time": 2.0, "pairs/kept": 31.0},
        {"event": "eval", "round": 8, "step": None, "time": 3.0, "eval/win_rate": 0.8125, "eval/score": 0.71},
    ]
    lines = [json.dumps({key: value for key, value in event.items() if value is not None}) for event in events]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_export_copies_the_policy_and_writes_a_card(run_dir: Path, tmp_path: Path) -> None:
    out = export_run(run_dir, tmp_path / "deep" / "out")
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (out / "model.safetensors").read_bytes() == b"\x00" * 16
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert "base_model" not in header  # a local folder is no id of the hub
    assert "`models/smollm2-135m-instruct`" in card
    assert "| eval/win_rate | 0.8125 |" in card
    assert "Evaluation after round 8" in card
    assert "torch 2.13.0" in card
    assert list(out.parent.iterdir()) == [out]


def test_a_hub_id_becomes_the_base_model(run_dir: Path, tmp_path: Path) -> None:
    file = run_dir / "config.yaml"
    document = yaml.safe_load(file.read_text())
    document["policy"]["path"] = "owner/model"
    file.write_text(yaml.safe_dump(document))
    (run_dir / "metrics.jsonl").unlink()
    card = (export_run(run_dir, tmp_path / "out") / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/model"
    assert "No evaluation ran." in card


def test_the_digest_names_the_config_and_not_where_it_ran(run_dir: Path) -> None:
    resolved = yaml.safe_load((run_dir / "config.yaml").read_text())
    digest = config_digest(resolved)
    assert digest == config_digest({**resolved, "output_dir": "elsewhere", "versions": {}})
    assert digest != config_digest({**resolved, "seed": 1})


def test_an_empty_folder_may_be_the_target(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert (export_run(run_dir, out) / "README.md").is_file()


def test_refusals_leave_everything_as_it_was(run_dir: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        export_run(run_dir, full)
    assert [file.name for file in full.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="inside the policy"):
        export_run(run_dir, run_dir / "policy" / "copy")
    with pytest.raises(InputError, match="there is no such folder"):
        export_run(tmp_path / "none", tmp_path / "out")
    (run_dir / "policy" / "config.json").unlink()
    with pytest.raises(InputError, match="the run has not finished"):
        export_run(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
