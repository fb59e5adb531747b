"""The online source: plans that never change, seeds that belong to their response, and sealed rounds read back."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from rlhf.config import RunConfig
from rlhf.data.prompts import PromptOrder
from rlhf.errors import InputError, RLHFError
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.packed import logprobs, token_ids
from rlhf.records import Comparison, Message, Prompt, Rollout, SampleRequest, Verdict, VersionSpan
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.metrics import staleness
from rlhf.rounds.online import OnlineSource, rollout_metrics, sample_requests
from rlhf.rounds.sealing import read_rollouts
from rlhf.seeds import derive_seed


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is proved in test_files."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(f"{n:016x}", (Message(role="user", content=str(n)),), str(n), (n, 1)) for n in range(count)]


def make_config(prompts: int = 3, **sections: Any) -> RunConfig:
    base = {"name": "r", "policy": {"path": "m"}, "prompts": {"path": "p.jsonl"}, "generator": {"samples": 3}}
    return RunConfig.model_validate(base | {"rounds": {"prompts": prompts}} | sections)


class Ports:
    """Generators that answer in reverse order, a judge that likes the larger text, a quiet monitor."""

    def __init__(self) -> None:
        self.requests: list[SampleRequest] = []
        self.judged: list[str] = []
        self.deadline = 0.0
        self.empty_uid = ""
        self.alerts: list[str] = []

    async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
        self.deadline = deadline
        self.requests += requests
        wanted = [(request.prompt.uid, k, seed) for request in requests for k, seed in enumerate(request.seeds)]
        for uid, k, seed in reversed(wanted):
            await asyncio.sleep(0)
            ids = () if uid == self.empty_uid else (seed % 50_000, seed // 50_000 % 50_000)
            reason = "length" if k == 0 else "stop"
            spans = (VersionSpan(0, 0, len(ids)),)
            scores = logprobs([-0.5] * len(ids))
            yield Rollout(uid, k, token_ids(ids), scores, f"{seed:020d}", reason, spans)

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.judged += [item.uid for item in comparisons]
        return [make_verdict(item, p, p) for item in comparisons for p in [0.9 if item.a > item.b else 0.1]]

    def alert(self, message: str) -> None:
        self.alerts.append(message)

    def progress(self, name: str, total: int | None) -> "Ports":
        return self

    def advance(self, amount: int = 1) -> None:
        return None

    def __enter__(self) -> "Ports":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def make_source(ports: Any, run_dir: Path, config: RunConfig, prompts: int = 5) -> OnlineSource:
    order = PromptOrder(make_prompts(prompts), config.seed)
    return OnlineSource(config, order, ports, ports, Ledger(run_dir), ports)


def test_a_plan_is_in_the_ledger_before_anything_is_sampled(tmp_path: Path) -> None:
    source = make_source(Ports(), tmp_path, make_config())
    planned = [[prompt.uid for prompt in source.plan(round)] for round in (1, 2)]
    ledger = Ledger(tmp_path)
    assert [ledger.plan(1), ledger.plan(2)] == planned
    assert ledger.state(2) == RoundState.PLANNED
    assert (ledger.manifest(1)["cursor"], ledger.manifest(2)["cursor"]) == (0, 3)
    assert len({uid for uids in planned for uid in uids}) == 6  # five prompts: the sixth is of the second epoch
    again = make_source(Ports(), tmp_path, make_config())
    assert [prompt.uid for prompt in again.plan(1)] == planned[0]


def test_rounds_cannot_be_planned_out_of_order(tmp_path: Path) -> None:
    with pytest.raises(RLHFError, match="round 2 cannot be planned before round 1"):
        make_source(Ports(), tmp_path, make_config()).plan(2)


def test_another_prompt_file_is_refused_for_a_planned_round(tmp_path: Path) -> None:
    make_source(Ports(), tmp_path, make_config()).plan(1)
    with pytest.raises(InputError, match=r"^prompts\.path = 'p\.jsonl': .*round 1 was planned") as error:
        make_source(Ports(), tmp_path, make_config(), prompts=40).plan(1)
    assert "\n" not in str(error.value)


async def test_a_round_is_sampled_judged_and_sealed_once(tmp_path: Path) -> None:
    ports = Ports()
    source = make_source(ports, tmp_path, make_config())
    sealed = (await source.streams(1))["online"]
    assert ports.deadline == make_config().cluster.deadlines.generate
    assert [pair.uid for pair in sealed.pairs] == sorted(Ledger(tmp_path).plan(1))
    best = {uid: max(r.text for r in read_rollouts(tmp_path / "rounds/0001/rollouts.parquet") if r.uid == uid)
            for uid in Ledger(tmp_path).plan(1)}  # fmt: skip
    assert {pair.uid: pair.chosen for pair in sealed.pairs} == best
    assert pq.read_table(tmp_path / "rounds/0001/verdicts.parquet").num_rows == len(ports.judged)
    manifest = Ledger(tmp_path).manifest(1)["pairs"]
    assert (manifest["sha256"], manifest["count"]) == (sealed.digest, 3)
    later = Ports()
    again = (await make_source(later, tmp_path, make_config()).streams(1))["online"]
    assert again == sealed
    assert (later.requests, later.judged) == ([], [])


async def test_metrics_of_a_round_survive_a_restart(tmp_path: Path) -> None:
    source = make_source(Ports(), tmp_path, make_config())
    await source.streams(1)
    metrics, warnings = source.metrics(1)
    assert (metrics["rollout/tokens"], metrics["rollout/length_mean"]) == (18.0, 2.0)
    assert metrics["rollout/truncated_rate"] == pytest.approx(1 / 3)
    assert (metrics["pairs/kept"], metrics["pairs/dropped_tie"], metrics["pairs/dropped_invalid"]) == (3.0, 0.0, 0.0)
    assert (warnings, metrics["timing_s/judge"] >= 0) == ([], True)
    assert make_source(Ports(), tmp_path, make_config()).metrics(1) == (metrics, warnings)


async def test_responses_without_tokens_are_counted_and_said(tmp_path: Path) -> None:
    ports = Ports()
    source = make_source(ports, tmp_path, make_config(prompts=1))
    ports.empty_uid = source.plan(1)[0].uid
    assert (await source.streams(1))["online"].pairs == ()
    metrics, warnings = source.metrics(1)
    assert (metrics["pairs/kept"], metrics["pairs/empty_responses"]) == (0.0, 3.0)
    assert ["kept no pair" in warnings[0], "3 responses have no tokens" in warnings[1]] == [True, True]


async def test_responses_that_would_be_too_old_at_training_are_dropped_and_counted(tmp_path: Path) -> None:
    class Old(Ports):
        """Its rounds are sampled under version 0; the first prompt's last response has a token of version -1."""

        async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
            async for rollout in super().sample(requests, deadline):
                if rollout.uid == requests[0].prompt.uid and rollout.k == 2:
                    yield replace(rollout, versions=(VersionSpan(-1, 0, 1), VersionSpan(0, 1, 2)))
                else:
                    yield rollout

    source = make_source(ports := Old(), tmp_path, make_config(), prompts=9)
    for round, (pairs, stale) in enumerate([(3, 0.0), (2, 1.0), (0, 9.0)], start=1):
        before = len(ports.judged)
        sealed = (await source.streams(round))["online"]
        metrics, warnings = source.metrics(round)
        assert (len(sealed.pairs), metrics["rollout/dropped_stale"]) == (pairs, stale)
        # What is trained is as old as it may be, and its age is that of its oldest token.
        assert staleness(sealed)["pairs/staleness_max"] <= 1.0
        assert any("older than rounds.max_staleness allows" in warning for warning in warnings) == (stale > 0)
        assert len(set(ports.judged[before:])) == pairs  # nothing is judged in vain
        assert pq.read_table(tmp_path / f"rounds/{round:04d}/rollouts.parquet").num_rows == 9


