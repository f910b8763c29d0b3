"""Stick-breaking attention in models: against sticks broken key by key, with padding, caches, training and saving."""

import json

import pytest
import torch
import transformers as tf
from attention_cases import TEXT, causal
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hfext  # noqa: F401
from hfext.attention.stickbreaking import METHOD, NAME, StickbreakingConfig, stickbreaking, stickbreaking_mask

OPTIONS = [{}, {"attend_current": False}, {"remainder": True}, {"attend_current": False, "remainder": True}]
PAD = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 10, [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


def brute(q, k, v, scale, seen, attend_current=True, remainder=False):
    """Each stick broken key by key, from the last key that a query sees; seen [B, M, N]. [B, M, H, DV]"""
    B, H, M, _ = q.shape
    k, v = (x.repeat_interleave(H // k.shape[1], 1) for x in (k, v))
    b = torch.sigmoid(torch.einsum("bhid,bhjd->bhij", q, k) * scale)
    out = torch.zeros(B, H, M, v.shape[3], dtype=v.dtype)
    for r in range(B):
        for i in range(M):
            keys = seen[r, i].nonzero()[:, 0].tolist()
            own = keys[-1] if keys else None
            stick = torch.ones(H, dtype=v.dtype)
            for j in reversed(keys if attend_current else keys[:-1]):
                out[r, :, i] += (stick * b[r, :, i, j])[:, None] * v[r, :, j]
                stick = stick * (1 - b[r, :, i, j])
            if remainder and own is not None:
                out[r, :, i] += stick[:, None] * v[r, :, own]
    return out.transpose(1, 2)


class Layer(nn.Module):
    is_causal = True

    def __init__(self, **options):
        super().__init__()
        self.config = tf.LlamaConfig(stickbreaking_attention=options)


def qkv(m=5, n=5, dtype=torch.float64):
    torch.manual_seed(0)
    return tuple(torch.randn(2, h, t, 8).to(dtype) for h, t in ((4, m), (2, n), (2, n)))


def lower(m, n):
    return (torch.arange(n) <= torch.arange(m)[:, None] + n - m).expand(2, m, n)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("m, n", [(5, 5), (1, 7)])
def test_without_a_mask(options, m, n):
    q, k, v = qkv(m, n)
    out, weights = stickbreaking(Layer(**options), q, k, v, None, scaling=0.5)
    assert weights is None and out.is_contiguous()
    assert (out - brute(q, k, v, 0.5, lower(m, n), **options)).abs().max() <= 1e-12


def test_keys_behind_the_queries_are_places_not_yet_written():
    q, k, v = qkv(3, 7)
    out, _ = stickbreaking(Layer(), q, k, v, None)
    assert (out - brute(q, k[:, :, :3], v[:, :, :3], 8**-0.5, lower(3, 3))).abs().max() <= 1e-12


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_masks(options):
    q, k, v = qkv(5, 7)
    seen = lower(5, 7) & (torch.rand(2, 1, 7) > 0.3)
    seen[0, 0] = False
    expected = brute(q, k, v, 8**-0.5, seen, **options)
    for mask in (seen[:, None], torch.zeros(2, 1, 5, 7).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)):
        out, _ = stickbreaking(Layer(**options), q, k, v, mask)
        rows = slice(1, None) if options.get("remainder") else slice(None)
        assert (out - expected)[:, rows].abs().max() <= 1e-12
    near = lower(5, 5) & (torch.arange(5) > torch.arange(5)[:, None] - 2)
    out, _ = stickbreaking(Layer(**options), q, k[:, :, :5], v[:, :, :5], None, sliding_window=2)
    assert (out - brute(q, k[:, :, :5], v[:, :, :5], 8**-0.5, near, **options)).abs().max() <= 1e-12


def test_the_worked_example():
    q = torch.tensor([[1.0, 0], [0, 1], [1, 1]])[None, None]
    k = torch.tensor([[1.0, 2], [0, 1], [-1, 1]])[None, None]
    rows = [[0.66976, 0, 0], [0.26565, 0.66976, 0], [0.14744, 0.33488, 0.5]]
    out, _ = stickbreaking(Layer(), q, k, torch.eye(3)[None, None], None)
    torch.testing.assert_close(out[0, :, 0], torch.tensor(rows), atol=6e-6, rtol=0)
    out, _ = stickbreaking(Layer(attend_current=False), q, k, torch.eye(3)[None, None], None)
    torch.testing.assert_close(out[0, 2, 0], torch.tensor([0.29489, 0.66976, 0]), atol=6e-6, rtol=0)


def recorded(layer_function, model, *args, **kwargs):
    """What a model's call gives, with another attention function under the same name."""
    before = ALL_ATTENTION_FUNCTIONS[NAME]
    tf.AttentionInterface.register(NAME, layer_function)
    try:
        return model(*args, **kwargs)
    finally:
        tf.AttentionInterface.register(NAME, before)


def by_brute_force(module, query, key, value, attention_mask, scaling=None, **_):
    m, n = query.shape[2], key.shape[2]
    seen = lower(m, n)[:1].expand(len(query), m, n) if attention_mask is None else attention_mask.dense()[:, 0]
    options = vars(module.config).get("stickbreaking_attention") or {}
    return brute(query, key, value, scaling, seen, **options), None


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "GPT2", "Phi3", "DeepseekV3"])
@pytest.mark.parametrize("options", [{}, {"attend_current": False, "remainder": True}], ids=str)
def test_a_model_with_padding_and_windows(name, options):
    model = causal(name, NAME)
    model.config.stickbreaking_attention = options
    torch.manual_seed(2)
    ids = torch.randint(3, 96, PAD.shape) * PAD
    with torch.no_grad():
        for mask in (PAD, None):
            ours = model(ids, attention_mask=mask, use_cache=False).logits
            other = recorded(by_brute_force, model, ids, attention_mask=mask, use_cache=False).logits
            real = torch.ones_like(PAD).bool() if mask is None else mask.bool()
            assert (ours - other)[real].abs().max() <= 1e-5
    # A padded row is the row alone.
    alone = model(ids[:1, 4:], position_ids=torch.arange(6)[None]).logits
    padded = model(ids[:1], attention_mask=PAD[:1], position_ids=(PAD[:1].cumsum(1) - 1).clamp(min=0)).logits
    assert (alone - padded[:, 4:]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "name, cache", [("Llama", None), ("Llama", "static"), ("Mistral", None), ("Mistral", "static")]
)
@pytest.mark.parametrize("options", [{}, {"attend_current": False, "remainder": True}], ids=str)
def test_generation_with_a_cache_equals_generation_without(name, cache, options):
    model = causal(name, NAME)
    model.config.stickbreaking_attention = options
    torch.manual_seed(2)
    ids = torch.randint(3, 96, PAD.shape) * PAD
    kw = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=PAD)
    kw |= dict(output_logits=True, return_dict_in_generate=True)
    cached = model.generate(ids, **kw, **({"cache_implementation": cache, "disable_compile": True} if cache else {}))
    whole = model.generate(ids, **kw, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    for a, b in zip(cached.logits, whole.logits, strict=True):
        assert (a - b).abs().max() <= 1e-5
    beams = dict(max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(*(model.generate(ids, attention_mask=PAD, use_cache=c, **beams) for c in (True, False)))


def test_packed_sequences_do_not_see_each_other():
    model = causal("Llama", NAME)
    model.config.stickbreaking_attention = {"attend_current": False, "remainder": True}
    ids = torch.randint(3, 96, (1, 9))
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=places, use_cache=False).logits
    apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)
    assert (packed - apart).abs().max() <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains(tmp_path, checkpointing):
    rows = [{"input_ids": [1, *range(3 + i, 10 + i)], "labels": [1, *range(3 + i, 10 + i)]} for i in range(8)]
    model = causal("Llama", NAME)
    arguments = TrainingArguments(
        tmp_path, max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", seed=1,
        logging_steps=1, save_strategy="no", use_cpu=True, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = causal("Llama", NAME).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(torch.arange(3, 12)[None], labels=torch.arange(3, 12)[None]).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert grads[0].abs().max() > 0 and torch.equal(*grads)


def test_options_are_saved_with_the_model(tmp_path):
    config = tf.LlamaConfig(**TEXT, stickbreaking_attention={"attend_current": False})
    model = tf.LlamaForCausalLM._from_config(config, attn_implementation=NAME).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["stickbreaking_attention"] == {"attend_current": False}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    again.config.stickbreaking_attention = {}
    assert (model(ids).logits - again(ids).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"attend": True}, ValueError, "'attend' but its options are attend_current, remainder"),
        ({"attend_current": 1}, TypeError, "attend_current is 1 but must be True or False"),
        ([True], TypeError, "is a list but must be a dict"),
    ],
    ids=str,
)
def test_bad_options(options, error, words):
    model = causal("Llama", NAME)
    model.config.stickbreaking_attention = options
    with pytest.raises(error, match=words):
        model(torch.ones(1, 4, dtype=torch.long))


