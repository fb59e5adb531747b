"""The chunked head: right numbers and gradients, and never the logits of all positions at one time."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.learning.batch import build_batch
from rlhf.learning.logprobs import token_logprobs, token_logprobs_and_squares
from rlhf.learning.policy import PolicyModule
from rlhf.records import Pair

VOCAB, WIDTH, CHUNK = 1009, 8, 16


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors alive at one time among those made inside the context, forward and backward."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        key = storage._cdata
        if key not in self.seen:
            self.seen.add(key)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key, size):
        self.seen.discard(key)
        self.alive -= size


def inputs(count, dtype=torch.float32):
    draw = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=draw).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (count,), generator=draw)


def chunked(hidden, weight, targets):
    return token_logprobs(hidden, weight, None, targets, CHUNK)


def squares(hidden, weight, targets):
    return token_logprobs_and_squares(hidden, weight, None, targets, CHUNK)[0]


def full(hidden, weight, targets):
    logits = torch.nn.functional.linear(hidden, weight).float()
    return logits.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)


def peak(head, count):
    hidden, weight, targets = inputs(count)
    with LiveBytes() as live:
        head(hidden, weight, targets).sum().backward()
    return live.peak


@pytest.mark.parametrize("head", [chunked, squares])
def test_peak_does_not_grow_with_vocabulary_times_positions(head):
    small, large = peak(head, 4 * CHUNK), peak(head, 16 * CHUNK)
    positions = 12 * CHUNK
    # What does grow is a few vectors of a position's own: its hidden state and its gradient, some scalars.
    assert large - small <= positions * 4 * (3 * WIDTH + 16)
    assert large <= 8 * 4 * VOCAB * max(CHUNK, WIDTH)


def test_the_measure_sees_logits_that_are_kept():
    assert peak(full, 16 * CHUNK) - peak(full, 4 * CHUNK) >= 2 * 12 * CHUNK * VOCAB * 4


def test_one_chunk_is_the_whole_and_gradients_do_not_depend_on_chunks():
    results = []
    for chunk in (CHUNK, 5, 4 * CHUNK):
        hidden, weight, targets = inputs(4 * CHUNK)
        values = token_logprobs(hidden, weight, None, targets, chunk)
        (values * torch.linspace(-1, 1, len(values))).sum().backward()
        results.append((values.detach(), hidden.grad, weight.grad))
    hidden, weight, targets = inputs(4 * CHUNK)
    values = full(hidden, weight, targets)
    (values * torch.linspace(-1, 1, len(values))).sum().backward()
    for found in results:
        for ours, plain in zip(found, (values.detach(), hidden.grad, weight.grad), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_weight_gradients_over_chunks_are_summed_in_float32():
    hidden, weight, targets = inputs(64 * CHUNK, torch.bfloat16)
    token_logprobs(hidden, weight, None, targets, CHUNK).sum().backward()
    exact_hidden, exact_weight, _ = inputs(64 * CHUNK, torch.bfloat16)
    exact_hidden, exact_weight = (t.detach().float().requires_grad_() for t in (exact_hidden, exact_weight))
    full(exact_hidden, exact_weight, targets).sum().backward()
    error = (weight.grad.float() - exact_weight.grad).norm() / exact_weight.grad.norm()
    # One rounding to bf16 of the gradient and of each chunk's softmax; 64 sums in bf16 would lose several times that.
    assert error < 5e-3


def test_a_policy_saves_nothing_of_positions_times_vocabulary():
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = PolicyModule(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=True, **sizes)), CHUNK)
    ids = tuple(range(3 * CHUNK))
    batch = build_batch([Pair("p", 0, ids[:2], ids, ids, "", "", "", 1.0, 0, 0)], prefix_sharing=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        logprobs = module(batch)
    assert logprobs.shape == (6 * CHUNK,)
    wide = [shape for shape in saved if VOCAB in shape]
    assert wide, "the head keeps its weight"
    assert all(shape.numel() == VOCAB * WIDTH for shape in wide)
    assert max(shape.numel() for shape in saved) < len(logprobs) * VOCAB / 8
