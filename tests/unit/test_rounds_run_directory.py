"""The run directory: one process, one config, and no folder emptied that is not a run's."""

import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config import RunConfig
from rlhf.config.judge import RUNNING
from rlhf.errors import InputError
from rlhf.rounds import run_directory
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.resume import leaves
from rlhf.rounds.run_directory import open_run_directory

HOLDER = """
import sys, time
from rlhf.config import RunConfig
from rlhf.rounds.run_directory import open_run_directory
config = RunConfig(name="r", output_dir=sys.argv[1], policy={"path": "m"}, prompts={"path": "p"})
with open_run_directory(config, fresh=False):
    print("held", flush=True)
    time.sleep(60)
"""


def config(output_dir: Path, **changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "name": "r",
        "output_dir": str(output_dir),
        "policy": {"path": "m"},
        "prompts": {"path": "p"},
    }
    return RunConfig.model_validate(base | changes)


def planned(output_dir: Path, **changes: Any) -> Path:
    """A run directory whose first round is planned: from here on the config is the run's."""
    path = begin(output_dir, **changes)
    Ledger(path).commit(1, RoundState.PLANNED, {"uids": ["u"], "cursor": 0})
    return path


def begin(output_dir: Path, fresh: bool = False, **changes: Any) -> Path:
    with open_run_directory(config(output_dir, **changes), fresh) as path:
        return path


