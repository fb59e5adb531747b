"""One learner rank: everything that an actor needs to train, save and export, without knowing of actors."""

import resource
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlhf.errors import RLHFError
from rlhf.files import writing
from rlhf.heap import trim_seldom
from rlhf.learning.batch import causal_batch
from rlhf.learning.beta import build_beta
from rlhf.learning.compile import compile_layers
from rlhf.learning.engine import TrainEngine, join
from rlhf.learning.flops import FlopCount, peak_flops
from rlhf.learning.held_out import HeldOutScores
from rlhf.learning.job import LearnerJob
from rlhf.learning.lora import LowRank
from rlhf.learning.mask_probe import choose_layout
from rlhf.learning.measure import measure
from rlhf.learning.parametrisation import Full
from rlhf.learning.plan import step_batches
from rlhf.learning.policy import PolicyModule, load_model
from rlhf.learning.reference import (
    InitialReference,
    ReferencePolicy,
    needs_copy,
    policy_reference,
    score_pairs,
)
from rlhf.learning.reshard import as_pieces, fill_named
from rlhf.learning.rng import restore_rng, rng_state, seed_all
from rlhf.learning.schedule import fraction_done, learning_rate
from rlhf.learning.setup import Setup, unique_tokens
from rlhf.learning.steps import Grouping, Mismatch, StepRunner
from rlhf.learning.streams import Streams
from rlhf.learning.subset import Subset
from rlhf.records import Pair, SealedRound, StepReport
from rlhf.seeds import derive_seed


