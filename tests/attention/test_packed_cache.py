"""A compressed cache read by the kernels as it is stored: tokens of the cache made whole, which is never made."""

import pytest
import torch
from attention_cases import causal

import hfext
from hfext.kv_cache import KIVIConfig
from hfext.kv_cache._codec_layer import CodecLayer

PAD = torch.tensor([[0, 0, 0, *[1] * 10], [1] * 13])


def tokens(model, config, **kw):
    torch.manual_seed(2)
    ids = torch.randint(3, 96, PAD.shape) * PAD
    hfext.kv_cache.apply(model, config)
    try:
        out = model.generate(
            ids, attention_mask=PAD, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True, **kw,
        )  # fmt: skip
    finally:
        hfext.kv_cache.remove(model)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name, bits", [("Llama", 2), ("GptOss", 3), ("Gemma2", 4), ("Llama", 8)])
def test_generate_reads_codes(name, bits, monkeypatch):
    from hfext_attention._launch import launches

    model = causal(name, "sdpa" if name == "Llama" else "eager")
    config = KIVIConfig(bits=bits, group_size=4, residual_length=4)
    expected, logits = tokens(model, config)
    ours = causal(name, "hfext_triton")
    ours.load_state_dict(model.state_dict())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = []
    decoded = CodecLayer._decoded
    monkeypatch.setattr(CodecLayer, "_decoded", lambda *a, **kw: made.append(a[3]) or decoded(*a, **kw))
    before = launches.copy()
    got, got_logits = tokens(ours, config)
    assert (launches - before)["attention_packed"] >= 3 and not any(made)
    assert torch.equal(got, expected) and (got_logits - logits).abs().max() <= 1e-4


def test_the_plain_path_makes_the_cache_whole():
    model = causal("Llama", "hfext_triton")
    config = KIVIConfig(bits=4, group_size=4, residual_length=4)
    got, logits = tokens(model, config)
    model.set_attn_implementation("eager")
    expected, others = tokens(model, config)
    assert torch.equal(got, expected) and (logits - others).abs().max() <= 1e-4


@pytest.mark.slow
def test_beams(monkeypatch):
    model = causal("Llama", "hfext_triton")
    config = KIVIConfig(bits=4, group_size=4, residual_length=4)
    expected, _ = tokens(model, config, num_beams=2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    got, _ = tokens(model, config, num_beams=2)
    assert torch.equal(got, expected)


def test_other_code_gets_the_whole_tensor():
    from hfext_attention import PackedStates, packed_attention

    whole = torch.randn(1, 2, 5, 8)
    states = PackedStates(whole, lambda: whole)
    assert states.shape == whole.shape and states.dtype == whole.dtype
    assert torch.equal(states * 2, whole * 2) and torch.equal(
        torch.cat([states, states], 2), torch.cat([whole] * 2, 2)
    )
    assert torch.equal(states[:, :, 1:3], whole[:, :, 1:3]) and "5 tokens" not in repr(states)
    with pytest.raises(ValueError, match="no gradient"):
        packed_attention(torch.randn(1, 2, 1, 8, requires_grad=True), states, states)
    with pytest.raises(ValueError, match="bits is 5"):
        PackedStates(whole, lambda: whole, bits=5)
