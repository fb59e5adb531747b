"""How a model's rows are laid out: what the config asks for, if the model and the attention give the right numbers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config.learner import Learner
from rlhf.errors import InputError
from rlhf.learning.attention import NAMES, Attention, block_mask, dense_mask, use
from rlhf.learning.batch import build_batch
from rlhf.learning.policy import PolicyModule
from rlhf.learning.probe_model import own_logprobs, probe_model
from rlhf.records import Pair

TOLERANCE = 1e-3
"""Largest fp32 difference of a log-prob: rounding stays under 1e-4, a mask not honoured moves it far more."""
FLEX_TOLERANCE = 0.05
"""Largest difference of an output or gradient, relative to its largest value, in the model's dtype."""

REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, ImportError, NotImplementedError)
"""What a model or a kernel raises for a mask that it cannot take. Memory that has run out is a RuntimeError too, and no
refusal."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How pairs become rows."""

    prefix_sharing: bool = False
    pack_tokens: int | None = None

    @property
    def masked(self) -> bool:
        """Do rows hold more than one sequence, so that they need a mask?"""
        return self.prefix_sharing or self.pack_tokens is not None


def choose_layout(module: PolicyModule, learner: Learner, device: str, path: str) -> tuple[Layout, str | None]:
    """Set the model's attention, and the layout that it can take; a note where that is not what was asked for.

    `path` is the model's, for messages. Raises `InputError` where an attention asked for by name cannot be had, and
    for a model whose log-probs are not those of the LM head.
    """
    layout = Layout(learner.prefix_sharing, learner.pack_tokens)
    asked = learner.attention
    eager = module.model.config._attn_implementation == NAMES["eager"]
    if device == "cpu" and asked in ("flex", "flash"):
        raise InputError(f"learner.attention = {asked}: it runs on GPUs only; use auto or sdpa on a CPU")
    if eager and asked != "auto":
        raise InputError(f"learner.attention = {asked}: {path} has eager attention only; use auto")
    use(module.model, "eager" if eager else "sdpa")
    probe = probe_model(module)
    _check_head(probe, path)
    notes = [f"learner.attention: {path} cannot use SDPA; taking eager attention, which is slower"] if eager else []
    if layout.masked:
        error = layout_error(probe, layout, learner.max_length)
        if error > TOLERANCE:
            layout = Layout()
            notes.append(
                f"learner.prefix_sharing, learner.pack_tokens: {path} does not honour the mask (log-probs off by "
                f"{error:.2g}); falling back to padded rows"
            )
        elif not eager and asked != "sdpa" and device != "cpu":
            notes += _masked_attention(module, asked, device, path)
    elif not eager:
        _plain_attention(module, asked, device)
    return layout, "; ".join(notes) or None


def _check_head(probe: PolicyModule, path: str) -> None:
    """Raise `InputError` where the head over response tokens alone does not give what the whole model does."""
    error = own_error(probe)
    if error > TOLERANCE:
        raise InputError(
            f"policy.path = {path!r}: {type(probe.model).__name__} does something to its hidden states or logits that "
            f"the learner does not know (log-probs off by {error:.2g}); use a model of another kind"
        )


def _masked_attention(module: PolicyModule, asked: str, device: str, path: str) -> list[str]:
    """FlexAttention for rows that need a mask, if it gives SDPA's numbers on this GPU; a note where it does not."""
    error = flex_error(module.model.config, device, module.dtype)
    if error <= FLEX_TOLERANCE:
        use(module.model, "flex")
        return []
    if asked == "flex":
        raise InputError(f"learner.attention = flex: off by {error:.2g} on this GPU with {path}; use auto or sdpa")
    return [f"learner.attention: FlexAttention is off by {error:.2g} with {path}; using sdpa"]


def _plain_attention(module: PolicyModule, asked: str, device: str) -> None:
    """Rows of one sequence need no mask: FlashAttention if it is installed and the dtype is one that it takes."""
    if device == "cpu" or asked == "sdpa" or (asked == "auto" and module.dtype == torch.float32):
        return
    wanted: Attention = "flex" if asked == "flex" else "flash"
    try:
        use(module.model, wanted)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        use(module.model, "sdpa")
        if asked != "auto":
            raise InputError(f"learner.attention = {asked}: {str(error).splitlines()[0]}; use auto or sdpa") from error