async def test_a_pairs_age_is_that_of_its_oldest_token(tmp_path: Path) -> None:
    class Mixed(Ports):
        """Each response ran through an update: its end is of the version that is being trained."""

        async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
            async for rollout in super().sample(requests, deadline):
                yield replace(rollout, versions=(VersionSpan(0, 0, 1), VersionSpan(1, 1, 2)))

    source = make_source(Mixed(), tmp_path, make_config())
    await source.streams(1)
    sealed = (await source.streams(2))["online"]
    assert staleness(sealed) == {"pairs/staleness_mean": 1.0, "pairs/staleness_max": 1.0}
    # Two versions wrote them: the engine's log-probs are nobody's to compare with.
    assert {tuple(pair.chosen_logprobs) for pair in sealed.pairs} == {()}


async def test_the_fleets_metrics_are_taken_when_a_round_is_sealed(tmp_path: Path) -> None:
    config, ports = make_config(), Ports()
    order, ledger = PromptOrder(make_prompts(5), config.seed), Ledger(tmp_path)
    source = OnlineSource(config, order, ports, ports, ledger, ports, lambda: {"fleet/restarts": 2.0})
    await source.streams(1)
    assert source.metrics(1)[0]["fleet/restarts"] == 2.0


async def test_a_failed_round_leaves_nothing_sealed(tmp_path: Path) -> None:
    class Broken(Ports):
        async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            raise RLHFError("the judge gave nothing")

    with pytest.raises(ExceptionGroup) as error:
        await make_source(Broken(), tmp_path, make_config()).streams(1)
    assert error.group_contains(RLHFError, match="the judge gave nothing")
    assert Ledger(tmp_path).state(1) == RoundState.PLANNED
    ports = Ports()
    assert len((await make_source(ports, tmp_path, make_config()).streams(1))["online"].pairs) == 3


