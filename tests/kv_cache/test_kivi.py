"""KIVI: groups and codes by hand, what stays in full precision when, bad input."""

import pytest
import torch
from kv_cache_cases import MODELS

from hfext.kv_cache import KIVIConfig


def ids(tokens, rows=2):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(2))


def run(config, tokens, then=()):
    model = MODELS["llama"]()
    cache, plain = config.make_cache(model), []
    with torch.no_grad():
        for count in (tokens, *then):
            model(ids(count), past_key_values=cache)
        if not then:
            plain = [(x.keys, x.values) for x in model(ids(tokens), use_cache=True).past_key_values.layers]
    return cache, plain


def by_hand(x, bits):
    """min-max of a group [n]: the card's formula in double precision."""
    low, high = x.double().min(), x.double().max()
    scale = (high - low) / (2**bits - 1)
    return ((x.double() - low) / scale).round() * scale + low


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_keys_are_grouped_over_tokens_and_values_over_channels(bits):
    cache, plain = run(KIVIConfig(bits=bits, group_size=4, residual_length=8), 29)
    for layer, (keys, values) in zip(cache.layers, plain, strict=True):
        got, got_values = layer.decompressed()
        want, want_values = keys.clone().double(), values.clone().double()
        for b in range(2):
            for h in range(2):
                for first in range(0, 24, 4):  # 29 // 8 * 8 keys are coded
                    for c in range(8):
                        want[b, h, first : first + 4, c] = by_hand(keys[b, h, first : first + 4, c], bits)
                for t in range(29 - 8):
                    for c in (0, 4):
                        want_values[b, h, t, c : c + 4] = by_hand(values[b, h, t, c : c + 4], bits)
        # Scale and zero are stored in half precision, and a number between two cells may fall into the other.
        for a, b in ((got, want), (got_values, want_values)):
            assert ((a.double() - b).abs() > 2e-3).double().mean() < 0.005
        assert torch.equal(got[:, :, 24:], keys[:, :, 24:]) and torch.equal(got_values[:, :, 21:], values[:, :, 21:])


@pytest.mark.parametrize(
    "tokens, then, keys, values",
    [
        (7, (), 0, 0),
        (8, (), 8, 0),
        (29, (), 24, 21),
        (29, (1, 1), 24, 23),
        (29, (1, 1, 1), 32, 24),
        (3, (30,), 32, 25),
    ],
)
def test_how_many_are_coded(tokens, then, keys, values):
    cache, _ = run(KIVIConfig(bits=2, group_size=4, residual_length=8), tokens, then)
    for layer in cache.layers:
        assert (layer.num_coded("key"), layer.num_coded("value")) == (keys, values)
        assert layer.held["key_scale"].shape[1] * 4 == keys if keys else "key_scale" not in layer.held


def test_crop_into_a_group_is_refused_and_between_groups_is_exact():
    cache, _ = run(KIVIConfig(bits=2, group_size=4, residual_length=8), 24)
    before = [layer.decompressed()[0].clone() for layer in cache.layers]
    with pytest.raises(NotImplementedError, match="4 tokens share one code and only 0 recent"):
        cache.crop(-3)
    assert cache.get_seq_length() == 24
    assert all(torch.equal(layer.decompressed()[0], old) for layer, old in zip(cache.layers, before, strict=True))
    cache.crop(-4)
    assert cache.get_seq_length() == 20
    assert all(
        torch.equal(layer.decompressed()[0], old[:, :, :20]) for layer, old in zip(cache.layers, before, strict=True)
    )


@pytest.mark.parametrize(
    "options, told",
    [
        ({"bits": 1}, "bits is 1"),
        ({"residual_length": 16}, r"residual_length is 16 but must be in \[32, 65536\]"),
        ({"residual_length": 100}, "group_size is 32 but must divide the 100 tokens of residual_length"),
    ],
)
def test_bad_options_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        KIVIConfig(**options)


def test_group_that_does_not_fit_the_heads_is_named():
    with pytest.raises(ValueError, match="group_size is 32 but must divide the 8 channels of a head"):
        KIVIConfig().make_cache(MODELS["llama"]())
