import math

import pytest
import torch
from kv_cache_cases import MODELS

from hfext import kv_cache
from hfext.kv_cache._low_rank import angles, slerp
from hfext.kv_cache.minicache import MiniCacheConfig, far_tokens

PROMPT, PADS = 40, (0, 11)


def padded(tokens=PROMPT, pads=PADS, seed=9):
    ids = torch.randint(3, 128, (len(pads), tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count], ids[row, :count] = 0, 0
    return ids, mask


@torch.no_grad()
def filled(model, config, ids, mask, calls=None):
    cache = config.make_cache(model)
    start = 0
    for count in calls or (ids.shape[1],):
        stop = start + count
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
        start = stop
    cache.finish_prefill()
    return cache


def test_the_shared_direction_divides_the_angle():
    for angle, t in ((0.3, 0.5), (2.0, 0.25), (3.0, 0.9), (1e-8, 0.5)):
        x, y = torch.tensor([2.0, 0.0, 0.0]), 5 * torch.tensor([math.cos(angle), math.sin(angle), 0.0])
        want = torch.tensor([math.cos(t * angle), math.sin(t * angle), 0.0])
        torch.testing.assert_close(slerp(x, y, t), want, atol=1e-6, rtol=0)
        assert float(angles(x, y)) == pytest.approx(angle, abs=1e-6)
    x = torch.randn(4, 8)
    torch.testing.assert_close(slerp(x, 3 * x, 0.3), torch.nn.functional.normalize(x, dim=-1))
    for t, end in ((0.0, x[:2]), (1.0, x[2:])):
        torch.testing.assert_close(slerp(x[:2], x[2:], t), torch.nn.functional.normalize(end, dim=-1))
    assert not slerp(torch.zeros(3), torch.zeros(3), 0.5).any() and torch.isfinite(slerp(x, -x, 0.5)).all()


def test_far_tokens_are_a_share_of_the_real_ones():
    angle = torch.tensor([[0.1, 0.9, 0.3, 0.8], [9.0, 9.0, 0.2, 0.1]])
    real = torch.tensor([[True] * 4, [False, False, True, True]])
    assert far_tokens(angle, real, 0.5).tolist() == [[1, 3], [-1, 2]]
    assert far_tokens(angle, None, 1.0).tolist() == [[0, 1, 2, 3]] * 2
    assert far_tokens(angle, None, 0.0).shape == (2, 0)


@pytest.mark.parametrize("t", [0.5, 0.2])
def test_pairs_share_directions_and_keep_lengths_and_far_tokens(t):
    model = MODELS["llama"](num_hidden_layers=4)
    ids, mask = padded()
    exact = filled(model, MiniCacheConfig(start=1.0), ids, mask)
    cache = filled(model, MiniCacheConfig(start=0.5, t=t, retention=0.1), ids, mask)
    for index in (0, 1):
        assert torch.equal(cache.layers[index].keys, exact.layers[index].keys)
    for name in ("keys", "values"):
        x, y = (getattr(exact.layers[i], name) for i in (2, 3))
        for row, pad in enumerate(PADS):
            a, b = x[row, :, pad:].double(), y[row, :, pad:].double()
            u, v = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
            w = (u * v).sum(-1).clamp(-1, 1).acos()
            e = (((1 - t) * w).sin()[..., None] * u + (t * w).sin()[..., None] * v) / w.sin()[..., None]
            far = w.mean(0).topk(math.ceil(0.1 * (PROMPT - pad))).indices
            for index, own in ((2, a), (3, b)):
                want = e * own.norm(dim=-1, keepdim=True)
                want[:, far] = own[:, far]
                got = getattr(cache.layers[index], name)[row, :, pad:]
                torch.testing.assert_close(got, want.float(), atol=1e-5, rtol=0)


def test_bytes_and_taking_back():
    model = MODELS["llama"](num_hidden_layers=2)
    ids, mask = padded(pads=(0, 0))
    cache = filled(model, MiniCacheConfig(start=0.0, retention=0.1), ids, mask)
    floats = PROMPT * 16 + 2 * PROMPT * 2 + 2 * 4 * 16
    assert cache.nbytes() - cache.shared.nbytes() == 2 * 2 * (4 * floats + 4 * 4)
    before = [layer.keys.clone() for layer in cache.layers]
    cache.crop(-15)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys[:, :, :-15])


def test_prompt_lookup_decodes_what_plain_decoding_does():
    model = MODELS["llama"]()
    ids = torch.randint(3, 9, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    kv_cache.apply(model, MiniCacheConfig(start=0.0))
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **settings), want)


@pytest.mark.parametrize("name", ["start", "t", "retention"])
def test_bad_options_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is 1.5"):
        MiniCacheConfig(**{name: 1.5})