async def test_a_second_try_samples_the_same_responses(tmp_path: Path) -> None:
    first, second = Ports(), Ports()
    one = (await make_source(first, tmp_path / "one", make_config()).streams(1))["online"]
    two = (await make_source(second, tmp_path / "two", make_config()).streams(1))["online"]
    assert first.requests == second.requests
    assert one == two  # the digest too


def test_each_response_has_a_seed_of_its_own() -> None:
    prompts = make_prompts(4)
    seeds = [
        seed
        for run_seed in (0, 1)
        for scope in (1, 2, "evaluation")
        for request in sample_requests(prompts, 3, run_seed, scope)
        for seed in request.seeds
    ]
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 4 * 3
    [request] = sample_requests(prompts[:1], 2, 7, 3)
    assert request.seeds == (derive_seed(7, prompts[0].uid, 3, 0), derive_seed(7, prompts[0].uid, 3, 1))
    # More samples keep the seeds of the first ones.
    assert sample_requests(prompts[:1], 5, 7, 3)[0].seeds[:2] == request.seeds


def test_rollout_metrics_count_sampled_tokens() -> None:
    span = (VersionSpan(0, 0, 1),)
    rollouts = [Rollout("u", k, (1,) * n, (0.0,) * n, "", reason, span)
                for k, (n, reason) in enumerate([(4, "length"), (1, "stop"), (0, "stop"), (3, "length")])]  # fmt: skip
    assert rollout_metrics(rollouts, 2.0) == {
        "rollout/tokens": 8.0,
        "rollout/tokens_per_s": 4.0,
        "rollout/length_mean": 2.0,
        "rollout/truncated_rate": 0.5,
    }


class Unsure(Ports):
    """Cannot judge the first `bad` comparisons; cuts the context of every other one."""

    bad = 2

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        verdicts = []
        for verdict in await super().compare(comparisons):
            self.bad -= 1
            failed = invalid_verdict(verdict.comparison, "the endpoint is\nout of order")
            verdicts.append(failed if self.bad >= 0 else replace(verdict, truncated=self.bad % 2 == 0))
        return verdicts


async def test_too_few_valid_verdicts_stop_the_round_before_anything_is_sealed(tmp_path: Path) -> None:
    strict = make_config(judge={"type": "sentiment", "health": {"min_valid": 0.9}})
    with pytest.raises(RLHFError, match=r"round 1: only .*min_valid = 0\.9; .*: the endpoint is out of order;"):
        await make_source(Unsure(), tmp_path, strict).streams(1)
    assert Ledger(tmp_path).state(1) == RoundState.PLANNED
    assert list((tmp_path / "rounds/0001").glob("*.parquet")) == []
    source = make_source(Unsure(), tmp_path, make_config())  # by default an empty round is legal
    await source.streams(1)
    assert source.metrics(1)[0]["judge/invalid_rate"] > 0.1


async def test_no_comparison_at_all_is_an_empty_round_not_a_failed_judge(tmp_path: Path) -> None:
    ports = Ports()
    config = make_config(prompts=1, judge={"type": "sentiment", "health": {"min_valid": 1.0}})
    source = make_source(ports, tmp_path, config)
    ports.empty_uid = source.plan(1)[0].uid
    assert (await source.streams(1))["online"].pairs == ()


async def test_thresholds_and_truncation_reach_the_round(tmp_path: Path) -> None:
    ports = Unsure()
    ports.bad = 0
    config = make_config(judge={"type": "sentiment", "health": {"max_truncated_rate": 0.3}})
    source = make_source(ports, tmp_path, config)
    await source.streams(1)
    metrics, warnings = source.metrics(1)
    column = pq.read_table(tmp_path / "rounds/0001/verdicts.parquet")["truncated"].to_pylist()
    assert metrics["judge/truncated_rate"] == pytest.approx(sum(column) / len(column)) == pytest.approx(0.5, abs=0.1)
    assert [warning for warning in warnings if "were cut" in warning] == warnings[:1]
    assert "judge/confidence" in metrics


class Interlocked(Ports):
    """Generators whose second prompt waits until the first is judged, and a judge that waits until all is sampled.

    A round that judges only after sampling, or samples only as fast as it judges, never ends with these two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.judging, self.sampled = asyncio.Event(), asyncio.Event()

    async def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
        count = 0
        async for rollout in super().sample(requests, deadline):
            if count == len(requests[0].seeds):
                await self.judging.wait()
            count += 1
            yield rollout
        self.sampled.set()

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.judging.set()
        await self.sampled.wait()
        return await super().compare(comparisons)


async def test_judging_starts_with_the_first_prompt_and_sampling_never_waits_for_it(tmp_path: Path) -> None:
    async with asyncio.timeout(10):
        sealed = (await make_source(Interlocked(), tmp_path, make_config()).streams(1))["online"]
    assert len(sealed.pairs) == 3
