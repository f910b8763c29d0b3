"""The kernels. Everything is computed in COMPUTE (float32, or float64 for float64 tensors) right after loading.

A program works on one group of channels, so coefficients are scalars to it. Columns are cut into chunks of BLOCK_C
inside a group, since a group need not be a power of two wide.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rational_forward_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    y_ptr,
    rows,
    groups,
    width,
    stride_row,
    stride_col,
    M: tl.constexpr,
    N: tl.constexpr,
    ABS_TERMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y of one tile of BLOCK_R rows and BLOCK_C channels of a group."""
    pid = tl.program_id(0)
    chunks = tl.cdiv(width, BLOCK_C)
    chunk = pid % chunks
    group = (pid // chunks) % groups
    tile = pid // chunks // groups
    r = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    keep = (r < rows)[:, None] & (c < width)[None, :]
    column = (group * width + c).to(tl.int64)
    x = tl.load(x_ptr + r[:, None] * stride_row + column[None, :] * stride_col, mask=keep, other=0.0).to(COMPUTE)
    p = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE) + tl.load(a_ptr + group * (M + 1) + M)
    for i in tl.static_range(M):
        p = p * x + tl.load(a_ptr + group * (M + 1) + M - 1 - i)
    q = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    for j in tl.static_range(N):
        b = tl.load(b_ptr + group * N + N - 1 - j)
        if ABS_TERMS:
            q = (q + tl.abs(b)) * tl.abs(x)
        else:
            q = (q + b) * x
    y = p / (1.0 + tl.abs(q))
    out = y_ptr + r[:, None] * (groups * width) + column[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def rational_backward_kernel(
    grad_ptr,
    x_ptr,
    a_ptr,
    b_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    groups,
    width,
    tiles,
    grad_stride_row,
    grad_stride_col,
    stride_row,
    stride_col,
    M: tl.constexpr,
    N: tl.constexpr,
    ABS_TERMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of every `tiles`-th tile of rows, and the sums of these rows for the coefficients of the group.

    Each lane sums its own elements over all its tiles, so the tree of additions is the same in every run; lanes are
    added once, at the end. partial[tile, chunk, group, :] is written by one program alone.
    """
    pid = tl.program_id(0)
    chunks = tl.cdiv(width, BLOCK_C)
    chunk = pid % chunks
    group = (pid // chunks) % groups
    first = pid // chunks // groups
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    column = (group * width + c).to(tl.int64)
    channels = groups * width
    # Scalars are loaded ahead of the loop: inside it they would take part in its pipeline.
    highest_a = tl.load(a_ptr + group * (M + 1) + M)
    c0 = tl.load(a_ptr + group * (M + 1) + 0, mask=M > 0, other=0.0)
    c1 = tl.load(a_ptr + group * (M + 1) + 1, mask=M > 1, other=0.0)
    c2 = tl.load(a_ptr + group * (M + 1) + 2, mask=M > 2, other=0.0)
    c3 = tl.load(a_ptr + group * (M + 1) + 3, mask=M > 3, other=0.0)
    c4 = tl.load(a_ptr + group * (M + 1) + 4, mask=M > 4, other=0.0)
    c5 = tl.load(a_ptr + group * (M + 1) + 5, mask=M > 5, other=0.0)
    c6 = tl.load(a_ptr + group * (M + 1) + 6, mask=M > 6, other=0.0)
    c7 = tl.load(a_ptr + group * (M + 1) + 7, mask=M > 7, other=0.0)
    highest_b = tl.load(b_ptr + group * N + N - 1, mask=N > 0, other=0.0)
    d1 = tl.load(b_ptr + group * N + 0, mask=N > 1, other=0.0)
    d2 = tl.load(b_ptr + group * N + 1, mask=N > 2, other=0.0)
    d3 = tl.load(b_ptr + group * N + 2, mask=N > 3, other=0.0)
    d4 = tl.load(b_ptr + group * N + 3, mask=N > 4, other=0.0)
    d5 = tl.load(b_ptr + group * N + 4, mask=N > 5, other=0.0)
    if ABS_TERMS:
        highest_b = tl.abs(highest_b)
        d1 = tl.abs(d1)
        d2 = tl.abs(d2)
        d3 = tl.abs(d3)
        d4 = tl.abs(d4)
        d5 = tl.abs(d5)
    # Triton has no arrays of tiles, so each sum has a name; what the orders leave out is not compiled.
    zero = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    a0 = zero
    a1 = zero
    a2 = zero
    a3 = zero
    a4 = zero
    a5 = zero
    a6 = zero
    a7 = zero
    a8 = zero
    b1 = zero
    b2 = zero
    b3 = zero
    b4 = zero
    b5 = zero
    b6 = zero
    for tile in tl.range(first, tl.cdiv(rows, BLOCK_R), tiles, num_stages=STAGES):
        r = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        keep = (r < rows)[:, None] & (c < width)[None, :]
        x = tl.load(x_ptr + r[:, None] * stride_row + column[None, :] * stride_col, mask=keep, other=0.0).to(COMPUTE)
        g = tl.load(
            grad_ptr + r[:, None] * grad_stride_row + column[None, :] * grad_stride_col, mask=keep, other=0.0
        ).to(COMPUTE)
        p = zero + highest_a
        dp = zero
        if M >= 8:
            dp = dp * x + p
            p = p * x + c7
        if M >= 7:
            dp = dp * x + p
            p = p * x + c6
        if M >= 6:
            dp = dp * x + p
            p = p * x + c5
        if M >= 5:
            dp = dp * x + p
            p = p * x + c4
        if M >= 4:
            dp = dp * x + p
            p = p * x + c3
        if M >= 3:
            dp = dp * x + p
            p = p * x + c2
        if M >= 2:
            dp = dp * x + p
            p = p * x + c1
        dp = dp * x + p
        p = p * x + c0
        base = x
        if ABS_TERMS:
            base = tl.abs(x)
        q = zero + highest_b
        dq = zero
        if N >= 6:
            dq = dq * base + q
            q = q * base + d5
        if N >= 5:
            dq = dq * base + q
            q = q * base + d4
        if N >= 4:
            dq = dq * base + q
            q = q * base + d3
        if N >= 3:
            dq = dq * base + q
            q = q * base + d2
        if N >= 2:
            dq = dq * base + q
            q = q * base + d1
        dq = dq * base + q
        q = q * base
        if ABS_TERMS:
            dq = tl.where(x < 0, -dq, tl.where(x > 0, dq, 0.0))
            inverse = 1.0 / (1.0 + q)
            t = g * inverse
            y = p * inverse
            u = t * y
        else:
            dq = tl.where(q < 0, -dq, dq)
            inverse = 1.0 / (1.0 + tl.abs(q))
            t = g * inverse
            y = p * inverse
            u = tl.where(q < 0, -t * y, t * y)
        dx = t * (dp - dq * y)
        tl.store(dx_ptr + r[:, None] * channels + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=keep)
        a0 += t
        t *= x
        a1 += t
        if M >= 2:
            t *= x
            a2 += t
        if M >= 3:
            t *= x
            a3 += t
        if M >= 4:
            t *= x
            a4 += t
        if M >= 5:
            t *= x
            a5 += t
        if M >= 6:
            t *= x
            a6 += t
        if M >= 7:
            t *= x
            a7 += t
        if M >= 8:
            t *= x
            a8 += t
        if N >= 1:
            u *= base
            b1 += u
        if N >= 2:
            u *= base
            b2 += u
        if N >= 3:
            u *= base
            b3 += u
        if N >= 4:
            u *= base
            b4 += u
        if N >= 5:
            u *= base
            b5 += u
        if N >= 6:
            u *= base
            b6 += u
    out = partial_ptr + ((first * chunks + chunk) * groups + group).to(tl.int64) * (M + 1 + N)
    tl.store(out, tl.sum(tl.sum(a0, 1), 0))
    tl.store(out + 1, tl.sum(tl.sum(a1, 1), 0))
    if M >= 2:
        tl.store(out + 2, tl.sum(tl.sum(a2, 1), 0))
    if M >= 3:
        tl.store(out + 3, tl.sum(tl.sum(a3, 1), 0))
    if M >= 4:
        tl.store(out + 4, tl.sum(tl.sum(a4, 1), 0))
    if M >= 5:
        tl.store(out + 5, tl.sum(tl.sum(a5, 1), 0))
    if M >= 6:
        tl.store(out + 6, tl.sum(tl.sum(a6, 1), 0))
    if M >= 7:
        tl.store(out + 7, tl.sum(tl.sum(a7, 1), 0))
    if M >= 8:
        tl.store(out + 8, tl.sum(tl.sum(a8, 1), 0))
    if N >= 1:
        tl.store(out + M + 1, tl.sum(tl.sum(b1, 1), 0))
    if N >= 2:
        tl.store(out + M + 2, tl.sum(tl.sum(b2, 1), 0))
    if N >= 3:
        tl.store(out + M + 3, tl.sum(tl.sum(b3, 1), 0))
    if N >= 4:
        tl.store(out + M + 4, tl.sum(tl.sum(b4, 1), 0))
    if N >= 5:
        tl.store(out + M + 5, tl.sum(tl.sum(b5, 1), 0))
    if N >= 6:
        tl.store(out + M + 6, tl.sum(tl.sum(b6, 1), 0))


@triton.jit
def rational_reduce_kernel(
    partial_ptr,
    b_ptr,
    da_ptr,
    db_ptr,
    count,
    groups,
    M: tl.constexpr,
    N: tl.constexpr,
    ABS_TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
):
    """Coefficient gradients of one group: its partial sums added in float64, always in the same order."""
    group = tl.program_id(0)
    k = tl.arange(0, COEFFICIENTS)
    total = tl.zeros([BLOCK, COEFFICIENTS], tl.float64)
    for start in range(0, count, BLOCK):
        i = (start + tl.arange(0, BLOCK)).to(tl.int64)
        keep = (i < count)[:, None] & (k < M + 1 + N)[None, :]
        at = (i[:, None] * groups + group) * (M + 1 + N) + k[None, :]
        total += tl.load(partial_ptr + at, mask=keep, other=0.0).to(tl.float64)
    found = tl.sum(total, 0)
    tl.store(da_ptr + group * (M + 1) + k, found.to(da_ptr.dtype.element_ty), mask=k <= M)
    if N > 0:
        j = k - (M + 1)
        inside = (j >= 0) & (j < N)
        found = -found
        if ABS_TERMS:
            b = tl.load(b_ptr + group * N + j, mask=inside, other=0.0)
            found = tl.where(b < 0, -found, found)
        tl.store(db_ptr + group * N + j, found.to(db_ptr.dtype.element_ty), mask=inside)
