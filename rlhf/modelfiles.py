"""What a checkpoint folder holds, read from safetensors headers without loading a weight."""

import json
from pathlib import Path
from typing import Any

from rlhf.errors import InputError


def find_model(path: str, key: str, *, fetch: bool = False) -> Path | None:
    """The folder of a local model or of a Hugging Face id's snapshot; None for an id that is not on this machine.

    With `fetch` a snapshot is brought up to date, or downloaded, and an id that cannot be had raises. Raises
    `InputError` naming the config key if there is no such folder.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise InputError(
            f"{key} = {path!r}: no model there (config.json, *.safetensors); give a model's folder or a Hugging Face id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if not fetch:
        try:
            cached = Path(snapshot_download(path, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
        return cached if (cached / "config.json").is_file() and any(cached.glob("*.safetensors")) else None
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:  # every failure of a lookup on the network has the same remedy
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{key} = {path!r}: no such folder, and no model of that id could be fetched ({reason})"
        ) from error


def local_folder(path: str, key: str) -> Path:
    """The folder of a local model, or the snapshot of a Hugging Face id (downloaded if the hub can be reached).

    Raises `InputError` naming the config key if there is no such model.
    """
    folder = find_model(path, key, fetch=True)
    assert folder is not None, "what cannot be fetched raises"
    return folder


def tensor_shapes(folder: Path, key: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, without a head that is tied to the embedding."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{key} = {str(folder)!r}: the folder holds no *.safetensors file; convert the model to safetensors"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(
                f"{key} = {str(folder)!r}: {file.name} is damaged ({error}); fetch the model again"
            ) from error
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = set(_json_object(index, key).get("weight_map", {}).values())
        if lost := sorted(listed - {file.name for file in files}):
            raise InputError(f"{key} = {str(folder)!r}: {lost[0]} is missing; fetch the model again")
    return untied(shapes, _json_object(folder / "config.json", key))


def untied(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """`shapes` without a head that `config`, of config.json, ties to the embedding."""
    tied = config.get("tie_word_embeddings")
    return {name: shape for name, shape in shapes.items() if not (tied and name == "lm_head.weight")}


def _json_object(file: Path, key: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{key} = {str(file.parent)!r}: {file.name} is damaged; fetch the model again")
    return value
