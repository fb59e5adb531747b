"""Requests of a judge's engine: calls that overlap, or follow a cancelled one, do not meet under one name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.engine.llm import engine_environment

pytestmark = pytest.mark.slow

SCRIPT = """
import asyncio, sys
import numpy as np
from actors.engine.llm import Engine, EngineSpec

async def main():
    arguments = {"kv_cache_memory_bytes": 64 << 20}
    engine = Engine(EngineSpec(sys.argv[1], "float32", 128, 1, "cpu", 0, False, arguments, None))
    prompts, letters = [[1, 5, 9], [1, 7]], (11, 12)
    first, second = await asyncio.gather(*(engine.next_logprobs(prompts, letters) for _ in range(2)))
    stopped = asyncio.create_task(engine.next_logprobs(prompts, letters))
    await asyncio.sleep(0)
    stopped.cancel()
    third = await engine.next_logprobs(prompts, letters)
    assert first.shape == (2, 2) and np.isfinite(first).all() and len(np.unique(first)) == 4, first
    assert np.abs(first - second).max() < 1e-5 and np.abs(first - third).max() < 1e-5
    engine.shutdown()
    print("alike")

if __name__ == "__main__":
    asyncio.run(main())
"""


TAKEN_AS_GIVEN = {"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1"}
"""vLLM appends random characters to names by default, which would hide two that are alike."""


def test_the_same_prompts_at_the_same_time_and_after_a_cancelled_call(tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_model)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **engine_environment("cpu", 1), **TAKEN_AS_GIVEN, "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.splitlines()[-1:] == ["alike"], done.stderr[-3000:]
