"""What a checkpoint folder holds, read from safetensors headers without loading a weight."""

import json
from pathlib import Path
from typing import Any

from rlhf.errors import InputError


def local_folder(path: str, key: str) -> Path:
    """The folder of a local model, or the snapshot of a Hugging Face id (downloaded if the hub can be reached).

    Raises `InputError` naming the config key if there is no such model.
    """
    if (Path(path) / "config.json").is_file():
        return Path(path)
    if Path(path).exists() or path.startswith((".", "/")) or path.count("/") != 1:
        raise InputError(
            f"{key} = {path!r}: no model there (config.json, *.safetensors); give a model's folder or a Hugging Face id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{key} = {path!r}: no such folder, and no model of that id could be fetched ({reason})"
        ) from error


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
    if _json_object(folder / "config.json", key).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return shapes


def _json_object(file: Path, key: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{key} = {str(file.parent)!r}: {file.name} is damaged; fetch the model again")
    return value
