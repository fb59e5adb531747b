"""Pairing: what is kept, what is dropped, and best against worst by brute force."""

import asyncio
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from rlhf.config.judge import SentimentJudge as SentimentConfig
from rlhf.config.pairing import Pairing
from rlhf.errors import RLHFError
from rlhf.judging.sentiment import SentimentJudge
from rlhf.judging.verdicts import invalid_verdict
from rlhf.packed import token_ids
from rlhf.records import Comparison, Rollout, Verdict, VersionSpan
from rlhf.rounds.pairing import DRAWING, STRATEGIES, Group, make_pairs
from tests.unit.pairing_world import PROMPT, TableJudge, by_strength, group, pairs_of, rollout, table


async def test_best_vs_worst_end_to_end_record() -> None:
    judge = by_strength(m=0.0, best=2.0, worst=-3.0, n=0.5)
    rollouts = [rollout(0, "m"), rollout(1, "best", (4, 2)), rollout(2, "worst", (2, 2)), rollout(3, "n")]
    result = await pairs_of(rollouts, judge)
    [pair] = result.pairs
    assert (pair.uid, pair.round, pair.prompt_ids, pair.prompt) == ("p", 5, (7, 8), "<user>Hi")
    assert (pair.chosen, pair.rejected) == ("best", "worst")
    assert (pair.chosen_ids, pair.rejected_ids) == (token_ids(list(b"best")), token_ids(list(b"worst")))
    assert pair.p_chosen == pytest.approx(1 / (1 + math.exp(-5)))
    assert (pair.chosen_version, pair.rejected_version) == (2, 2)
    assert pair.chosen_logprobs == (), "two versions wrote it"
    assert pair.rejected_logprobs == rollouts[2].logprobs
    # No scores: a cover of all responses, then what the round robin still lacks.
    assert [[(c.index_a, c.index_b) for c in batch] for batch in judge.batches] == [
        [(0, 1), (2, 3)],
        [(0, 2), (0, 3), (1, 2), (1, 3)],
    ]
    assert len(result.verdicts) == 6
    assert result.counts == {"kept": 1, "dropped_tie": 0, "dropped_invalid": 0, "empty_responses": 0, "incomplete": 0}


async def test_round_robin_is_one_batch_of_all_matches() -> None:
    judge = by_strength(m=0.0, best=2.0, worst=-3.0, n=0.5)
    result = await pairs_of(group("m", "best", "worst", "n"), judge, "round_robin")
    assert [(pair.chosen, pair.rejected) for pair in result.pairs] == [("best", "worst")]
    [batch] = judge.batches
    assert [(c.index_a, c.index_b) for c in batch] == list(itertools.combinations(range(4), 2))


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_the_judge_is_given_the_reference_answer(strategy: str) -> None:
    judge = by_strength(x=0.0, y=1.0, z=3.0)
    prompt = replace(PROMPT, reference="42")
    config = Pairing(strategy=strategy)
    await make_pairs([Group(prompt, group("x", "y", "z"), np.random.default_rng(0))], judge, config, 1)
    assert {c.reference for batch in judge.batches for c in batch} == {"42"}


async def test_order_of_arrival_does_not_matter() -> None:
    texts = ["x", "y", "z", "w"]
    judge = by_strength(x=0.0, y=1.0, z=2.0, w=3.0)
    for strategy in STRATEGIES:
        there = await pairs_of(group(*texts), judge, strategy)
        back = await pairs_of(group(*texts)[::-1], judge, strategy)
        assert there == back
        assert there.pairs


@pytest.mark.parametrize("strategy", ["round_robin", "best_vs_worst"])
@settings(deadline=None, max_examples=60)
@given(
    ps=st.lists(st.integers(0, 20), min_size=6, max_size=6),
    holes=st.sets(st.integers(0, 5), max_size=4),
    margin=st.sampled_from([0.0, 0.1, 0.5]),
)
async def test_ranking_equals_brute_force(strategy: str, ps: list[int], holes: set[int], margin: float) -> None:
    texts = "wxyz"
    p = {pair: ps[n] / 20 for n, pair in enumerate(itertools.combinations(texts, 2)) if n not in holes}

    def rule(a: str, b: str) -> tuple[float, float]:
        value = p.get((a, b), math.nan)
        return value, value

    result = await pairs_of(group(*texts), TableJudge(rule), strategy, margin)
    both = p | {(b, a): 1 - value for (a, b), value in p.items()}
    means = {t: np.mean([v for (a, _), v in both.items() if a == t]) for t in texts if any(a == t for a, _ in both)}
    assert result.counts["kept"] == len(result.pairs) <= 1
    assert sum(result.counts[name] for name in ("kept", "dropped_tie", "dropped_invalid")) == 1
    for pair in result.pairs:
        assert means[pair.chosen] == pytest.approx(max(means.values()))
        assert means[pair.rejected] == pytest.approx(min(means.values()))
        assert pair.p_chosen == pytest.approx(both[pair.chosen, pair.rejected])
    leaders = [t for t in means if means[t] > max(means.values()) - 1e-9]
    losers = [t for t in means if means[t] < min(means.values()) + 1e-9]
    if len(leaders) == len(losers) == 1 and leaders != losers:
        direct = both.get((leaders[0], losers[0]))
        expected = "dropped_invalid" if direct is None else "kept"
        if direct is not None and (direct <= 0.5 or 2 * direct - 1 < margin):
            expected = "dropped_tie"
        assert result.counts[expected] == 1


