"""The online pair source: sample K responses, judge each prompt as soon as they are in, seal the pairs."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import RunConfig
from rlhf.data.prompts import PromptOrder
from rlhf.errors import InputError
from rlhf.judging.health import check_valid_share, health_warnings, judge_metrics
from rlhf.ports import Generators, Judge, Monitor
from rlhf.records import Pair, Prompt, Rollout, SampleRequest, SealedRound, Verdict
from rlhf.rounds.gathered import Gathered
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.pairing import DRAWING, Group, PairingResult, make_pairs
from rlhf.rounds.resume_sealed import RecordedJudge, check_file, mend_sealed
from rlhf.rounds.sealing import read_rollouts, read_sealed, read_verdicts, seal_pairs, write_rollouts, write_verdicts
from rlhf.seeds import derive_seed, derive_seeds

ROLLOUTS, VERDICTS = "rollouts.parquet", "verdicts.parquet"

Whole = tuple[Prompt, list[Rollout]]
"""A prompt and all its responses."""


class OnlineSource:
    """Plans rounds from the prompt order and turns them into sealed pairs, once; afterwards reads them back."""

    def __init__(
        self,
        config: RunConfig,
        order: PromptOrder,
        generators: Generators,
        judge: Judge,
        ledger: Ledger,
        monitor: Monitor,
        fleet_metrics: Callable[[], Mapping[str, float]] = dict,
    ):
        """`fleet_metrics` are taken into a round's when it is sealed."""
        self._fleet_metrics = fleet_metrics
        self._config = config
        self._order = order
        self._generators = generators
        self._judge = judge
        self._ledger = ledger
        self._monitor = monitor
        # For strategies that draw nothing: making a generator takes longer than all else of a prompt.
        self._undrawn = np.random.default_rng(0)
        self._mended = False

    def plan(self, round: int) -> list[Prompt]:
        """The round's prompts, planned in the ledger before anything is sampled."""
        start = self._ledger.cursor(round)
        prompts = self._order.slice(start, self._config.rounds.prompts)
        planned = self._ledger.plan(round)
        if planned and len(planned) != len(prompts):
            prompts = self._order.slice(start, len(planned))
        uids = [prompt.uid for prompt in prompts]
        if planned and planned != uids:
            raise InputError(
                f"prompts.path = {self._config.prompts.path!r}: not the prompts that round {round} was planned with; "
                "restore the file, or start over with --fresh"
            )
        self._ledger.commit(round, RoundState.PLANNED, {"uids": uids, "cursor": start})
        return prompts

    async def streams(self, round: int) -> Mapping[str, SealedRound]:
        """The round's sealed pairs, sampled and judged now unless they are on disk already.

        The first call of a process looks at all sealed files and makes again what is damaged, where that can be done.
        Raises `RLHFError`, with nothing sealed, if fewer than judge.health.min_valid of the comparisons are valid.
        """
        if not self._mended:
            await mend_sealed(self._ledger, self.rebuild, self._monitor.alert)
            self._mended = True
        prompts = self.plan(round)
        if self._ledger.state(round) < RoundState.SEALED:
            await self._sample_and_seal(round, prompts)
        sealed = self._ledger.manifest(round)["pairs"]
        return {"online": read_sealed(self._ledger.folder(round) / "pairs.parquet", round, sealed["sha256"])}

    def metrics(self, round: int) -> tuple[dict[str, float], list[str]]:
        """Metrics and warnings of the sampling and judging of a sealed round."""
        sealed = self._ledger.manifest(round)["pairs"]
        return dict(sealed["metrics"]), list(sealed["warnings"])

    async def rebuild(self, round: int) -> list[Pair]:
        """The pairs of a sealed round, made again from its responses and verdicts.

        Raises `RLHFError` where these files are damaged too, or are not those of the round's prompts.
        """
        folder, made_of = self._ledger.folder(round), self._ledger.manifest(round)["pairs"]["made_of"]
        files = {name: check_file(folder / name, digest) for name, digest in made_of.items()}
        rollouts = await asyncio.to_thread(read_rollouts, files[ROLLOUTS])
        judge = RecordedJudge(await asyncio.to_thread(read_verdicts, files[VERDICTS]))
        groups: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            groups.setdefault(rollout.uid, []).append(rollout)
        samples = self._config.generator.samples
        found = [(prompt, groups.get(prompt.uid, [])) for prompt in self.plan(round)]
        results = await self._pairs([whole for whole in found if len(whole[1]) == samples], round, judge)
        return [pair for result in results for pair in result.pairs]

    async def _sample_and_seal(self, round: int, prompts: list[Prompt]) -> None:
        started = time.monotonic()
        rollouts, results, generate_s = await self._rollouts_and_verdicts(round, prompts)
        total_s = time.monotonic() - started
        verdicts = [verdict for result in results for verdict in result.verdicts]
        health = self._config.judge.health
        check_valid_share(verdicts, health.min_valid, f"round {round}")
        pairs = [pair for result in results for pair in result.pairs]
        metrics = rollout_metrics(rollouts, generate_s) | judge_metrics(verdicts) | _pair_metrics(results)
        metrics |= {"timing_s/generate": generate_s, "timing_s/judge": total_s - generate_s}
        metrics |= {"rollout/dropped_stale": float(sum(self._too_old(rollout, round) for rollout in rollouts))}
        metrics |= self._fleet_metrics()
        warnings = health_warnings(metrics, health) + _empty_warnings(round, metrics)
        folder = self._ledger.folder(round)
        made_of = await asyncio.to_thread(_write, folder, rollouts, verdicts)
        digest = await asyncio.to_thread(seal_pairs, folder / "pairs.parquet", pairs)
        payload = {"sha256": digest, "count": len(pairs), "made_of": made_of, "metrics": metrics, "warnings": warnings}
        self._ledger.commit(round, RoundState.SEALED, {"pairs": payload})

    async def _rollouts_and_verdicts(
        self, round: int, prompts: list[Prompt]
    ) -> tuple[list[Rollout], list[PairingResult], float]:
        """All responses, what became of each prompt, and the seconds until the last response was in."""
        samples = self._config.generator.samples
        requests = sample_requests(prompts, samples, self._config.seed, round)
        by_uid = {prompt.uid: prompt for prompt in prompts}
        groups: dict[str, list[Rollout]] = {prompt.uid: [] for prompt in prompts}
        pairing = partial(self._pairs, round=round, judge=self._judge)
        started = time.monotonic()
        async with asyncio.TaskGroup() as tasks, Gathered(tasks, pairing) as whole:
            with self._monitor.progress("generate", len(prompts) * samples) as bar:
                async for rollout in self._generators.sample(requests, self._config.cluster.deadlines.generate):
                    bar.advance()
                    group = groups[rollout.uid]
                    group.append(rollout)
                    if len(group) == samples:
                        # Judging starts with the first finished prompt, while others are still sampled.
                        whole.add((by_uid[rollout.uid], group))
            generate_s = time.monotonic() - started
            results = []
            with self._monitor.progress("judge", whole.count) as bar:
                # In the order in which they began; a failure ends the group, and this wait, at once.
                async for judged in whole.results():
                    results += judged
                    bar.advance(len(judged))
        return [rollout for group in groups.values() for rollout in group], results, generate_s

    async def _pairs(self, whole: Sequence[Whole], round: int, judge: Judge) -> list[PairingResult]:
        drawing = self._config.pairing.strategy in DRAWING
        groups = []
        for prompt, rollouts in whole:
            rng = self._undrawn
            if drawing:
                rng = np.random.default_rng(derive_seed(self._config.seed, "pairing", prompt.uid, round))
            fresh = [rollout for rollout in rollouts if not self._too_old(rollout, round)]
            groups.append(Group(prompt, fresh, rng))
        return await make_pairs(groups, judge, self._config.pairing, round, self._config.generator.samples)

    def _too_old(self, rollout: Rollout, round: int) -> bool:
        """Would its oldest token be more than rounds.max_staleness versions old when the round is trained?

        Permits keep sampling close to training; this bounds what is trained whatever a generator went through.
        """
        oldest = round - 1 - self._config.rounds.max_staleness
        for span in rollout.versions:  # noqa: SIM110 - any() takes three times as long, for every response
            if span.version < oldest:
                return True
        return False


