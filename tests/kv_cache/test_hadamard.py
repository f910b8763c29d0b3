"""Rotations: orthonormal matrices of every order, the fast product against the dense one, blocks of heads."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfext.kv_cache._hadamard import hadamard_factor, hadamard_matrix, is_hadamard_order, rotate, rotation_block
from hfext.kv_cache._quantize import dequantize_affine, quantize_affine

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 192, 256, 320, 448]


@pytest.mark.parametrize("n", ORDERS)
def test_matrices_are_orthonormal_with_entries_of_one_size(n):
    matrix = hadamard_matrix(n, torch.float64).numpy()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(np.abs(matrix), n**-0.5, rtol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 256])
def test_powers_of_two_give_sylvesters_matrix(n):
    expected = scipy.linalg.hadamard(n) / n**0.5
    np.testing.assert_allclose(hadamard_matrix(n, torch.float64).numpy(), expected, atol=1e-15)


def test_other_orders_are_sylvesters_times_their_base():
    expected = np.kron(scipy.linalg.hadamard(16) / 4, hadamard_matrix(12, torch.float64).numpy())
    np.testing.assert_allclose(hadamard_matrix(192, torch.float64).numpy(), expected, atol=1e-15)


def test_orders_are_told_from_other_numbers():
    valid = {base * 2**k for base in (1, 12, 20, 28) for k in range(10)}
    for n in range(-4, 513):
        assert is_hadamard_order(n) == (n in valid)
        if n in valid:
            base, power = hadamard_factor(n)
            assert base in (1, 12, 20, 28) and base * 2**power == n
        else:
            with pytest.raises(ValueError, match=f"to have a Hadamard rotation here, got {n}"):
                hadamard_factor(n)


@settings(max_examples=40, deadline=None)
@given(n=st.sampled_from(ORDERS), blocks=st.integers(1, 3), tokens=st.integers(0, 3), inverse=st.booleans())
def test_rotation_is_the_dense_product_in_every_block(n, blocks, tokens, inverse):
    x = torch.randn(2, tokens, blocks * n, dtype=torch.float64)
    matrix = scipy.linalg.block_diag(*[hadamard_matrix(n, torch.float64).numpy()] * blocks)
    expected = x.numpy() @ (matrix.T if inverse else matrix)
    np.testing.assert_allclose(rotate(x, n, inverse).numpy(), expected, atol=1e-12)
    torch.testing.assert_close(rotate(x.float(), n, inverse).double(), torch.from_numpy(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("n", [12, 20, 28, 64, 192, 256])
def test_the_inverse_undoes_the_rotation_and_symmetric_ones_are_their_own(n):
    x = torch.randn(5, 2 * n)
    y = rotate(x, n)
    torch.testing.assert_close(rotate(y, n, inverse=True), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.allclose(rotate(y, n), x, atol=1e-4) == (n in (28, 64, 256))


def test_the_whole_last_dimension_is_the_default_block():
    x = torch.randn(3, 96)
    assert torch.equal(rotate(x), rotate(x, 96))


def test_the_input_is_left_alone_and_may_be_strided():
    x = torch.randn(4, 3, 64)
    before = x.clone()
    for n in (16, 32, 64):
        y = rotate(x, n)
        assert y.data_ptr() != x.data_ptr() and torch.equal(x, before)
        assert torch.equal(rotate(x.transpose(0, 1), n), rotate(x.transpose(0, 1).contiguous(), n))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rotated_in_fp32_and_rounded_once(dtype):
    x = torch.randn(7, 192).to(dtype)
    y = rotate(x, 192)
    assert y.dtype == dtype and torch.equal(y, rotate(x.float(), 192).to(dtype))


@pytest.mark.parametrize("n", [1, 16, 48])
def test_gradients_are_those_of_the_product(n):
    x = torch.randn(2, 96, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 96, dtype=torch.float64)
    with torch.inference_mode():
        rotate(x, n)
    (rotate(x, n) * weights).sum().backward()
    torch.testing.assert_close(x.grad, rotate(weights, n, inverse=True))
    torch.testing.assert_close(rotate(x, n).detach(), rotate(x.detach(), n))


def test_a_default_device_of_the_callers_takes_no_part():
    x = torch.randn(2, 3584)
    with torch.device("meta"):
        assert torch.equal(hadamard_matrix(56), hadamard_matrix(56, device="cpu"))
        assert rotate(x, 1792).device.type == "cpu"


@pytest.mark.parametrize(
    ("heads", "dim", "group", "block"),
    [
        (3, 64, 4, 192),  # 3 heads: 12 * 16
        (3, 64, 2, 64),
        (8, 128, 4, 512),
        (9, 64, 4, 192),
        (9, 64, 9, 192),  # 9 * 64 is no order, 3 * 64 is
        (2, 80, 4, 160),
        (6, 48, 4, 96),  # 3 * 48 is no order
        (1, 72, 4, 24),  # no group of heads works: 3 blocks in each head
        (5, 36, 5, 12),
        (7, 9, 4, 1),
    ],
)
def test_blocks_cover_the_most_whole_heads_that_have_an_order(heads, dim, group, block):
    assert rotation_block(heads, dim, group) == block
    assert heads * dim % block == 0 and is_hadamard_order(block)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`n` must divide the last dimension of `x`, 96, got 64"):
        rotate(torch.zeros(2, 96), 64)
    with pytest.raises(ValueError, match="`n` must be 2.k.* got 36"):
        rotate(torch.zeros(2, 72), 36)
    with pytest.raises(ValueError, match="`head_group` must be at least 1, got 0"):
        rotation_block(3, 64, 0)


def _two_bit_errors(channels):
    """Mean squared errors of N(0, 1) keys of 4 heads of 64, offset by 50 in one channel of each: as they are, rotated
    over all heads, and rotated with the channels in the order of their signed sums."""
    x = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    for head, channel in enumerate(channels):
        x[:, 64 * head + channel] += 50
    rotated = rotate(x, 256)
    order = rotated.sum(0).argsort(stable=True)
    keys = (x, rotated, rotated[:, order])
    return [(dequantize_affine(*quantize_affine(y, 2, 64), 64) - y).square().mean().item() for y in keys]


def test_a_constant_offset_needs_the_reorder_and_not_only_the_rotation():
    assert _two_bit_errors([7, 7, 7, 7]) == pytest.approx([1.07, 2.33, 0.99], abs=0.02)


@pytest.mark.parametrize("channels", [[5, 17, 33, 60], [10, 11, 50, 51], [1, 2, 4, 8]])
def test_the_reorder_is_best_wherever_the_offsets_lie(channels):
    plain, rotated, reordered = _two_bit_errors(channels)
    assert reordered < plain < rotated


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [64, 192])
def test_a_device_rotates_alike(n):
    x = torch.randn(5, 192)
    torch.testing.assert_close(rotate(x.cuda(), n).cpu(), rotate(x, n), atol=1e-5, rtol=0)
