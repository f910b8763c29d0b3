"""Quantisers: the rules written another way, error bounds of the stored numbers, extreme groups, codebooks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from hfext.kv_cache._quantize import (
    dequantize_affine,
    dequantize_codebook,
    dequantize_minmax,
    lloyd_max_codebook,
    quantize_affine,
    quantize_codebook,
    quantize_minmax,
    random_signs,
)

BITS = (1, 2, 3, 4, 8, 16)
groups_of_numbers = st.lists(st.floats(-3e4, 3e4, width=32, allow_subnormal=False), min_size=8, max_size=8)


def _per_value(per_group, group_size, dim=-1):
    return per_group.double().repeat_interleave(group_size, dim)


def _data(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 3 + 10 * torch.randn(shape[-1], generator=generator)


@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_affine_codes_follow_the_rule_group_by_group(bits, clip):
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    codes, scale, zero = quantize_affine(x, bits, 16, clip)
    assert codes.dtype == torch.uint8 and scale.dtype == torch.float16 and zero.dtype == torch.int16
    for t in range(6):
        for g in range(3):
            group = x[t, 16 * g : 16 * g + 16].numpy().astype(np.float64)
            wanted = clip * (group.max() - group.min()) / (2**bits - 1)
            s = scale[t, g].item()
            assert wanted * (1 - 1e-6) <= s <= wanted * (1 + 2**-10)
            z = round(-clip * group.min() / s)
            q = np.clip(np.array([round(v / s) for v in group]) + z, 0, 2**bits - 1)
            assert zero[t, g].item() == z
            np.testing.assert_array_equal(codes[t, 16 * g : 16 * g + 16].numpy(), q)


def test_rounding_is_half_to_even():
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.0, 1.0, 2.0, 0.0]])
    for quantize in (quantize_affine, quantize_minmax):
        codes, scale, offset = quantize(x, 2, 8)
        assert scale.item() == 1 and offset.item() == 0
        assert codes.tolist() == [[0, 0, 2, 2, 3, 1, 2, 0]]


@settings(max_examples=80, deadline=None)
@given(values=groups_of_numbers, bits=st.sampled_from(BITS), offset=st.sampled_from([0.0, 50.0, -3000.0]))
def test_affine_errors_are_at_most_half_a_stored_step(values, bits, offset):
    x = torch.tensor([values]) + offset
    codes, scale, zero = quantize_affine(x, bits, 4)
    back = dequantize_affine(codes, scale, zero, 4)
    # Beside the half step only the fp32 rounding of x / s and of the product is left.
    slack = 2e-6 * x.abs().double() + 1e-6 * _per_value(scale, 4)
    assert ((back - x).abs().double() <= _per_value(scale, 4) / 2 + slack).all()
    assert 0 <= codes.min().item() and codes.max().item() < 2**bits


@settings(max_examples=80, deadline=None)
@given(values=groups_of_numbers, bits=st.sampled_from(BITS), dim=st.sampled_from([-1, -2]))
def test_minmax_errors_are_at_most_half_a_stored_step_or_the_rounding_of_the_minimum(values, bits, dim):
    x = torch.tensor([values, values[::-1]]).view(4, 4)
    codes, scale, minimum = quantize_minmax(x, bits, 2, dim)
    back = dequantize_minmax(codes, scale, minimum, 2, dim)
    coarse = 2.0**-11 if bits < 8 else 0.0
    lowest = coarse * _per_value(minimum, 2, dim).abs() + (2.0**-24 if bits < 8 else 0.0)
    bound = torch.maximum(_per_value(scale, 2, dim) / 2, lowest) + 1e-6 * (
        x.abs().double() + _per_value(scale, 2, dim)
    )
    assert ((back - x).abs().double() <= bound).all()


@pytest.mark.parametrize(
    "quantize, dequantize", [(quantize_affine, dequantize_affine), (quantize_minmax, dequantize_minmax)]
)
def test_sixteen_bits_lose_a_hundred_thousandth_of_the_range_and_no_more(quantize, dequantize):
    x = _data(64, 96)
    codes, scale, offset = quantize(x, 16, 32)
    assert codes.dtype == torch.int32 and scale.dtype == torch.float32
    spread = (x.unflatten(-1, (3, 32)).amax(-1) - x.unflatten(-1, (3, 32)).amin(-1)).repeat_interleave(32, -1)
    assert ((dequantize(codes, scale, offset, 32) - x).abs() <= 1e-5 * spread).all()


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_minmax_codes_follow_the_rule_along_either_dimension(bits, dim):
    x = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(2))
    codes, scale, minimum = quantize_minmax(x, bits, 4, dim)
    assert scale.shape == minimum.shape == ((2, 12, 2) if dim == -1 else (2, 3, 8))
    moved = [t if dim == -1 else t.transpose(-1, -2) for t in (x, codes, scale, minimum)]
    for values, q, s, m in zip(
        *(t.reshape(-1, k).numpy() for t, k in zip(moved, (4, 4, 1, 1), strict=True)), strict=True
    ):
        assert abs(m[0] - values.min()) <= 2**-11 * abs(values.min())
        wanted = (float(values.max()) - float(m[0])) / (2**bits - 1)
        assert wanted * (1 - 1e-6) <= s[0] <= wanted * (1 + 2**-10)
        expected = np.rint((values.astype(np.float64) - float(m[0])) / float(s[0])).clip(0, 2**bits - 1)
        np.testing.assert_array_equal(q, expected)


def test_tokens_of_a_channel_are_grouped_as_channels_of_the_transpose():
    x = _data(3, 64, 20)
    by_token = quantize_minmax(x, 2, 16, dim=-2)
    by_channel = quantize_minmax(x.transpose(-1, -2), 2, 16, dim=-1)
    for one, other in zip(by_token, by_channel, strict=True):
        assert torch.equal(one, other.transpose(-1, -2))
    torch.testing.assert_close(
        dequantize_minmax(*by_token, 16, dim=-2), dequantize_minmax(*by_channel, 16).transpose(-1, -2)
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_doubling_the_input_doubles_the_scale_and_leaves_the_codes(bits, clip):
    x = _data(20, 64)
    codes, scale, zero = quantize_affine(x, bits, 32, clip)
    twice_codes, twice_scale, twice_zero = quantize_affine(2 * x, bits, 32, clip)
    assert torch.equal(twice_codes, codes) and torch.equal(twice_scale, 2 * scale) and torch.equal(twice_zero, zero)
    codes, scale, minimum = quantize_minmax(x, bits, 32)
    twice_codes, twice_scale, twice_minimum = quantize_minmax(2 * x, bits, 32)
    assert torch.equal(twice_codes, codes) and torch.equal(twice_scale, 2 * scale)
    assert torch.equal(twice_minimum, 2 * minimum)


@pytest.mark.parametrize("constant", [0.0, 50.0, -50.0, 1.0, 1e-5, -0.3, 6e4, -6e4])
@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_group_comes_back_as_its_constant(bits, clip, constant):
    x = torch.full((2, 8), constant)
    codes, scale, zero = quantize_affine(x, bits, 8, clip)
    assert scale.isfinite().all() and (scale > 0).all()
    affine = dequantize_affine(codes, scale, zero, 8)
    minmax = dequantize_minmax(*quantize_minmax(x, bits, 8), 8)
    for back in (affine, minmax):
        torch.testing.assert_close(back, x, rtol=2.0**-11, atol=2.0**-24)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_clipped_range_beside_the_group_is_not_clipped(bits):
    x = 50 + torch.linspace(-1, 1, 8)[None]
    clipped, full = quantize_affine(x, bits, 8, clip=0.8), quantize_affine(x, bits, 8)
    assert all(torch.equal(a, b) for a, b in zip(clipped, full, strict=True))
    overlapping = torch.linspace(10, 20, 8)[None]  # clipped to 8..16
    back = dequantize_affine(*quantize_affine(overlapping, bits, 8, clip=0.8), 8)
    assert back.max() == pytest.approx(16, abs=8 / (2**bits - 1) / 2 + 0.02)


def test_clipping_brings_both_ends_in_and_keeps_the_bound_between_them():
    x = torch.randn(50, 64)
    codes, scale, zero = quantize_affine(x, 2, 64, clip=0.8)
    back = dequantize_affine(codes, scale, zero, 64)
    low, high = 0.8 * x.amin(-1, keepdim=True), 0.8 * x.amax(-1, keepdim=True)
    inside = (x >= low) & (x <= high)
    assert ((back - x).abs()[inside] <= (scale.float().expand(50, 64) / 2 + 1e-5)[inside]).all()
    assert (back <= high + scale.float()).all() and (back >= low - scale.float()).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_numbers_too_large_for_fp16_stay_finite(bits):
    x = torch.tensor([[-3e38, 3e38, 0.0, 1.0], [1e30, 1e30, 1e30, 1e30]])
    for quantize, dequantize in ((quantize_affine, dequantize_affine), (quantize_minmax, dequantize_minmax)):
        codes, scale, offset = quantize(x, bits, 4)
        assert scale.isfinite().all() and offset.isfinite().all()
        assert dequantize(codes, scale, offset, 4).isfinite().all()


@pytest.mark.parametrize(
    "quantize, dequantize", [(quantize_affine, dequantize_affine), (quantize_minmax, dequantize_minmax)]
)
def test_values_on_the_grid_are_quantised_without_loss(quantize, dequantize):
    grid = torch.tensor([[0, 1, 2, 3, 3, 0, 1, 2]]) * 0.375 - 0.75
    codes, scale, offset = quantize(grid, 2, 8)
    assert torch.equal(dequantize(codes, scale, offset, 8), grid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_quantised_as_their_fp32_values(dtype):
    x = _data(5, 64).to(dtype)
    for quantize, dequantize in ((quantize_affine, dequantize_affine), (quantize_minmax, dequantize_minmax)):
        stored = quantize(x, 2, 32)
        assert all(torch.equal(a, b) for a, b in zip(stored, quantize(x.float(), 2, 32), strict=True))
        back = dequantize(*stored, 32, dtype=dtype)
        assert back.dtype == dtype and torch.equal(back, dequantize(*stored, 32).to(dtype))


def test_a_token_has_the_same_codes_alone_and_in_any_batch():
    x = _data(3, 40, 64)
    whole = quantize_affine(x, 2, 32, 0.8)
    alone = quantize_affine(x[1, 7], 2, 32, 0.8)
    strided = quantize_affine(x.transpose(0, 1), 2, 32, 0.8)
    for a, b, c in zip(whole, alone, strided, strict=True):
        assert torch.equal(a[1, 7], b) and torch.equal(a, c.transpose(0, 1))


def test_the_input_and_the_stored_numbers_are_left_alone():
    x = _data(4, 32)
    before = x.clone()
    for quantize, dequantize in ((quantize_affine, dequantize_affine), (quantize_minmax, dequantize_minmax)):
        stored = quantize(x, 2, 16)
        copies = [t.clone() for t in stored]
        dequantize(*stored, 16)
        floating = stored[0].float()
        dequantize(floating, *stored[1:], 16)
        assert torch.equal(x, before) and torch.equal(floating, copies[0].float())
        assert all(torch.equal(a, b) for a, b in zip(stored, copies, strict=True))


def test_no_tokens_give_no_codes():
    x = torch.zeros(2, 0, 32)
    for quantize, dequantize in ((quantize_affine, dequantize_affine), (quantize_minmax, dequantize_minmax)):
        stored = quantize(x, 2, 16)
        assert stored[0].shape == (2, 0, 32) and stored[1].shape == stored[2].shape == (2, 0, 2)
        assert dequantize(*stored, 16).shape == (2, 0, 32)
    assert quantize_minmax(x, 2, 16, dim=-2)[1].shape == (2, 0, 32)


@pytest.mark.parametrize(
    ("bits", "positive"),
    [
        (1, [0.7979]),
        (2, [0.4528, 1.510]),
        (3, [0.2451, 0.7560, 1.344, 2.152]),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
    ],
)
def test_codebooks_are_the_published_ones(bits, positive):
    codebook = lloyd_max_codebook(bits)
    assert codebook.dtype == torch.float32
    np.testing.assert_allclose(codebook[len(positive) :].numpy(), positive, rtol=4e-4)
    assert torch.equal(codebook, -codebook.flip(0))


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_level_is_the_mean_of_its_cell(bits):
    levels = lloyd_max_codebook(bits).double().numpy()
    assert (np.diff(levels) > 0).all()
    edges = np.concatenate(([-9.0], (levels[1:] + levels[:-1]) / 2, [9.0]))
    for i in range(0, 2**bits, max(1, 2**bits // 8)):
        weighted = integrate.quad(lambda v: v * stats.norm.pdf(v), edges[i], edges[i + 1])[0]
        assert weighted / (stats.norm.cdf(edges[i + 1]) - stats.norm.cdf(edges[i])) == pytest.approx(
            levels[i], abs=2e-6
        )


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_error_on_normal_numbers_is_the_known_optimum(bits, distortion):
    x = torch.from_numpy(stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)).float()
    codebook = lloyd_max_codebook(bits)
    error = (dequantize_codebook(quantize_codebook(x, codebook), codebook) - x).square().mean().item()
    assert error == pytest.approx(distortion, rel=2e-3)


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_codebook_codes_name_the_nearest_level(bits):
    x, codebook = torch.randn(3, 5, 16).transpose(0, 1), lloyd_max_codebook(bits)
    codes = quantize_codebook(x, codebook)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), (x[..., None] - codebook).abs().argmin(-1))
    assert torch.equal(dequantize_codebook(codes, codebook), codebook[codes.long()])
    assert quantize_codebook(x[:0].bfloat16(), codebook).shape == (0, 3, 16)


def test_signs_depend_on_their_seed_alone():
    state = torch.get_rng_state()
    signs = random_signs(4096, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(random_signs(4096, seed=3), signs) and not torch.equal(random_signs(4096, seed=4), signs)
    assert signs.dtype == torch.float32 and set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.sum().item()) < 4 * math.sqrt(4096)


def test_a_default_device_of_the_callers_takes_no_part():
    x, codebook, signs = torch.randn(3, 16), lloyd_max_codebook(3), random_signs(8, seed=0)
    codes, stored = quantize_codebook(x, codebook), quantize_affine(x, 2, 8)
    with torch.device("meta"):
        assert torch.equal(lloyd_max_codebook(3), codebook) and torch.equal(random_signs(8, seed=0), signs)
        assert torch.equal(quantize_codebook(x, codebook), codes)
        assert all(torch.equal(a, b) for a, b in zip(quantize_affine(x, 2, 8), stored, strict=True))
        assert lloyd_max_codebook(7).device.type == "cpu"


def test_wrong_arguments_are_named():
    x = torch.zeros(2, 24)
    with pytest.raises(
        ValueError, match="`group_size` must divide the size of dimension -1 of the tensor, 24, got 16"
    ):
        quantize_affine(x, 2, 16)
    with pytest.raises(ValueError, match="`group_size` must divide the size of dimension -2 of the tensor, 2, got 4"):
        quantize_minmax(x, 2, 4, dim=-2)
    with pytest.raises(ValueError, match="`dim` must be -1 .* got 0"):
        quantize_minmax(x, 2, 2, dim=0)
    with pytest.raises(ValueError, match="`bits` must be one of"):
        quantize_minmax(x, 6, 8)
    with pytest.raises(ValueError, match=r"`clip` must be in \(0, 1\], got 1.5"):
        quantize_affine(x, 2, 8, clip=1.5)
    with pytest.raises(ValueError, match="`bits` of a codebook must be in 1..8, got 9"):
        lloyd_max_codebook(9)
