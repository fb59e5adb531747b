"""Raw overrides of the DeepSpeed config: what is taken, and the one line for what is not."""

import importlib.util
import re
from pathlib import Path

import pytest

from rlhf.config.deepspeed import OWNED, TAKEN
from rlhf.config.learner import Learner
from rlhf.config.load import validate
from rlhf.errors import InputError
from rlhf.learning.engine import deepspeed_config, naming_overrides


def refusal(deepspeed, **learner):
    with pytest.raises(InputError) as caught:
        validate({"deepspeed": deepspeed, **learner}, "run.yaml", Learner)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("run.yaml: ")
    return text


@pytest.mark.parametrize(
    ("deepspeed", "words"),
    [
        ({"bf16": {"enabled": True}}, "learner.deepspeed.bf16: it cannot be set here; policy.dtype decides"),
        ({"fp16": {"enabled": True}}, "learner.deepspeed.fp16: it cannot be set here; policy.dtype decides"),
        ({"optimizer": {"type": "SGD"}}, "learner.deepspeed.optimizer: it cannot be set here; set learner.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "learner.deepspeed.scheduler: it cannot be set here"),
        ({"train_batch_size": 64}, "learner.deepspeed.train_batch_size = 64: it cannot be set here; set learner.batch"),
        ({"gradient_predivide_factor": 2.0}, "learner.deepspeed.gradient_predivide_factor = 2.0: it cannot be set"),
        ({"gradient_clipping": 5}, "learner.optimizer.max_grad_norm"),
        ({"zero_optimisation": {}}, "learner.deepspeed.zero_optimisation: DeepSpeed's config has no such key; did you"),
        ({"nonsense": 1}, "learner.deepspeed.nonsense: DeepSpeed's config has no such key; it may hold aio,"),
        ({"zero_optimization": 3}, "learner.deepspeed.zero_optimization = 3: expected a mapping"),
    ],
)
def test_what_is_not_the_users_to_set_is_refused_in_one_line(deepspeed, words):
    assert words in refusal(deepspeed, zero_stage=0)


def test_every_key_that_the_learner_generates_is_the_learners_or_taken():
    from torch import bfloat16

    generated = deepspeed_config(Learner(zero_stage=3, offload={"optimizer": True, "parameters": True}), bfloat16)
    assert generated.keys() <= OWNED.keys() | TAKEN
    assert not OWNED.keys() & TAKEN


def test_keys_that_are_taken_are_deepspeeds():
    folder = Path(importlib.util.find_spec("deepspeed").origin).parent
    files = [*folder.glob("runtime/*.py"), *folder.glob("runtime/*/*.py"), *folder.glob("*/con*.py")]
    known = set().union(*(re.findall(r"""["']([a-z_]+)["']""", file.read_text()) for file in files))
    assert known >= TAKEN
    validate({"deepspeed": {key: {} for key in TAKEN}}, "run.yaml", Learner)


def test_what_deepspeed_says_of_the_overrides_is_bad_input():
    from deepspeed.runtime.zero.config import get_zero_config

    learner = Learner(deepspeed={"zero_optimization": {"stge": 2}})
    words = r"learner\.deepspeed: DeepSpeed refuses its config: .*stge"
    with pytest.raises(InputError, match=words) as caught, naming_overrides(learner):
        get_zero_config(learner.deepspeed)
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyError), naming_overrides(Learner()):
        raise KeyError("another")
