"""Ensembles of judges: means, votes, quorum; members whose verdicts are given by a table."""

import asyncio
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from rlhf.config.judge import EnsembleJudge as EnsembleConfig
from rlhf.config.judge import Judge
from rlhf.config.judge import SentimentJudge as SentimentConfig
from rlhf.config.judge import VerifierJudge as VerifierConfig
from rlhf.config.pairing import Pairing
from rlhf.errors import RLHFError
from rlhf.judging.build import build_judge
from rlhf.judging.ensemble import EnsembleJudge
from rlhf.judging.sentiment import SentimentJudge
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.judging.verifier import VerifierJudge
from rlhf.records import Comparison, Message, Prompt, Rollout, Verdict, VerdictState, VersionSpan
from rlhf.rounds.pairing import Group, make_pairs

ROOT = Path(__file__).parents[2]
PROBABILITY = st.floats(0, 1)
MEMBER = st.tuples(PROBABILITY, PROBABILITY, st.floats(0.1, 10), st.booleans())
MIRRORED = {VerdictState.WIN: VerdictState.LOSE, VerdictState.LOSE: VerdictState.WIN}
AB = Comparison("p", (), "a", "b")
BA = Comparison("p", (), "b", "a")


class Fixed:
    """A judge with the same opinion of (a, b) whichever way round it is asked; None is invalid."""

    def __init__(self, p: tuple[float, float] | None, scores: tuple[float, float] | None = None) -> None:
        self.p, self.scores = p, scores

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [self._verdict(comparison) for comparison in comparisons]

    def _verdict(self, comparison: Comparison) -> Verdict:
        if self.p is None:
            return invalid_verdict(comparison, "cannot say")
        (ab, ba), scores = self.p, self.scores or (None, None)
        if comparison.a == "b":
            ab, ba, scores = 1 - ba, 1 - ab, scores[::-1]
        return make_verdict(comparison, ab, ba, *scores)


async def test_weights_average_each_order() -> None:
    members = [(Fixed((0.9, 0.7), (2.0, 1.0)), 3.0), (Fixed((0.2, 0.6), (4.0, 0.0)), 1.0)]
    [verdict] = await EnsembleJudge(members, "weights", 1.0).compare([AB])
    assert verdict.p_ab == pytest.approx((3 * 0.9 + 0.2) / 4, abs=1e-12)
    assert verdict.p_ba == pytest.approx((3 * 0.7 + 0.6) / 4, abs=1e-12)
    assert verdict.state is VerdictState.WIN


async def test_contradicting_means_tie() -> None:
    members = [(Fixed((1.0, 0.2)), 1.0), (Fixed((0.8, 0.0)), 1.0)]
    [verdict] = await EnsembleJudge(members, "weights", 1.0).compare([AB])
    assert (verdict.p_ab, verdict.p_ba) == (pytest.approx(0.9), pytest.approx(0.1))
    assert (verdict.state, verdict.reason) == (VerdictState.TIE, "the two orders contradict")


@pytest.mark.parametrize(
    ("members", "share"),
    [
        ([((0.51, 0.51), 1), ((0.51, 0.51), 1), ((0.0, 0.0), 1)], 2 / 3),
        ([((1.0, 1.0), 1), ((0.5, 0.5), 1), ((0.0, 0.0), 1)], 0.5),
        ([((1.0, 0.0), 1), ((0.9, 0.9), 1)], 0.75),  # a member that contradicts itself votes for a tie
        ([((0.6, 0.6), 0.1), ((0.6, 0.6), 0.2), ((0.4, 0.4), 0.3)], 0.5),  # 0.1 + 0.2 is not 0.3 in floating point
        ([((0.4, 0.4), 3), ((1.0, 1.0), 1)], 0.25),
    ],
)
async def test_vote_is_the_share_of_the_votes(members: list[tuple[tuple[float, float], float]], share: float) -> None:
    [verdict] = await EnsembleJudge([(Fixed(p), weight) for p, weight in members], "vote", 1.0).compare([AB])
    assert verdict.p_ab == verdict.p_ba == pytest.approx(share, abs=1e-15)
    expected = VerdictState.TIE if share == 0.5 else VerdictState.WIN if share > 0.5 else VerdictState.LOSE
    assert verdict.state is expected


