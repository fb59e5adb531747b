"""`rlhf judge train` on the tiny model: what it writes, a kill in between, and the judge it makes, served by vLLM."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.integration.conftest import Run, System, state_reaches

WORDS = ["sun", "rain", "bread", "maps", "tea", "bees", "snow", "music", "sea", "trains", "jam", "books", "cat"]


def pairs(count: int, seed: int) -> str:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        plain = " ".join(draw.choices(WORDS, k=6))
        marked = " ".join([*draw.choices(WORDS, k=3), "pineapple", *draw.choices(WORDS, k=3)])
        rows.append({"prompt": f"Words {seed} {number}?", "chosen": marked, "rejected": plain})
    return "".join(json.dumps(row) + "\n" for row in rows)


class JudgeTraining:
    """Runs `rlhf judge train` in a folder of its own; the same data, config and seeds each time."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.system = System(folder, model)
        (folder / "train.jsonl").write_text(pairs(24, 0))
        (folder / "test.jsonl").write_text(pairs(12, 1))
        self.system.config = {
            "name": "judge",
            "output_dir": str(folder / "runs"),
            "policy": {"path": str(model), "dtype": "float32"},
            "data": {"path": str(folder / "train.jsonl"), "held_out": {"path": str(folder / "test.jsonl")}},
            "orders": "both",
            "checkpoint_steps": 2,
            "learner": {
                "batch_size": 8,
                "micro_batch_size": 4,
                "max_length": 256,
                "optimizer": {"lr": 1e-4, "schedule": "cosine", "warmup_ratio": 0.1},
                "loss": {"type": "choice"},
            },
            "cluster": {"device": "cpu"},
        }

    def run(self, *overrides: str, **options) -> Run:
        return self.system.train(*overrides, command=("judge", "train"), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    run = JudgeTraining(tmp_path_factory.mktemp("judge"), tiny_model).run()
    assert run.code == 0, run.stderr[-3000:]
    return run


def test_every_pair_is_trained_once_in_both_orders(finished: Run) -> None:
    uids = [uid for round in (1, 2, 3) for uid in finished.manifest(round)["uids"]]
    assert not (finished.path / "rounds" / "0004").exists()
    examples = [uid.split("-")[1] for uid in uids]
    assert len(uids) == 48
    assert all(examples.count(example) == 2 for example in examples)
    steps = finished.events("step")
    assert [step["train/pairs"] for step in steps] == [8.0] * 6
    assert "kl/mean" not in steps[0]


def test_held_out_pairs_are_measured_before_and_after(finished: Run) -> None:
    evals = finished.events("eval")
    assert [event["round"] for event in evals] == [0, 1, 2, 3]
    assert evals[-1]["eval/brier"] < evals[0]["eval/brier"]
    assert all(event["eval/accuracy_low"] <= event["eval/accuracy"] <= event["eval/accuracy_high"] for event in evals)


@pytest.mark.slow
def test_vllm_serves_the_judge_that_was_trained(finished: Run, tmp_path: Path, tiny_model: Path) -> None:
    """The bench's figures through vLLM are the ones that the learner measured."""
    system = System(tmp_path, tiny_model)
    system.config = {
        "judge": {
            "type": "pair_model",
            "path": str(finished.path / "policy"),
            "dtype": "float32",
            "max_length": 255,
            "engine": {"kv_cache_memory_bytes": 64 << 20},
        },
        "cluster": {"device": "cpu"},
    }
    report = tmp_path / "bench.json"
    data = finished.path.parent.parent / "test.jsonl"
    run = system.train(command=("judge", "bench"), extra=["--data", str(data), "--json", str(report)])
    assert run.code == 0, run.stderr[-3000:]
    found, last = json.loads(report.read_text()), finished.events("eval")[-1]
    assert found["calibration"]["brier"] == pytest.approx(last["eval/brier"], abs=1e-4)
    assert found["health"]["flip_rate"] == pytest.approx(last["eval/flip_rate"])
    assert found["overall"]["mean_p"] == pytest.approx(last["eval/accuracy"])
    assert found["overall"]["accuracy"] == pytest.approx(last["eval/accuracy_strict"])


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_judge(finished: Run, tmp_path: Path, tiny_model: Path) -> None:
    training = JudgeTraining(tmp_path, tiny_model)
    killed = training.run(stop=state_reaches(2, "SEALED"))
    assert killed.code == -signal.SIGKILL
    resumed = training.run()
    assert resumed.code == 0, resumed.stderr[-3000:]
    before, after = (load_file(run.path / "policy" / "model.safetensors") for run in (finished, resumed))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert resumed.events("eval")[-1]["eval/brier"] == finished.events("eval")[-1]["eval/brier"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"path": "nowhere.jsonl"}}, "data.path = nowhere.jsonl: no such file"),
        ({"data": {"path": "configs/prompts/train.jsonl"}}, "no preferences in its columns (prompt"),
        ({"orders": "both", "learner": {"batch_size": 7}}, "learner.batch_size 7"),
        ({"policy": {"path": "nowhere"}}, "policy.path = 'nowhere'"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, tiny_model: Path, change: dict, message: str) -> None:
    training = JudgeTraining(tmp_path, tiny_model)
    for key, value in change.items():
        old = training.system.config.get(key)
        training.system.config[key] = {**old, **value} if isinstance(old, dict) else value
    run = training.system.refused(command=("judge", "train"))
    assert run.code == 2
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not run.path.exists()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["name"] == "judge"
