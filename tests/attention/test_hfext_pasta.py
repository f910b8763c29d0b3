"""Steered attention without a dense mask: weights multiplied and renormalised, in every cache, and nothing else."""

import pytest
import torch
import transformers as tf
from attention_cases import TEXT, causal
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hfext.attention.hfext_pasta  # noqa: F401
from hfext.attention._mask import IntervalMask
from hfext.attention.hfext_pasta import NAME, STEERING, pasta_attention
from hfext.attention.hfext_triton import triton_attention
from hfext.decoding._active_steering import BY_KEY, suspended
from hfext.decoding._active_steering import STEERING as ITS_NAME
from hfext.decoding.pasta import steer_attention

HEADS = {0: [1, 2], 1: [3]}
IDS = torch.tensor([[5, 17, 33, 90, 12, 61, 7, 44, 9, 71]])
PAD = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10])
MODELS = ["Llama", "Mistral", "Qwen3", "Gemma2", "GPT2", "GPTNeoX", "GptOss", "DeepseekV3"]
GREEDY = dict(max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
GREEDY |= dict(output_logits=True, return_dict_in_generate=True)


class Layer(nn.Module):
    is_causal = True


def qkv(m=6, n=6, dtype=torch.float64):
    torch.manual_seed(0)
    return tuple(torch.randn(2, h, t, 8).to(dtype) for h, t in ((6, m), (2, n), (2, n)))


def steered(function, heads, bias, *tensors, mask=None, **kw):
    layer = Layer()
    setattr(layer, STEERING, (heads, bias))
    out, weights = function(layer, *tensors, mask, **kw)
    assert weights is None and not hasattr(layer, STEERING), "the layer keeps its steering"
    return out


def brute(q, k, v, heads, weight, seen, sink=None):
    """Softmax, weights of the chosen heads times `weight` [B, N] over their new sum. [B, M, H, DV]"""
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink[None, :, None, None].expand(*s.shape[:3], 1)], -1)
        weight = nn.functional.pad(weight, (0, 1), value=1.0)
    a = s.softmax(-1)
    b = a * weight[:, None, None]
    chosen = torch.zeros(q.shape[1], dtype=torch.bool)
    chosen[heads] = True
    a = torch.where(chosen[:, None, None], b / b.sum(-1, keepdim=True), a)
    return (a[..., : k.shape[2]] @ v).transpose(1, 2)


@pytest.mark.parametrize("heads", [[1], [0, 1, 5], [0, 1, 2], [4, 5], list(range(6))], ids=str)
@pytest.mark.parametrize("alpha", [0.01, 3.0])
def test_it_is_multiplication_and_a_new_sum(heads, alpha):
    q, k, v = qkv()
    weight = torch.where(torch.rand(2, 6) > 0.5, 1.0, alpha).double()
    seen = torch.ones(6, 6).tril().bool()
    out = steered(pasta_attention, heads, weight.log(), q, k, v)
    assert (out - brute(q, k, v, heads, weight, seen)).abs().max() <= 1e-12
    plain, _ = triton_attention(Layer(), q, k, v, None)
    others = [h for h in range(6) if h not in heads]
    assert torch.equal(out[:, :, others], plain[:, :, others])
    assert (out[:, 1:, heads] - plain[:, 1:, heads]).abs().max() > 1e-3


def test_masks_sinks_and_a_bias_of_the_model():
    q, k, v = qkv(4, 7)
    weight = torch.rand(2, 7).double() + 0.1
    seen = torch.ones(4, 7).tril(3).bool() & torch.tensor([[0] + [1] * 6, [1] * 7]).bool()[:, None, None]
    for mask in (seen, seen.expand(2, 6, 4, 7), torch.zeros(seen.shape).double().masked_fill(~seen, -torch.inf)):
        out = steered(pasta_attention, [0, 3], weight.log(), q, k, v, mask=mask)
        assert (out - brute(q, k, v, [0, 3], weight, seen)).abs().max() <= 1e-12
    sink = torch.randn(6).double()
    out = steered(pasta_attention, [0, 3], weight.log(), q, k, v, mask=seen, s_aux=sink)
    assert (out - brute(q, k, v, [0, 3], weight, seen, sink)).abs().max() <= 1e-12
    bias = torch.randn(1, 6, 4, 7).double()
    for heads in ([0, 3], list(range(6))):
        out = steered(pasta_attention, heads, weight.log(), q, k, v, mask=seen, position_bias=bias)
        both = bias.expand(2, 6, 4, 7).clone()
        both[:, heads] += weight.log()[:, None, None]
        other, _ = triton_attention(Layer(), q, k, v, seen, position_bias=both)
        assert (out - other).abs().max() <= 1e-12


