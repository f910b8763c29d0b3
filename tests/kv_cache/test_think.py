import pytest
import torch
from kv_cache_cases import MODELS
from transformers import DynamicCache

from hfext import kv_cache
from hfext.kv_cache.think import ThinKConfig, channel_scores, kept_channels

PROMPT, PADS, WINDOW = 40, (0, 11), 6


def padded(tokens=PROMPT, pads=PADS, seed=9):
    ids = torch.randint(3, 128, (len(pads), tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count], ids[row, :count] = 0, 0
    return ids, mask


@torch.no_grad()
def filled(model, config, ids, mask, calls=None):
    cache = config.make_cache(model)
    cache.shared.prompt_length = ids.shape[1]
    start = 0
    for count in calls or (ids.shape[1],):
        stop = start + count
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
        start = stop
    cache.finish_prefill()
    return cache


def test_score_is_the_frobenius_norm_of_what_a_channel_adds_to_the_logits():
    g = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 6, 5, 8, generator=g), torch.randn(2, 3, 9, 8, generator=g)
    each = torch.einsum("bgmij,bgtj->bgmitj", queries.view(2, 3, 2, 5, 8), keys)
    torch.testing.assert_close(channel_scores(queries, keys), each.square().sum((2, 3, 4)) / 2)
    kept = kept_channels(torch.tensor([[[3.0, 1.0, 2.0, 3.0, 0.0]]]), 3)
    assert kept.tolist() == [[[0, 2, 3]]] and kept.dtype == torch.int16


@pytest.mark.parametrize("calls", [None, (20, 17, 3)])
def test_the_channels_that_matter_least_become_zero_and_nothing_else(calls):
    model = MODELS["llama"]()
    ids, mask = padded()
    cache = filled(model, ThinKConfig(ratio=0.4, window=WINDOW), ids, mask, calls)
    for row, pad in enumerate(PADS):
        plain, queries = DynamicCache(config=model.config), []
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda m, args, kwargs, to=queries: to.append((m, kwargs)), with_kwargs=True
            )
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(ids[row : row + 1, pad:], past_key_values=plain)
        for hook in hooks:
            hook.remove()
        for index, layer in enumerate(cache.layers):
            module, kwargs = queries[index]
            cos, sin = (x[0, -WINDOW:] for x in kwargs["position_embeddings"])
            q = module.q_proj(kwargs["hidden_states"])[0, -WINDOW:].view(WINDOW, 2, 2, 8)
            half = torch.cat([-q[..., 4:], q[..., :4]], -1)
            q = q * cos[:, None, None] + half * sin[:, None, None]
            keys = plain.layers[index].keys[0]
            score = torch.einsum("wgmj,gtj->gj", q.square(), keys.square())
            got = layer.keys[row, :, pad:]
            for head in range(2):
                dropped = score[head].argsort()[:3]  # floor(0.4 * 8)
                want = keys[head].clone()
                want[: PROMPT - pad - WINDOW, dropped] = 0
                torch.testing.assert_close(got[head], want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.values[row, :, pad:], plain.layers[index].values[0], atol=1e-5, rtol=1e-5)


def test_bytes_are_those_of_the_kept_channels():
    model = MODELS["llama"]()
    ids, mask = padded(pads=(0, 0))
    cache = filled(model, ThinKConfig(ratio=0.4, window=WINDOW), ids, mask)
    rows_heads, thin, whole = 3 * 2 * 2, PROMPT - WINDOW, WINDOW
    keys = thin * 5 * 4 + 5 * 2 + whole * 8 * 4
    assert cache.nbytes() == rows_heads * (keys + PROMPT * 8 * 4)


def test_many_pieces_are_decoded_as_one(monkeypatch):
    model = MODELS["llama"]()
    ids, mask = padded()
    cache = filled(model, ThinKConfig(ratio=0.4, window=WINDOW), ids, mask)
    want = [layer.keys.clone() for layer in cache.layers]
    monkeypatch.setattr("hfext.kv_cache._codec_layer.PIECE", 1)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, want, strict=True))


def test_a_prompt_within_the_window_stays_whole():
    model = MODELS["llama"]()
    ids, mask = padded(tokens=WINDOW, pads=(0,))
    cache = filled(model, ThinKConfig(ratio=0.4, window=WINDOW), ids, mask)
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=plain)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, plain.layers, strict=True))
    assert all(set(layer.held) == {"key_recent", "value_recent"} for layer in cache.layers)


def test_whole_tokens_can_be_taken_back_and_thin_ones_not():
    model = MODELS["llama"]()
    ids, mask = padded(pads=(0, 0))
    config = ThinKConfig(ratio=0.4, window=WINDOW)
    cache = filled(model, config, ids, mask)
    before = [layer.keys.clone() for layer in cache.layers]
    cache.crop(-WINDOW)
    assert all(torch.equal(layer.keys, keys[:, :, :-WINDOW]) for layer, keys in zip(cache.layers, before, strict=True))
    with pytest.raises(NotImplementedError, match="1 tokens cannot be taken back: only the last 0"):
        cache.crop(-1)
    assert cache.get_seq_length() == PROMPT - WINDOW


def test_prompt_lookup_decodes_what_plain_decoding_does():
    model = MODELS["llama"]()
    ids = torch.randint(3, 9, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    kv_cache.apply(model, ThinKConfig(ratio=0.5, window=WINDOW))
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **settings), want)


@pytest.mark.parametrize(("options", "message"), [({"ratio": 1.0}, "ratio is 1.0"), ({"window": 0}, "window is 0")])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ThinKConfig(**options)
