"""Where a model is and what its safetensors headers promise; whatever is missing or broken is one clear line."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf.errors import InputError
from rlhf.modelfiles import find_model, local_folder, tensor_shapes


def make_model(folder: Path, config: dict[str, object] | None = None, **tensors: tuple[int, ...]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    for file, (name, shape) in enumerate(tensors.items()):
        save_file({name.replace("__", "."): np.zeros(shape, np.float32)}, folder / f"model-{file}.safetensors")
    return folder


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_folder_with_a_config_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    assert local_folder(str(folder), "policy.path") == folder


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "../model", "model", "a/b/c"])
def test_a_missing_folder_is_named_with_its_key(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        local_folder(name, "judge.path")
    assert one_line(error).startswith(f"judge.path = {name!r}: no model there")


def test_a_folder_without_a_config_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models/mine` looks like a hub id; if such a folder exists, it is what the user means."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(InputError, match=r"config\.json"):
        local_folder("models/mine", "policy.path")


def test_a_hub_id_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        local_folder("nobody/no-such-model", "policy.path")
    assert one_line(error).startswith("policy.path = 'nobody/no-such-model': ")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("~/m", "policy.path") == find_model("~/m", "policy.path") == folder
    for look in (local_folder, find_model):
        with pytest.raises(InputError, match=r"policy.path = '~/none': no model there"):
            look("~/none", "policy.path")


def test_an_id_that_is_not_on_this_machine_is_none_until_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find_model("nobody/no-such-model", "policy.path") is None
    snapshots = tmp_path / "models--nobody--no-such-model"
    (snapshots / "refs").mkdir(parents=True)
    (snapshots / "refs" / "main").write_text("abc")
    (snapshots / "snapshots").mkdir()
    folder = make_model(snapshots / "snapshots" / "abc")
    assert find_model("nobody/no-such-model", "policy.path") is None, "it has no weights"
    make_model(folder, weights=(2, 2))
    found = find_model("nobody/no-such-model", "policy.path")
    assert found is not None
    assert found.samefile(folder)


def test_shapes_are_gathered_over_all_shards(tmp_path: Path) -> None:
    folder = make_model(tmp_path, model__embed=(7, 4), model__norm=(4,), scalar=())
    assert tensor_shapes(folder, "policy.path") == {"model.embed": (7, 4), "model.norm": (4,), "scalar": ()}


@pytest.mark.parametrize(("tied", "kept"), [(True, False), (False, True), (None, True)])
def test_a_tied_head_is_left_out(tied: bool | None, kept: bool, tmp_path: Path) -> None:
    config: dict[str, object] = {} if tied is None else {"tie_word_embeddings": tied}
    folder = make_model(tmp_path, config, model__embed=(7, 4), lm_head__weight=(7, 4))
    expected = {"model.embed": (7, 4)} | ({"lm_head.weight": (7, 4)} if kept else {})
    assert tensor_shapes(folder, "policy.path") == expected


def test_no_safetensors_at_all(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError) as error:
        tensor_shapes(folder, "policy.path")
    assert "policy.path" in one_line(error)
    assert "safetensors" in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1, -8])
def test_a_damaged_file_is_named(keep: int, tmp_path: Path) -> None:
    """Cut off anywhere: before the header, inside it, and one byte short."""
    folder = make_model(tmp_path / "m", good=(2, 2), broken=(8, 8))
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError) as error:
        tensor_shapes(folder, "policy.path")
    message = one_line(error)
    assert "policy.path" in message
    assert "model-1.safetensors is damaged" in message


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", broken=(8, 8))
    file = folder / "model-0.safetensors"
    data = bytearray(file.read_bytes())
    data[8] ^= 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"model-0\.safetensors is damaged"):
        tensor_shapes(folder, "policy.path")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", good=(2, 2))
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        tensor_shapes(folder, "policy.path")
    assert "config.json" in one_line(error)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """A download that stopped half-way: the index lists a file that is not there."""
    folder = make_model(tmp_path / "m", good=(2, 2))
    index = {"weight_map": {"good": "model-0.safetensors", "lost": "model-9.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as error:
        tensor_shapes(folder, "policy.path")
    assert "model-9.safetensors" in one_line(error)