def test_the_defaults_are_moduleformers():
    assert StickbreakingConfig() == StickbreakingConfig(True, False) == StickbreakingConfig.of(tf.LlamaConfig())
    assert METHOD.config is StickbreakingConfig and METHOD.target.endswith(stickbreaking.__name__)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(softcap=2.0), NotImplementedError, "no soft cap"),
        (dict(s_aux=torch.zeros(4)), NotImplementedError, "no sinks"),
        (dict(position_bias=torch.zeros(1, 4, 5, 5)), NotImplementedError, "no position bias"),
        (dict(attention_mask=torch.full((1, 1, 5, 5), 0.5)), NotImplementedError, "no position bias"),
        (dict(attention_mask=torch.ones(1, 1, 5, 4).bool()), ValueError, "must broadcast"),
        (dict(is_causal=False), NotImplementedError, "it is causal"),
        (dict(dropout=0.1), NotImplementedError, "attention_dropout to 0"),
        (dict(output_attentions=True), ValueError, "eager"),
        (dict(cache=object()), NotImplementedError, "continuous batching"),
        (dict(rel_scale=2.0), NotImplementedError, "rel_scale"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        stickbreaking(Layer(), *qkv(), **{"attention_mask": None, **change})


@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_models_with_modifiers_are_refused(name):
    with pytest.raises(NotImplementedError, match="soft cap|sinks"):
        causal(name, NAME)(torch.ones(1, 4, dtype=torch.long))


def test_bidirectional_models_are_refused():
    model = tf.BertModel._from_config(
        tf.BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4),
        attn_implementation=NAME,
    ).eval()
    for mask in (None, torch.tensor([[1, 1, 1, 0]])):
        with pytest.raises(NotImplementedError, match="it is causal"):
            model(torch.ones(1, 4, dtype=torch.long), attention_mask=mask)
    with pytest.raises(NotImplementedError, match="it is causal"):
        stickbreaking_mask(1, 4, 4, mask_function=tf.masking_utils.bidirectional_mask_function)