def own_error(probe: PolicyModule) -> float:
    """Largest |log-prob difference| between `probe` and its model's own forward, on two short made-up pairs."""
    vocab = probe.model.config.get_text_config().vocab_size
    batch = build_batch(_two_pairs(vocab, 8), prefix_sharing=False).to(next(probe.parameters()).device)
    with torch.no_grad():
        return _largest(probe(batch) - own_logprobs(probe, batch))


def layout_error(probe: PolicyModule, layout: Layout, max_length: int) -> float:
    """Largest |log-prob difference| between the layout and ordinary rows, over two small made-up pairs.

    `probe` is in fp32 (see `probe_model`).

    A model that attends through a sliding window would lose the window under an own mask, so where the window is
    shorter than `max_length` the pair is made long enough to notice. A model that cannot take the mask at all
    counts as infinitely wrong.
    """
    window = min(_windows(probe.model.config), default=max_length)
    prompt = window if window < max_length else 8
    pairs = _two_pairs(probe.model.config.get_text_config().vocab_size, prompt)
    packed = layout.pack_tokens is not None
    device = next(probe.parameters()).device
    with torch.no_grad():
        expected = probe(build_batch(pairs, prefix_sharing=False).to(device))
        try:
            found = probe(build_batch(pairs, prefix_sharing=layout.prefix_sharing, packed=packed).to(device))
        except torch.OutOfMemoryError:
            raise
        except REFUSALS:
            return float("inf")
    return _largest(found - expected)


def flex_error(config: Any, device: str, dtype: torch.dtype) -> float:
    """Largest relative difference of FlexAttention's output and gradients from SDPA's, on heads of the model's shape.

    The kernels are compiled for the device here, forward and backward; infinite where that fails.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    pair = [_pair(list(range(90)), list(range(70)), list(range(50)))]
    segments = build_batch(pair, prefix_sharing=True, packed=True).segments
    assert segments is not None, "two branches need a mask"
    segments = segments.to(device)
    shapes = [(1, count, segments.shape[2], width) for count in (heads, text.num_key_value_heads or heads)]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shapes[index], generator=generator) for index in (0, 1, 1))
    results = []
    for name, mask in (("sdpa", dense_mask(segments, dtype)), ("flex_attention", None)):
        inputs = [part.to(device, dtype).requires_grad_() for part in (query, key, value)]
        owner = torch.nn.Module()
        owner.num_key_value_groups = heads // (text.num_key_value_heads or heads)
        try:
            output, _ = ALL_ATTENTION_FUNCTIONS[name](
                owner, *inputs, block_mask(segments) if mask is None else mask, scaling=width**-0.5
            )
            output.float().square().sum().backward()
        except torch.OutOfMemoryError:
            raise
        except REFUSALS:
            return float("inf")
        results.append([output.detach(), *(part.grad for part in inputs)])
    errors = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def _windows(config: Any) -> Iterable[int]:
    """Attention windows and chunks that a config speaks of, under whatever name."""
    for name, value in config.to_dict().items():
        named = "window" in name or "attention_chunk" in name
        if named and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield value


def _two_pairs(vocab: int, prompt: int) -> list[Pair]:
    """A pair with a prompt of so many tokens, and a short one; always the same tokens."""
    tokens = torch.randint(vocab, (prompt + 26,), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        _pair(tokens[:prompt], tokens[prompt : prompt + 7], tokens[prompt + 7 : prompt + 13]),
        _pair(tokens[-13:-8], tokens[-8:-3], tokens[-3:]),
    ]


def _largest(difference: torch.Tensor) -> float:
    """The largest absolute value; infinite where there is a NaN."""
    error = difference.abs().max().item()
    return error if error == error else float("inf")


def _pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    ids = [tuple(part) for part in (prompt, chosen, rejected)]
    return Pair("probe", 0, ids[0], ids[1], ids[2], "", "", "", 1.0, 0, 0)
