"""`rlhf train` on a preference set with the tiny model: offline DPO, supervised fine-tuning, a kill in between."""

import contextlib
import json
import math
import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.conftest import Run, System, exists, state_reaches

WORDS = ["sun", "rain", "bread", "maps", "tea", "bees", "snow", "music", "sea", "trains", "jam", "books", "cat"]


def rows(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [
        {
            "prompt": f"Say {seed} {number}",
            "chosen": " ".join(draw.choices(WORDS, k=draw.randrange(2, 9))),
            "rejected": " ".join(draw.choices(WORDS, k=draw.randrange(2, 9))),
        }
        for number in range(count)
    ]


class Offline:
    """Runs `rlhf train` on the same pairs in a folder of its own."""

    def __init__(self, folder: Path, model: Path, **changes) -> None:
        self.system = System(folder, model)
        for name, count, seed in (("train", 21, 0), ("test", 5, 1)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)))
        self.system.config = {
            "name": "offline",
            "output_dir": str(folder / "runs"),
            "policy": {"path": str(model), "dtype": "float32"},
            "preferences": {"path": str(folder / "train.jsonl"), "held_out": {"path": str(folder / "test.jsonl")}},
            "epochs": 2,
            "checkpoint_steps": 2,
            "learner": {"batch_size": 8, "micro_batch_size": 4, "max_length": 128, "optimizer": {"lr": 1e-3}},
            "cluster": {"device": "cpu"},
        } | changes

    def run(self, *overrides: str, **options) -> Run:
        return self.system.train(*overrides, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    run = Offline(tmp_path_factory.mktemp("offline"), tiny_model).run()
    assert run.code == 0, run.stderr[-3000:]
    return run


def test_every_pair_is_trained_once_an_epoch(finished: Run) -> None:
    uids = [uid.split("-")[1] for round in (1, 2, 3) for uid in finished.manifest(round)["uids"]]
    assert not (finished.path / "rounds" / "0004").exists()
    assert len(uids) == 42
    assert all(uids.count(uid) == 2 for uid in uids)
    assert [step["train/pairs"] for step in finished.events("step")] == [8, 8, 8, 8, 8, 2]


def test_the_card_s_figures_start_at_the_reference(finished: Run) -> None:
    evals = finished.events("eval")
    assert [event["round"] for event in evals] == [0, 1, 2, 3]
    first, last = evals[0], evals[-1]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["eval/pairs"] == 5
    assert abs(last["eval/rewards/margins"]) > 0.01
    assert last["eval/rewards/chosen"] - last["eval/rewards/rejected"] == pytest.approx(last["eval/rewards/margins"])
    for shown in ("margin", "accuracy", "reward, chosen"):
        assert shown in finished.stdout


def test_a_killed_training_ends_with_the_same_weights(finished: Run, tmp_path: Path, tiny_model: Path) -> None:
    offline = Offline(tmp_path, tiny_model)
    killed = offline.run(stop=state_reaches(2, "SEALED"))
    assert killed.code == -signal.SIGKILL
    resumed = offline.run()
    assert resumed.code == 0, resumed.stderr[-3000:]
    before, after = (load_file(run.path / "policy" / "model.safetensors") for run in (finished, resumed))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_full_disk_ends_it_with_one_line_and_it_goes_on_with_room(
    finished: Run, tmp_path: Path, tiny_model: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        offline = Offline(tmp_path, tiny_model, output_dir=str(disk))
        saving = exists("checkpoints/round-0002.tmp/*")
        ballast = disk / "ballast"

        def fill(path: Path) -> bool:
            if saving(path) and not ballast.exists():
                with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(1 << 16))
            return False

        failed = offline.run(stop=fill)
        assert failed.code == 1, failed.stderr[-3000:]
        assert "Traceback" not in failed.stderr
        line = failed.stderr.strip().splitlines()[-1]
        assert line.startswith("rlhf: ")
        assert "cannot be written" in line
        assert str(disk) in line
        again = offline.run("checkpoint.keep=1")
        assert again.code == 2, again.stderr[-3000:]
        assert "No space left on device" in again.stderr
        ballast.unlink()
        done = offline.run("learner.world_size=2", "learner.zero_stage=3", "learner.micro_batch_size=2")
        assert done.code == 0, done.stderr[-3000:]
        assert "learner.world_size 1 -> 2" in " ".join(done.stdout.split())
        assert [step["step"] for step in done.events("step")] == [step["step"] for step in finished.events("step")]
        before, after = (load_file(run.path / "policy" / "model.safetensors") for run in (finished, done))
        start = load_file(tiny_model / "model.safetensors")
        off = sum((after[name] - before[name]).square().sum() for name in before)
        assert off <= 1e-8 * sum((before[name] - start[name]).square().sum() for name in before)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_fine_tuning_is_the_likelihood_of_the_chosen_responses(tmp_path: Path, tiny_model: Path) -> None:
    offline = Offline(tmp_path, tiny_model, epochs=1)
    offline.system.config["learner"]["loss"] = {"type": "sft"}
    run = offline.run()
    assert run.code == 0, run.stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    @torch.no_grad()
    def plain(path: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        total, tokens = 0.0, 0
        for row in rows(5, 1):
            messages = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            start = tokenizer(prompt, add_special_tokens=False).input_ids
            answer = [*tokenizer(row["chosen"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            logprobs = model(torch.tensor([[*start, *answer]])).logits[0, len(start) - 1 : -1].double().log_softmax(-1)
            total -= logprobs.gather(1, torch.tensor(answer).unsqueeze(1)).sum().item()
            tokens += len(answer)
        return total / tokens

    evals = run.events("eval")
    assert evals[0]["eval/loss"] == pytest.approx(plain(tiny_model), rel=1e-5)
    assert evals[-1]["eval/loss"] == pytest.approx(plain(run.path / "policy"), rel=1e-5)
    assert evals[-1]["eval/loss"] < evals[0]["eval/loss"]
    assert "eval/kl/mean" not in evals[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {"path": "x"}}, "preferences and prompts are both given"),
        ({"preferences": {"path": "nowhere.jsonl"}}, "preferences.path = nowhere.jsonl: no such file"),
        ({"learner": {"epochs": 2}}, "learner.epochs 2"),
        ({"preferences": {"held_out": None, "held_out_count": 50}}, "none is left to train on"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, tiny_model: Path, change: dict, message: str) -> None:
    offline = Offline(tmp_path, tiny_model)
    for key, value in change.items():
        old = offline.system.config.get(key)
        offline.system.config[key] = {**old, **value} if isinstance(old, dict) else value
    run = offline.system.refused()
    assert run.code == 2
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not run.path.exists()