class RankLearner:
    """One rank of the learner. Every rank gets every call with the same arguments, in the same order.

    The policy's version is the number of rounds trained: round v + 1 makes version v into v + 1.
    """

    setup: Setup
    reference: ReferencePolicy

    def __init__(self, config: LearnerJob, rank: int, world_size: int, device: str) -> None:
        """`device` is "cpu" or "cuda" (the process's one visible GPU)."""
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._statistics: dict[str, float] = {}
        self._peak: float | None = None
        self._step = 0
        self.rounds_done = 0
        self.notes: list[str] = []

    def start(self, master_address: str, master_port: int, timeout_s: float) -> None:
        """Meet the other ranks and build policy and reference.

        `timeout_s` bounds the meeting and each collective. Raises `InputError` for a model that cannot be loaded and
        `DeadlineError` when the ranks do not meet. Warns when the model cannot take the prefix-sharing mask.
        """
        learner = self._config.learner
        seed_all(self._config.seed)
        join(self._device, self._rank, self._world_size, master_address, master_port, timeout_s)
        # Any: transformers' models have no useful static type.
        model: Any = load_model(self._config.policy)
        self._flops = FlopCount(model)  # of the model without adapters: they add well under a hundredth
        lora = LowRank(learner.lora, self._config.policy.path) if learner.lora else None
        subset = Subset(learner.trainable, self._config.policy.path) if learner.trainable else None
        self._parametrisation = lora or subset or Full()
        self._model: Any = self._parametrisation.wrap(model)
        if learner.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        module = PolicyModule(model).train()
        if learner.zero_stage < 3:
            module.to(self._device)
        dtype = module.dtype
        layout, note = choose_layout(module, learner, self._device, self._config.policy.path)
        self._say(note)
        self.setup = Setup(learner, self._rank, self._world_size, self._device, dtype, layout)
        if learner.compile:
            compile_layers(module, self._device)
        copied = InitialReference(module, self.setup) if needs_copy(learner) else None
        trainable = list(self._parametrisation.trainable(module))
        self._trained_share = sum(p.numel() for _, p in trainable) / sum(p.numel() for p in module.parameters())
        masks = self._parametrisation.mask_gradients(model)
        self._engine = TrainEngine(module, trainable, learner, dtype, self._device, masks)
        adapters_off = partial(lora.initial, model) if lora else None
        self.reference = copied or policy_reference(self._engine, self.setup, adapters_off, trainable)
        self._held_out = HeldOutScores(self.reference, learner)
        self._beta = build_beta(learner.loss)
        module.head.keeps_squares = learner.loss.use_weighting
        self._steps = StepRunner(self._engine, self.setup, self._beta, module.head)

    def train(self, sealed: SealedRound, others: Mapping[str, SealedRound] | None = None) -> list[StepReport]:
        """Take all of the round's steps; see `steps`."""
        return list(self.steps(sealed, others))

    def steps(self, sealed: SealedRound, others: Mapping[str, SealedRound] | None = None) -> Iterator[StepReport]:
        """Take the round's steps and yield a report after each; the round counts as trained once all are taken.

        Each step takes its share of the `others`' pairs too; see `Streams.shares`.
        Reports are equal on every rank. A round without pairs takes no step and counts as trained. Raises
        `RLHFError` for a round already trained or out of order, `InputError` for a pair without tokens.
        """
        if sealed.round != self.rounds_done + 1:
            what = "has already been trained" if sealed.round <= self.rounds_done else "comes too early"
            raise RLHFError(f"round {sealed.round} {what}: the learner expects round {self.rounds_done + 1}")
        started = time.perf_counter()
        streams = Streams.read(sealed, others or {}, self.setup.learner.max_length, self.reference.score)
        scored = time.perf_counter()
        mismatch, skipped = Mismatch(self.rounds_done), self._steps.skipped
        yield from self._train(sealed, streams, mismatch)
        ended = time.perf_counter()
        self._statistics = self._summarise(streams.pairs, scored - started, ended - scored)
        self._statistics |= mismatch.reduce(self._device)
        self._statistics |= {
            "pairs/dropped_long": float(streams.dropped),
            "train/skipped": float(self._steps.skipped - skipped),
        }
        self.rounds_done += 1
        trim_seldom()

    def statistics(self) -> dict[str, float]:
        """Round metrics of the last `train`, equal on every rank. `mismatch/*` is absent when no token qualified."""
        return dict(self._statistics)

    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Summed log-probs of `pairs` under the policy, float32 [n, 2] on the CPU, chosen then rejected."""
        if not pairs:
            return torch.zeros(0, 2)
        with self._engine.evaluating():
            return score_pairs(self._engine, pairs, self.setup).cpu()

    def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Loss, rewards and log-probs of `pairs` without a step, equal on every rank; see `measure`."""
        return measure(self._steps, pairs, self._held_out.score(pairs)) if pairs else {}

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Log-prob of each token after the first, by an ordinary causal forward pass."""
        if any(len(ids) < 2 for ids in sequences):
            raise RLHFError("a probe sequence needs at least 2 tokens")
        if not sequences:
            return []
        batch = causal_batch([(ids[:1], ids[1:]) for ids in sequences]).to(self._device)
        with self._engine.evaluating():
            rows = batch.per_sequence(self._engine(batch)).tolist()
        return [tuple(row[: len(ids) - 1]) for row, ids in zip(rows, sequences, strict=True)]

    def sleep(self) -> None:
        """Give the GPU's memory back until `wake`, but for what `TrainEngine.sleep` cannot move; nothing on a CPU.

        What a reference policy holds has to be offloaded anyway (`sharing_gpu`). Exports and saves go on.
        """
        if self._device != "cpu":
            self._engine.sleep()
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take the GPU's memory again."""
        self._engine.wake()

    def export_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole CPU tensors in the policy's dtype under checkpoint names; every rank must go through all of them."""
        return self._parametrisation.export(self._model, self._engine.gather)

    def export_adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole CPU tensors of the LoRA adapters alone; see `LowRank.adapters`. Every rank must go through all."""
        if not isinstance(self._parametrisation, LowRank):
            raise RLHFError("there are no adapters to export: learner.lora is not set")
        return self._parametrisation.adapters(self._model, self._engine.gather)

    def export_hf(self, path: Path) -> None:
        """Write a Hugging Face checkpoint folder: weights, config, generation config, tokenizer. Rank 0 writes."""
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self.export_tensors():
            if self._rank == 0:
                tensors[name] = tensor
        if self._rank == 0:
            from transformers import AutoTokenizer

            policy = self._config.policy
            tokenizer: Any = AutoTokenizer.from_pretrained(policy.path, trust_remote_code=policy.trust_remote_code)
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
                self._model.save_pretrained(path, state_dict=tensors)
                tokenizer.save_pretrained(path)
        dist.barrier()

    def save(self, path: Path) -> None:
        """Write this rank's part of a checkpoint into `path`; whole only once every rank has returned.

        Raises `StorageError` where there is no room for it.
        """
        with writing(path):
            self._save(path)
        dist.barrier()

    def _save(self, path: Path) -> None:
        self._engine.save(path)
        state = {
            "rounds_done": self.rounds_done,
            "step": self._step,
            "skipped": self._steps.skipped,
            "skipped_in_a_row": self._steps.skipped_in_a_row,
            "beta": self._beta.state_dict(),
            "reward_shift": self._steps.shift.state_dict(),
            "rng": rng_state(),
            "layout": self._engine.layout(),
        }
        torch.save(state, path / f"rank-{self._rank:05d}.pt")
        if self._reference_owner == self._rank and (reference := self.reference.state_dict()):
            torch.save(reference, path / f"reference-{self._rank:05d}.pt")

    def load(self, path: Path) -> None:
        """Restore what `save` wrote, bit for bit, by whatever number of ranks and under whatever ZeRO stage.

        Random generators go on for as many ranks; for another number each is seeded from (seed, rank, rounds trained).
        Raises `RLHFError` for a checkpoint that is not whole, or not of this model.
        """
        state = _read_rank(path, 0)
        layout, own = state["layout"], self._engine.layout()
        if all(layout[key] == own[key] for key in ("world_size", "zero_stage", "offload")):
            self._engine.load(path)
            if self.reference.state_dict():
                self.reference.load_state_dict(_read_reference(path, self._reference_owner))
        else:
            self._load_resharded(path, layout["zero_stage"], layout["world_size"], own["weights"])
        self.rounds_done = state["rounds_done"]
        self._step = state["step"]
        self._steps.skipped = state["skipped"]
        self._steps.skipped_in_a_row = state["skipped_in_a_row"]
        self._beta.load_state_dict(state["beta"])
        self._steps.shift.load_state_dict(state["reward_shift"])
        if layout["world_size"] == self._world_size:
            restore_rng(_read_rank(path, self._rank)["rng"])
        else:
            seed_all(derive_seed(self._config.seed, "rank", self._rank, self.rounds_done) % 2**32)

    def _load_resharded(self, path: Path, stage: int, world_size: int, weights: Sequence[Sequence[Any]]) -> None:
        """What the ranks share, of `world_size` ranks under ZeRO `stage`; `weights` is this rank's own layout."""
        layouts = [_read_rank(path, rank)["layout"] for rank in range(world_size)]
        self._engine.load_from(path, stage, [as_pieces(layout["optimizer"]) for layout in layouts])
        owners = range(world_size) if stage == 3 else (0,)
        # What `state_dict` gives are the tensors themselves, which are written to in place.
        for key, tensors in self.reference.state_dict().items():
            saved = [(_read_reference(path, rank)[key], as_pieces(layouts[rank]["weights"])) for rank in owners]
            fill_named(tensors, as_pieces(weights), saved)

    @property
    def _reference_owner(self) -> int:
        """The rank that saves this rank's state of the reference: ZeRO-3 splits it, otherwise all have the same."""
        return self._rank if self.setup.learner.zero_stage == 3 else 0

    def _say(self, note: str | None) -> None:
        if note and self._rank == 0:
            self.notes.append(note)
            warnings.warn(note, stacklevel=2)

    def _train(self, sealed: SealedRound, streams: Streams, mismatch: Mismatch) -> Iterator[StepReport]:
        learner, rounds, round = self.setup.learner, self._config.rounds.count, sealed.round
        main = streams.main
        seed = None if sealed.ordered else self._config.seed
        reference_version = round - 1 if learner.reference.policy == "round_start" else None
        batches = list(step_batches(len(main.pairs), learner.batch_size, learner.epochs, seed, round))
        shares = streams.shares([len(batch) for batch in batches], self._config.seed)
        for number, (indices, others) in enumerate(zip(batches, shares, strict=True)):
            fraction = fraction_done(sealed, number, len(batches), rounds)
            # Only before the round's first update is the policy the version that sampled.
            first = mismatch if number == 0 and not (learner.lora and learner.lora.dropout) else None
            grouping = Grouping(sealed.group, learner.loss.averages(fraction))
            lr = learning_rate(learner.optimizer, fraction)
            own = main.take(indices)
            metrics = self._steps.step(own.pairs, own.reference, lr, first, grouping, reference_version, others)
            if not metrics["train/skipped"]:
                self.reference.stepped()
            self._step += 1
            yield StepReport(round, self._step, metrics)
            self._steps.check_skipped(learner.max_skipped_steps)

    def _summarise(self, pairs: Sequence[Pair], reference_s: float, learn_s: float) -> dict[str, float]:
        """Timing and throughput; the slowest rank's seconds and the largest rank's memory."""
        if self._device == "cpu":
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        else:
            peak_bytes = float(torch.cuda.max_memory_allocated())
        largest = torch.tensor([reference_s, learn_s, peak_bytes], dtype=torch.float64, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        reference_s, learn_s, peak_bytes = largest.tolist()
        result = {
            "timing_s/reference": reference_s,
            "timing_s/learn": learn_s,
            "perf/peak_memory_gb": peak_bytes / 1e9,
        }
        if pairs:
            if self._peak is None:
                peak = torch.tensor(peak_flops(self._device, self.setup.dtype), dtype=torch.float64)
                peak = peak.to(self._device)
                dist.all_reduce(peak)
                self._peak = peak.item()
            epochs, seconds = self.setup.learner.epochs, reference_s + learn_s
            # The reference's forward; of each epoch forward and backward, in which frozen weights get no gradient.
            passes = int(self.setup.learner.loss.needs_reference) + (2 + self._trained_share) * epochs
            computed = [self.setup.trained(pair) for pair in pairs]
            result["perf/learner_tokens_per_s"] = sum(map(unique_tokens, computed)) * epochs / seconds
            result["perf/mfu"] = passes * self._flops.forward(computed) / seconds / self._peak
        return result


def _read_rank(path: Path, rank: int) -> dict[str, Any]:
    file = path / f"rank-{rank:05d}.pt"
    if not file.is_file():
        raise RLHFError(f"{path}: no state of learner rank {rank}; the checkpoint is not whole")
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def _read_reference(path: Path, owner: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path / f"reference-{owner:05d}.pt", weights_only=True, map_location="cpu")
    return state