def refused(output_dir: Path, fresh: bool = False, **changes: Any) -> str:
    with pytest.raises(InputError) as error:
        begin(output_dir, fresh, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_new_folder_holds_the_resolved_config_and_the_versions(tmp_path: Path) -> None:
    path = begin(tmp_path / "deep" / "er")
    assert path == tmp_path / "deep" / "er" / "r"
    document = yaml.safe_load((path / "config.yaml").read_text())
    versions = document.pop("versions")
    assert RunConfig.model_validate(document) == config(tmp_path / "deep" / "er")
    assert document["learner"]["optimizer"]["lr"] == 3e-5  # defaults are written out
    assert versions["rlhf"]
    assert versions["numpy"]
    assert "no-such-package" not in versions


def test_the_config_file_loads_as_a_config_again(tmp_path: Path) -> None:
    """What is written down is what ran: every key, read back by YAML, gives the same run."""
    changes: dict[str, Any] = {
        "learner": {"optimizer": {"lr": 1e-7, "eps": 1e-12}},
        "generator": {"engine": {"max_num_seqs": 8}},
    }
    path = planned(tmp_path, **changes)
    document = yaml.safe_load((path / "config.yaml").read_text())
    del document["versions"]
    assert RunConfig.model_validate(document) == config(tmp_path, **changes)
    begin(tmp_path, **changes)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        assert "another process works on this run" in refused(tmp_path)
        before = sorted(os.listdir(tmp_path / "r"))
        assert "another process works on this run" in refused(tmp_path, fresh=True)
        assert sorted(os.listdir(tmp_path / "r")) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    begin(tmp_path)


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_run_directory(config(tmp_path), fresh=False):
        raise RuntimeError
    begin(tmp_path)


@pytest.mark.parametrize(
    ("changes", "key", "old", "new"),
    [
        ({"seed": 5}, "seed", "0", "5"),
        ({"policy": {"path": "other"}}, "policy.path", "'m'", "'other'"),
        ({"rounds": {"prompts": 8}}, "rounds.prompts", "32", "8"),
        ({"generator": {"sampling": {"temperature": 0.5}}}, "generator.sampling.temperature", "1.0", "0.5"),
        ({"generator": {"samples": 5}}, "generator.samples", "4", "5"),
        ({"rounds": {"lookahead": 1}}, "rounds.lookahead", "0", "1"),
        ({"learner": {"optimizer": {"lr": 1e-6}}}, "learner.optimizer.lr", "3e-05", "1e-06"),
        ({"learner": {"batch_size": 8}}, "learner.batch_size", "16", "8"),
        ({"learner": {"reference": {"policy": "ema"}}}, "learner.reference.policy", "'initial'", "'ema'"),
        (
            {"learner": {"deepspeed": {"aio": {"overlap_events": True}}}},
            "learner.deepspeed.aio.overlap_events",
            "None",
            "True",
        ),
        ({"judge": {"type": "sentiment", "scale": 2.0}}, "judge.scale", "4.0", "2.0"),
        ({"pairing": {"strategy": "random"}}, "pairing.strategy", "'best_vs_worst'", "'random'"),
    ],
)
def test_another_config_is_refused_naming_key_and_both_values(
    changes: dict[str, Any], key: str, old: str, new: str, tmp_path: Path
) -> None:
    path = planned(tmp_path)
    before = (path / "config.yaml").read_bytes()
    message = refused(tmp_path, **changes)
    assert f"config.yaml: {key} was {old} when this run began and is {new} now" in message
    assert "--fresh" in message
    assert (path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": {"count": 20}},
        {"evaluation": {"every": 1, "samples": 2}},
        {"monitor": {"wandb": {"mode": "offline"}}},
        {"checkpoint": {"every": 2, "keep": 5}},
        {"cluster": {"deadlines": {"start": 5}}},
        {"sync": {"bucket_mb": 8}},
        {"generator": {"replicas": 3, "cpus": 1}},
        {"generator": {"engine": {"enforce_eager": False}}},
        {"learner": {"world_size": 2, "zero_stage": 3, "micro_batch_size": 1}},
        {"learner": {"offload": {"optimizer": True}, "activation_checkpointing": True}},
        {"judge": {"type": "sentiment", "replicas": 2, "batch_size": 8, "cpus": 1}},
        {"learner": {"cpus": 2}},
        {"eval_judge": {"type": "sentiment", "scale": 9.0}},
    ],
)
def test_free_keys_may_change_and_are_written_down(changes: dict[str, Any], tmp_path: Path) -> None:
    planned(tmp_path)
    told: list[str] = []
    with open_run_directory(config(tmp_path, **changes), fresh=False, tell=told.append) as path:
        document = yaml.safe_load((path / "config.yaml").read_text())
    (entry,) = document.pop("history")
    del document["versions"]
    assert RunConfig.model_validate(document) == config(tmp_path, **changes)
    before, now = (leaves(config(tmp_path, **c).model_dump(mode="json")) for c in ({}, changes))
    expected = {key: [before.get(key), now.get(key)] for key in {*before, *now} if before.get(key) != now.get(key)}
    assert entry["changes"] == expected
    assert (entry["rounds_begun"], entry["versions"]) == (1, {})
    (line,) = told
    assert line.startswith(f"{path / 'config.yaml'}: changed since the last start: ")
    assert "\n" not in line
    for key, (old, new) in expected.items():
        assert f"{key} {old!r} -> {new!r}" in line


def test_the_history_is_kept_and_what_stays_the_same_adds_nothing(tmp_path: Path) -> None:
    path = planned(tmp_path)
    for count in (9, 9, 10):
        begin(tmp_path, rounds={"count": count})
    begin(tmp_path, rounds={"count": 10})
    history = yaml.safe_load((path / "config.yaml").read_text())["history"]
    assert [entry["changes"] for entry in history] == [{"rounds.count": [8, 9]}, {"rounds.count": [9, 10]}]
    assert all(datetime.fromisoformat(entry["time"]).tzinfo for entry in history)
    begin(tmp_path, fresh=True)
    assert "history" not in yaml.safe_load((path / "config.yaml").read_text())


def test_other_packages_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(tmp_path)
    real = run_directory._version
    monkeypatch.setattr(run_directory, "_version", lambda name: "9.9" if name == "numpy" else real(name))
    told: list[str] = []
    with open_run_directory(config(tmp_path), fresh=False, tell=told.append) as path:
        (entry,) = yaml.safe_load((path / "config.yaml").read_text())["history"]
    assert (entry["changes"], entry["versions"]) == ({}, {"numpy": [real("numpy"), "9.9"]})
    assert f"numpy {real('numpy')!r} -> '9.9'" in told[0]


