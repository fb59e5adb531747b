"""Models that differ from Llama where the learner would not see it: their logits, attention, layers and windows."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from rlhf.config.data import Policy
from rlhf.config.learner import Learner
from rlhf.errors import InputError
from rlhf.learning.batch import build_batch
from rlhf.learning.flops import FlopCount
from rlhf.learning.logits import LogitTransform
from rlhf.learning.logprobs import token_logprobs, token_logprobs_and_squares
from rlhf.learning.mask_probe import Layout, choose_layout, layout_error
from rlhf.learning.policy import PolicyModule, load_model
from rlhf.learning.probe_model import probe_model
from rlhf.records import Pair

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5}
PAIRS = [
    Pair("a", 1, (5, 6, 7, 8), (9, 10, 11), (12, 13), "", "", "", 1.0, 0, 0),
    Pair("b", 1, (50, 60), (70,), (80, 90, 20, 30), "", "", "", 1.0, 0, 0),
]
MODELS = {
    "granite": (GraniteForCausalLM, GraniteConfig, SIZES | {"logits_scaling": 6.0}),
    "cohere": (CohereForCausalLM, CohereConfig, SIZES | {"logit_scale": 0.25}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA | {"final_logit_softcapping": 1.5}),
}


def save(folder, model, config, keys):
    torch.manual_seed(0)
    model(config(**keys)).save_pretrained(folder)
    return Policy(path=str(folder), dtype="float32")


def own(model, pairs):
    """Log-probs of every response token by the model's own forward with eager attention, one sequence at a time."""
    model.set_attn_implementation("eager")
    found = []
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            logits = model(torch.tensor([[*pair.prompt_ids, *response]])).logits[0, len(pair.prompt_ids) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1))
    return torch.cat(found)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_log_probs_and_gradients_are_the_models_own(tmp_path, name):
    kind, config, keys = MODELS[name]
    policy = save(tmp_path, kind, config, keys)
    plain = kind.from_pretrained(tmp_path, attn_implementation="eager")
    expected = own(plain, PAIRS)
    module = PolicyModule(load_model(policy), chunk=3)
    layout, _ = choose_layout(module, Learner(max_length=16), "cpu", name)
    found = module(build_batch(PAIRS, prefix_sharing=layout.prefix_sharing))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, len(found))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for key, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", [LogitTransform(0.3), LogitTransform(1.0, 2.0), LogitTransform(2.5, 4.0)])
def test_a_transform_has_exact_values_squares_and_gradients(transform):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(VOCAB, 16, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(VOCAB, (20,), generator=generator)
    logits = (hidden @ weight.T) * transform.factor
    if transform.cap:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    expected = logits.log_softmax(1)[torch.arange(20), targets]
    scale = torch.linspace(-1, 1, 20)
    wanted = torch.autograd.grad((expected * scale).sum(), (hidden, weight), retain_graph=True)
    single = [part.detach().float().requires_grad_() for part in (hidden, weight)]
    found = token_logprobs(*single, None, targets, 7, transform)
    gradients = torch.autograd.grad((found * scale).sum(), single)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want.float(), rtol=1e-4, atol=1e-5)
    values, squares = token_logprobs_and_squares(*single, None, targets, 7, transform)
    torch.testing.assert_close(values, found)
    log_sum = torch.logsumexp(2 * logits.log_softmax(1), 1)
    torch.testing.assert_close(squares, log_sum.detach().float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "transform"),
    [
        (LlamaConfig(), LogitTransform()),
        (GraniteConfig(logits_scaling=8.0), LogitTransform(1 / 8)),
        (CohereConfig(logit_scale=0.0625), LogitTransform(0.0625)),
        (Gemma2Config(final_logit_softcapping=30.0), LogitTransform(1.0, 30.0)),
        (Gemma2Config(final_logit_softcapping=None), LogitTransform()),
    ],
)
def test_what_a_config_says(config, transform):
    assert LogitTransform.of(config) == transform


def test_hyperclovax_multiplies_where_granite_divides():
    from transformers import AutoConfig

    assert LogitTransform.of(AutoConfig.for_model("hyperclovax", logits_scaling=4.0)) == LogitTransform(4.0)
    assert LogitTransform.of(AutoConfig.for_model("falcon_h1", lm_head_multiplier=0.5)) == LogitTransform(0.5)


class Strange(LlamaForCausalLM):
    """Scales its logits without a word in its config."""

    def forward(self, *args, **keys):
        found = super().forward(*args, **keys)
        found.logits = found.logits * 0.5
        return found


