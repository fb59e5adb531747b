"""Runs that are killed or stopped, and what the same command makes of them."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import System, exists, state_reaches

ENDS = (
    (state_reaches(1, "SEALED"), signal.SIGINT, 130),
    (exists("checkpoints/round-0001.tmp/*"), signal.SIGKILL, -signal.SIGKILL),
    (state_reaches(2, "SEALED"), signal.SIGTERM, 143),
    (exists("policy.tmp"), signal.SIGKILL, -signal.SIGKILL),
)
"""Each is a moment in the life of the run, how it is ended then, and its exit code; the next one goes on from there."""


@pytest.mark.slow
def test_stopped_and_killed_again_and_again_every_round_is_done_once(tmp_path: Path, tiny_model: Path):
    # With both second streams: what they bring has to come back as well.
    anchor = tmp_path / "anchor.jsonl"
    rows = [{"prompt": f"Name {n} birds.", "chosen": "Wren, rook.", "rejected": "No."} for n in range(5)]
    anchor.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("evaluation.every=0", "buffer.share=0.5", f"anchor.path={anchor}", "anchor.share=0.75")
    undisturbed = System(tmp_path / "undisturbed", tiny_model).train(*options)
    assert undisturbed.code == 0, undisturbed.stderr[-3000:]
    system = System(tmp_path / "killed", tiny_model)
    for number, (moment, end, code) in enumerate(ENDS):
        ended = system.train(*options, stop=moment, signal_number=end)
        assert ended.code == code, f"end {number} never came: {ended.stderr[-3000:]}"
        if end != signal.SIGKILL:
            assert "Traceback" not in ended.stderr
        if end == signal.SIGTERM:
            saved = ended.path / "checkpoints" / "round-0001" / "manifest.json"
            assert json.loads(saved.read_text())["round"] == 1
    resumed = system.train(*options)
    assert resumed.code == 0, resumed.stderr[-3000:]
    for round in (1, 2):
        assert resumed.manifest(round)["state"] == "PUBLISHED"
        # Same seeds, same weights: the very same pairs, whoever sampled them.
        assert resumed.manifest(round)["uids"] == undisturbed.manifest(round)["uids"]
        assert resumed.manifest(round)["pairs"]["sha256"] == undisturbed.manifest(round)["pairs"]["sha256"]
    assert [event["round"] for event in resumed.events("round")] == [1, 2]
    steps = [event["step"] for event in resumed.events("step")]
    assert steps == [event["step"] for event in undisturbed.events("step")], "a step is missing or logged twice"
    one, two = (resumed.manifest(round)["pairs"]["count"] for round in (1, 2))
    assert min(one, two) >= 2
    shares = {"replay": (0, (one + two) // 2 - one // 2), "anchor": (3 * one // 4, 3 * (one + two) // 4 - 3 * one // 4)}
    for name, expected in shares.items():
        for round, pairs in zip((1, 2), expected, strict=True):
            taken = [event.get(f"{name}/pairs", 0) for event in resumed.events("step") if event["round"] == round]
            assert sum(taken) == pairs, name
    expected = load_file(undisturbed.path / "policy" / "model.safetensors")
    found = load_file(resumed.path / "policy" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected), "not the weights of an undisturbed run"