def prefix(b, h, i, j):
    return j < 2


@pytest.mark.parametrize("use_vmap", [False, True])
def test_dense_masks_that_see_the_future_are_refused(use_vmap):
    masking = tf.masking_utils
    causal_too = masking.or_masks(masking.causal_mask_function, prefix)
    kw = dict(device="cpu", use_vmap=use_vmap)
    with pytest.raises(NotImplementedError, match="keys behind them.*it is causal"):
        stickbreaking_mask(1, 4, 4, mask_function=causal_too, **kw)
    later = stickbreaking_mask(1, 4, 9, q_offset=3, mask_function=causal_too, **kw)  # the prefix lies behind
    assert torch.equal(later[0, 0], torch.ones(4, 9).tril(3).bool())
    far = masking.or_masks(masking.causal_mask_function, lambda b, h, i, j: j < 6)
    for offset in (3, torch.tensor(3)):
        with pytest.raises(NotImplementedError, match="keys behind them"):
            stickbreaking_mask(1, 4, 9, q_offset=offset, mask_function=far, **kw)
    odd = masking.and_masks(masking.causal_mask_function, lambda b, h, i, j: j != 1)
    assert stickbreaking_mask(1, 4, 4, mask_function=odd, **kw).shape == (1, 1, 4, 4)
    model = causal("Llama", NAME)
    with pytest.raises(NotImplementedError, match="keys behind them"):
        masking.create_causal_mask(
            model.config, torch.zeros(1, 4, 32), attention_mask=None, past_key_values=None, or_mask_function=prefix
        )


def test_dense_masks_of_the_caller_that_see_the_future_are_refused():
    q, k, v = qkv(5, 7)
    seen = lower(5, 7)[:1, None] | (torch.arange(7) < 5)
    ids, model = torch.arange(3, 8)[None], causal("Llama", NAME)
    for mask in (seen, torch.zeros(1, 1, 5, 7).masked_fill(~seen, -torch.inf), torch.ones(1, 1, 1, 7).bool()):
        with pytest.raises(NotImplementedError, match="keys behind them.*it is causal"):
            stickbreaking(Layer(), q, k, v, mask)
    with pytest.raises(NotImplementedError, match="keys behind them"):
        model(ids, attention_mask=torch.ones(1, 1, 5, 5).bool())
    dense = lower(5, 5)[:1, None]
    assert (model(ids, attention_mask=dense).logits - model(ids).logits).abs().max() <= 1e-5
    assert (stickbreaking(Layer(), q[:, :, :1], k, v, torch.ones(1, 1, 1, 7).bool())[0]).isfinite().all()


def test_16_bits_and_autocast():
    exact, _ = stickbreaking(Layer(), *qkv(), None)
    for dtype in (torch.bfloat16, torch.float16):
        out, _ = stickbreaking(Layer(), *qkv(dtype=dtype), None)
        assert out.dtype == dtype and (out - exact).abs().max() < 2e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stickbreaking(Layer(), *qkv(dtype=torch.float32), None)[0].dtype == torch.bfloat16


def test_a_model_compiles_without_a_break():
    model = causal("Llama", NAME)
    ids = torch.randint(3, 96, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits
        assert (logits - model(ids, attention_mask=mask, use_cache=False).logits)[mask.bool()].abs().max() <= 1e-5


def test_the_kernels_themselves_in_a_model(monkeypatch):
    from hfext_stickbreaking._launch import launches

    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = tf.LlamaConfig(**TEXT | {"num_hidden_layers": 1})
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM._from_config(config, attn_implementation=NAME)
    ids, mask = torch.arange(3, 23).view(2, 10), torch.tensor([[0] * 3 + [1] * 7, [1] * 10])
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        before = launches.copy()
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        count = launches - before
        assert bool(count["stickbreaking_key_gradient"]) == kernels == bool(count["stickbreaking_forward"])
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    assert (found[0][0] - found[1][0]).abs() <= 1e-5
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).abs().max() <= 1e-5