def sample_requests(prompts: list[Prompt], samples: int, seed: int, scope: int | str) -> list[SampleRequest]:
    """Requests whose seeds derive from (run seed, prompt uid, round, k): a retry samples the same responses."""
    seeds = derive_seeds(seed, [prompt.uid for prompt in prompts], scope, samples)
    return list(map(SampleRequest, prompts, seeds))


def rollout_metrics(rollouts: list[Rollout], seconds: float) -> dict[str, float]:
    """rollout/{tokens,tokens_per_s,length_mean,truncated_rate}; tokens are sampled tokens, lengths in tokens."""
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    count = max(len(rollouts), 1)
    return {
        "rollout/tokens": float(tokens),
        "rollout/tokens_per_s": tokens / seconds,
        "rollout/length_mean": tokens / count,
        "rollout/truncated_rate": sum(rollout.finish_reason == "length" for rollout in rollouts) / count,
    }


def _pair_metrics(results: list[PairingResult]) -> dict[str, float]:
    names = ("kept", "dropped_tie", "dropped_invalid", "empty_responses")
    return {f"pairs/{name}": float(sum(result.counts[name] for result in results)) for name in names}


def _empty_warnings(round: int, metrics: dict[str, Any]) -> list[str]:
    warnings = []
    if not metrics["pairs/kept"]:
        warnings.append(f"round {round} kept no pair: no step is taken (see pairs/dropped_* and judge/*)")
    if metrics["pairs/empty_responses"]:
        warnings.append(f"{metrics['pairs/empty_responses']:.0f} responses have no tokens and were left out")
    if metrics["rollout/dropped_stale"]:
        warnings.append(
            f"round {round}: {metrics['rollout/dropped_stale']:.0f} responses have tokens of a version that is older "
            "than rounds.max_staleness allows; they were dropped, and their prompts with them"
        )
    return warnings


def _write(folder: Path, rollouts: list[Rollout], verdicts: list[Verdict]) -> dict[str, str]:
    """What pairs are made of, by file name its SHA-256."""
    return {
        ROLLOUTS: write_rollouts(folder / ROLLOUTS, rollouts),
        VERDICTS: write_verdicts(folder / VERDICTS, verdicts),
    }
