"""DeepSpeed: the only file that imports it. Process group, engines, accumulation, gathering, checkpoints."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rlhf.config.learner import Learner, Optimizer
from rlhf.errors import DeadlineError, InputError, RLHFError
from rlhf.learning.compile import compile_layers
from rlhf.learning.parametrisation import Mask
from rlhf.learning.reshard import Piece, fill, optimizer_pieces, optimizer_shards, read_shards, weight_pieces

TAG = "learner"
BUCKET = 50_000_000
"""Elements of a communication bucket. DeepSpeed's default of 5e8 would reserve 1 GB a rank."""


def _deepspeed(device: str) -> Any:
    """The deepspeed module, set up for `device` before its first import: it picks its accelerator then."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    return deepspeed


def hold_port(address: str) -> dist.TCPStore:
    """A store on a free port of this machine, which no other process gets before `join` takes it, in this process."""
    return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)


def join(device: str, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
    """Join the ranks' process group, gloo on a CPU and NCCL on GPUs; a group of this size is kept if there is one.

    `timeout_s` bounds the meeting and every later collective. Raises `DeadlineError` when the ranks do not meet,
    `RLHFError` when rank 0's port is another process's.
    """
    deepspeed = _deepspeed(device)
    if device == "cpu":
        # The shared-memory collective compiles for 25 s at first use and spins for ever on a missing peer.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized() and dist.get_world_size() != world_size:
        raise RLHFError(f"rank {rank}: already in a process group of {dist.get_world_size()}, not {world_size}")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    try:
        deepspeed.init_distributed(
            "gloo" if device == "cpu" else "nccl",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=world_size,
        )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        if "EADDRINUSE" in str(error):
            raise RLHFError(
                f"learner rank {rank}: {address}:{port}, where the ranks were to meet, is another process's; run the "
                "same command again, which takes another port"
            ) from error
        raise DeadlineError(
            f"learner rank {rank}: waited {timeout_s:.0f} s for {world_size} ranks to meet at {address}:{port}"
        ) from error


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid over it, key by key; neither is changed."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def deepspeed_config(learner: Learner, dtype: torch.dtype) -> dict[str, Any]:
    """The generated DeepSpeed config with the run's raw overrides laid over it."""
    generated: dict[str, Any] = {
        # Boundaries of accumulation are set by hand; ZeRO 1 in bf16 would divide gradients by a number above 1.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.optimizer.max_grad_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": learner.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
    }
    # Pinned by default; DeepSpeed's own CPU Adam would have to be compiled when the run starts.
    if learner.offload.optimizer:
        generated["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if learner.offload.parameters:
        generated["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if dtype == torch.bfloat16:
        generated["bf16"] = {"enabled": True}
        # bf16 accumulation, the default, loses small micro-batch gradients.
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return merge(generated, learner.deepspeed)


@contextmanager
def naming_overrides(learner: Learner) -> Iterator[None]:
    """What DeepSpeed says of a config with raw overrides becomes an `InputError`; without any it is a fault of ours."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError, KeyError) as error:
        if not learner.deepspeed:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"learner.deepspeed: DeepSpeed refuses its config: {reason[:300]}") from error


def build_optimizer(
    parameters: Sequence[tuple[str, nn.Parameter]], options: Optimizer, masked: Collection[int] = ()
) -> torch.optim.AdamW:
    """AdamW over matrices with weight decay; over vectors (norms, biases) and `masked` parameters, by id, without."""
    decayed = [p for _, p in parameters if p.dim() >= 2 and id(p) not in masked]
    others = [p for _, p in parameters if p.dim() < 2 or id(p) in masked]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # One fused pass over the flat masters instead of ten.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=options.lr, betas=options.betas, eps=options.eps, fused=True
    )


class TrainEngine:
    """A module under DeepSpeed, with accumulation boundaries set by hand."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[tuple[str, nn.Parameter]],
        learner: Learner,
        dtype: torch.dtype,
        device: str,
        masks: Iterable[tuple[nn.Parameter, Mask]] = (),
    ) -> None:
        """`masks` are what the gradients of some parameters go through; see `Parametrisation.mask_gradients`."""
        masked = set()
        for parameter, mask in masks:
            # A hook on the leaf runs before the gradient is accumulated, so ZeRO never sees what is masked; a step
            # later there are only partitions.
            parameter.register_hook(mask)
            masked.add(id(parameter))
        self._zero = _deepspeed(device).zero
        self.config = deepspeed_config(learner, dtype)
        optimizer = build_optimizer(parameters, learner.optimizer, masked)
        with naming_overrides(learner):
            self._engine, *_ = _deepspeed(device).initialize(model=module, optimizer=optimizer, config=self.config)
        self._frozen = any(not parameter.requires_grad for parameter in module.parameters())
        self._parameters = list(parameters)
        self._offload = learner.offload.model_dump()
        self.stage = int(self._engine.zero_optimization_stage())
        self._device = device
        self._asleep: dict[str, Any] | None = None

    def __call__(self, batch: Any) -> torch.Tensor:
        """The module's forward."""
        return self._engine(batch)

    def boundary(self, last: bool) -> None:
        """Say before a micro-batch whether it is the step's last."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients; DeepSpeed averages over ranks, so `loss` carries the world size."""
        # A loss that is not finite poisons every gradient, so that all ranks see an invalid norm and skip the step.
        self._engine.backward(loss if torch.isfinite(loss) else loss * float("nan"), scale_wrt_gas=False)

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip, step with `lr` and clear the gradients: the gradient norm before clipping, and if a step was taken.

        A norm that is not finite takes no step: weights and optimizer state stay as they were.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            return self._plain_step()
        self._engine.step()
        stepped = bool(self._engine.was_step_applied())
        if not stepped:
            self._drop_gradients()
        return float(self._engine.get_global_grad_norm()), stepped

    def _drop_gradients(self) -> None:
        """With an offloaded optimizer in bf16, ZeRO 1 and 2 keep the fp32 gradients of a step that was not taken: what
        is not finite there would stay in those of every later step."""
        kept = getattr(self._engine.optimizer, "averaged_gradients", {})
        if self.stage < 3:
            kept.update(dict.fromkeys(kept))

    def _plain_step(self) -> tuple[float, bool]:
        """ZeRO 0: gradients are whole and already averaged; DeepSpeed reports no norm and checks nothing."""
        grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if not torch.isfinite(torch.tensor(norm)):
            self._engine.zero_grad()
            return norm, False
        self._engine.step()
        return norm, True

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients and evaluation mode."""
        self._engine.eval()
        with torch.no_grad():
            yield
        self._engine.train()

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """Makes ZeRO-3 parameters whole on every rank inside the context."""
        return self._zero.GatheredParameters(list(parameters)) if self.stage == 3 else nullcontext()

    def shard(self, parameter: nn.Parameter) -> torch.Tensor:
        """What this rank holds of a parameter: with ZeRO-3 its partition, flat and padded, else all of it."""
        part: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
        return part.detach()

    @contextmanager
    def writing_shards(self) -> Iterator[None]:
        """The `shard`s may be written inside the context; every rank has to enter it.

        Parameters that ZeRO-3 still has whole would go stale: all are released before and the small ones, which it
        keeps whole for good, gathered again after.
        """
        if self.stage == 3:
            self._engine.optimizer.checkpoint_event_prologue()
        yield
        if self.stage == 3:
            self._engine.optimizer.checkpoint_event_epilogue()

    @property
    def can_sleep(self) -> bool:
        """Can DeepSpeed move its states? `rlhf.config.colocate.learner_sleeps` says the same of a config."""
        return self.stage in (1, 2) and hasattr(self._engine.optimizer, "offload_states")

    def sleep(self) -> None:
        """Move weights, masters and optimizer state to CPU memory until `wake`.

        What does not compute goes on: exports, checkpoints, `layout`. Where DeepSpeed cannot move its states they stay.
        """
        if self._asleep is None and self.can_sleep:
            # DeepSpeed forgets where parameters lie in the masters until they are back.
            self._asleep = self.layout()
            self._engine.offload_states(pin_memory=self._device != "cpu")
            self._move_frozen("cpu")

    def wake(self) -> None:
        """Take back what `sleep` moved, bit for bit."""
        if self._asleep is not None:
            self._move_frozen(self._device)
            self._engine.reload_states()
            self._asleep = None

    def _move_frozen(self, device: str) -> None:
        for parameter in self._engine.module.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(device)

    def save(self, path: Path) -> None:
        """Write weights, masters and optimizer state into `path`, without frozen weights; every rank calls."""
        # The checkpoint's manifest has checksums of its own; those inside the archives would cost seconds of a core
        # that the next round's sampling needs.
        torch.serialization.set_crc32_options(False)
        self._engine.save_checkpoint(str(path), tag=TAG, exclude_frozen_parameters=self._frozen)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote, with the same number of ranks."""
        loaded, _ = self._engine.load_checkpoint(str(path), tag=TAG, load_module_strict=not self._frozen)
        if loaded is None:
            raise RLHFError(f"{path}: no learner checkpoint to load")

    def layout(self) -> dict[str, Any]:
        """How this rank holds its share, in plain values: the ranks, the ZeRO stage, and where each parameter lies.

        `optimizer` and `weights` are pieces (see `reshard.Piece`) of masters and moments, and of the `shard`s.
        """
        if self._asleep is not None:
            return self._asleep
        rank = dist.get_rank()
        return {
            "world_size": dist.get_world_size(),
            "zero_stage": self.stage,
            "offload": self._offload,
            "optimizer": [tuple(piece) for piece in optimizer_pieces(self._engine.optimizer, self._parameters, rank)],
            "weights": [tuple(piece) for piece in weight_pieces(self._parameters, rank)],
        }

    def load_from(self, path: Path, stage: int, pieces: Sequence[Sequence[Piece]]) -> None:
        """Restore what `save` wrote with another number of ranks or ZeRO stage, bit for bit; every rank calls.

        `stage` and `pieces` are of the ranks that saved. Raises `RLHFError` where that cannot be done.
        """
        optimizer: Any = self._engine.optimizer
        with self.writing_shards():
            own = optimizer_shards(optimizer, self._parameters, dist.get_rank())
            fill(own, read_shards(path / TAG, stage, pieces))
            # The weights that the forward pass takes come of the masters, as after each step.
            if self.stage == 3:
                for group in range(len(optimizer.fp16_groups)):
                    optimizer._reassign_or_swap_out_partitioned_parameters(group)
            elif self.stage:
                optimizer.update_lp_params()


def frozen_engine(module: nn.Module, learner: Learner, dtype: torch.dtype, device: str) -> Callable[[Any], Any]:
    """A frozen module for inference: sharded over the ranks with ZeRO-3, else a whole copy on each.

    With `learner.reference.offload` it lies in CPU memory: ZeRO-3 fetches a layer at a time, otherwise the caller
    moves it.
    """
    module.requires_grad_(False)
    if learner.compile:
        compile_layers(module, device)
    offload = learner.reference.offload and device != "cpu"
    if learner.zero_stage < 3:
        return module.to("cpu" if offload else device).eval()
    config = deepspeed_config(learner, dtype)
    if offload:
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    # Nothing is optimised, so offloading an optimizer would only be refused.
    config["zero_optimization"].pop("offload_optimizer", None)
    with naming_overrides(learner):
        engine, *_ = _deepspeed(device).initialize(model=module, config=config)
    engine.eval()
    return engine
