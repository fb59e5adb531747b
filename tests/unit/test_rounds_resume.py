"""Which keys may change when a run goes on: every key of every config is in one of two tables, which the docs show."""

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from rlhf.config import OfflineConfig, RunConfig
from rlhf.config.judge import RUNNING
from rlhf.config.judging import JudgeTraining
from rlhf.rounds.resume import MAY_CHANGE, MUST_STAY, OF_A_JUDGE, differences, leaves, may_change, table

ROOT = Path(__file__).parents[2]
CONFIGS: list[type[BaseModel]] = [RunConfig, OfflineConfig, JudgeTraining]


def keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of all fields, sections and what is in them."""
    found = set()
    for name, info in model.model_fields.items():
        found.add(prefix + name)
        for option in [info.annotation, *get_args(info.annotation)]:
            if isinstance(option, type) and issubclass(option, BaseModel):
                found |= keys(option, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("model", CONFIGS)
def test_every_section_is_in_a_table(model: type[BaseModel]) -> None:
    for name in model.model_fields:
        assert name in MAY_CHANGE or name in MUST_STAY, f"{name}: say in rlhf/rounds/resume.py if it may change"
        assert not (name in MAY_CHANGE and name in MUST_STAY)


def test_no_table_names_a_key_that_there_is_not() -> None:
    every = set().union(*(keys(model) for model in CONFIGS))
    assert {key for key in MAY_CHANGE if "{" not in key} <= every
    assert set(MUST_STAY) <= every


@pytest.mark.parametrize(
    ("key", "free"),
    [
        ("learner.world_size", True),
        ("learner.offload.optimizer", True),
        ("learner.reference.offload", True),
        ("learner.reference.policy", False),
        ("learner.batch_size", False),
        ("learner.cpus", True),
        ("learner.cpus_more", False),
        ("monitor.wandb.mode", True),
        ("monitoring", False),
        ("rounds.count", True),
        ("rounds.prompts", False),
        ("generator.sampling.temperature", False),
        ("generator.engine.max_num_seqs", True),
        ("judge.type", False),
        ("judge.members.1.weight", False),
        ("cluster.deadlines.token", True),
        ("seed", False),
        ("a key that nobody knows", False),
        *((f"judge.{name}", True) for name in sorted(RUNNING)),
        *((f"judge.members.11.judge.{name}", True) for name in sorted(OF_A_JUDGE)),
    ],
)
def test_keys(key: str, free: bool) -> None:
    assert may_change(key) is free


def test_differences_name_both_values_and_types_come_first() -> None:
    before: dict[str, Any] = {"a": {"x": 1, "gone": 2}, "judge": {"members": [{"p": 1}], "type": "one"}, "same": [1, 2]}
    now: dict[str, Any] = {"a": {"x": 3}, "judge": {"members": [{"p": 1}, {"p": 2}], "type": "two"}, "same": [1, 2]}
    found = differences(before, now)
    assert found == {
        "judge.type": ["one", "two"],
        "a.gone": [2, None],
        "a.x": [1, 3],
        "judge.members.1.p": [None, 2],
    }
    assert next(iter(found)) == "judge.type"
    assert leaves(before)["judge.members.0.p"] == 1


def test_the_docs_show_the_tables() -> None:
    assert table() in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