def test_a_transform_that_is_not_known_is_refused():
    torch.manual_seed(0)
    module = PolicyModule(Strange(LlamaConfig(**SIZES)))
    for learner in (Learner(), Learner(prefix_sharing=False)):
        with pytest.raises(InputError, match=r"policy\.path = 'strange': Strange does something .*off by"):
            choose_layout(module, learner, "cpu", "strange")


def test_caps_of_attention_keep_a_model_off_sdpa(tmp_path):
    policy = save(tmp_path, Gemma2ForCausalLM, Gemma2Config, GEMMA)
    module = PolicyModule(load_model(policy))
    assert module.model.config._attn_implementation == "eager"
    layout, note = choose_layout(module, Learner(max_length=16), "cpu", "gemma")
    assert layout == Layout(prefix_sharing=True)  # its eager attention takes the mask
    assert "gemma cannot use SDPA; taking eager attention" in note
    with pytest.raises(InputError, match=r"learner\.attention = sdpa: gemma has eager attention only; use auto"):
        choose_layout(module, Learner(attention="sdpa"), "cpu", "gemma")
    plain = save(tmp_path / "uncapped", Gemma2ForCausalLM, Gemma2Config, GEMMA | {"attn_logit_softcapping": None})
    assert load_model(plain).config._attn_implementation == "sdpa"


def test_a_model_without_sdpa_is_padded_and_says_so(tmp_path):
    keys = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    policy = save(tmp_path, BloomForCausalLM, BloomConfig, keys)
    module = PolicyModule(load_model(policy))
    layout, note = choose_layout(module, Learner(), "cpu", "bloom")
    assert layout == Layout()
    assert "bloom cannot use SDPA; taking eager attention" in note
    assert "falling back to padded rows" in note
    expected = own(BloomForCausalLM.from_pretrained(tmp_path), PAIRS)
    found = module(build_batch(PAIRS, prefix_sharing=False))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_probe_takes_the_first_layers_of_every_kind_in_fp32():
    kinds = ["sliding_attention"] * 6 + ["full_attention"] * 2
    keys = GEMMA | {"num_hidden_layers": 8, "layer_types": kinds, "sliding_window": 16}
    module = PolicyModule(Gemma2ForCausalLM(Gemma2Config(**keys)).bfloat16())
    before = {name: value.clone() for name, value in module.named_parameters()}
    probe = probe_model(module)
    assert len(probe.model.model.layers) == probe.model.config.num_hidden_layers == 7
    assert probe.model.config.layer_types == kinds[:7]
    assert {p.dtype for p in probe.parameters()} == {torch.float32}
    assert probe.model.lm_head.weight is probe.model.model.embed_tokens.weight
    assert len(module.model.model.layers) == module.model.config.num_hidden_layers == 8
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name]), name
    assert layout_error(probe, Layout(prefix_sharing=True), 16) < 1e-3
    assert layout_error(probe, Layout(prefix_sharing=True), 64) > 1e-2


def test_layers_alike_are_four_and_a_short_model_is_whole():
    for count, taken in ((12, 4), (3, 3)):
        probe = probe_model(PolicyModule(LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": count}))))
        assert len(probe.model.model.layers) == taken


def test_memory_that_runs_out_is_no_refusal_of_the_mask():
    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    module = PolicyModule(LlamaForCausalLM(LlamaConfig(**SIZES)))
    probe = probe_model(module)
    plain, calls = probe.forward, []

    def second_fails(batch):
        calls.append(batch)
        return plain(batch) if len(calls) == 1 else full(batch)

    probe.forward = second_fails
    with pytest.raises(torch.OutOfMemoryError):
        layout_error(probe, Layout(prefix_sharing=True), 64)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("kind", "config", "key"),
    [
        (MixtralForCausalLM, MixtralConfig, "num_local_experts"),
        (Qwen2MoeForCausalLM, Qwen2MoeConfig, "num_experts"),
    ],
)
def test_flops_count_the_experts_that_a_token_goes_through(kind, config, key):
    sizes = SIZES | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2}
    few, many = (FlopCount(kind(config(**sizes | {key: count}))).forward(PAIRS) for count in (2, 8))
    tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in PAIRS)
    # Six more rows of each layer's router are all that is more.
    assert many - few == pytest.approx(2 * tokens * SIZES["num_hidden_layers"] * SIZES["hidden_size"] * 6)
