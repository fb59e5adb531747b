"""The loss's config: what is accepted, and the one line for each combination that makes no sense."""

import pytest

from rlhf.config.judging import JudgeLearner
from rlhf.config.learner import Learner
from rlhf.config.load import validate
from rlhf.config.loss import LOSS_FACTS
from rlhf.errors import InputError


def loss(**keys):
    return validate({"loss": keys}, "run.yaml", Learner).loss


@pytest.mark.parametrize("name", sorted(LOSS_FACTS))
def test_every_loss_has_a_config(name):
    found = loss(type=name, **({"label_smoothing": 0.1} if name == "robust" else {}))
    assert found.names == (name,)
    assert found.needs_reference == LOSS_FACTS[name].reference
    assert found.parts == (found,)


def test_the_default_is_dpo():
    found = Learner().loss
    assert (found.type, found.beta, found.options()) == ("sigmoid", 0.1, {})
    assert found.needs_reference


def test_options_that_are_set():
    assert loss(type="simpo", gamma=1.4, beta=2.5, rpo_alpha=0.2).options() == {"gamma": 1.4, "rpo_alpha": 0.2}
    assert loss(type="ipo", length_normalised=False).options() == {"length_normalised": False}
    assert loss(type="aot", label_smoothing=0.0, ld_alpha=0.5).options() == {"label_smoothing": 0.0}


def test_a_mix():
    terms = [{"type": "sigmoid", "weight": 0.8, "label_smoothing": 0.1}, {"type": "sft"}]
    found = loss(type="mix", terms=terms, f_divergence="js", use_weighting=True)
    assert found.names == ("sigmoid", "sft")
    assert [part.weight for part in found.parts] == [0.8, 1.0]
    assert found.needs_reference
    assert not loss(type="mix", terms=[{"type": "simpo"}, {"type": "sft"}]).needs_reference


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"type": "dpo"}, "loss.type = 'dpo': expected 'sigmoid',"),
        ({"beta": 0}, "loss.beta = 0: expected greater than 0"),
        ({"type": "hinge", "label_smoothing": 0.1}, "label_smoothing = 0.1 means nothing to type hinge"),
        ({"type": "sigmoid", "label_smoothing": 0.5}, "loss.label_smoothing = 0.5: expected less than 0.5"),
        ({"type": "sigmoid", "label_smoothing": True}, "loss.label_smoothing = 'true'"),
        ({"type": "exo_pair", "label_smoothing": 0}, "label_smoothing = 0.0 with type exo_pair|= 0 with type exo_pair"),
        ({"type": "robust"}, "label_smoothing: type robust without it is sigmoid"),
        ({"type": "sft", "rpo_alpha": 1}, "rpo_alpha = 1.0 means nothing to type sft"),
        ({"type": "sft", "use_weighting": True}, "use_weighting = true with type sft"),
        ({"type": "aot", "use_weighting": True}, "use_weighting = true with type aot"),
        ({"type": "simpo", "tau": 0.1}, "tau = 0.1 means nothing to type simpo"),
        ({"type": "discopop", "tau": 1.5}, "loss.tau = 1.5: expected less than or equal to 1"),
        ({"type": "sigmoid", "gamma": 1}, "gamma = 1.0 means nothing to type sigmoid"),
        ({"type": "hinge", "length_normalised": True}, "length_normalised = True means nothing to type hinge"),
        ({"type": "nca_pair", "reward_shift": True}, "reward_shift = True means nothing to type nca_pair"),
        ({"type": "simpo", "f_divergence": "js"}, "f_divergence = js with type simpo (no reference)"),
        ({"type": "sft", "f_divergence": "js"}, "f_divergence = js with type sft (no reference)"),
        ({"type": "bco_pair", "f_divergence": "js"}, "f_divergence = js with type bco_pair (sees more"),
        ({"f_alpha": 0.3}, "f_alpha = 0.3 with f_divergence reverse_kl"),
        ({"f_divergence": "alpha", "f_alpha": 1}, "f_alpha = 1 is the reverse KL"),
        ({"ld_alpha": 1.5}, "loss.ld_alpha = 1.5: expected less than or equal to 1"),
        ({"type": "cpo", "ld_alpha": 0.5}, "ld_alpha = 0.5 with type cpo"),
        ({"rpo_alpha": 1, "ld_alpha": 0.5}, "ld_alpha = 0.5 with rpo_alpha 1"),
        ({"type": "mix"}, "terms = []: type mix adds up terms"),
        ({"terms": [{"type": "sft"}]}, "terms with type sigmoid: terms belong to type mix"),
        ({"type": "mix", "terms": [{"type": "sft"}], "rpo_alpha": 1}, "rpo_alpha = 1.0 with type mix: set it in the"),
        ({"type": "mix", "terms": [{"type": "sft", "gamma": 1}]}, "terms.0.gamma = 1.0 means nothing to type sft"),
        ({"type": "mix", "terms": [{"type": "mix"}]}, "loss.terms.0.type = 'mix'"),
        ({"type": "mix", "terms": [{"type": "sft", "weight": 0}]}, "loss.terms.0.weight = 0: expected greater than 0"),
        (
            {"type": "mix", "terms": [{"type": "sigmoid"}, {"type": "sft"}], "ld_alpha": 0.5},
            "ld_alpha = 0.5 with type sft",
        ),
        (
            {"type": "mix", "terms": [{"type": "sigmoid"}, {"type": "nca_pair"}], "f_divergence": "js"},
            "f_divergence = js with type nca_pair",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(keys, words):
    with pytest.raises(InputError) as refused:
        loss(**keys)
    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith("run.yaml: ")
    assert any(word in text for word in words.split("|")), text


def test_the_judges_loss_takes_none_of_the_options():
    with pytest.raises(InputError, match=r"rpo_alpha = 1\.0 means nothing to type choice"):
        validate({"loss": {"type": "choice", "rpo_alpha": 1}}, "judge.yaml", JudgeLearner)
    with pytest.raises(InputError, match="expected 'sft' or 'choice'"):
        validate({"loss": {"type": "sigmoid"}}, "judge.yaml", JudgeLearner)
