"""Orthonormal Hadamard rotations of order 2^k, 12 2^k, 20 2^k and 28 2^k.

    M_n = H_(2^k) (x) P_base / sqrt(n),    M_n M_n^T = I

H is Sylvester's matrix (symmetric), P a matrix of Paley: order q + 1 from the quadratic residues of a prime q = 3 mod
4 (12 from 11, 20 from 19), order 2 (q + 1) from those of a prime q = 1 mod 4 (28 from 13). M of base 1 and 28 is
symmetric and so its own inverse; that of base 12 and 20 is not, and its inverse is its transpose.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

# The widest dense factor: beyond it a butterfly costs less than doubling the matrix (measured, see `rotate`).
_DENSE = 28


def hadamard_factor(n: int) -> tuple[int, int]:
    """(base, k) with n = base * 2^k and base 1, 12, 20 or 28; ValueError if `n` is not of this form."""
    if not is_hadamard_order(n):
        raise ValueError(f"`n` must be 2^k, 12 2^k, 20 2^k or 28 2^k to have a Hadamard rotation here, got {n!r}.")
    odd = n // (n & -n)
    base = 1 if odd == 1 else 4 * odd
    return base, (n // base).bit_length() - 1


def is_hadamard_order(n: int) -> bool:
    """Whether `rotate` has a rotation of this order: 2^k, 12 2^k, 20 2^k or 28 2^k."""
    if n < 1:
        return False
    odd = n // (n & -n)
    return odd == 1 or (odd in (3, 5, 7) and n % 4 == 0)


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """M_n [n, n], orthonormal, made in fp64 and then cast."""
    base, power = hadamard_factor(n)
    # A default device of the caller's, such as "meta" while a model is loaded, must not take part.
    with torch.device("cpu"):
        matrix = _paley(base)
    for _ in range(power):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix.double() / math.sqrt(n)).to(device=device, dtype=dtype)


def rotate(x: Tensor, n: int | None = None, inverse: bool = False) -> Tensor:
    """
    Each block of `n` channels times M_n, or times its transpose.

    The matrix is a Kronecker product: one dense product takes its innermost factor (16 to 28 channels wide) and
    butterflies, in place, take the doublings. On one core and for [8192, 192] floats this is 2.4 ms in blocks of 192
    and 1.6 ms in blocks of 64, where the dense matrices take 7.6 ms and 2.8 ms, butterflies alone 16 ms and more.

    Args:
        x (`torch.Tensor`): [..., m * n]. Computed in fp32 (fp64 stays fp64); differentiable.
        n (`int`, *optional*): The order; by default the whole last dimension.
        inverse (`bool`, *optional*, defaults to `False`): Multiply by the transpose.

    Returns:
        A fresh tensor of the shape and type of `x`.
    """
    n = x.shape[-1] if n is None else n
    base, power = hadamard_factor(n)
    if x.shape[-1] % n:
        raise ValueError(f"`n` must divide the last dimension of `x`, {x.shape[-1]}, got {n}.")
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    differentiate = torch.is_grad_enabled() and x.requires_grad
    width = n if differentiate else base << min(power, (_DENSE // base).bit_length() - 1)
    factor = _scaled_factor(width, n, kind, x.device)
    y = x.to(kind).reshape(-1, width) @ (factor.T if inverse else factor)
    while width < n:
        a, b = y.view(-1, 2, width).unbind(1)
        a.add_(b)
        torch.sub(a, b, alpha=2, out=b)
        width *= 2
    return y.view(x.shape).to(x.dtype)


def rotation_block(num_heads: int, head_dim: int, head_group: int) -> int:
    """
    The order of the rotation of `num_heads * head_dim` channels in groups of whole heads.

    Returns:
        h * head_dim with the largest h <= `head_group` that divides `num_heads` and gives a Hadamard order. If no h
        does, then the largest Hadamard order that divides `head_dim`, so that a head is rotated in several blocks.
    """
    for name, value in (("num_heads", num_heads), ("head_dim", head_dim), ("head_group", head_group)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
    heads = [h for h in range(1, min(head_group, num_heads) + 1) if num_heads % h == 0]
    orders = [h * head_dim for h in heads if is_hadamard_order(h * head_dim)]
    return max(orders or [d for d in range(1, head_dim + 1) if head_dim % d == 0 and is_hadamard_order(d)])


@lru_cache(maxsize=32)
def _scaled_factor(width: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """M_width sqrt(width / n): the innermost factor of M_n."""
    # Outside inference mode, as a matrix made inside it could not be used in a later backward.
    with torch.inference_mode(False):
        return hadamard_matrix(width, torch.float64, device).mul_(math.sqrt(width / n)).to(dtype)


def _paley(base: int) -> Tensor:
    """P_base [base, base] of ones and minus ones."""
    if base == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    q = base - 1 if base != 28 else 13
    character = torch.full((q,), -1, dtype=torch.int8)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    residues = character[(torch.arange(q)[:, None] - torch.arange(q)) % q]
    core = torch.ones(q + 1, q + 1, dtype=torch.int8)
    core[0, 0] = 0
    core[1:, 1:] = residues
    identity = torch.eye(q + 1, dtype=torch.int8)
    if base == q + 1:
        core[1:, 0] = -1
        return core + identity
    one, two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(core, one) + torch.kron(identity, two)
