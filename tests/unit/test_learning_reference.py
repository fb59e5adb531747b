"""Which references and adapters go with which losses, and what holds a copy of the starting policy."""

import pytest
from pydantic import ValidationError

from rlhf.config.learner import Learner
from rlhf.learning.losses import REFERENCE_FREE
from rlhf.learning.reference import needs_copy


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reference": {"policy": "none"}}, ["reference.policy = none", "sigmoid", "initial"]),
        ({"reference": {"policy": "initial", "ema_decay": 0.9}}, ["ema_decay = 0.9", "initial"]),
        ({"reference": {"policy": "ema", "ema_decay": 1.0}}, ["ema_decay"]),
        ({"reference": {"policy": "round_start", "offload": True}}, ["offload", "round_start"]),
        ({"reference": {"offload": True}, "loss": {"type": "simpo"}}, ["offload", "simpo"]),
        ({"reference": {"offload": True}, "lora": {}}, ["offload", "adapters"]),
        ({"lora": {"rank": 0}}, ["lora.rank"]),
        ({"lora": {"bias": "all"}}, ["lora.bias"]),
        ({"lora": {}, "trainable": {"include": ["*.mlp.*"]}}, ["learner.trainable", "learner.lora"]),
        ({"lora": {}, "warp": {}}, ["warp", "reserved"]),
        *(
            ({"reference": {"policy": policy}, "loss": {"type": name}}, [f"reference.policy = {policy}", name])
            for policy in ("round_start", "ema")
            for name in sorted(REFERENCE_FREE - {"choice"})
        ),
    ],
)
def test_what_makes_no_sense_is_refused(settings, words):
    with pytest.raises(ValidationError) as error:
        Learner.model_validate(settings)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("settings", "copied"),
    [
        ({}, True),
        ({"reference": {"policy": "initial", "offload": True}}, True),
        ({"lora": {}}, False),
        ({"reference": {"policy": "round_start"}}, False),
        ({"reference": {"policy": "ema", "ema_decay": 0.5, "offload": True}, "lora": {}}, False),
        ({"loss": {"type": "orpo"}}, False),
        ({"reference": {"policy": "none"}, "loss": {"type": "sft"}}, False),
        ({"loss": {"type": "mix", "terms": [{"type": "sigmoid"}, {"type": "sft"}]}}, True),
    ],
)
def test_only_a_starting_policy_without_adapters_is_copied(settings, copied):
    assert needs_copy(Learner.model_validate(settings)) is copied
