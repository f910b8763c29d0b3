"""The kernels: row statistics, sums over tokens (output and gradient of x), sums over rows (keys and values).

All three make the tile of scores again from x and the keys, and in the backward pass also that of dO V'. Products of
16-bit tiles run on tensor cores with float32 sums; everything between is float32. With UPCAST operands are float32.
MODE: 0 gelu(a f), 1 gelu(a) f, 2 exp(a - offset) f, where f is a factor of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(
    a_ptr, b_ptr, a_index, b_index, a_count, b_count, depth, UPCAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[A, B]: rows `a_index` of a times rows `b_index` of b, both [count, depth]."""
    total = tl.zeros([A, B], tl.float32)
    d = tl.arange(0, BLOCK_D)
    a_at = a_ptr + a_index.to(tl.int64)[:, None] * depth + d[None, :]
    b_at = b_ptr + b_index.to(tl.int64)[None, :] * depth + d[:, None]
    for start in range(0, depth, BLOCK_D):
        left = depth - start
        a = tl.load(a_at + start, mask=(a_index < a_count)[:, None] & (d < left)[None, :], other=0.0)
        b = tl.load(b_at + start, mask=(b_index < b_count)[None, :] & (d < left)[:, None], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _gelu(u):
    return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _slope(u):
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _kept(seed_ptr, r, t, dropout):
    """What dropout multiplies a score by: 0, or 1 / (1 - dropout)."""
    seed = tl.load(seed_ptr).to(tl.uint32)
    h = _mix(_mix(r.to(tl.uint32) ^ seed) ^ (t.to(tl.uint32) * 0x9E3779B1))
    return tl.where((h >> 8).to(tl.float32) * 5.9604644775390625e-08 >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _scores(
    x_ptr, k_ptr, mask_ptr, row, token, rows, tokens, d_in, MODE: tl.constexpr, MASKED: tl.constexpr,
    FLIP: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores a, which of them are open, and their rows and tokens: [BLOCK_M, BLOCK_N], or turned with FLIP."""
    if FLIP:
        a = _product(k_ptr, x_ptr, token, row, tokens, rows, d_in, UPCAST, BLOCK_N, BLOCK_M, BLOCK_D)
        r = row[None, :]
        t = token[:, None]
    else:
        a = _product(x_ptr, k_ptr, row, token, rows, tokens, d_in, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D)
        r = row[:, None]
        t = token[None, :]
    open = (r < rows) & (t < tokens)
    if MASKED:
        open = open & (tl.load(mask_ptr + r.to(tl.int64) * tokens + t, mask=open, other=0) != 0)
    if MODE == 2:
        a = tl.where(open, a, float("-inf"))
    else:
        a = tl.where(open, a, 0.0)
    return a, open, r, t


@triton.jit
def _weights(
    a, open, r, t, x_ptr, v_ptr, grad_ptr, offset_ptr, factor_ptr, inner_ptr, seed_ptr, row, token, rows, tokens,
    d_out, dropout, MODE: tl.constexpr, WHAT: tl.constexpr, DROPOUT: tl.constexpr, FLIP: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From scores: S (WHAT 0), dA (1), or the terms whose sum over a row dA needs (2)."""
    f = tl.load(factor_ptr + r, mask=r < rows, other=0.0)
    if MODE == 0:
        u = a * f
        s = _gelu(u)
    elif MODE == 1:
        u = a
        s = _gelu(a) * f
    else:
        u = a
        s = tl.where(open, tl.exp(a - tl.load(offset_ptr + r, mask=r < rows, other=0.0)) * f, 0.0)
    if WHAT == 0:
        if DROPOUT:
            s = s * _kept(seed_ptr, r, t, dropout)
        found = s
    else:
        if FLIP:
            g = _product(v_ptr, grad_ptr, token, row, tokens, rows, d_out, UPCAST, BLOCK_N, BLOCK_M, BLOCK_D)
        else:
            g = _product(grad_ptr, v_ptr, row, token, rows, tokens, d_out, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D)
        if DROPOUT:
            g = g * _kept(seed_ptr, r, t, dropout)
        if MODE == 0:
            g = g * _slope(u)
            s = u
        if WHAT == 2:
            found = tl.where(open, s * g, 0.0)
        else:
            c = tl.load(inner_ptr + r, mask=r < rows, other=0.0)
            if MODE == 0:
                found = f * (g - s * c)
            elif MODE == 1:
                found = _slope(u) * f * (g - s * c)
            else:
                found = s * (g - c)
            found = tl.where(open, found, 0.0)
    return found


@triton.jit
def pattention_statistics_kernel(
    x_ptr, k_ptr, v_ptr, grad_ptr, mask_ptr, seed_ptr, offset_ptr, factor_ptr, partial_ptr, top_ptr, rows, tokens,
    d_in, d_out, dropout, MODE: tl.constexpr, BACKWARD: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over one tile of tokens, [token tiles, rows]: of squares or exponentials, and backward of <S, dS>."""
    tile = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    a, open, r, t = _scores(
        x_ptr, k_ptr, mask_ptr, row, token, rows, tokens, d_in, MODE, MASKED, False, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D
    )
    out = tile.to(tl.int64) * rows + row
    if BACKWARD:
        w = _weights(
            a, open, r, t, x_ptr, v_ptr, grad_ptr, offset_ptr, factor_ptr, partial_ptr, seed_ptr, row, token, rows,
            tokens, d_out, dropout, MODE, 2, DROPOUT, False, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        tl.store(partial_ptr + out, tl.sum(w, 1), mask=row < rows)
    elif MODE == 2:
        top = tl.max(a, 1)
        shift = tl.where(top == float("-inf"), 0.0, top)
        tl.store(top_ptr + out, top, mask=row < rows)
        tl.store(partial_ptr + out, tl.sum(tl.exp(a - shift[:, None]), 1), mask=row < rows)
    else:
        if MODE == 1:
            a = _gelu(a)
        tl.store(partial_ptr + out, tl.sum(a * a, 1), mask=row < rows)


@triton.jit
def pattention_rows_kernel(
    x_ptr, k_ptr, v_ptr, grad_ptr, mask_ptr, seed_ptr, offset_ptr, factor_ptr, inner_ptr, out_ptr, rows, tokens,
    d_in, d_out, dropout, MODE: tl.constexpr, BACKWARD: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """BLOCK_O columns of O = S V, or backward of dX = dA K, for a tile of rows: a loop over all tokens."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    if BACKWARD:
        right_ptr = k_ptr
        width = d_in
    else:
        right_ptr = v_ptr
        width = d_out
    total = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        a, open, r, t = _scores(
            x_ptr, k_ptr, mask_ptr, row, token, rows, tokens, d_in, MODE, MASKED, False, UPCAST, BLOCK_M, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
        w = _weights(
            a, open, r, t, x_ptr, v_ptr, grad_ptr, offset_ptr, factor_ptr, inner_ptr, seed_ptr, row, token, rows,
            tokens, d_out, dropout, MODE, 1 if BACKWARD else 0, DROPOUT, False, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        at = right_ptr + token.to(tl.int64)[:, None] * width + column[None, :]
        right = tl.load(at, mask=(token < tokens)[:, None] & (column < width)[None, :], other=0.0)
        if UPCAST:
            right = right.to(tl.float32)
        total = tl.dot(w.to(right.dtype), right, total, input_precision="ieee")
    at = out_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit
def pattention_tokens_kernel(
    x_ptr, k_ptr, v_ptr, grad_ptr, mask_ptr, seed_ptr, offset_ptr, factor_ptr, inner_ptr, out_ptr, rows, tokens,
    d_in, d_out, dropout, MODE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """BLOCK_O columns of dK = dA' X, or of dV = S' dO, for a tile of tokens: a loop over all rows in order."""
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    if KEYS:
        right_ptr = x_ptr
        width = d_in
    else:
        right_ptr = grad_ptr
        width = d_out
    total = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for start in range(0, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        a, open, r, t = _scores(
            x_ptr, k_ptr, mask_ptr, row, token, rows, tokens, d_in, MODE, MASKED, True, UPCAST, BLOCK_M, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
        w = _weights(
            a, open, r, t, x_ptr, v_ptr, grad_ptr, offset_ptr, factor_ptr, inner_ptr, seed_ptr, row, token, rows,
            tokens, d_out, dropout, MODE, 1 if KEYS else 0, DROPOUT, True, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        at = right_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
        right = tl.load(at, mask=(row < rows)[:, None] & (column < width)[None, :], other=0.0)
        if UPCAST:
            right = right.to(tl.float32)
        total = tl.dot(w.to(right.dtype), right, total, input_precision="ieee")
    at = out_ptr + token.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (column < width)[None, :])
