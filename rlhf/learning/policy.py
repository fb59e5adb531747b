"""The one module given to DeepSpeed: from a batch to the log-probs of its response tokens."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.config.data import Policy
from rlhf.errors import InputError
from rlhf.learning.attention import mask_for
from rlhf.learning.batch import Batch
from rlhf.learning.logprobs import CHUNK, token_logprobs, token_logprobs_and_squares


class ResponseHead(nn.Module):
    """The LM head over chosen positions, from hidden states to log-probs of given tokens.

    It takes the place of the model's own head and holds the same parameters, tied or not, so their names stay. One
    call covers all chunks: ZeRO-3 gathers the weight once a call, and ranks may differ in their number of chunks.
    """

    def __init__(self, linear: nn.Linear, chunk: int = CHUNK) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.chunk = chunk
        self.keeps_squares = False
        """Keep log sum_v p_v^2 of each position in `log_sum_squares`: WPO's weights need it, nothing else does."""
        self.log_sum_squares: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """float32 [T] from hidden [T, D] and targets int64 [T]."""
        if not self.keeps_squares:
            return token_logprobs(hidden, self.weight, self.bias, targets, self.chunk)
        logprobs, self.log_sum_squares = token_logprobs_and_squares(hidden, self.weight, self.bias, targets, self.chunk)
        return logprobs


class PolicyModule(nn.Module):
    """A causal LM whose head sees only the positions that predict response tokens.

    Everything runs inside this module's forward, because ZeRO-3 makes weights whole only there.
    """

    def __init__(self, model: Any, chunk: int = CHUNK) -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise InputError(f"policy.path: {type(model).__name__} has no linear LM head; use a causal language model")
        model.set_output_embeddings(ResponseHead(head, chunk))

    @property
    def head(self) -> ResponseHead:
        """The model's head; a property, so that its parameters have one name only."""
        head: ResponseHead = self.model.get_output_embeddings()
        return head

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.model.parameters()).dtype

    def forward(self, batch: Batch) -> torch.Tensor:
        """Log-prob of each of the batch's targets, float32 [T]."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=mask_for(self.model.config._attn_implementation, batch.segments, self.dtype),
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, batch.predict)
        return self.head(chosen, batch.targets)


def load_model(policy: Policy) -> Any:
    """The causal LM in the policy's dtype on the CPU, without dropout: the log-probs have to be those that sampled.

    Raises `InputError` where there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": policy.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(policy.path, **options)
        for name, value in config.to_dict().items():
            if isinstance(value, float) and (name.endswith("dropout") or name.endswith("_pdrop")):
                setattr(config, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            policy.path, config=config, dtype=getattr(torch, policy.dtype), attn_implementation="sdpa", **options
        )
    except (OSError, ValueError) as error:
        where = "" if Path(policy.path).is_dir() else "; give a local folder or a Hugging Face id that can be reached"
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"policy.path = {policy.path!r}: cannot load the model: {reason}{where}") from error
    if config.vocab_size and model.get_output_embeddings() is None:
        raise InputError(f"policy.path = {policy.path!r}: not a causal language model")
    return model


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters in fp32 for a while; bf16 values come back bit for bit. Buffers stay as they are."""
    kept = {id(p): (p, p.dtype) for p in model.parameters()}
    for parameter, _ in kept.values():
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in kept.values():
            parameter.data = parameter.data.to(dtype)