async def test_direct_verdict_against_the_ranking_is_dropped() -> None:
    # x beats y and z widely, and so is first; w loses to y and z and so is last, yet w beats x.
    judge = table(xy=1.0, xz=1.0, xw=0.45, yz=0.5, yw=1.0, zw=1.0)
    result = await pairs_of(group("x", "y", "z", "w"), judge)
    assert result.pairs == ()
    assert result.counts["dropped_tie"] == 1


async def test_tied_direct_verdict_is_dropped() -> None:
    judge = table(xy=1.0, xw=0.5, yw=1.0)
    result = await pairs_of(group("x", "y", "w"), judge, margin=0.0)
    assert (result.pairs, result.counts["dropped_tie"]) == ((), 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_nothing_judged_is_invalid(strategy: str) -> None:
    result = await pairs_of(group("x", "y", "z"), TableJudge(lambda a, b: (math.nan, math.nan)), strategy)
    assert result.pairs == ()
    assert result.counts["dropped_invalid"] == (3 if strategy == "all_pairs" else 1)
    assert result.counts["dropped_tie"] == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_contradictory_orders_are_dropped(strategy: str) -> None:
    result = await pairs_of(group("x", "y"), TableJudge(lambda a, b: (0.99, 0.3)), strategy)
    assert (result.pairs, result.counts["dropped_tie"]) == ((), 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_identical_responses_are_never_compared(strategy: str) -> None:
    judge = by_strength(x=0.0)
    result = await pairs_of(group("x", "x", "x"), judge, strategy)
    assert judge.batches == []
    assert result.pairs == ()
    assert result.counts["dropped_tie"] == (2 if strategy == "all_pairs" else 1)


async def test_same_text_of_other_tokens_is_identical() -> None:
    twin = Rollout("p", 1, token_ids([1, 2]), (-1.0, -1.0), "x", "stop", (VersionSpan(0, 0, 2),))
    judge = by_strength(x=0.0, y=2.0)
    result = await pairs_of([rollout(0, "x"), twin, rollout(2, "y")], judge)
    assert [len(batch) for batch in judge.batches] == [1]
    assert (result.pairs[0].chosen, result.pairs[0].rejected_ids) == ("y", token_ids(list(b"x")))


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_empty_responses_are_counted_and_never_paired(strategy: str) -> None:
    judge = by_strength(x=0.0, y=2.0)
    result = await pairs_of(group("", "x", "", "y"), judge, strategy)
    assert [(pair.chosen, pair.rejected) for pair in result.pairs] == [("y", "x")]
    assert result.counts["empty_responses"] == 2
    assert [(c.index_a, c.index_b) for c in judge.batches[0]] in ([(1, 3)], [(3, 1)])


@pytest.mark.parametrize(
    ("rollouts", "samples"), [(group("x"), None), (group("x", ""), 2), (group("x", "y"), 3), ([], 2)]
)
async def test_group_with_too_few_responses_is_counted(rollouts: list[Rollout], samples: int | None) -> None:
    judge = by_strength(x=0.0, y=2.0)
    result = await pairs_of(rollouts, judge, samples=samples)  # type: ignore[arg-type]
    assert (result.pairs, result.verdicts, judge.batches) == ((), (), [])
    assert result.counts["incomplete"] == 1


async def test_all_pairs_keeps_every_decisive_one() -> None:
    judge = table(xy=0.9, xz=0.52, yz=0.2)
    result = await pairs_of(group("x", "y", "z"), judge, "all_pairs")
    assert [(pair.chosen, pair.rejected, round(pair.p_chosen, 9)) for pair in result.pairs] == [
        ("x", "y", 0.9),
        ("z", "y", 0.8),
    ]
    assert (result.counts["kept"], result.counts["dropped_tie"]) == (2, 1)


async def test_random_draws_each_pair_alike_and_repeats_with_its_seed() -> None:
    judge = by_strength(x=0.0, y=2.0, z=4.0)
    drawn = [(await pairs_of(group("x", "y", "z"), judge, "random", seed=seed)).pairs[0] for seed in range(300)]
    counts = {key: sum({p.chosen, p.rejected} == set(key) for p in drawn) for key in ("xy", "xz", "yz")}
    assert sum(counts.values()) == 300
    assert min(counts.values()) > 70  # 100 each is expected, the standard deviation is 8
    assert (await pairs_of(group("x", "y", "z"), judge, "random", seed=9)).pairs[0] == drawn[9]


SENTIMENT = SentimentJudge(SentimentConfig())
WORDS = st.sampled_from(["", "good", "bad", "great day", "awful", "the table", "love", "hate it"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None)
@given(texts=st.lists(WORDS, max_size=6), margin=st.sampled_from([0.0, 0.1, 0.4, 0.9]), seed=st.integers(0, 99))
async def test_invariants_with_a_real_judge(strategy: str, texts: list[str], margin: float, seed: int) -> None:
    rollouts = group(*texts)
    result = await pairs_of(rollouts, SENTIMENT, strategy, margin, seed)
    counts = result.counts
    scores: dict[str, float | None] = {}
    for verdict in result.verdicts:
        scores[verdict.comparison.a], scores[verdict.comparison.b] = verdict.score_a, verdict.score_b
        assert verdict.comparison.a != verdict.comparison.b
    for pair in result.pairs:
        assert pair.chosen != pair.rejected
        assert pair.chosen_ids != pair.rejected_ids
        assert pair.chosen_ids
        assert pair.rejected_ids
        assert pair.p_chosen >= 0.5 + margin / 2 - 1e-12
        assert pair.p_chosen > 0.5
        chosen, rejected = scores[pair.chosen], scores[pair.rejected]
        assert chosen is not None
        assert rejected is not None
        assert chosen > rejected
    usable = [text for text in texts if text]
    assert counts["kept"] == len(result.pairs)
    assert counts["empty_responses"] == len(texts) - len(usable)
    assert counts["incomplete"] == (len(usable) < 2)
    candidates = counts["kept"] + counts["dropped_tie"] + counts["dropped_invalid"]
    if len(usable) < 2:
        assert candidates == 0
    elif strategy == "all_pairs":
        names = len(set(usable))
        assert candidates == names * (names - 1) // 2 + len(usable) - names
    else:
        assert candidates == 1


async def test_judge_that_returns_nothing_is_an_error() -> None:
    async def nothing(comparisons: Sequence[Comparison]) -> list[Verdict]:
        return []

    judge = by_strength()
    judge.compare = nothing  # type: ignore[method-assign]
    with pytest.raises(RLHFError, match="returned 0 verdicts for 1 comparisons"):
        await pairs_of(group("x", "y"), judge)


async def test_responses_of_another_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="responses of other prompts"):
        await pairs_of([rollout(0, "x"), rollout(1, "y", uid="q")], by_strength(x=0.0, y=1.0))


@pytest.mark.parametrize("strategy", ["best_vs_worst", "round_robin", "knockout"])
def test_unjudgeable_response_does_not_spoil_the_ranking(strategy: str) -> None:
    class Picky(TableJudge):
        async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            verdicts = await super().compare(comparisons)
            return [
                invalid_verdict(v.comparison, "odd") if "odd" in (v.comparison.a, v.comparison.b) else v
                for v in verdicts
            ]

    judge = Picky(by_strength(x=0.0, y=2.0, odd=9.0, z=1.0).rule)
    result = asyncio.run(pairs_of(group("x", "odd", "y", "z"), judge, strategy))
    assert [(pair.chosen, pair.rejected) for pair in result.pairs] == [("y", "x")]


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_strategies_that_draw_are_known(strategy: str) -> None:
    """The others share one generator, so that a draw would depend on the order in which prompts finish."""
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    config = Pairing(strategy=strategy, min_margin=0.1)
    judge = by_strength(a=1, b=2, c=3, d=4)
    await make_pairs([Group(PROMPT, group("a", "b", "c", "d"), rng)], judge, config, 5)
    assert (rng.bit_generator.state != before) == (strategy in DRAWING)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_groups_judged_together_come_out_as_those_judged_alone(strategy: str) -> None:
    """Groups of other sizes, one that ties with itself and one that is incomplete: their calls differ in number."""
    texts = [("a", "b", "c", "d"), ("b", "a", "c"), ("a", "a", "a"), ("c", "d"), ("d",)]
    prompts = [replace(PROMPT, uid=f"p{n}") for n in range(len(texts))]
    rollouts = [[rollout(k, t, uid=f"p{n}") for k, t in enumerate(words)] for n, words in enumerate(texts)]
    config = Pairing(strategy=strategy, min_margin=0.1)

    def groups() -> list[Group]:
        return [Group(p, r, np.random.default_rng(n)) for n, (p, r) in enumerate(zip(prompts, rollouts, strict=True))]

    together, alone = (by_strength(a=1, b=2, c=3, d=4) for _ in range(2))
    found = await make_pairs(groups(), together, config, 5)
    singly = [result for each in groups() for result in await make_pairs([each], alone, config, 5)]
    assert found == singly
    assert [len(result.pairs) > 0 for result in found] == [True, True, False, True, False]
    # As many calls as the group that asks most often.
    calls = [[c.uid for c in batch] for batch in alone.batches]
    assert len(together.batches) == max(sum(f"p{n}" in call for call in calls) for n in range(len(texts)))
