"""bench/mfu.py on a CPU: its figures belong together, and what it is given reaches the learner."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "bench" / "mfu.py"


def test_the_figures_of_a_tiny_model() -> None:
    command = [sys.executable, str(SCRIPT), "--size=tiny", "--length=64", "--pairs=2", "--steps=3", "--dtype=float32"]
    done = subprocess.run(
        [*command, "prefix_sharing=false", "loss={type: ipo}"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line, figures = done.stdout.splitlines()[-2:]
    found = json.loads(figures)
    assert "% MFU" in line
    assert 0 < found["mfu"] < 1
    # A prompt of 32 tokens and two responses of 16, the prompt counted once though the rows are padded.
    assert found["tokens_per_s"] / found["pairs_per_s"] == pytest.approx(64)
    # IPO starts at (1 / (2 beta))^2 = 25 where sigmoid starts at log 2; the steps at 3e-5 hardly move it.
    assert found["loss"] == pytest.approx(25, rel=0.1)
    refused = subprocess.run([*command, "prefix_shring=false"], capture_output=True, text=True, timeout=200)
    assert refused.returncode
    assert "prefix_shring" in refused.stderr
