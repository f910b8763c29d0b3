"""RotateKV: codes against an independent computation, orders, sinks, the fused form, ablations and bad input."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
import transformers
from kv_cache_cases import MODELS, data

from hfext import kv_cache
from hfext.kv_cache import RotateKVConfig
from hfext.kv_cache._calibration import watch
from hfext.kv_cache._sinks import massive_tokens


def prompt(rows=2, tokens=40, seed=5):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def filled(model, config, ids, mask=None):
    cache = config.make_cache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def pre_rope(model, ids):
    """Keys before the rotary embedding from k_proj itself, and values: [layers][batch, tokens, channels]."""
    found = {"k": {}, "v": {}}
    handles = []
    for index, layer in enumerate(model.model.layers):
        for kind in found:
            module = getattr(layer.self_attn, f"{kind}_proj")
            handles.append(
                module.register_forward_hook(lambda m, a, out, i=index, k=kind: found[k].__setitem__(i, out))
            )
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found["k"], found["v"]


def numpy_round_trip(y, bits, group, clip):
    """Q of the card, group by group."""
    out = np.empty_like(y, dtype=np.float64)
    for row in np.ndindex(y.shape[:-1]):
        for start in range(0, y.shape[-1], group):
            x = y[row][start : start + group].astype(np.float64)
            top, bottom = clip * x.max(), clip * x.min()
            scale = (top - bottom) / (2**bits - 1)
            zero = np.round(-bottom / scale)
            out[row][start : start + group] = scale * (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero)
    return out


@pytest.mark.parametrize("reorder", ["after", "none"])
def test_stored_keys_and_values_are_those_of_the_formula(reorder):
    """Independent of our transforms: scipy's Hadamard matrix, keys from k_proj, the model's own rotary embedding."""
    model = MODELS["llama"]()
    ids = prompt()
    config = RotateKVConfig(bits=4, group_size=8, sink_topk=0, reorder=reorder)
    config = config if reorder == "none" else config.calibrate(model, data())
    cache = filled(model, config, ids)
    keys, values = pre_rope(model, ids)
    cos, sin = model.model.rotary_emb(keys[0], torch.arange(ids.shape[1])[None])
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    hadamard = {n: scipy.linalg.hadamard(n) / np.sqrt(n) for n in (8, 16)}
    for index in range(3):
        y = keys[index].numpy() @ hadamard[16]  # two heads of 8 together
        order = np.arange(16) if reorder == "none" else config.calibration.layer(index, "key_order").numpy()
        back = np.empty_like(y)
        back[..., order] = numpy_round_trip(y[..., order], 4, 8, 1.0)
        want = torch.tensor(back @ hadamard[16].T).float().unflatten(-1, (2, 8)).transpose(1, 2)
        want = apply_rotary_pos_emb(want, want, cos, sin)[0]
        v = values[index].numpy().reshape(2, -1, 2, 8) @ hadamard[8]
        want_v = torch.tensor(numpy_round_trip(v, 4, 8, 1.0) @ hadamard[8].T).float().transpose(1, 2)
        got, got_v = cache.layers[index].decompressed()
        # The stored scale is rounded up to fp16, and a value at the edge of two cells may fall into the other.
        assert (got - want).abs().mean() < 8e-3 * want.abs().mean()
        assert (got_v - want_v).abs().mean() < 8e-3 * want_v.abs().mean()


def test_order_sorts_the_signed_means_of_rotated_keys():
    model = MODELS["llama"]()
    config = RotateKVConfig(bits=2, group_size=8).calibrate(model, data())
    total = [torch.zeros(16, dtype=torch.float64) for _ in range(3)]
    for row in data():
        keys, _ = pre_rope(model, row[None])
        for index in range(3):
            turned = keys[index][0, 1:].double() @ torch.tensor(scipy.linalg.hadamard(16) / 4.0)
            total[index] += turned.sum(0)
    for index in range(3):
        assert torch.equal(config.calibration.layer(index, "key_order").long(), total[index].argsort(stable=True))


def test_calibration_ignores_padding():
    model = MODELS["llama"]()
    ids = data(rows=2, tokens=40)
    padded = torch.cat([torch.zeros(2, 9, dtype=ids.dtype), ids], dim=1)
    mask = (torch.arange(49) >= 9).long().expand(2, -1)
    config = RotateKVConfig(bits=2, group_size=8, subtract_mean=True)
    one = config.calibrate(model, ids).calibration
    other = config.calibrate(model, {"input_ids": padded, "attention_mask": mask}).calibration
    assert one.tokens == other.tokens == 80
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, atol=1e-5, rtol=0)


def test_without_calibration_the_order_is_that_of_the_prompt():
    """Each row learns its own, and it is what calibration on that row gives."""
    model = MODELS["llama"]()
    ids = prompt(tokens=48)
    config = RotateKVConfig(bits=2, group_size=8)
    cache = filled(model, config, ids)
    for row in range(2):
        calibrated = config.calibrate(model, ids[row : row + 1]).calibration
        for layer in cache.layers:
            assert torch.equal(layer.held["order"][row].int(), calibrated.layer(layer.layer_idx, "key_order"))


def test_short_prompt_waits_for_enough_tokens_to_learn_from():
    model = MODELS["llama"]()
    cache = filled(model, RotateKVConfig(bits=2, group_size=8), prompt(tokens=20))
    assert cache.layers[0].num_coded("key") == 0
    with torch.no_grad():
        model(prompt(tokens=12, seed=1), past_key_values=cache)
    assert cache.layers[0].num_coded("key") == 32


def test_identity_settings_are_plain_quantisation_of_each_token():
    model = MODELS["llama"]()
    ids = prompt()
    config = RotateKVConfig(bits=4, group_size=8, rotation="none", reorder="none", sink_topk=0)
    got, _ = filled(model, config, ids).layers[1].decompressed()
    keys, _ = pre_rope(model, ids)
    plain = torch.tensor(numpy_round_trip(keys[1].numpy(), 4, 8, 1.0)).float().unflatten(-1, (2, 8)).transpose(1, 2)
    cos, sin = model.model.rotary_emb(keys[0], torch.arange(ids.shape[1])[None])
    half = torch.cat([-plain[..., 4:], plain[..., :4]], dim=-1)
    assert (got - (plain * cos[:, None] + half * sin[:, None])).abs().mean() < 8e-3 * plain.abs().mean()


def test_scores_are_unchanged_without_quantisation():
    """Rotation, order and their inverses alone: 16-bit codes give the attention scores of plain keys."""
    model = MODELS["llama"]()
    ids = prompt()
    cache = filled(model, RotateKVConfig(bits=16, group_size=8).calibrate(model, data()), ids)
    plain = filled_plain(model, ids)
    q = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    for layer, (keys, _) in zip(cache.layers, plain, strict=True):
        got = q @ layer.decompressed()[0].transpose(2, 3)
        torch.testing.assert_close(got, q @ keys.transpose(2, 3), atol=3e-5, rtol=0)


def filled_plain(model, ids):
    with torch.no_grad():
        return [(layer.keys, layer.values) for layer in model(ids, use_cache=True).past_key_values.layers]


def test_massive_tokens_by_hand():
    x = torch.zeros(2, 5, 4)
    x[0, 1, 2], x[0, 3, 0], x[0, 3, 1], x[0, 4, 3] = -9.0, 5.0, 4.0, 3.0
    x[1, 0, 0], x[1, 2, 2] = 100.0, 1.0
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    assert massive_tokens(x, 3, real)[0].tolist() == [False, True, False, True, False]
    assert massive_tokens(x, 1, real)[1].tolist() == [False, False, True, False, False]
    assert massive_tokens(x, 1, None)[1].tolist() == [True, False, False, False, False]


def test_sinks_are_exact_and_the_others_are_not():
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.embed_tokens.weight[77, 3] = 40.0  # a token whose input is massive in layer 0
    ids = prompt()
    ids[0, 6] = ids[0, 30] = ids[1, 13] = ids[1, 20] = 77
    cache = filled(model, RotateKVConfig(bits=2, group_size=8, sink_topk=2), ids)
    keys, values = cache.layers[0].decompressed()
    want, want_values = filled_plain(model, ids)[0]
    kept = torch.zeros(2, 40, dtype=torch.bool)
    kept[0, 6] = kept[0, 30] = kept[1, 13] = kept[1, 20] = True
    exact = (keys == want).all(-1).all(1) & (values == want_values).all(-1).all(1)
    assert torch.equal(exact, kept)
    index = cache.layers[0].held["sinks_index"]
    assert index.tolist() == [[6, 30], [13, 20]]
    cache.crop(-25)
    assert cache.layers[0].held["sinks_index"].tolist() == [[6, -1], [13, -1]]
    assert cache.layers[0].decompressed()[0].shape[2] == 15


def test_a_sink_that_was_taken_back_does_not_come_back():
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.embed_tokens.weight[77, 3] = 40.0
    ids = prompt()
    ids[:, 35] = 77
    config = RotateKVConfig(bits=2, group_size=8, sink_topk=1)
    cache = filled(model, config, ids)
    cache.crop(-5)  # the sink is the first of the tokens that leave
    with torch.no_grad():
        model(prompt(tokens=3, seed=8), past_key_values=cache)
    assert cache.layers[0].held["sinks_index"][:, 0].tolist() == [-1, -1]


def test_sinks_are_looked_for_in_decoding_only_when_asked_for():
    model = MODELS["llama"]()
    ids = prompt()
    for looks in (False, True):
        cache = filled(model, RotateKVConfig(bits=2, group_size=8, sink_topk=1, detect_in_decode=looks), ids)
        with torch.no_grad():
            model(ids[:, :1], past_key_values=cache)
        assert (cache.layers[0].held["sinks_index"] == 40).any() == looks


def test_padding_does_not_count_as_text_to_learn_from():
    model = MODELS["llama"]()
    ids, mask = prompt(tokens=50), torch.ones(2, 50, dtype=torch.long)
    ids[1, :20], mask[1, :20] = 0, 0  # 30 real tokens
    cache = filled(model, RotateKVConfig(bits=2, group_size=8), ids, mask)
    assert "order" not in cache.layers[0].held and cache.layers[0].num_coded("key") == 0


def test_order_is_the_same_with_padding():
    model = MODELS["llama"]()
    ids, mask = prompt(tokens=60), torch.ones(2, 60, dtype=torch.long)
    ids[1, :20], mask[1, :20] = 0, 0
    padded = filled(model, RotateKVConfig(bits=2, group_size=8), ids, mask)
    alone = filled(model, RotateKVConfig(bits=2, group_size=8), ids[1:, 20:])
    assert torch.equal(padded.layers[0].held["order"][1:], alone.layers[0].held["order"])


def test_padding_is_never_a_sink():
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 40.0
    ids, mask = prompt(tokens=44), torch.ones(2, 44, dtype=torch.long)
    ids[1, :6], mask[1, :6] = 0, 0
    cache = filled(model, RotateKVConfig(bits=2, group_size=8, sink_topk=2), ids, mask)
    assert (cache.layers[0].held["sinks_index"][1] >= 6).any()
    assert not ((cache.layers[0].held["sinks_index"][1] >= 0) & (cache.layers[0].held["sinks_index"][1] < 6)).any()


def test_fused_values_are_the_same_function_and_the_same_codes(tmp_path):
    model = MODELS["llama"](attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.normal_()
    ids = prompt()
    config = RotateKVConfig(bits=3, group_size=8).calibrate(model, data())
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    online = filled(model, config, ids)
    fused_config = kv_cache.fuse_values(model, config)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain, atol=1e-5, rtol=0)
    fused = filled(model, fused_config, ids)
    for a, b in zip(online.layers, fused.layers, strict=True):
        differ = (a.held["value_codes"] != b.held["value_codes"]).float().mean()
        assert differ < 0.01  # an entry at the edge of two cells
    more = prompt(tokens=3, seed=9)
    with torch.no_grad():
        got, want = (model(more, past_key_values=c).logits for c in (fused, filled(model, fused_config, ids)))
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="already"):
        kv_cache.fuse_values(model, fused_config)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    gated = transformers.BitNetForCausalLM(transformers.BitNetConfig(**sizes, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for layer in gated.model.layers:
            layer.self_attn.attn_sub_norm.weight.uniform_(0.5, 2)
    before = [x.clone() for x in gated.parameters()]
    with pytest.raises(NotImplementedError, match="nothing was changed"):
        kv_cache.fuse_values(gated, RotateKVConfig())
    assert all(torch.equal(a, b) for a, b in zip(before, gated.parameters(), strict=True))
    with pytest.raises(NotImplementedError, match="v_proj"):
        kv_cache.fuse_values(MODELS["phi3"](), config)


def test_quantised_prompt_when_asked_for():
    model = MODELS["llama"]()
    ids = prompt()
    config = RotateKVConfig(bits=2, group_size=8).calibrate(model, data())
    exact = model(ids, past_key_values=config.make_cache(model)).logits
    coarse = model(ids, past_key_values=dataclasses.replace(config, prefill_exact=False).make_cache(model)).logits
    torch.testing.assert_close(exact, model(ids, use_cache=False).logits, atol=1e-5, rtol=0)
    assert (coarse - exact).abs().max() > 1e-3


def test_bytes_are_those_of_the_formula():
    model = MODELS["llama"](num_key_value_heads=4, hidden_size=64).to(torch.bfloat16)  # 4 heads of 16: 64 channels
    ids = prompt(tokens=64)
    config = RotateKVConfig(bits=2, group_size=32, sink_topk=0).calibrate(model, data())
    cache = filled(model, config, ids)
    keys = 64 * 2 // 8 + 2 * (2 + 2)  # codes, then scale and zero of two groups
    values = 64 * 2 // 8 + 4 * (2 + 2)  # a group a head
    assert cache.nbytes() == 3 * 2 * 64 * (keys + values) + 4 * 64  # and one int32 position a token


def test_a_rotation_that_a_model_does_not_allow_is_refused():
    dynamic = MODELS["llama"](rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="rope_type 'dynamic'"):
        RotateKVConfig().make_cache(dynamic)
    assert RotateKVConfig(rotation="post_rope").make_cache(dynamic) is not None


@pytest.mark.parametrize(
    "options, told",
    [
        ({"bits": 5}, "bits is 5 but must be one of 2, 3, 4, 8, 16"),
        ({"clip": 0.0}, r"clip is 0.0 but must be in \(0, 1\]"),
        ({"clip": 1.5}, "clip is 1.5"),
        ({"reorder": "later"}, "reorder is 'later'"),
        ({"sink_topk": -1}, "sink_topk is -1"),
        ({"residual_length": -1}, "residual_length is -1"),
        ({"bits": "2"}, "bits is '2' but must be int"),
    ],
)
def test_bad_options_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        RotateKVConfig(**options)


def test_group_size_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="group_size is 12 but must divide the 16 key channels"):
        RotateKVConfig(group_size=12).make_cache(MODELS["llama"]())


def test_calibration_made_with_other_options_is_refused():
    model = MODELS["llama"]()
    config = RotateKVConfig(bits=2, group_size=8).calibrate(model, data())
    dataclasses.replace(config, bits=4, clip=0.9).make_cache(model)
    with pytest.raises(ValueError, match="head_group 4 and not 1"):
        dataclasses.replace(config, head_group=1).make_cache(model)


@pytest.mark.parametrize(
    "text, told",
    [
        (torch.ones(2, 3, 4, dtype=torch.long), r"torch.int64 \[2, 3, 4\]"),
        (torch.ones(2, 8), "torch.float32"),
        (torch.ones(3, 1, dtype=torch.long), "no token behind the first"),
        ([], "no text"),
        ("some text", "must be token ids"),
    ],
)
def test_data_that_teaches_nothing_is_named(text, told):
    with pytest.raises((ValueError, TypeError), match=told):
        RotateKVConfig(group_size=8).calibrate(MODELS["llama"](), text)


def test_order_that_is_none_is_refused(tmp_path):
    model = MODELS["llama"]()
    config = RotateKVConfig(bits=2, group_size=8).calibrate(model, data())
    config.calibration.tensors["1.key_order"][0] = config.calibration.tensors["1.key_order"][1]
    with pytest.raises(ValueError, match="not an order"):
        config.make_cache(model)


def test_watching_leaves_nothing_on_the_model():
    model = MODELS["llama"]().train()
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    watch(model, data(), lambda seen: None)
    assert model.training and sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
