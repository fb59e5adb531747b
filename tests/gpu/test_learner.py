"""The learner on a GPU: every attention, compiled layers and offload give the steps that SDPA gives in float32."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.ranks import make_config, make_round, save_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

FLASH = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attention is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "flex": {"attention": "flex"},
    "auto": {},
    "packed": {"attention": "flex", "pack_tokens": 256},
    "compiled": {"attention": "sdpa", "compile": True},
    "offloaded": {"attention": "sdpa", "offload": {"optimizer": True}},
    "offloaded3": {"attention": "sdpa", "zero_stage": 3, "offload": {"optimizer": True, "parameters": True}},
}
HALF = {"prefix_sharing": False, "dtype": "bfloat16"}
"""FlashAttention takes rows of one sequence, in half precision."""


def train(folder: Path, settings: dict) -> dict:
    """Steps and weights of one round, and the attention that was chosen, in a process of its own."""
    out = folder / "result.pt"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, __file__, str(folder), repr(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


def run(folder: Path, settings: dict) -> None:
    """What the process does."""
    import socket

    from rlhf.learning.rank import RankLearner

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    learner = RankLearner(make_config(folder / "model", **settings), 0, 1, DEVICE)
    learner.start("127.0.0.1", port, 60)
    steps = [report.metrics for report in learner.train(make_round(1, 9))]
    weights = {name: tensor.float() for name, tensor in learner.export_tensors()}
    torch.save({"steps": steps, "weights": weights, "notes": learner.notes}, folder / "result.pt")


def compare(found: dict, expected: dict, start: dict, rel: float, of_change: float) -> None:
    """Losses and gradient norms to `rel`, weights to `of_change` of what the round changed."""
    assert len(found["steps"]) == len(expected["steps"]) > 1
    for one, two in zip(found["steps"], expected["steps"], strict=True):
        for key in ("train/loss", "train/grad_norm", "logps/chosen", "logps/rejected"):
            assert one[key] == pytest.approx(two[key], rel=rel, abs=rel), key
    change = sum((expected["weights"][key] - start[key]).square().sum() for key in start) ** 0.5
    off = sum((found["weights"][key] - expected["weights"][key]).square().sum() for key in start) ** 0.5
    assert change > 0
    assert off <= of_change * change


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    save_tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def start(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def sdpa(folder: Path) -> dict:
    return train(folder, {"attention": "sdpa"})


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_those_of_sdpa(folder: Path, start: dict, sdpa: dict, name: str) -> None:
    found = train(folder, CASES[name])
    # A fall-back to SDPA would pass without having tried anything.
    assert not found["notes"]
    compare(found, sdpa, start, rel=2e-4, of_change=2e-2)


@FLASH
def test_flash_attention_equals_sdpa_in_half_precision(folder: Path, start: dict) -> None:
    found, expected = (train(folder, {**HALF, "attention": name}) for name in ("flash", "sdpa"))
    assert not found["notes"]
    compare(found, expected, start, rel=3e-2, of_change=0.5)


if __name__ == "__main__":
    import ast

    run(Path(sys.argv[1]), ast.literal_eval(sys.argv[2]))
