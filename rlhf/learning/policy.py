"""The one module given to DeepSpeed: from a batch to the log-probs of its response tokens."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.config.data import Policy
from rlhf.errors import InputError
from rlhf.learning.attention import mask_for
from rlhf.learning.batch import Batch
from rlhf.learning.logits import LogitTransform
from rlhf.learning.logprobs import CHUNK, token_logprobs, token_logprobs_and_squares


class ResponseHead(nn.Module):
    """The LM head over chosen positions, from hidden states to log-probs of given tokens.

    It takes the place of the model's own head and holds the same parameters, tied or not, so their names stay. One
    call covers all chunks: ZeRO-3 gathers the weight once a call, and ranks may differ in their number of chunks.
    """

    def __init__(self, linear: nn.Linear, transform: LogitTransform, chunk: int = CHUNK) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.transform = transform
        self.chunk = chunk
        self.keeps_squares = False
        """Keep log sum_v p_v^2 of each position in `log_sum_squares`: WPO's weights need it, nothing else does."""
        self.log_sum_squares: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """float32 [T] from hidden [T, D] and targets int64 [T]."""
        arguments = (hidden, self.weight, self.bias, targets, self.chunk, self.transform)
        if not self.keeps_squares:
            return token_logprobs(*arguments)
        logprobs, self.log_sum_squares = token_logprobs_and_squares(*arguments)
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
        model.set_output_embeddings(ResponseHead(head, LogitTransform.of(model.config), chunk))

    @property
    def head(self) -> ResponseHead:
        """The model's head; a property, so that its parameters have one name only."""
        head: ResponseHead = self.model.get_output_embeddings()
        return head

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.model.parameters()).dtype

    def float_parameters(self) -> "PolicyModule":
        """Parameters in fp32, ties kept; buffers stay as they are."""
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        return self

    def forward(self, batch: Batch) -> torch.Tensor:
        """Log-prob of each of the batch's targets, float32 [T]."""
        # Models without positions of their own (ALiBi) take none.
        positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        hidden = self.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=mask_for(self.model.config._attn_implementation, batch.segments, self.dtype),
            use_cache=False,
            **positions,
        ).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, batch.predict)
        return self.head(chosen, batch.targets)


def caps_attention(config: Any) -> bool:
    """Does the model put its attention scores through a tanh (Gemma 2)?"""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def load_model(policy: Policy) -> Any:
    """The causal LM in the policy's dtype on the CPU, without dropout: the log-probs have to be those that sampled.

    Its attention is SDPA, or eager where the model has none, or has more to its attention than SDPA can do. Raises
    `InputError` where there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": policy.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(policy.path, **options)
        for name, value in config.to_dict().items():
            if isinstance(value, float) and (name.endswith("dropout") or name.endswith("_pdrop")):
                setattr(config, name, 0.0)
        options |= {"config": config, "dtype": getattr(torch, policy.dtype)}
        load = partial(AutoModelForCausalLM.from_pretrained, policy.path, **options)
        try:
            # SDPA cannot cap attention scores, and transformers leaves the cap out without a word.
            model = load(attn_implementation="eager" if caps_attention(config) else "sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model = load(attn_implementation="eager")
    except (OSError, ValueError) as error:
        where = "" if Path(policy.path).is_dir() else "; give a local folder or a Hugging Face id that can be reached"
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"policy.path = {policy.path!r}: cannot load the model: {reason}{where}") from error
    if config.vocab_size and model.get_output_embeddings() is None:
        raise InputError(f"policy.path = {policy.path!r}: not a causal language model")
    return model
