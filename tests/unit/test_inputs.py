"""What the judges' checks say: the key under which the config has the judge, and nothing else renamed."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from rlhf.config.judge import Judge
from rlhf.errors import InputError
from rlhf.inputs import check_judges

SENTIMENT = {"type": "sentiment"}


def complaint(key: str, **fields: Any) -> str:
    judge: Judge = TypeAdapter[Judge](Judge).validate_python(fields)
    with pytest.raises(InputError) as caught:
        check_judges({key: judge})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["pair_model", "safety"])
def test_a_judge_without_a_path_is_named(kind: str) -> None:
    assert complaint("judge", type=kind).startswith("judge.path: required here; ")
    assert complaint("eval_judge", type=kind).startswith("eval_judge.path: required here; ")
    members = [{"judge": SENTIMENT}, {"judge": {"type": kind}}]
    message = complaint("eval_judge", type="ensemble", members=members)
    assert message.startswith("eval_judge.members.1.judge.path: required here; ")


@pytest.mark.parametrize("name", ["judge.v2", "my-judge.v2", "judge.path", "a judge.v2"])
def test_a_value_that_looks_like_a_key_stays(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    here = complaint("judge", type="pair_model", path=path)
    assert here.count(path) == 1
    assert complaint("eval_judge", type="pair_model", path=path) == here.replace("judge.path", "eval_judge.path", 1)


def test_each_key_of_a_message_is_renamed(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.unit.byte_tokenizer import byte_tokenizer

    folder = tmp_path / "judge.guard"
    tiny = LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(tiny).save_pretrained(folder)
    byte_tokenizer(None).save_pretrained(folder)
    message = complaint("eval_judge", type="safety", path=str(folder), max_length=64)
    assert message == f"eval_judge.path = {folder}: the tokenizer has no chat template; set eval_judge.template"
