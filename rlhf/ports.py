"""The small protocols that the loop is written against; `actors/` implements them on Ray."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlhf.config.judge import EngineJudge
from rlhf.records import (
    Comparison,
    Pair,
    Rollout,
    SampleRequest,
    SealedRound,
    StepReport,
    SyncReport,
    Verdict,
    WeightManifest,
)


class Generators(Protocol):
    """Samples responses on whichever replica is free."""

    def sample(self, requests: Sequence[SampleRequest], deadline: float) -> AsyncIterator[Rollout]:
        """Yield each response as it ends; raise `DeadlineError` after `deadline` seconds."""
        ...


class Judge(Protocol):
    """Compares responses pairwise, batched over prompts."""

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order; what cannot be judged is `invalid`, never guessed."""
        ...


class Scorer(Protocol):
    """What `pair_model` needs of an engine."""

    async def next_logprobs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> np.ndarray:
        """Log-probs of `token_ids` as the next token of each prompt: float64 [len(prompts), len(token_ids)]."""
        ...


class Rewarder(Protocol):
    """What `reward_model` needs of an engine."""

    async def rewards(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The model's one logit for each tokenized conversation, before any activation: float64 [len(prompts)]."""
        ...


class JudgeEngines(Protocol):
    """Starts the engines that judges ask for; `path` is a folder by then."""

    def scorer(self, config: EngineJudge) -> Scorer:
        """An engine that gives next-token log-probs."""
        ...

    def rewarder(self, config: EngineJudge) -> Rewarder:
        """An engine that gives rewards."""
        ...


class PairSource(Protocol):
    """Where a round's pairs come from: sampled and judged, or a preference set."""

    async def streams(self, round: int) -> Mapping[str, SealedRound]:
        """The round's pair streams by name, planned and sealed on disk; the same ones whenever it is asked.

        The first is the round's own, whose pairs make its steps; the others' losses are added to them by `weight`.
        """
        ...

    def metrics(self, round: int) -> tuple[dict[str, float], list[str]]:
        """Metrics and warnings of how a sealed round's pairs came about."""
        ...


class SecondStream(Protocol):
    """Pairs that are trained beside a round's own."""

    def pairs(self, main: SealedRound) -> SealedRound:
        """The stream's pairs for the round that `main` is of, with their weight; the same ones whenever it is asked."""
        ...


class RoundEvaluator(Protocol):
    """Measures the policy between rounds."""

    def due(self, round: int, last: bool) -> bool:
        """Is this round evaluated?"""
        ...

    async def catch_up(self, round: int, last: bool) -> None:
        """Evaluate the round that a start or a resume begins from, if it is due and was not evaluated to the end."""
        ...

    async def evaluate(self, round: int) -> dict[str, float]:
        """Measure, log an `eval` event; returns the metrics."""
        ...


class Learner(Protocol):
    """A group of ranks that trains the policy.

    Every call but `restart` raises `LearnerLostError` once a rank is gone or has not answered in time.
    """

    async def restart(self) -> bool:
        """Start all ranks again, untrained, if one of them is lost; returns whether one was.

        Raises `RLHFError` when no restart is left to be taken.
        """
        ...

    def train(self, sealed: SealedRound, others: Mapping[str, SealedRound]) -> AsyncIterator[StepReport]:
        """Take the round's optimizer steps, a report each; refuses a round that it has already taken.

        Each step takes its share of every other stream, scored under the round's reference as the main one is.
        """
        ...

    async def statistics(self) -> dict[str, float]:
        """Round metrics of the last `train`: timing_s/{reference,learn}, perf/*, mismatch/*, pairs/dropped_long."""
        ...

    async def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Summed log-probs of `pairs` under the policy: float64 [n, 2], chosen then rejected."""
        ...

    async def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Mean loss, rewards/*, logps/* and kl/mean of `pairs` as a step on them would report; nothing moves."""
        ...

    async def save(self, path: Path) -> None:
        """Write a checkpoint folder, whole or not at all."""
        ...

    async def load(self, path: Path) -> None:
        """Restore what `save` wrote."""
        ...

    async def manifest(self, version: int) -> WeightManifest:
        """Export the policy's weights, packed and checksummed, with the probe's log-probs."""
        ...

    async def export(self, path: Path) -> None:
        """Write the policy as a Hugging Face checkpoint folder."""
        ...


class WeightPlane(Protocol):
    """Moves a version to the generators and proves it."""

    async def publish(self, manifest: WeightManifest, targets: Sequence[str]) -> SyncReport:
        """Deliver to `targets` (member ids); a target serves the version only once the probe has proved it."""
        ...


class Fleet(Protocol):
    """The generators as members that come and go."""

    def members(self) -> list[str]:
        """Ids of the members that exist, serving or not."""
        ...

    async def admit(self, member: str, version: int) -> None:
        """Let a member serve `version`, which it must have proved."""
        ...

    async def suspend(self, member: str) -> None:
        """Make a member STALE: it serves nothing until it is admitted again."""
        ...


class Parametrisation(Protocol):
    """How trained parameters relate to the checkpoint's tensors."""

    def wrap(self, model: Any) -> Any:
        """The model with what training needs put in place."""
        ...

    def trainable(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Names and parameters that the optimizer moves."""
        ...

    def export(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Names and whole tensors in checkpoint coordinates, one at a time."""
        ...

    def mask_gradients(self, model: Any) -> Iterator[tuple[Any, Callable[[Any], Any]]]:
        """Parameters and what their whole gradients go through in every backward pass, before they are reduced.

        What it sets to 0 is left out of the gradient norm too, and such a parameter has no weight decay: the elements
        do not move at all.
        """
        ...


class BetaController(Protocol):
    """Chooses beta; fed once per optimizer step with statistics already reduced over ranks."""

    def beta(self, pairs: Sequence[Pair]) -> float | Sequence[float]:
        """The beta of the next step: one for all of its `pairs`, or one for each. The pairs have no texts here."""
        ...

    def observe(self, statistics: Mapping[str, float]) -> None:
        """Take the step's sums over the round's own pairs: `h_sum`, `abs_logratio_sum`, `count`.

        A step that could not be taken is not shown.
        """
        ...


@runtime_checkable
class Stateful(Protocol):
    """Anything a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly from here."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state`."""
        ...


class Monitor(Protocol):
    """Receives what happens."""

    def log(self, event: str, round: int, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics of an event: step, round or eval."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show or store a table (samples, before and after)."""
        ...

    def alert(self, message: str) -> None:
        """Warn: shown on the console and in W&B."""
        ...

    def rewind(self, round: int) -> None:
        """Forget what was logged of later rounds: they are trained again."""
        ...

    def progress(self, name: str, total: int | None) -> "Progress":
        """A progress bar for a long part; use as a context manager."""
        ...


class Progress(Protocol):
    """One running progress bar."""

    def __enter__(self) -> "Progress": ...

    def __exit__(self, *exc: object) -> None: ...

    def advance(self, amount: int = 1) -> None:
        """Move on by `amount`."""
        ...