def test_a_run_may_become_shorter_but_not_than_what_has_begun(tmp_path: Path) -> None:
    path = planned(tmp_path)
    for round in (2, 3):
        Ledger(path).commit(round, RoundState.PLANNED, {"uids": ["u"], "cursor": round})
    message = refused(tmp_path, rounds={"count": 2})
    assert (
        "rounds.count was 8 when this run began and is 2 now, but 3 rounds have begun; set it to 3 or more" in message
    )
    begin(tmp_path, rounds={"count": 3})


LLM = {"type": "llm", "base_url": "http://localhost:1/v1", "model": "m", "api_key_env": "OLD", "seed": 1}
MOVED = {
    "base_url": "https://other.example.org/v1",
    "api_key_env": "NEW",
    "concurrency": 3,
    "timeout_s": 5.0,
    "retries": 1,
    "batch_timeout_s": 60.0,
    "max_requests": 900,
    "max_total_tokens": 900,
    "replicas": 2,
    "batch_size": 8,
    "cpus": 2,
    "cache": False,
}


def ensemble(*members: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "ensemble", "members": [{"judge": member} for member in members], **fields}


def test_how_a_judge_is_reached_may_change(tmp_path: Path) -> None:
    assert set(MOVED) | {"health"} == RUNNING | {"base_url"}
    planned(tmp_path / "one", judge=LLM)
    begin(tmp_path / "one", judge=LLM | MOVED | {"health": {"min_valid": 0.5}})
    planned(tmp_path / "two", judge=ensemble({"type": "sentiment"}, LLM))
    begin(
        tmp_path / "two",
        judge=ensemble({"type": "sentiment", "replicas": 2}, LLM | MOVED, health={"max_flip_rate": 0.9}),
    )


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        (LLM, LLM | {"model": "n"}, "judge.model was 'm'"),
        (LLM, LLM | {"seed": 2}, "judge.seed was 1"),
        (
            ensemble({"type": "sentiment"}, LLM),
            ensemble({"type": "sentiment", "scale": 2.0}, LLM),
            "judge.members.0.judge.scale was 4.0",
        ),
        (
            ensemble({"type": "sentiment"}, LLM),
            ensemble({"type": "sentiment"}, LLM, {"type": "sentiment"}),
            "judge.members.2.judge.type was None",
        ),
        (ensemble({"type": "sentiment"}, LLM), ensemble({"type": "sentiment"}, LLM, quorum=0.5), "judge.quorum was 1"),
    ],
)
def test_what_a_judge_answers_may_not(before: dict[str, Any], after: dict[str, Any], key: str, tmp_path: Path) -> None:
    planned(tmp_path, judge=before)
    assert f"config.yaml: {key}" in refused(tmp_path, judge=after)


