"""Rows of judge training: what each asks, which answer is right, and that segments cover the data once an epoch."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf.config import JudgeTraining
from rlhf.data.preferences import PreferenceExample
from rlhf.data.training_sets import without_conversations
from rlhf.errors import RLHFError
from rlhf.evaluation.judge_accuracy import accuracy_metrics
from rlhf.judging.pair_prompt import PairPrompt
from rlhf.judging.training import JudgeRows, comparison, encode_examples
from rlhf.judging.verdicts import make_verdict
from rlhf.records import Message
from rlhf.rounds.segments import Segments

SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"


def example(number: int, chosen: str = "", rejected: str = "") -> PreferenceExample:
    messages = (Message(role="user", content=f"question {number}"),)
    return PreferenceExample(
        f"{number:016x}", messages, chosen or f"good {number}", rejected or f"bad {number}", None, number
    )


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="module")
def prompt(tokenizer) -> PairPrompt:
    return PairPrompt(tokenizer, 256)


def rows(prompt, count=5, **changes) -> JudgeRows:
    options = {"epochs": 1, "per_segment": 2, "seed": 0} | changes
    both = options.pop("both_orders", True)
    return JudgeRows([example(i) for i in range(count)], prompt, Segments(count, **options), both_orders=both)


def test_a_row_is_the_judge_s_prompt_and_the_right_letter(prompt, tokenizer):
    a, b = prompt.answer_ids
    made = {row.uid[9:]: row for row in rows(prompt, 1).segment(1)[0]}
    first, second = made[f"{0:016x}-a"], made[f"{0:016x}-b"]
    assert tokenizer.decode(first.prompt_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n[CONTEXT] \n\n<turn> user\n question 0\n [RESPONSE A] good 0 [RESPONSE B] bad 0 \n"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (first.chosen_ids, first.rejected_ids) == ((a,), (b,))
    assert "[RESPONSE A] bad 0 [RESPONSE B] good 0" in tokenizer.decode(second.prompt_ids)
    assert (second.chosen_ids, second.rejected_ids) == ((b,), (a,))


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(1, 9),
    epochs=st.integers(1, 3),
    per_segment=st.integers(1, 7),
    both=st.booleans(),
    seed=st.integers(0, 5),
)
def test_segments_hold_every_example_once_an_epoch(prompt, count, epochs, per_segment, both, seed):
    def segments():
        made = rows(prompt, count, epochs=epochs, per_segment=per_segment, both_orders=both, seed=seed)
        number = Segments(count, epochs, per_segment, seed).count
        return [made.segment(round)[0] for round in range(1, number + 1)]

    found = segments()
    flat = [row for segment in found for row in segment]
    per_example = Counter(row.uid.split("-")[1] for row in flat)
    width = 2 if both else 1
    assert set(per_example.values()) == {epochs * width}
    assert len(per_example) == count
    assert all(found)
    assert [len(segment) for segment in found[:-1]] == [per_segment * width] * (len(found) - 1)
    assert [row.uid for row in flat] == sorted(row.uid for row in flat), "a sealed file is sorted by uid"
    assert segments() == found


def test_sides_are_random_and_differ_between_epochs(prompt):
    made = rows(prompt, 200, both_orders=False, epochs=2, per_segment=200)
    sides = [{row.uid[9:25]: row.uid[-1] for row in made.segment(round)[0]} for round in (1, 2)]
    share = sum(side == "a" for side in sides[0].values()) / 200
    assert 0.35 < share < 0.65
    assert 50 < sum(sides[0][uid] != sides[1][uid] for uid in sides[0]) < 150
    assert [row.uid[9:25] for row in made.segment(1)[0]] != [row.uid[9:25] for row in made.segment(2)[0]]


def test_a_long_context_is_cut_and_long_responses_are_left_out(tokenizer):
    short = PairPrompt(tokenizer, 90)
    long_context = PreferenceExample("c" * 16, (Message(role="user", content="word " * 200),), "yes", "no", None, 0)
    [orders] = encode_examples([long_context], short)
    assert orders is not None
    assert max(map(len, orders)) <= 90
    assert "[RESPONSE A] yes [RESPONSE B] no" in tokenizer.decode(orders[0])
    examples = [long_context, example(1, chosen="word " * 200)]
    made = JudgeRows(examples, short, Segments(2, epochs=1, per_segment=2, seed=0), both_orders=True)
    rows, unusable = made.segment(1)
    assert ([row.uid[9:25] for row in rows], unusable) == (["c" * 16] * 2, 1)


def test_forged_control_tokens_are_left_out(prompt):
    fine, forged = example(0), example(1, chosen="fine<|im_end|>")
    first, second = encode_examples([fine, forged], prompt)
    assert second is None
    assert [first] == encode_examples([fine], prompt)


def test_accuracy_by_hand():
    verdicts = [
        make_verdict(comparison(example(i)), p_ab, p_ba)
        for i, (p_ab, p_ba) in enumerate([(0.9, 0.7), (0.9, 0.4), (0.2, 0.6), (0.1, 0.3), (0.5, 0.5)])
    ]
    metrics = accuracy_metrics(verdicts)
    # Averages 0.8, 0.65, 0.4, 0.2, 0.5: right, right, wrong, wrong, half; the second and third contradict themselves.
    assert metrics["eval/accuracy"] == pytest.approx((1 + 1 + 0 + 0 + 0.5) / 5)
    assert metrics["eval/accuracy_strict"] == pytest.approx((1 + 0.5 + 0.5 + 0 + 0.5) / 5)
    assert metrics["eval/flip_rate"] == pytest.approx(0.4)
    assert metrics["eval/brier"] == pytest.approx((0.04 + 0.1225 + 0.36 + 0.64 + 0.25) / 5)
    assert metrics["eval/accuracy_low"] < metrics["eval/accuracy"] < metrics["eval/accuracy_high"]


def test_a_diverged_judge_is_said_to_be_one():
    broken = make_verdict(comparison(example(0)), float("nan"), 0.5)
    with pytest.raises(RLHFError, match="the training has diverged"):
        accuracy_metrics([broken])
    metrics = accuracy_metrics([broken, make_verdict(comparison(example(1)), 0.8, 0.8)])
    assert (metrics["eval/accuracy"], metrics["eval/invalid_rate"]) == (1.0, 0.5)


def test_held_out_conversations_are_not_trained_on():
    again = PreferenceExample("f" * 16, example(1).messages, "another", "response", None, 9)
    assert without_conversations([example(0), example(1), example(2), again], [example(1)]) == (example(0), example(2))


@pytest.mark.parametrize(
    ("examples", "per_step", "warmup", "wanted"),
    [(1600, 8, 40, 0.2), (400, 8, 40, 0.8), (880, 8, 40, 40 / 110), (80, 8, 5, 0.5), (80, 8, 50, 0.999)],
    ids=["four full segments", "one", "two and a fifth", "a fifth of one", "longer than the training"],
)
def test_warm_up_steps_are_a_share_of_all_steps(examples, per_step, warmup, wanted):
    config = JudgeTraining.model_validate(
        {"name": "j", "policy": {"path": "p"}, "data": {"path": "d"}, "warmup_steps": warmup, "checkpoint_steps": 50}
    )
    segments = Segments(examples, config.epochs, config.checkpoint_steps * per_step, 0)
    assert config.warmed_up(segments.length).optimizer.warmup_ratio == pytest.approx(wanted)
    assert config.learner.optimizer.warmup_ratio == pytest.approx(0.03)
