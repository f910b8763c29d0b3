"""`hfext_spark` and `hfext_topk` in models: the formula, padding, caches, training, saving, and what they refuse."""

import copy

import pytest
import torch
import transformers as tf
from attention_cases import TEXT, causal
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hfext.attention.spark import METHOD, spark_attention, topk_attention

PAD = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 10, [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
NAMES = ("hfext_spark", "hfext_topk")


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 2

    def __init__(self, **options):
        super().__init__()
        self.config = tf.LlamaConfig(**TEXT)
        if options:
            self.config.spark_attention = options


def qkv(m=5, n=5, D=8):
    return tuple(torch.randn(2, h, t, D) for h, t in ((4, m), (2, n), (2, n)))


def by_hand(q, k, v, seen, places, topk, gate=True, factor=1.0, unbiased=True):
    """The formula, query by query; seen [batch, m, n]."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    D = q.shape[-1]
    others = [c for c in range(D) if c not in places]
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], D)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                visible = torch.nonzero(seen[b, i])[:, 0]
                if not len(visible):
                    continue
                s = k[b, h, visible][:, places] @ q[b, h, i, places] / len(places) ** 0.5 * factor
                if len(visible) > topk:
                    level = torch.special.ndtri(torch.tensor(1 - topk / len(visible)))
                    chosen = s >= torch.minimum(s.mean() + s.std(unbiased=unbiased) * level, s.max())
                    visible, s = visible[chosen], s[chosen]
                w = torch.softmax(s, 0)
                if gate:
                    t = k[b, h, visible][:, others] @ q[b, h, i, others] / len(others) ** 0.5 * factor
                    w = w * F.softplus(t)
                out[b, i, h] = w @ v[b, h, visible]
    return out


def make(name="Llama", implementation="hfext_spark", **options):
    model = causal(name, implementation)
    if options:
        model.config.spark_attention = options
    return model


def inputs():
    torch.manual_seed(2)
    return torch.randint(3, 96, PAD.shape) * PAD, PAD


@pytest.mark.parametrize("m, n", [(5, 5), (1, 9), (3, 7)])
def test_the_formula(m, n):
    q, k, v = qkv(m, n)
    seen = torch.ones(m, n).tril().bool() if m > 1 else torch.ones(1, n).bool()
    seen = seen.expand(2, m, n)
    for options, places in ((dict(r=4), [0, 1, 4, 5]), (dict(r=3, pairs="contiguous"), [0, 1, 2])):
        out, none = spark_attention(Layer(k=2, **options), q, k, v, None)
        assert none is None and out.is_contiguous()
        assert (out - by_hand(q, k, v, seen, places, 2)).abs().max() <= 1e-6
    out, _ = topk_attention(Layer(k=2), q, k, v, None)
    assert (out - by_hand(q, k, v, seen, [*range(8)], 2, gate=False)).abs().max() <= 1e-6


def test_the_deviation_divides_by_the_count_where_the_config_says_so():
    q, k, v = qkv(1, 9)
    q, k = q.expand(-1, -1, 40, -1) + 0.3 * torch.randn(2, 4, 40, 8), k.clone()
    seen = torch.ones(2, 40, 9).bool()
    mask = seen[:, None]
    both = {}
    for unbiased in (True, False):
        out, _ = topk_attention(Layer(k=2, unbiased=unbiased), q, k, v, mask)
        both[unbiased] = by_hand(q, k, v, seen, [*range(8)], 2, gate=False, unbiased=unbiased)
        assert (out - both[unbiased]).abs().max() <= 1e-6
    assert (both[True] - both[False]).abs().max() > 1e-2


@pytest.mark.parametrize("head_dim, r", [(4, 2), (6, 2), (8, 4), (10, 4)])
def test_the_default_r_keeps_pairs_together(head_dim, r):
    q, k, v = qkv(D=head_dim)
    out, _ = spark_attention(Layer(k=2), q, k, v, None)
    assert torch.equal(out, spark_attention(Layer(k=2, r=r), q, k, v, None)[0])
    contiguous, _ = spark_attention(Layer(k=2, pairs="contiguous"), q, k, v, None)
    same = spark_attention(Layer(k=2, r=head_dim // 2, pairs="contiguous"), q, k, v, None)[0]
    assert torch.equal(contiguous, same)


def test_defaults_and_the_scale_of_the_layer():
    q, k, v = qkv(4, 4)
    seen = torch.ones(2, 4, 4).tril().bool()
    out, _ = spark_attention(Layer(), q, k, v, None, scaling=0.5)
    assert (out - by_hand(q, k, v, seen, [0, 1, 4, 5], 256, factor=0.5 * 8**0.5)).abs().max() <= 1e-6
    assert torch.equal(
        spark_attention(Layer(), q, k, v, None, scaling=8**-0.5)[0], spark_attention(Layer(), q, k, v, None)[0]
    )


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 1, 5, 7), (2, 4, 5, 7), (2, 1, 1, 7)])
def test_boolean_masks_of_four_dimensions(shape):
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    arguments = (Layer(k=99), *qkv(5, 7))
    ours = topk_attention(*arguments, mask)[0]
    assert (ours - sdpa_attention_forward(*arguments, mask.expand(2, -1, 5, 7))[0]).abs().max() <= 1e-6


def test_enough_keys_make_topk_eager_attention():
    for name in ("Llama", "Mistral", "Qwen3", "GPT2", "Gemma3"):
        eager, ours = make(name, "eager"), make(name, "hfext_topk", k=99)
        ours.load_state_dict(eager.state_dict())
        ids, mask = inputs()
        with torch.no_grad():
            for padding in (mask, mask.flip(1)):
                a, b = (model(ids, attention_mask=padding).logits for model in (eager, ours))
                assert (a - b)[padding.bool()].abs().max() <= 1e-5
        kw = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(*(model.generate(ids, attention_mask=mask, **kw) for model in (eager, ours)))


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPTNeoX"])
def test_padding_and_caches_change_nothing(name, implementation):
    model = make(name, implementation, k=3)
    ids, mask = inputs()
    with torch.no_grad():
        alone = model(ids[:1, 4:]).logits
        assert (model(ids, attention_mask=mask).logits[:1, 4:] - alone).abs().max() <= 1e-5
        cached = model(ids[1:2, :6], use_cache=True)
        rest = model(ids[1:2, 6:], past_key_values=cached.past_key_values).logits
        assert (rest - model(ids[1:2]).logits[:, 6:]).abs().max() <= 1e-5
    kw = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    batch = model.generate(ids, attention_mask=mask, **kw)
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", **kw)
    assert torch.equal(batch, static) and torch.equal(batch[0, 10:], model.generate(ids[:1, 4:], **kw)[0, 6:])
    steps = model.generate(ids[1:2], output_logits=True, return_dict_in_generate=True, **kw)
    whole = model(steps.sequences).logits[:, 9:-1]
    assert (torch.stack(steps.logits, 1) - whole).abs().max() <= 1e-5


def test_k_matters_and_so_does_the_gate():
    ids, _ = inputs()
    few, more = make(k=2), make(k=99)
    with torch.no_grad():
        assert (few(ids).logits - more(ids).logits).abs().max() > 1e-4
        assert (more(ids).logits - make(implementation="hfext_topk", k=99)(ids).logits).abs().max() > 1e-4


@pytest.mark.parametrize("implementation", NAMES)
def test_training_with_gradient_checkpointing_and_dropout(implementation):
    ids, mask = inputs()
    labels = ids.masked_fill(mask == 0, -100)
    grads = []
    for checkpoint in (False, True):
        model = make(implementation=implementation, k=3).train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2
        if checkpoint:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all((a - b).abs().max() <= 1e-6 for a, b in zip(*grads, strict=True))
    assert all(g.isfinite().all() for g in grads[0]) and sum(g.abs().max() > 0 for g in grads[0]) > 10


def test_the_loss_falls():
    model = make(k=3).train()
    ids, _ = inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_config_is_saved_and_read(tmp_path):
    model = make(k=3, r=4)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hfext_spark")
    assert again.config.spark_attention == {"k": 3, "r": 4}
    ids, mask = inputs()
    with torch.no_grad():
        assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    built = tf.AutoModelForCausalLM.from_config(model.config, attn_implementation="hfext_topk")
    assert built.config._attn_implementation == "hfext_topk"


def test_both_names_have_masks():
    from transformers import AttentionMaskInterface

    assert all(name in AttentionMaskInterface._global_mapping for name in NAMES)


def test_bf16_and_autocast():
    ids, mask = inputs()
    model = make(k=3)
    with torch.no_grad():
        exact = model(ids, attention_mask=mask).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert model(ids, attention_mask=mask).logits.isfinite().all()
        low = copy.deepcopy(model).bfloat16()(ids, attention_mask=mask).logits
    assert low.dtype == torch.bfloat16 and (low.float() - exact)[mask.bool()].abs().mean() < 0.05


def test_the_kernels_themselves_in_a_model(monkeypatch):
    from hfext_spark._launch import launches

    ids, mask = inputs()
    ids, mask = ids[:2], mask[:2]
    kw = dict(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    results = []
    for kernel in (False, True):
        model = make(k=3)
        if kernel:
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        before = launches.copy()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        results.append([model.generate(ids, attention_mask=mask, **kw), *(p.grad for p in model.parameters())])
    assert torch.equal(results[0][0], results[1][0])
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(results[0][1:], results[1][1:], strict=True))
    ran = launches - before
    assert ran["spark_key_gradient"] == 2 and ran["spark_decode"] >= 2


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(k=0), r"spark_attention\['k'\] is 0"),
        (dict(k=2.5), r"\['k'\] is 2.5"),
        (dict(r=0), r"\['r'\] is 0 but must be an integer in \[1, 7\]"),
        (dict(r=8), r"\['r'\] is 8"),
        (dict(r=3), "both must be even"),
        (dict(pairs="odd"), "one of halves, contiguous"),
        (dict(unbiased=1), "must be true or false"),
        (dict(topk=3), "keys out of r, k, unbiased, pairs"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        spark_attention(Layer(**options), *qkv(), None)


@pytest.mark.parametrize("function", [spark_attention, topk_attention])
def test_what_is_refused(function):
    for name, value in (("softcap", 2.0), ("s_aux", torch.zeros(4)), ("position_bias", torch.zeros(1, 4, 5, 5))):
        with pytest.raises(NotImplementedError, match=f"{name} to its attention, which hfext_"):
            function(Layer(), *qkv(), None, **{name: value})
    with pytest.raises(NotImplementedError, match="boolean masks"):
        function(Layer(), *qkv(), torch.zeros(1, 1, 5, 5))
    with pytest.raises(NotImplementedError, match="continuous batching"):
        function(Layer(), *qkv(), None, cache=object())
    with pytest.raises(NotImplementedError, match="some_bias"):
        function(Layer(), *qkv(), None, some_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="eager"):
        function(Layer(), *qkv(), None, output_attentions=True)
    with pytest.raises(ValueError, match="must broadcast"):
        function(Layer(), *qkv(), torch.ones(2, 1, 4, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="share one of"):
        function(Layer(), *(x.half() if i else x for i, x in enumerate(qkv())), None)


def test_the_record():
    assert METHOD.name == "spark" and METHOD.arxiv == "2506.06644" and METHOD.difference
