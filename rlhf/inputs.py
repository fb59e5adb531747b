"""What a run reads before anything is written or started: a bad input leaves no trace."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf.config import RunConfig
from rlhf.data.chat import load_tokenizer
from rlhf.data.prompts import PromptSet, load_eval_prompts, load_prompts
from rlhf.errors import RLHFError
from rlhf.modelfiles import local_folder, tensor_shapes


@dataclass(frozen=True)
class Inputs:
    """The model's folder, names and shapes of its tensors, the prompts and the held-out prompts."""

    model: Path
    shapes: dict[str, tuple[int, ...]]
    prompts: PromptSet
    held_out: PromptSet

    @property
    def model_bytes(self) -> int:
        """Size of the checkpoint's weights."""
        return sum(file.stat().st_size for file in self.model.glob("*.safetensors"))

    def notes(self) -> list[str]:
        """What was left out, for the user."""
        dropped = [f"{count} {reason.replace('_', ' ')}" for reason, count in self.prompts.dropped.items() if count]
        return ["prompts left out: " + ", ".join(dropped)] if dropped else []


def read_inputs(config: RunConfig) -> Inputs:
    """Read model headers, tokenizer and prompts; raises `InputError` naming the key of what is missing or unusable."""
    model = local_folder(config.policy.path, "policy.path")
    shapes = tensor_shapes(model, "policy.path")
    tokenizer = load_tokenizer(str(model), trust_remote_code=config.policy.trust_remote_code, key="policy.path")
    return Inputs(
        model=model,
        shapes=shapes,
        prompts=load_prompts(config.prompts, tokenizer),
        held_out=load_eval_prompts(config.prompts, tokenizer),
    )


def check_memory(needed: int) -> None:
    """Raise `RLHFError` if this machine's free memory cannot hold `needed` bytes."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise RLHFError(
            f"this run needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free; lower "
            "learner.micro_batch_size or generator.replicas, take a smaller policy.path, or free memory "
            "(`rlhf validate` shows the estimate of each actor)"
        )
