"""The attention function by itself: what it takes, what it refuses, autocast, compilation, training and saving."""

import pytest
import torch
import transformers
from attention_cases import TEXT, causal
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hfext.attention.hfext_triton import triton_attention


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def qkv(m=5, n=5, dtype=torch.float32):
    torch.manual_seed(0)
    return tuple(torch.randn(2, h, t, 8).to(dtype) for h, t in ((4, m), (2, n), (2, n)))


def same(a, b):
    assert a[1] is None and (a[0] - b[0]).abs().max() <= 1e-6
    assert a[0].is_contiguous()


@pytest.mark.parametrize("m, n", [(5, 5), (1, 7), (3, 7), (4, 1)])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_without_a_mask_it_means_what_transformers_means(m, n, is_causal):
    if m > n and is_causal is not False:
        pytest.skip("torch gives NaN to queries without keys")
    arguments = (Layer(), *qkv(m, n), None)
    same(triton_attention(*arguments, is_causal=is_causal), sdpa_attention_forward(*arguments, is_causal=is_causal))


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 1, 5, 7), (2, 4, 5, 7), (2, 1, 1, 7)])
def test_masks_of_four_dimensions(shape):
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    for given in (mask, torch.where(mask, 0.5, -1e4)):
        same(
            triton_attention(Layer(), *qkv(5, 7), given),
            sdpa_attention_forward(Layer(), *qkv(5, 7), given.expand(2, -1, 5, 7)),
        )


def test_bias_beside_a_mask_and_behind_a_static_cache():
    bias = torch.randn(1, 4, 3, 7)
    same(
        triton_attention(Layer(), *qkv(3, 7), None, position_bias=bias),
        sdpa_attention_forward(Layer(), *qkv(3, 7), None, position_bias=bias),
    )
    mask = torch.rand(2, 1, 3, 7) > 0.3
    mask[..., 0] = True
    same(
        triton_attention(Layer(), *qkv(3, 7), mask, position_bias=bias),
        sdpa_attention_forward(Layer(), *qkv(3, 7), mask, position_bias=bias),
    )
    added = torch.randn(2, 1, 3, 7)
    same(
        triton_attention(Layer(), *qkv(3, 7), added, position_bias=bias),
        sdpa_attention_forward(Layer(), *qkv(3, 7), added, position_bias=bias),
    )


def test_a_window_without_a_mask_holds():
    q, k, v = qkv(6, 6)
    near = torch.ones(6, 6).tril().triu(-1).bool()[None, None]
    same(
        triton_attention(Layer(), q, k, v, None, sliding_window=2),
        sdpa_attention_forward(Layer(), q, k, v, near.expand(2, 1, 6, 6)),
    )


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(output_attentions=True), ValueError, "attn_implementation='eager'"),
        (dict(cache=object()), NotImplementedError, "continuous batching"),
        (dict(indices=torch.zeros(2)), NotImplementedError, "passes indices to its attention"),
        (dict(rel_scale=2.0), NotImplementedError, "rel_scale"),
        (dict(rel_bias=[1.0]), NotImplementedError, "rel_bias"),
        (dict(use_alibi=True), NotImplementedError, "use_alibi"),
        (dict(score_mod=max), NotImplementedError, "score_mod"),
        (dict(mode="x"), NotImplementedError, "mode"),
        (dict(softcap=-1.0), ValueError, "softcap is -1.0"),
        (dict(dropout=1.5), ValueError, "dropout_p is 1.5"),
        (dict(s_aux=torch.zeros(3)), ValueError, "sink is"),
        (dict(sliding_window=0), ValueError, "window is 0"),
        (dict(position_bias=torch.zeros(1, 3, 5, 5)), ValueError, "bias is"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_arguments(change, error, words):
    with pytest.raises(error, match=words):
        triton_attention(Layer(), *qkv(), None, **change)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 5).bool(), torch.ones(2, 1, 5, 4).bool(), torch.ones(3, 1, 5, 5), torch.ones(2, 3, 5, 5)]
)
def test_masks_of_a_wrong_shape(mask):
    with pytest.raises(ValueError, match="must broadcast to"):
        triton_attention(Layer(), *qkv(), mask)