def test_a_moved_run_goes_on(tmp_path: Path) -> None:
    planned(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    begin(tmp_path / "two")


@pytest.mark.parametrize(
    "optimizer", [{"schedule": "cosine"}, {"schedule": "linear"}, {"schedule": "constant", "warmup_ratio": 0.1}]
)
def test_the_number_of_rounds_may_not_move_under_a_schedule_that_depends_on_it(
    optimizer: dict[str, Any], tmp_path: Path
) -> None:
    """The learning rate is a function of the fraction of rounds: done rounds would have had another one."""
    path = planned(tmp_path, learner={"optimizer": optimizer}, rounds={"count": 4})
    before = (path / "config.yaml").read_bytes()
    message = refused(tmp_path, learner={"optimizer": optimizer}, rounds={"count": 6})
    assert "rounds.count was 4 when this run began and is 6 now" in message
    assert (path / "config.yaml").read_bytes() == before
    begin(tmp_path, learner={"optimizer": optimizer}, rounds={"count": 4})


def test_a_foreign_folder_is_neither_used_nor_emptied(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").write_text("years of work")
    assert "no run directory" in refused(tmp_path)
    assert "will not empty" in refused(tmp_path, fresh=True)
    assert (tmp_path / "r" / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "r" / "config.yaml").exists()


def test_fresh_empties_a_run_folder_and_follows_no_link(tmp_path: Path) -> None:
    path = begin(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (path / "rounds" / "0001").mkdir(parents=True)
    (path / "rounds" / "0001" / "manifest.json").write_text("{}")
    (path / "metrics.jsonl").write_text("{}")
    (path / "link").symlink_to(outside)
    begin(tmp_path, fresh=True, seed=7)
    assert sorted(os.listdir(path)) == [".lock", "config.yaml"]
    assert yaml.safe_load((path / "config.yaml").read_text())["seed"] == 7
    assert (outside / "file").read_text() == "mine"


def test_fresh_killed_half_way_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = begin(tmp_path)
    (path / "a-metrics.jsonl").write_text("")
    (path / "z-rounds").mkdir()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path, fresh=True)
    assert (path / "config.yaml").exists()
    begin(tmp_path, fresh=True)
    assert sorted(os.listdir(path)) == [".lock", "config.yaml"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_kill_while_the_first_config_is_written_blocks_nothing(fresh: bool, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".lock").touch()
    (tmp_path / "r" / "config.yaml.tmp").write_text("name: r\nse")
    path = begin(tmp_path, fresh=fresh)
    assert yaml.safe_load((path / "config.yaml").read_text())["name"] == "r"


def test_until_something_depends_on_it_the_config_may_change(tmp_path: Path) -> None:
    """The first try of a config often ends with a mistake in it; nothing of the run exists yet."""
    begin(tmp_path)
    path = begin(tmp_path, seed=5, policy={"path": "other"})
    assert yaml.safe_load((path / "config.yaml").read_text())["policy"]["path"] == "other"


def test_the_round_0_evaluation_depends_on_the_config_too(tmp_path: Path) -> None:
    """It is made before round 1 is planned, and another policy must not be measured against it."""
    path = begin(tmp_path)
    (path / "evaluation").mkdir()
    (path / "evaluation" / "round-0000.json").write_text("{}")
    assert "policy.path was 'm'" in refused(tmp_path, policy={"path": "other"})


def test_a_foreign_config_is_not_overwritten(tmp_path: Path) -> None:
    """Plenty of programs keep a config.yaml."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("port: 80\n")
    assert "config.yaml" in refused(tmp_path)
    assert (tmp_path / "r" / "config.yaml").read_text() == "port: 80\n"


def test_a_type_that_changed_is_named_before_the_fields_it_brings(tmp_path: Path) -> None:
    planned(tmp_path)
    assert "judge.type was 'sentiment'" in refused(tmp_path, judge={"type": "pair_model", "max_length": 512})


def test_a_planned_run_without_its_config_is_one_line(tmp_path: Path) -> None:
    path = planned(tmp_path)
    (path / "config.yaml").unlink()
    assert "config.yaml" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "name: [", "name: r\nversions: {}\n", "\x00"])
def test_a_damaged_config_is_one_line_and_fresh_gets_over_it(content: str, tmp_path: Path) -> None:
    path = planned(tmp_path)
    (path / "config.yaml").write_text(content)
    assert "config.yaml" in refused(tmp_path)
    begin(tmp_path, fresh=True)


def test_an_output_dir_or_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("")
    assert refused(tmp_path / "r").startswith(f"output_dir = '{tmp_path / 'r'}': cannot write")
    assert "cannot write" in refused(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_an_output_dir_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in refused(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_file_system(tmp_path: Path) -> None:
    """/proc refuses new folders, also to root."""
    assert "output_dir = '/proc/self'" in refused(Path("/proc/self"))
