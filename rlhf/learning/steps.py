"""One optimizer step: micro-batches forward and backward, the update, and the step's metrics over all ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from rlhf.errors import RLHFError
from rlhf.learning.batch import Batch
from rlhf.learning.engine import TrainEngine
from rlhf.learning.losses import PreferenceLoss, RewardShift, StepLoss
from rlhf.learning.losses.weighting import wpo_weights
from rlhf.learning.policy import ResponseHead
from rlhf.learning.reference import score_pairs
from rlhf.learning.setup import Setup
from rlhf.learning.streams import MAIN, Part, split, stream_metrics
from rlhf.ports import BetaController
from rlhf.records import Pair

SUMS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "h_sum",
    "abs_logratio_sum",
    "kl",
)
OF_REJECTED = ("rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/rejected")
"""Metrics of a step that need the rejected responses' log-probs."""


@dataclass(slots=True)
class Mismatch:
    """Engine against learner log-probs of the same tokens under the same version; sums over ranks after `reduce`."""

    version: int
    total: float = 0.0
    tokens: float = 0.0
    largest: float = 0.0

    def observe(self, pairs: Sequence[Pair], by_sequence: torch.Tensor) -> None:
        """Take the learner's log-probs [2 n, longest] of `pairs`; only what this version wrote alone counts."""
        rows = by_sequence.detach().double().cpu()
        for i, pair in enumerate(pairs):
            for row, version, logprobs in (
                (rows[2 * i], pair.chosen_version, pair.chosen_logprobs),
                (rows[2 * i + 1], pair.rejected_version, pair.rejected_logprobs),
            ):
                if logprobs and version == self.version:
                    difference = torch.tensor(logprobs, dtype=torch.float64) - row[: len(logprobs)]
                    self.total += difference.sum().item()
                    self.tokens += len(logprobs)
                    self.largest = max(self.largest, difference.abs().max().item())

    def reduce(self, device: str) -> dict[str, float]:
        """`mismatch/kl`, the mean over tokens, and `mismatch/max`; nothing when no token qualified on any rank."""
        sums = torch.tensor([self.total, self.tokens], dtype=torch.float64, device=device)
        largest = torch.tensor(self.largest, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        total, tokens = sums.tolist()
        return {"mismatch/kl": total / tokens, "mismatch/max": largest.item()} if tokens else {}


@dataclass(frozen=True, slots=True)
class Grouping:
    """`size` neighbouring pairs belong together; with `average` the loss sees the mean of their log-probs."""

    size: int = 1
    average: bool = False

    def plan(self, costs: Sequence[int], setup: Setup) -> list[list[int]]:
        """This rank's micro-batches of pairs that cost `costs`, groups kept whole; see `Setup.micro_batches`."""
        units = [sum(costs[start : start + self.size]) for start in range(0, len(costs), self.size)]
        micros = setup.micro_batches(units, self.size)
        return [[unit * self.size + place for unit in micro for place in range(self.size)] for micro in micros]

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 2] from [n, 2]: means over each group in its members' places where the loss averages."""
        if not self.average or self.size == 1:
            return values
        means = values.view(-1, self.size, 2).mean(1, keepdim=True)
        return means.expand(-1, self.size, 2).reshape(values.shape)


@dataclass(frozen=True, slots=True)
class _Term:
    """One stream's part in a step's loss."""

    part: Part
    loss: StepLoss
    beta: float | torch.Tensor


