"""A tiny random model with the real tokenizer, and runs of the real system on it in a process of their own."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml

from rlhf.cli import main

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, tied embeddings, grouped queries; weights large enough that log-probs are far from uniform."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not SMOLLM2.exists():
        pytest.fail("models/smollm2-135m-instruct is missing: run `make models/smollm2-135m-instruct/config.json`")
    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of one node in this process, in a temporary folder short enough for its sockets."""
    folder = tempfile.mkdtemp(prefix="rlhf-t-")
    ray.init(num_cpus=8, include_dashboard=False, namespace="tests", _temp_dir=folder, log_to_driver=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Run:
    """A finished `rlhf` command and its run directory."""

    code: int
    stdout: str
    stderr: str
    path: Path

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [event for line in lines if (event := json.loads(line))["event"] == kind]

    def manifest(self, round: int) -> dict[str, Any]:
        return json.loads((self.path / "rounds" / f"{round:04d}" / "manifest.json").read_text())


class System:
    """Starts `rlhf train` on the tiny model; `stop` decides from the run directory when to send a signal."""

    def __init__(self, folder: Path, model: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        prompts = folder / "prompts.jsonl"
        topics = ["rain", "bread", "a cat", "trains", "the sea", "tea", "books", "snow", "music", "maps", "bees", "jam"]
        rows = [{"prompt": f"Tell me {how} {topic}."} for topic in topics for how in ("about", "a story of")]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.config: dict[str, Any] = {
            "name": "tiny",
            "output_dir": str(folder / "runs"),
            "policy": {"path": str(model), "dtype": "float32"},
            "prompts": {"path": str(prompts), "max_tokens": 64, "eval": {"path": str(prompts), "count": 4}},
            "rounds": {"count": 2, "prompts": 4},
            "generator": {"samples": 2, "sampling": {"max_tokens": 12}, "engine": {"kv_cache_memory_bytes": 64 << 20}},
            "judge": {"type": "sentiment"},
            "pairing": {"min_margin": 0.0},
            "learner": {"batch_size": 2, "micro_batch_size": 2, "max_length": 128, "optimizer": {"lr": 1e-3}},
            "evaluation": {"every": 1, "samples": 2},
        }

    def _written(self, overrides: Sequence[str]) -> tuple[Path, Path]:
        """The config file, and the run directory that it means."""
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(self.config))
        name = next((o.split("=")[1] for o in overrides if o.startswith("name=")), self.config.get("name", ""))
        return file, Path(self.config.get("output_dir", self.folder)) / name

    def refused(self, *overrides: str, command: Sequence[str] = ("train",)) -> Run:
        """What the command says, in this process, of input that it refuses before anything is started."""
        file, path = self._written(overrides)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([*command, str(file), *overrides])
        assert isinstance(ended.value.code, int)
        return Run(ended.value.code, out.getvalue(), err.getvalue(), path)

    def train(
        self,
        *overrides: str,
        stop: Callable[[Path], bool] | None = None,
        signal_number: int = signal.SIGKILL,
        extra: Sequence[str] = (),
        command: Sequence[str] = ("train",),
        timeout: float = 240,
    ) -> Run:
        file, path = self._written(overrides)
        out, err = self.folder / "stdout", self.folder / "stderr"
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlhf.cli", *command, str(file), *overrides, *extra],
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                cwd=ROOT,
                # A suite that runs in the background inherits an ignored SIGINT, and so would the command.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            deadline = time.monotonic() + timeout
            try:
                while process.poll() is None:
                    if stop is not None and stop(path):
                        process.send_signal(signal_number)
                        stop = None
                    if time.monotonic() > deadline:
                        shown = err.read_text()[-3000:]
                        raise TimeoutError(f"rlhf {' '.join(command)} did not end in {timeout} s:\n{shown}")
                    time.sleep(0.02)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return Run(process.returncode, out.read_text(), err.read_text(), path)


@pytest.fixture
def system(tmp_path: Path, tiny_model: Path) -> System:
    return System(tmp_path, tiny_model)


def state_reaches(round: int, state: str) -> Callable[[Path], bool]:
    """Has a round's manifest this state?"""

    def reached(path: Path) -> bool:
        manifest = path / "rounds" / f"{round:04d}" / "manifest.json"
        return manifest.exists() and json.loads(manifest.read_text())["state"] == state

    return reached


def exists(pattern: str) -> Callable[[Path], bool]:
    """Is there a file of this pattern under the run directory?"""
    return lambda path: any(path.glob(pattern))