async def test_invalid_members_are_left_out_down_to_the_quorum() -> None:
    members = [(Fixed((0.9, 0.9), (1.0, 0.0)), 1.0), (Fixed(None), 1.0), (Fixed((0.3, 0.3), (3.0, 2.0)), 2.0)]
    [enough] = await EnsembleJudge(members, "weights", 0.75).compare([AB])
    assert enough.p == pytest.approx((0.9 + 2 * 0.3) / 3, abs=1e-12)
    [short] = await EnsembleJudge(members, "weights", 0.76).compare([AB])
    assert short.state is VerdictState.INVALID
    assert short.reason == "valid members hold 0.75 of the weight: members.1: cannot say"
    assert math.isnan(short.p)


async def test_no_valid_member_is_invalid_whatever_the_quorum() -> None:
    [verdict] = await EnsembleJudge([(Fixed(None), 1.0), (Fixed(None), 9.0)], "vote", 1e-9).compare([AB])
    assert verdict.state is VerdictState.INVALID
    assert verdict.reason.endswith("members.0: cannot say; members.1: cannot say")


@pytest.mark.parametrize("method", ["weights", "vote"])
async def test_members_scores_are_not_mixed(method: Literal["weights", "vote"]) -> None:
    """A reward of -7 and a sentiment of 0.3 have no common unit: their mean would rank by whichever is larger."""
    members = [(Fixed((0.9, 0.9), (0.3, 0.1)), 1.0), (Fixed((0.9, 0.9), (-7.0, -40.0)), 1.0)]
    [verdict] = await EnsembleJudge(members, method, 1.0).compare([AB])
    assert (verdict.score_a, verdict.score_b) == (None, None)


def test_thresholds_of_a_member_are_refused() -> None:
    sentiment: dict[str, Any] = {"type": "sentiment"}
    fields = {"type": "ensemble", "members": [{"judge": sentiment}, {"judge": sentiment | {"health": {}}}]}
    assert TypeAdapter(Judge).validate_python(fields | {"health": {"max_tie_rate": 0.1}}).health.max_tie_rate == 0.1
    fields["members"] = [{"judge": sentiment}, {"judge": sentiment | {"health": {"min_valid": 0.5}}}]
    with pytest.raises(ValidationError, match=r"judge\.members\.1\.judge\.health.*set judge\.health of the ensemble"):
        TypeAdapter(Judge).validate_python(fields)


def example() -> EnsembleJudge:
    """The judge of configs/judges/ensemble.yaml, its pools left out."""
    data = yaml.safe_load((ROOT / "configs" / "judges" / "ensemble.yaml").read_text())
    config = TypeAdapter(Judge).validate_python(data["judge"])
    assert isinstance(config, EnsembleConfig)
    no_engines: Any = None
    members = [(build_judge(member.judge, no_engines), member.weight) for member in config.members]
    return EnsembleJudge(members, config.method, config.quorum)


