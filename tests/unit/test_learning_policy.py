"""Log-probs, layouts, mask probe, export and FLOPs on a tiny random Llama: tied embeddings, grouped queries."""

import copy
import itertools
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rlhf.config.data import Policy
from rlhf.config.learner import Learner
from rlhf.errors import InputError
from rlhf.learning.attention import mask_for, use, visible
from rlhf.learning.batch import build_batch, causal_batch
from rlhf.learning.flops import FlopCount, peak_flops
from rlhf.learning.logprobs import token_logprobs
from rlhf.learning.mask_probe import FLEX_TOLERANCE, TOLERANCE, Layout, choose_layout, flex_error, layout_error
from rlhf.learning.parametrisation import Full
from rlhf.learning.policy import PolicyModule, ResponseHead, load_model
from rlhf.learning.probe_model import probe_model
from rlhf.records import Pair

VOCAB = 97
SHARED, PACKED = Layout(prefix_sharing=True), Layout(pack_tokens=64)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}


def tiny(model=LlamaForCausalLM, config=LlamaConfig, **changes):
    torch.manual_seed(0)
    return model(config(**{**SIZES, **changes}))


def pairs(sizes, seed=0):
    draw = random.Random(seed)

    def ids(n):
        return tuple(draw.randrange(VOCAB) for _ in range(n))

    return [Pair(str(i), 1, *(ids(n) for n in size), "", "", "", 1.0, 0, 0) for i, size in enumerate(sizes)]


