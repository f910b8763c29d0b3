"""Packed codes: exact round trips, the byte layout against numpy's bit arithmetic, and the fused dequantisers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfext._packing import (
    BITS,
    dequantize_packed,
    dequantize_packed_codebook,
    dequantize_packed_minmax,
    pack,
    packed_length,
    unpack,
    unpack_to,
)


def _codes(shape, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=generator).to(torch.int32 if bits == 16 else torch.uint8)


def _bits_of(codes, bits):
    """[..., n, bits] with the lowest bit first, by integer division."""
    return codes.numpy().astype(np.int64)[..., None] // 2 ** np.arange(bits) % 2


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    n=st.integers(0, 70),
    leading=st.lists(st.integers(0, 3), max_size=2),
    seed=st.integers(0, 1000),
)
def test_unpacking_inverts_packing_for_every_width_and_length(bits, n, leading, seed):
    codes = _codes((*leading, n), bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*leading, packed_length(n, bits))
    back = unpack(packed, bits, n)
    assert back.dtype == codes.dtype and torch.equal(back, codes)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("n", [1, 7, 16, 33])
def test_the_first_code_lies_in_the_lowest_bits(bits, n):
    codes = _codes((3, n), bits)
    stream = _bits_of(codes, bits).reshape(3, -1)
    expected = np.packbits(stream.astype(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(pack(codes, bits).numpy(), expected)


@pytest.mark.parametrize("n", [1, 8, 13, 64])
def test_three_bits_are_a_plane_of_low_pairs_and_a_plane_of_high_bits(n):
    codes = _codes((2, n), 3)
    padded = torch.nn.functional.pad(codes, (0, -n % 8))
    bits = _bits_of(padded, 3)
    planes = [
        np.packbits(bits[..., cut].reshape(2, -1).astype(np.uint8), -1, "little") for cut in (slice(2), slice(2, 3))
    ]
    packed = pack(codes, 3)
    assert packed.shape[-1] == 3 * -(-n // 8)
    np.testing.assert_array_equal(packed.numpy(), np.concatenate(planes, -1))


@pytest.mark.parametrize(("n", "lengths"), [(64, (8, 16, 24, 32, 64, 128)), (9, (2, 3, 6, 5, 9, 18)), (0, (0,) * 6)])
def test_packed_lengths_are_what_the_widths_say(n, lengths):
    assert tuple(packed_length(n, bits) for bits in BITS) == lengths


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_byte_reads_back_at_every_place(bits):
    packed = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 6).contiguous()
    n = 48 // bits
    assert torch.equal(pack(unpack(packed, bits, n), bits), packed)


@pytest.mark.parametrize("bits", BITS)
def test_strided_tensors_pack_and_unpack_like_their_copies(bits):
    codes = _codes((6, 5, 40), bits)
    for view in (codes.transpose(0, 1), codes[:, 1:, 3:38], codes.permute(2, 1, 0), codes[..., ::2]):
        assert torch.equal(pack(view, bits), pack(view.contiguous(), bits))
    packed = pack(codes, bits)
    longer = torch.zeros(6, 9, packed.shape[-1] + 3, dtype=torch.uint8)
    longer[:, 2:7, 1:-2] = packed
    assert torch.equal(unpack(longer[:, 2:7, 1:-2], bits, 40), codes)
    assert torch.equal(unpack(packed.transpose(0, 1), bits, 40), codes.transpose(0, 1))
    by_channel = packed.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(unpack(by_channel, bits, 40), codes)


def test_higher_bits_are_cut_off_and_signs_do_not_spread():
    assert torch.equal(unpack(pack(torch.tensor([5, 6, -1, 300]), 2), 2, 4), torch.tensor([1, 2, 3, 0]).byte())
    assert unpack(pack(torch.tensor([65535, 32768, 0]), 16), 16, 3).tolist() == [65535, 32768, 0]


@pytest.mark.parametrize("bits", BITS)
def test_converted_codes_are_a_tensor_of_their_own(bits):
    codes = _codes((4, 24), bits)
    packed = pack(codes, bits)
    before = packed.clone()
    for dtype in (torch.float32, codes.dtype):
        converted = unpack_to(packed, bits, 24, dtype)
        assert converted.dtype == dtype and converted.is_contiguous()
        assert torch.equal(converted.to(codes.dtype), codes)
        converted.zero_()
    assert torch.equal(packed, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_fused_affine_values_are_scale_times_code_less_zero(bits, tokens, dtype):
    codes = _codes((2, tokens, 24), bits)
    scale = torch.rand(2, tokens, 3).half()
    zero = torch.randint(-300, 300, (2, tokens, 3)).to(torch.int16)
    values = dequantize_packed(pack(codes, bits), scale, zero, bits, 8, 24, dtype)
    each = np.repeat(scale.numpy().astype(np.float64), 8, -1) * (
        codes.numpy().astype(np.float64) - np.repeat(zero.numpy(), 8, -1)
    )
    assert values.dtype == dtype
    torch.testing.assert_close(values, torch.from_numpy(each).to(dtype))


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("bits", [2, 3, 16])
def test_fused_minmax_values_are_code_times_scale_plus_minimum(bits, dim):
    codes = _codes((2, 12, 20), bits)
    shape = (2, 12, 5) if dim == -1 else (2, 3, 20)
    scale, minimum = torch.rand(shape).half(), torch.randn(shape).half()
    values = dequantize_packed_minmax(pack(codes, bits), scale, minimum, bits, 4, 20, dim)
    scale, minimum = (np.repeat(t.numpy().astype(np.float64), 4, dim) for t in (scale, minimum))
    expected = torch.from_numpy(codes.numpy() * scale + minimum).float()
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [16, 13])
def test_fused_codebook_values_are_the_levels_of_the_codes(bits, n, dtype):
    codes, codebook = _codes((2, 3, n), bits), torch.randn(2**bits, dtype=dtype)
    values = dequantize_packed_codebook(pack(codes, bits), codebook, bits, n)
    assert values.dtype == dtype and torch.equal(values, codebook[codes.long()])
    assert dequantize_packed_codebook(pack(codes[:, :0], bits), codebook, bits, n).shape == (2, 0, n)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`bits` must be one of .* got 5"):
        pack(torch.zeros(4, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="`packed` must hold 3 bytes .* for 12 codes of 2 bits, got 4"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 2, 12)
    with pytest.raises(TypeError, match="`codes` must hold integers"):
        pack(torch.zeros(4), 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", BITS)
def test_a_device_gives_the_same_bytes_and_codes(bits):
    codes = _codes((3, 40), bits)
    packed = pack(codes.cuda(), bits)
    assert torch.equal(packed.cpu(), pack(codes, bits))
    assert torch.equal(unpack(packed, bits, 40).cpu(), codes)