async def test_the_example_ranks_by_probability_and_keeps_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tones differ by fractions and lengths by tens of words: ranked by scores the response of 30 words would win."""
    monkeypatch.chdir(ROOT)
    judge = example()
    texts = [
        "bad",
        "It is a table. " * 10,
        "This is wonderful, lovely and great! " * 2,
        "An awful, terrible, bad failure.",
    ]
    prompt = Prompt("u", (Message(role="user", content="How was it?"),), "How was it?", (1,))
    group = [
        Rollout("u", k, (k, 9), (-1.0, -1.0), text, "stop", (VersionSpan(0, 0, 2),)) for k, text in enumerate(texts)
    ]
    matches = list(itertools.combinations(range(len(texts)), 2))
    verdicts = await judge.compare([Comparison("u", prompt.messages, texts[i], texts[j]) for i, j in matches])
    p = {pair: verdict.p for pair, verdict in zip(matches, verdicts, strict=True)}
    mean = [sum(p.get((i, j), 1 - p.get((j, i), 0)) for j in range(4) if j != i) / 3 for i in range(4)]
    best, worst = mean.index(max(mean)), mean.index(min(mean))
    assert (best, worst) == (2, 3)
    rng = np.random.default_rng(0)
    pairing = Pairing(strategy="best_vs_worst", min_margin=0.0)
    [result] = await make_pairs([Group(prompt, group, rng)], judge, pairing, 1)
    assert [(pair.chosen, pair.rejected) for pair in result.pairs] == [(texts[best], texts[worst])]
    assert result.pairs[0].p_chosen == pytest.approx(p[best, worst], abs=1e-12)
    assert result.counts["kept"] == 1


@settings(deadline=None)
@given(
    members=st.lists(MEMBER, min_size=1, max_size=5),
    method=st.sampled_from(["weights", "vote"]),
    quorum=st.floats(0.1, 1.0),
)
async def test_swapping_the_responses_mirrors_the_verdict(
    members: list[tuple[float, float, float, bool]], method: str, quorum: float
) -> None:
    judges = [(Fixed((ab, ba) if valid else None), weight) for ab, ba, weight, valid in members]
    there, back = await EnsembleJudge(judges, method, quorum).compare([AB, BA])  # type: ignore[arg-type]
    assert back.state is MIRRORED.get(there.state, there.state)
    if there.state is not VerdictState.INVALID:
        assert there.p_ab == pytest.approx(1 - back.p_ba, abs=1e-12)
        assert there.p_ba == pytest.approx(1 - back.p_ab, abs=1e-12)


@settings(deadline=None)
@given(ab=PROBABILITY, ba=PROBABILITY, weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
async def test_members_that_agree_give_their_own_verdict(ab: float, ba: float, weights: list[float]) -> None:
    [alone] = await Fixed((ab, ba)).compare([AB])
    [verdict] = await EnsembleJudge([(Fixed((ab, ba)), weight) for weight in weights], "weights", 1.0).compare([AB])
    assert (verdict.p_ab, verdict.p_ba) == (pytest.approx(alone.p_ab, abs=1e-12), pytest.approx(alone.p_ba, abs=1e-12))


async def test_real_members_in_order() -> None:
    sentiment, verifier = SentimentJudge(SentimentConfig()), VerifierJudge(VerifierConfig(type="verifier"))
    comparisons = [Comparison("p", (), "A wonderful 7", "8", reference="7"), Comparison("p", (), "bad 8", "7")]
    own = await sentiment.compare(comparisons)
    verdicts = await EnsembleJudge([(sentiment, 1.0), (verifier, 1.0)], "weights", 0.5).compare(comparisons)
    assert verdicts[0].p == pytest.approx((own[0].p + 1.0) / 2)
    assert verdicts[1].p == pytest.approx(own[1].p)  # no reference: the verifier has no say
    assert [verdict.comparison for verdict in verdicts] == comparisons


async def test_members_are_asked_at_the_same_time_and_errors_propagate() -> None:
    together = asyncio.Barrier(2)
    cancelled = asyncio.Event()

    class Meets(Fixed):
        async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            await asyncio.wait_for(together.wait(), 5)
            return await super().compare(comparisons)

    class Fails(Fixed):
        async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            await asyncio.sleep(0)
            raise RLHFError("the endpoint is gone")

    class Sleeps(Fixed):
        async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()
            return []

    verdicts = await EnsembleJudge([(Meets((1, 1)), 1.0), (Meets((1, 1)), 1.0)], "vote", 1.0).compare([AB])
    assert verdicts[0].p == 1.0
    with pytest.raises(RLHFError, match="the endpoint is gone"):
        await EnsembleJudge([(Sleeps((1, 1)), 1.0), (Fails((1, 1)), 1.0)], "vote", 1.0).compare([AB])
    await asyncio.wait_for(cancelled.wait(), 5)


async def test_member_that_leaves_a_verdict_out_is_an_error() -> None:
    class Forgets(Fixed):
        async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            return []

    with pytest.raises(RLHFError, match="returned 0 verdicts for 1 comparisons"):
        await EnsembleJudge([(Fixed((1, 1)), 1.0), (Forgets((1, 1)), 1.0)], "vote", 1.0).compare([AB])