def plain_logprobs(model, prompt, response):
    """Log-probs by the model's own forward on one unpadded sequence."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)


@pytest.fixture(scope="module")
def plain():
    return tiny()


@pytest.fixture(scope="module")
def module(plain):
    return PolicyModule(copy.deepcopy(plain))


sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(0, 99))
def test_layouts_equal_plain_transformers(plain, module, sizes, seed):
    batch_pairs = pairs(sizes, seed)
    responses = [(p.prompt_ids, r) for p in batch_pairs for r in (p.chosen_ids, p.rejected_ids)]
    with torch.no_grad():
        expected = torch.cat([plain_logprobs(plain, *item) for item in responses]).float()
        for sharing, packed in itertools.product((True, False), repeat=2):
            batch = build_batch(batch_pairs, prefix_sharing=sharing, packed=packed)
            found = module(batch)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            sums = torch.stack([part.sum() for part in expected.split([len(r) for _, r in responses])])
            torch.testing.assert_close(batch.sums(found), sums.view(-1, 2), rtol=1e-5, atol=1e-4)


def test_a_rejected_token_does_not_see_the_chosen_response(module):
    first, second = pairs([(5, 6, 7)]), pairs([(5, 6, 7)])
    second[0] = Pair("x", 1, first[0].prompt_ids, (3, 1, 4, 1, 5, 9), first[0].rejected_ids, "", "", "", 1.0, 0, 0)
    with torch.no_grad():
        a, b = (module(build_batch(p, prefix_sharing=True)) for p in (first, second))
    assert torch.equal(a[6:], b[6:])
    assert not torch.allclose(a[:6], b[:6])


def test_shared_row_layout():
    batch = build_batch(pairs([(3, 3, 2)]), prefix_sharing=True)
    assert batch.input_ids.shape == (1, 6)  # 3 + (3 - 1) + (2 - 1): a last token predicts nothing
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.predict.tolist() == [2, 3, 4, 2, 5]
    seen = visible(batch.segments)[0].int().tolist()
    assert seen[4] == [1, 1, 1, 1, 1, 0]
    assert seen[5] == [1, 1, 1, 0, 0, 1]


def test_packed_rows_hold_documents_that_do_not_see_each_other():
    batch = build_batch(pairs([(2, 2, 2), (1, 1, 3)]), prefix_sharing=True, packed=True)
    assert batch.input_ids.shape == (1, 7)
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 0, 1, 2]]
    assert batch.predict.tolist() == [1, 2, 1, 3, 4, 4, 5, 6]
    assert visible(batch.segments)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1],
    ]


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention without its compiler, whose CPU kernels have no backward pass: mask and wiring are tested."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("sharing", [True, False])
def test_flex_attention_equals_sdpa(sharing, eager_flex):
    batch_pairs = pairs([(9, 8, 7), (30, 3, 60), (5, 80, 70)])
    batch = build_batch(batch_pairs, prefix_sharing=sharing, packed=True)
    found = {}
    for name in ("sdpa", "flex"):
        module = PolicyModule(tiny())
        use(module.model, name)
        logprobs = module(batch)
        logprobs.sum().backward()
        found[name] = [logprobs.detach(), *(p.grad for p in module.parameters())]
    assert isinstance(mask_for("flex_attention", batch.segments, torch.float32), BlockMask)
    for ours, expected in zip(found["flex"], found["sdpa"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_flex_kernels_are_compared_with_sdpa(eager_flex):
    assert flex_error(tiny().config, "cpu", torch.float32) < 1e-5
    assert 1e-6 < flex_error(tiny().config, "cpu", torch.bfloat16) < FLEX_TOLERANCE


def test_head_sees_only_predicting_positions(module):
    rows = []
    head = module.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    batch_pairs = pairs([(40, 3, 2), (30, 1, 6)])
    for sharing in (True, False):
        module(build_batch(batch_pairs, prefix_sharing=sharing))
    handle.remove()
    assert isinstance(head, ResponseHead)
    assert rows == [3 + 2 + 1 + 6] * 2


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_do_not_change_values_or_gradients(chunk):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 16, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, 16, generator=generator, requires_grad=True)
    bias = torch.randn(VOCAB, generator=generator, requires_grad=True)
    targets = torch.randint(VOCAB, (20,), generator=generator)
    scale = torch.randn(20, generator=generator)

    expected = torch.log_softmax(hidden.double() @ weight.double().T + bias.double(), -1)[torch.arange(20), targets]
    wanted = torch.autograd.grad((expected * scale).sum(), (hidden, weight, bias))
    found = token_logprobs(hidden, weight, bias, targets, chunk)
    gradients = torch.autograd.grad((found * scale).sum(), (hidden, weight, bias))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


def test_logits_are_not_kept_for_the_backward_pass():
    hidden, targets = torch.randn(64, 8, requires_grad=True), torch.zeros(64, dtype=torch.long)
    weight = torch.randn(5000, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        token_logprobs(hidden, weight, None, targets, chunk=16)
    assert max(saved, default=0) < 16 * 5000


def test_extreme_logits_stay_finite():
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0] * 4, [-1.0] * 4, [0.0] * 4], requires_grad=True)
    found = token_logprobs(hidden, weight, None, torch.tensor([0, 1]))
    found.sum().backward()
    assert found.tolist() == [0.0, -80000.0]
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_probe_accepts_llama_and_is_quiet_about_dtype(module):
    for layout in (SHARED, PACKED, Layout(prefix_sharing=True, pack_tokens=64)):
        assert layout_error(probe_model(module), layout, 64) < TOLERANCE / 10
    half = PolicyModule(tiny().bfloat16())
    before = {name: value.clone() for name, value in half.named_parameters()}
    assert layout_error(probe_model(half), SHARED, 64) < TOLERANCE / 10
    for name, value in half.named_parameters():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, before[name])


def test_probe_notices_a_sliding_window_that_matters():
    sliding = PolicyModule(tiny(MistralForCausalLM, MistralConfig, sliding_window=16))
    assert layout_error(probe_model(sliding), SHARED, 16) < TOLERANCE
    assert layout_error(probe_model(sliding), SHARED, 64) > 10 * TOLERANCE
    layout, note = choose_layout(sliding, Learner(max_length=64, pack_tokens=99), "cpu", "a-model")
    assert layout == Layout(prefix_sharing=False, pack_tokens=None)
    assert re.search(r"a-model does not honour the mask .* falling back to padded rows", note)


def test_layout_is_what_was_asked_for_where_the_model_can(module):
    learner = Learner(pack_tokens=99, prefix_sharing=False)
    assert choose_layout(module, learner, "cpu", "m") == (Layout(prefix_sharing=False, pack_tokens=99), None)
    plain = Learner(prefix_sharing=False)
    assert choose_layout(module, plain, "cpu", "m") == (Layout(), None)


@pytest.mark.parametrize("name", ["flex", "flash"])
def test_attention_of_gpus_is_refused_on_a_cpu(module, name):
    learner = Learner(attention=name, prefix_sharing=False)
    with pytest.raises(InputError, match=rf"learner\.attention = {name}: it runs on GPUs only"):
        choose_layout(module, learner, "cpu", "m")


@pytest.mark.parametrize("keys", [{}, {"prefix_sharing": False, "pack_tokens": 512}])
def test_flash_attention_takes_no_mask(keys):
    with pytest.raises(ValueError, match=r"FlashAttention takes no such mask"):
        Learner(attention="flash", **keys)


def test_causal_batch_scores_every_token_after_the_first(plain, module):
    sequences = [(1, 2, 3, 4, 5), (9, 8)]
    batch = causal_batch([(ids[:1], ids[1:]) for ids in sequences])
    with torch.no_grad():
        rows = batch.per_sequence(module(batch))
        for row, ids in zip(rows, sequences, strict=True):
            expected = plain_logprobs(plain, ids[:1], ids[1:]).float()
            torch.testing.assert_close(row[: len(ids) - 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_export_has_the_names_of_save_pretrained(tmp_path, tied):
    from safetensors.torch import load_file

    model = tiny(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    exported = dict(Full().export(PolicyModule(model).model))
    assert exported.keys() == saved.keys()
    assert ("lm_head.weight" in exported) is not tied
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    model.model.norm.weight.data.add_(1.0)
    assert torch.equal(exported["model.norm.weight"], saved["model.norm.weight"])


def test_flops_equal_torchs_count_of_the_matrix_products():
    module = PolicyModule(tiny(attn_implementation="eager"))  # torch counts no FLOPs of SDPA on a CPU
    (only,) = pairs([(6, 5, 4)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(build_batch([only], prefix_sharing=True))
    ours = FlopCount(module.model).forward([only])
    # torch counts attention over the full square and no position for last tokens, which predict nothing.
    tokens, length = 15, 13
    body = sum(p.numel() for n, p in module.model.named_parameters() if p.dim() == 2 and "embed" not in n)
    seen = 21 + (6 * 5 + 15) + (6 * 4 + 10)
    attention = 4 * 32 * 2  # two products, a multiply-add counted as two, per layer and hidden unit
    expected = ours - 2 * body * (tokens - length) - attention * (seen - length**2)
    assert counter.get_total_flops() == expected


def test_peak_is_a_rate():
    assert 1e9 < peak_flops("cpu", torch.float32) < 1e14


def test_dropout_is_off_and_missing_models_are_named(tmp_path):
    tiny(attention_dropout=0.5).save_pretrained(tmp_path)
    assert load_model(Policy(path=str(tmp_path), dtype="float32")).config.attention_dropout == 0.0
    with pytest.raises(InputError, match=r"policy\.path"):
        load_model(Policy(path=str(tmp_path / "absent")))