def test_masks_that_are_neither_boolean_nor_added():
    with pytest.raises(ValueError, match="attention_mask is torch.int64"):
        triton_attention(Layer(), *qkv(), torch.ones(2, 1, 5, 5).long())
    model = causal("Llama", "hfext_triton")
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 4, 4\) but must be \[batch, keys\]"):
        model(torch.ones(2, 4, dtype=torch.long), attention_mask=torch.zeros(2, 4, 4))


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min])
def test_added_masks_of_padded_rows_train_by_the_kernels(least, monkeypatch):
    model = causal("Llama", "hfext_triton")
    ids = torch.randint(3, 96, (2, 40))
    seen = torch.ones(40, 40).tril().bool()[None, None].repeat(2, 1, 1, 1)
    seen[0, :, :, :35] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, least)
    losses = []
    for interpret in (False, True):
        if interpret:
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        model.zero_grad()
        logits = model(ids, attention_mask=mask).logits
        loss = logits[:, 35:].square().mean()
        loss.backward()
        losses.append((logits[:, 35:].detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    for a, b in zip(*losses, strict=True):
        assert a.isfinite().all() and (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "tensors, error, words",
    [
        (tuple(x.int() for x in qkv()), TypeError, "must share one of"),
        ((qkv()[0].half(), *qkv()[1:]), TypeError, "must share one of"),
        (tuple(torch.zeros(1, 2, 3, 300) for _ in range(3)), ValueError, "Head sizes 300"),
        ((torch.zeros(1, 3, 3, 8), *(torch.zeros(1, 2, 3, 8),) * 2), ValueError, "not a multiple"),
        ((torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, 8)), ValueError, "do not fit"),
    ],
    ids=["integers", "mixed", "wide", "heads", "lengths"],
)
def test_bad_tensors(tensors, error, words):
    with pytest.raises(error, match=words):
        triton_attention(Layer(), *tensors, None)


def test_harmless_arguments_are_taken():
    q, k, v = qkv()
    out = triton_attention(
        Layer(), q, k, v, None, position_ids=torch.arange(5), use_cache=True, cu_seq_lens_q=None, max_length_q=5,
        output_attentions=False, num_items_in_batch=torch.tensor(3), something=None, flag=False,
    )  # fmt: skip
    same(out, triton_attention(Layer(), q, k, v, None))


def test_autocast_decides_the_type_of_products():
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = triton_attention(Layer(), q, k.bfloat16(), v, None)
    assert out.dtype == torch.bfloat16
    expected, _ = triton_attention(Layer(), *(x.bfloat16() for x in (q, k, v)), None)
    assert torch.equal(out, expected)


def test_fp64_and_16_bits_on_the_plain_path():
    exact, _ = triton_attention(Layer(), *qkv(dtype=torch.float64), None)
    for dtype in (torch.bfloat16, torch.float16):
        out, _ = triton_attention(Layer(), *(x.to(dtype) for x in qkv()), None)
        assert out.dtype == dtype and (out - exact).abs().max() < 2e-2
    assert exact.dtype == torch.float64


def test_from_pretrained_by_name_and_changed_later(tmp_path):
    causal("Llama", "eager").save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hfext_triton")
    ids = torch.randint(3, 96, (2, 6))
    first = ours(ids).logits
    ours.set_attn_implementation("eager")
    assert (first - ours(ids).logits).abs().max() <= 1e-5
    ours.set_attn_implementation("hfext_triton")
    assert torch.equal(first, ours(ids).logits)
    ours.save_pretrained(tmp_path / "again")
    assert "hfext" not in (tmp_path / "again" / "config.json").read_text()


def test_weights_that_are_asked_for(tmp_path):
    model = causal("Llama", "hfext_triton")
    with pytest.raises(ValueError, match="eager"):
        model(torch.ones(1, 4, dtype=torch.long), output_attentions=True)


def test_continuous_batching_is_refused():
    model = causal("Llama", "hfext_triton")
    with pytest.raises(Exception, match="attn_implementation|attention implementation|paged|flash|sdpa"):
        model.generate_batch([[1, 2, 3]], generation_config=transformers.GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_equals_that_of_eager_attention(tmp_path, checkpointing):
    rows = [{"input_ids": [1, *range(3 + i, 10 + i)], "labels": [1, *range(3 + i, 10 + i)]} for i in range(8)]
    losses = []
    for implementation in ("eager", "hfext_triton"):
        model = causal("Gemma2", implementation)
        arguments = TrainingArguments(
            tmp_path, max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", seed=1,
            logging_steps=1, save_strategy="no", use_cpu=True, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][-1] < losses[0][0]
    assert torch.allclose(*torch.tensor(losses), atol=1e-4, rtol=0)


def test_dropout_is_redrawn_alike_under_checkpointing():
    config = transformers.LlamaConfig(**TEXT, attention_dropout=0.5)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="hfext_triton").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(torch.arange(3, 12)[None], labels=torch.arange(3, 12)[None]).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*grads)


def test_a_model_compiles_without_a_break():
    model = causal("Gemma2", "hfext_triton")
    ids = torch.randint(3, 96, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits
        assert (logits - model(ids, attention_mask=mask, use_cache=False).logits)[mask.bool()].abs().max() <= 1e-5
