"""Scalar TurboQuant: codes by scipy's Hadamard matrix, the distortion of theory, bytes, bad input."""

import numpy as np
import pytest
import scipy.linalg
import torch
from kv_cache_cases import MODELS

from hfext.kv_cache import TurboQuantConfig
from hfext.kv_cache._quantize import lloyd_max_codebook, random_signs
from hfext.kv_cache.turboquant import gather, spread

# Mean squared error of the best quantiser of N(0, 1) with 2, 3 and 4 bits (Max 1960).
DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497}


def filled(config, tokens=30):
    model = MODELS["llama"]()
    ids = torch.randint(3, 128, (2, tokens), generator=torch.Generator().manual_seed(2))
    cache = config.make_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        plain = model(ids, use_cache=True).past_key_values
    return cache, [(x.keys, x.values) for x in plain.layers]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_stored_vectors_are_those_of_the_formula(bits):
    cache, plain = filled(TurboQuantConfig(bits=bits, seed=3))
    signs, levels = random_signs(8, 3).double().numpy(), lloyd_max_codebook(bits).double().numpy()
    turn = scipy.linalg.hadamard(8) / np.sqrt(8)
    for layer, sides in zip(cache.layers, plain, strict=True):
        for got, x in zip(layer.decompressed(), sides, strict=True):
            x = x.double().numpy()
            norm = np.linalg.norm(x, axis=-1, keepdims=True)
            u = np.sqrt(8) * (x * signs) @ turn / norm
            nearest = levels[np.abs(u[..., None] - levels).argmin(-1)]
            want = norm * (nearest @ turn.T) * signs / np.sqrt(8)
            # A number in the middle of two levels may fall to either, which changes its whole vector.
            off = np.abs(got.numpy() - want).max(-1) > 2e-3 * np.abs(x).max()
            assert off.mean() < 0.05


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_distortion_is_that_of_theory_for_any_direction(bits):
    """Also of vectors with one large channel, which the rotation spreads."""
    config = TurboQuantConfig(bits=bits)
    model = MODELS["llama"](hidden_size=512, num_attention_heads=4, num_key_value_heads=4)  # heads of 128
    x = torch.randn(1, 4, 500, 128, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 20
    layer = config.make_cache(model).layers[0]
    layer.lazy_initialization(x, x)
    layer.append(x, x)
    error = (layer.decompressed()[1] - x).square().sum(-1) / x.square().sum(-1)
    assert abs(float(error.mean()) / DISTORTION[bits] - 1) < 0.15


def test_spreading_is_undone():
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    signs = random_signs(96, 0)
    u, norm = spread(x, signs, 96)
    torch.testing.assert_close(gather(u, norm, signs, 96), x, atol=3e-3, rtol=1e-3)
    torch.testing.assert_close(u.square().mean(-1), torch.ones(5), atol=2e-3, rtol=0)
    zero, none = spread(torch.zeros(1, 96), signs, 96)
    assert torch.equal(gather(zero, none, signs, 96), torch.zeros(1, 96))


def test_bytes_are_those_of_the_formula():
    cache, _ = filled(TurboQuantConfig(bits=4), tokens=64)
    assert cache.nbytes() == 3 * 2 * 2 * 64 * 2 * (8 * 4 // 8 + 2)  # layers, sides, rows, tokens, heads; no positions


@pytest.mark.parametrize("options, told", [({"bits": 6}, "bits is 6"), ({"seed": -1}, "seed is -1")])
def test_bad_options_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        TurboQuantConfig(**options)