@dataclass(slots=True)
class StepRunner:
    """Takes optimizer steps with an engine, whose module has the LM head `head`."""

    engine: TrainEngine
    setup: Setup
    beta: BetaController
    head: ResponseHead
    skipped: int = field(default=0)
    skipped_in_a_row: int = field(default=0)
    shift: RewardShift = field(default_factory=RewardShift)

    def step(
        self,
        pairs: Sequence[Pair],
        reference: torch.Tensor,
        lr: float,
        mismatch: Mismatch | None = None,
        grouping: Grouping = Grouping(),
        reference_version: int | None = None,
        others: Sequence[Part] = (),
    ) -> dict[str, float]:
        """One step on `pairs` with their reference log-probs [n, 2]; every rank calls with the same arguments.

        The loss is the mean over these n pairs, however few, plus that of each of `others` by its weight: the pairs of
        all streams share the micro-batches. `reference_version` is the reference's, where it has one.
        Returns the step's metrics, equal on every rank. When the loss or the gradient is not finite no step is taken:
        `train/skipped` is 1, what is not finite is left out.
        """
        setup, parts = self.setup, [Part(MAIN, pairs, reference, reference_version=reference_version), *others]
        every = [setup.trained(pair) for part in parts for pair in part.pairs]
        micros = grouping.plan([setup.cost(pair) for pair in every], setup)
        terms = [_Term(part, self._step_loss(part, len(micros)), self.betas(part.pairs)) for part in parts]
        sums = torch.zeros(len(parts), len(SUMS), dtype=torch.float64, device=setup.device)
        for number, micro in enumerate(micros):
            chosen = [every[index] for index in micro] or [setup.filler(every)]
            batch = setup.batch(chosen)
            self.engine.boundary(number == len(micros) - 1)
            logprobs = self.engine(batch)
            loss = self._loss(batch, logprobs, micro, terms, grouping, sums) if micro else logprobs.sum() * 0.0
            if micro and mismatch is not None:
                mismatch.observe(chosen, batch.per_sequence(logprobs))
            self.engine.backward(loss)
        norm, stepped = self.engine.step(lr)
        dist.all_reduce(sums)
        rows = [dict(zip(SUMS, row, strict=True)) for row in sums.tolist()]
        beta = terms[0].beta
        mean_beta = float(beta.mean()) if isinstance(beta, torch.Tensor) else beta
        metrics = self._metrics(rows[0], len(pairs), mean_beta, lr, norm, stepped)
        for part, row in zip(others, rows[1:], strict=True):
            means = {name: value / len(part.pairs) for name, value in row.items()}
            metrics |= stream_metrics(part.name, means, len(part.pairs), accuracy=not setup.chosen_only)
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def betas(self, pairs: Sequence[Pair]) -> float | torch.Tensor:
        """The controller's beta of the next step: a number, or float32 [n] with one for each of `pairs`."""
        beta = self.beta.beta(pairs)
        return beta if isinstance(beta, int | float) else torch.tensor(beta, device=self.setup.device)

    def check_skipped(self, limit: int) -> None:
        """Raise `RLHFError` when `limit` steps in a row could not be taken: nothing will mend itself any more."""
        if self.skipped_in_a_row >= limit:
            raise RLHFError(
                f"learner: {self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite "
                f"(learner.max_skipped_steps = {limit}); lower learner.optimizer.lr or learner.loss.beta, or go back "
                "to an older checkpoint"
            )

    def _step_loss(self, part: Part, micros: int) -> StepLoss:
        """The loss over a stream's pairs in the whole step. One that sorts them gets them scored first, unless this
        rank sees them all at once."""
        setup = self.setup
        loss = StepLoss.of(setup.learner.loss, part.pairs, setup.device, self.shift.value, part.reference_version)
        if loss.matches and (micros > 1 or setup.world_size > 1):
            with self.engine.evaluating():
                loss.match(score_pairs(self.engine, part.pairs, setup, setup.learner.loss.ld_alpha), part.reference)
        return loss

    def _loss(
        self,
        batch: Batch,
        logprobs: torch.Tensor,
        micro: Sequence[int],
        terms: "Sequence[_Term]",
        grouping: Grouping,
        sums: torch.Tensor,
    ) -> torch.Tensor:
        """The micro-batch's share of the step's loss, times the ranks; its sums are added to those of its streams."""
        policy = batch.sums(logprobs, self.setup.learner.loss.ld_alpha)
        weights = self._weights(batch, logprobs)
        losses = []
        for number, places, rows in split([term.part for term in terms], micro):
            part, beta = terms[number].part, terms[number].beta
            own, reference = policy[places], part.reference[rows]
            values = terms[number].loss(
                grouping.reduce(own),
                grouping.reduce(reference),
                rows,
                beta[rows] if isinstance(beta, torch.Tensor) else beta,
                None if weights is None else weights[places],
            )
            sums[number] += self._sums(values, own, reference)
            losses.append(values.losses.sum() * (part.weight * self.setup.world_size / len(part.pairs)))
        return torch.stack(losses).sum()

    def _weights(self, batch: Batch, logprobs: torch.Tensor) -> torch.Tensor | None:
        """WPO's weights of the micro-batch's pairs, if the loss takes them."""
        if not self.setup.learner.loss.use_weighting:
            return None
        squares = self.head.log_sum_squares
        assert squares is not None, "the head keeps them where the loss uses weights"
        # A token's probability against that of a token drawn at the same place, summed over each response.
        return wpo_weights(batch.sums(logprobs.detach() - squares), batch.lengths.view(-1, 2))

    def _sums(self, values: PreferenceLoss, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """The micro-batch's sums in the order of `SUMS`."""
        logratios = (policy - reference).detach().double()
        losses, chosen, rejected = values
        columns = (
            losses.detach(),
            chosen,
            rejected,
            values.accuracies,
            *policy.detach().unbind(1),
            logratios[:, 0] - logratios[:, 1],
            logratios.abs().mean(1),
            logratios.mean(1),
        )
        return torch.stack([column.double().sum() for column in columns])

    def _metrics(
        self, sums: dict[str, float], count: int, beta: float, lr: float, norm: float, stepped: bool
    ) -> dict[str, float]:
        mean = {name: value / count for name, value in sums.items()}
        if stepped:
            self.shift.observe(mean["rewards/chosen"], mean["rewards/rejected"])
            observed = {"h_sum": sums["h_sum"], "abs_logratio_sum": sums["abs_logratio_sum"], "count": float(count)}
            self.beta.observe(observed)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        metrics = {
            "train/loss": mean["loss"],
            "train/grad_norm": norm,
            "train/lr": lr,
            "train/pairs": float(count),
            "train/skipped": float(not stepped),
            "rewards/chosen": mean["rewards/chosen"],
            "rewards/rejected": mean["rewards/rejected"],
            "rewards/margins": mean["rewards/chosen"] - mean["rewards/rejected"],
            "rewards/accuracies": mean["rewards/accuracies"],
            "logps/chosen": mean["logps/chosen"],
            "logps/rejected": mean["logps/rejected"],
            "kl/mean": mean["kl"],
            "loss/beta": beta,
        }
        if not self.setup.learner.loss.needs_reference:
            del metrics["kl/mean"]  # there is nothing that the policy could have moved away from
        if self.setup.chosen_only:
            for name in OF_REJECTED:
                del metrics[name]
        return metrics