def test_every_key_or_a_constant_changes_nothing():
    q, k, v = qkv()
    plain, _ = triton_attention(Layer(), q, k, v, None)
    constant = torch.full((2, 6), -4.6, dtype=torch.float64)
    assert (steered(pasta_attention, [1, 4], constant, q, k, v) - plain).abs().max() <= 1e-12
    assert (steered(pasta_attention, [1, 4], 0 * constant, q, k, v) - plain).abs().max() <= 1e-12


def test_without_steering_it_is_hfext_triton():
    assert ALL_ATTENTION_FUNCTIONS[NAME] is pasta_attention is ALL_ATTENTION_FUNCTIONS["hfext_triton"]
    assert ITS_NAME == STEERING and NAME in BY_KEY
    for name in ("Llama", "Gemma2"):
        ours, other = causal(name, NAME), causal(name, "hfext_triton")
        ids = IDS.repeat(2, 1)
        assert torch.equal(ours(ids, attention_mask=PAD).logits, other(ids, attention_mask=PAD).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_and_16_bits_are_kept(dtype):
    q, k, v = (x.requires_grad_() for x in qkv(dtype=dtype))
    weight = torch.rand(2, 6) + 0.1
    out = steered(pasta_attention, [0, 4], weight.log(), q, k, v)
    assert out.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = brute(*exact, [0, 4], weight.double(), torch.ones(6, 6).tril().bool())
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    unit = 1e-5 if dtype == torch.float32 else 6e-2
    for mine, other in zip((out, *grads), (expected, *wanted), strict=True):
        assert (mine - other).abs().max() <= unit * max(1.0, other.abs().max())


def test_more_keys_than_steering_and_fewer():
    q, k, v = qkv(1, 6)
    rows = torch.randn(2, 4).double()
    longer = nn.functional.pad(rows, (0, 2))
    assert torch.equal(steered(pasta_attention, [1], rows, q, k, v), steered(pasta_attention, [1], longer, q, k, v))
    with pytest.raises(ValueError, match="Steering is for 7 keys but the layer has 6"):
        steered(pasta_attention, [1], torch.zeros(2, 7), q, k, v)


def pair(name, implementation):
    eager, ours = causal(name, "eager"), causal(name, implementation)
    ours.load_state_dict(eager.state_dict())
    with torch.no_grad():
        for model in (eager, ours):
            for p in model.parameters():
                if p.ndim == 2:
                    p.mul_(2.0)
    return eager, ours


@pytest.mark.parametrize("implementation", ["hfext_pasta", "hfext_triton"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["exclude", "include"])
def test_models_are_steered_as_with_eager_attention(name, implementation, mode):
    eager, ours = pair(name, implementation)
    ids = IDS.repeat(2, 1)
    spans = [[(4, 6), (8, 9)], [(1, 3)]]
    for mask in (PAD, None):
        real = torch.ones_like(PAD).bool() if mask is None else PAD.bool()
        out = []
        for model in (eager, ours):
            with torch.no_grad(), steer_attention(model, spans, HEADS, 0.02, mode):
                out.append(model(ids, attention_mask=mask).logits)
        assert (out[0] - out[1])[real].abs().max() <= 1e-4
        assert (out[1] - ours(ids, attention_mask=mask).logits)[real].abs().max() > 1e-2
    assert not any(hasattr(module, STEERING) for module in ours.modules())


@pytest.mark.parametrize("implementation", ["hfext_pasta", "hfext_triton"])
@pytest.mark.parametrize(
    "name, options",
    [("Llama", {}), ("Llama", {"cache_implementation": "static"}), ("Mistral", {}), ("Gemma2", {}), ("GptOss", {}),
     ("Mistral", {"cache_implementation": "static"}), ("Llama", {"num_beams": 3}), ("Llama", {"use_cache": False}),
     ("Llama", {"prefill_chunk_size": 3})],
    ids=str,
)  # fmt: skip
def test_what_is_generated_is_steered_as_with_eager_attention(name, options, implementation):
    """Windows of 4 keys have left the spans behind when tokens are generated."""
    eager, ours = pair(name, implementation)
    kw = GREEDY | options | ({"disable_compile": True} if "cache_implementation" in options else {})
    out = []
    for model in (eager, ours):
        with steer_attention(model, [[(4, 6), (8, 9)], [(1, 3)]], HEADS, 0.02):
            out.append(model.generate(IDS.repeat(2, 1), attention_mask=PAD, **kw))
    assert torch.equal(out[0].sequences, out[1].sequences)
    for a, b in zip(out[0].logits, out[1].logits, strict=True):
        assert (a - b).abs().max() <= 1e-3


@pytest.mark.parametrize("implementation", ["hfext_pasta", "hfext_triton"])
def test_alpha_one_other_layers_and_other_heads_stay_bit_for_bit(implementation):
    _, ours = pair("Llama", implementation)
    plain = ours(IDS).logits
    with steer_attention(ours, [(2, 4)], HEADS, 1.0):
        assert torch.equal(ours(IDS).logits, plain)
    seen = []
    hook = ours.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    ours(IDS)
    with steer_attention(ours, [(2, 4)], HEADS, 0.01):
        ours(IDS)
    hook.remove()
    before, after = (x.view(1, 10, 4, -1) for x in seen)
    assert torch.equal(before[:, :, [0, 3]], after[:, :, [0, 3]])
    assert (before - after)[:, 3:, [1, 2]].abs().max() > 1e-3
    assert torch.equal(ours(IDS).logits, plain)


def test_fp64_models_are_exact():
    """log(alpha) is not rounded on its way."""
    _, ours = pair("Llama", NAME)
    ours = ours.double()
    got = []
    attention = ours.model.layers[0].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda m, args: got.append(args[0].view(1, 10, 4, -1)))
    states = []

    def listen(module, query, key, value, mask, **kw):
        states.append((query, key, value))
        return pasta_attention(module, query, key, value, mask, **kw)

    tf.AttentionInterface.register(NAME, listen)
    try:
        with steer_attention(ours, [(2, 4), (5, 6)], {0: [1, 2]}, 0.03):
            ours(IDS)
    finally:
        tf.AttentionInterface.register(NAME, pasta_attention)
    hook.remove()
    weight = torch.full((1, 10), 0.03, dtype=torch.float64)
    weight[:, [2, 3, 5]] = 1.0
    expected = brute(*states[0], [1, 2], weight, torch.ones(10, 10).tril().bool())
    assert (got[0] - expected).abs().max() <= 1e-12


def test_no_mask_of_queries_and_keys_is_made(monkeypatch):
    _, ours = pair("Llama", NAME)
    monkeypatch.setattr(IntervalMask, "dense", lambda self: pytest.fail("a dense mask was made"))
    sizes = []

    def listen(module, query, key, value, mask, **kw):
        sizes.extend(x.numel() for x in (vars(module).get(STEERING) or (None,))[1:])
        assert mask is None or isinstance(mask, IntervalMask)
        return pasta_attention(module, query, key, value, mask, **kw)

    tf.AttentionInterface.register(NAME, listen)
    try:
        with steer_attention(ours, [[(4, 6)], [(1, 3)]], HEADS, 0.02):
            ours(IDS.repeat(2, 1), attention_mask=PAD)
    finally:
        tf.AttentionInterface.register(NAME, pasta_attention)
    assert sizes == [2 * 10] * 2


def test_a_layer_that_does_not_ask_is_no_silent_loss():
    _, ours = pair("Llama", NAME)
    tf.AttentionInterface.register(NAME, triton_attention)
    try:
        with (
            steer_attention(ours, [(2, 4)], HEADS),
            pytest.raises(NotImplementedError, match="LlamaAttention was"),
        ):
            ours(IDS)
    finally:
        tf.AttentionInterface.register(NAME, pasta_attention)
    with steer_attention(ours, [(2, 4)], HEADS), pytest.raises(ValueError, match="output_attentions|eager"):
        ours(IDS, output_attentions=True)
    assert not any(hasattr(module, STEERING) for module in ours.modules())


def test_attention_that_is_no_softmax_is_refused():
    for name in ("hfext_stickbreaking", "hfext_spark"):
        if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
            with pytest.raises(NotImplementedError, match=f"'{name}' takes no additive mask"):
                steer_attention(causal("Llama", name), [(2, 4)], HEADS)


def test_the_second_stream_is_not_steered():
    _, ours = pair("Llama", NAME)
    plain = ours(IDS).logits
    with steer_attention(ours, [(2, 4)], HEADS), suspended(ours):
        assert torch.equal(ours(IDS).logits, plain)


def test_the_kernels_run_and_leave_other_heads_alone(monkeypatch):
    from hfext_attention._launch import launches

    config = tf.LlamaConfig(**TEXT | {"num_hidden_layers": 1})
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM._from_config(config, attn_implementation=NAME).eval()
    spans = [[(4, 6), (8, 9)], [(1, 3)]]
    found = []
    for kernels in (False, True):
        if kernels and not torch.cuda.is_available():
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        before = launches.copy()
        seen = []
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
        with torch.no_grad():
            model(IDS.repeat(2, 1), attention_mask=PAD)
            with steer_attention(model, spans, {0: [1, 2]}, 0.02):
                logits = model(IDS.repeat(2, 1), attention_mask=PAD).logits
        hook.remove()
        assert (sum((launches - before).values()) > 0) == kernels
        plain, after = (x.view(2, 10, 4, -1) for x in seen)
        assert torch.equal(plain[:, :, [0, 3]], after[:, :, [0, 3]])
        found.append(logits)
    assert (found[0] - found[1])[PAD.bool()].abs().max() <= 1e-5


def test_it_is_found_by_name():
    assert hfext.registry.get("pasta").target == "hfext.decoding.pasta:steer_attention"
