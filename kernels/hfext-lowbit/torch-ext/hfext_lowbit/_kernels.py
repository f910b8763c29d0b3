"""Triton kernels that read packed codes and make weights w = s q + z in registers.

Within a byte the first code is in the lowest bits. Three bits are two planes: the two low bits of every code, then
from byte `WIDTH` on, the width of the first plane, the high bits. Codes of a tile are spread by halving bytes:
nibbles, then pairs, then bits, each step a join of neighbours, so that they come in the order of the inputs.
"""

import triton
import triton.language as tl


@triton.jit
def _spread(v, BITS: tl.constexpr):
    """uint8 [rows, n] as codes uint8 [rows, 8 n / BITS]."""
    if BITS <= 4:
        v = tl.reshape(tl.join(v & 15, v >> 4), v.shape[0], 2 * v.shape[1])
    if BITS <= 2:
        v = tl.reshape(tl.join(v & 3, v >> 2), v.shape[0], 2 * v.shape[1])
    if BITS == 1:
        v = tl.reshape(tl.join(v & 1, v >> 1), v.shape[0], 2 * v.shape[1])
    return v


@triton.jit
def _plane(base, valid, k0, width, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes [rows, BLOCK_K] from input `k0` on, a multiple of the codes in a byte, of a plane `width` bytes wide."""
    FIELDS: tl.constexpr = 8 // BITS
    byte = k0 // FIELDS + tl.arange(0, BLOCK_K // FIELDS)
    mask = valid[:, None] & (byte < width)[None, :]
    return _spread(tl.load(base[:, None] + byte[None, :], mask=mask, other=0), BITS)


@triton.jit
def _weight(
    qweight, scales, zeros, rows, valid, k0, K, WIDTH, stride_q, stride_g,
    GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """fp32 [rows, BLOCK_K]; with `WHOLE` a tile lies in one group."""
    base = qweight + rows.to(tl.int64) * stride_q
    if BITS == 3:
        codes = _plane(base, valid, k0, WIDTH, 2, BLOCK_K)
        codes += 4 * _plane(base + WIDTH, valid, k0, WIDTH // 2, 1, BLOCK_K)
    else:
        codes = _plane(base, valid, k0, WIDTH, BITS, BLOCK_K)
    at = rows.to(tl.int64) * stride_g
    if WHOLE:
        s = tl.load(scales + at + k0 // GROUP, mask=valid, other=0.0).to(tl.float32)[:, None]
        z = tl.load(zeros + at + k0 // GROUP, mask=valid, other=0.0).to(tl.float32)[:, None]
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        mask = valid[:, None] & (k < K)[None, :]
        s = tl.load(scales + at[:, None] + (k // GROUP)[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.load(zeros + at[:, None] + (k // GROUP)[None, :], mask=mask, other=0.0).to(tl.float32)
    return codes.to(tl.float32) * s + z


@triton.jit
def _group_codes(
    base, valid, group, start, width, n_groups,
    GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Codes uint8 [BLOCK_N, GROUPS, CODES] of a plane: the same stretch of several groups."""
    FIELDS: tl.constexpr = 8 // BITS
    inside = start // FIELDS + tl.arange(0, CODES // FIELDS)
    byte = (group * (GROUP // FIELDS))[:, None] + inside[None, :]
    ok = (group < n_groups)[:, None] & (inside < GROUP // FIELDS)[None, :] & (byte < width)
    v = tl.load(base[:, None, None] + byte[None, :, :], mask=valid[:, None, None] & ok[None, :, :], other=0)
    v = _spread(tl.reshape(v, BLOCK_N, GROUPS * (CODES // FIELDS)), BITS)
    return tl.reshape(v, BLOCK_N, GROUPS, CODES)


@triton.jit
def gemv_kernel(
    x, qweight, scales, zeros, bias, out, M, N, K, WIDTH, stride_m, stride_k, stride_q, stride_g, n_groups,
    GROUP: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
    CODES: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A few tokens: y = sum_g s_g (q_g . x_g) + z_g sum(x_g), fp32; codes are read once and meet every token."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    valid = rows < N
    base = qweight + rows.to(tl.int64) * stride_q
    grid = rows.to(tl.int64) * stride_g
    token = tl.arange(0, TOKENS)
    acc = tl.zeros((BLOCK_N, GROUPS, TOKENS), tl.float32)
    # A group longer than a tile is cut, with one group in a tile; splits share the tiles out.
    cuts = tl.cdiv(GROUP, CODES) if GROUPS == 1 else 1
    tiles = tl.cdiv(n_groups, GROUPS) * cuts
    first = split * tl.cdiv(tiles, SPLIT)
    last = min(tiles, first + tl.cdiv(tiles, SPLIT))
    for step in tl.range(first, last, num_stages=STAGES):
        group = step // cuts * GROUPS + tl.arange(0, GROUPS)
        start = step % cuts * CODES
        if BITS == 3:
            low = _group_codes(base, valid, group, start, WIDTH, n_groups, GROUP, 2, BLOCK_N, GROUPS, CODES)
            high = _group_codes(
                base + WIDTH, valid, group, start, WIDTH // 2, n_groups, GROUP, 1, BLOCK_N, GROUPS, CODES
            )
            codes = (low + 4 * high).to(tl.float32)
        else:
            codes = _group_codes(base, valid, group, start, WIDTH, n_groups, GROUP, BITS, BLOCK_N, GROUPS, CODES)
            codes = codes.to(tl.float32)
        of_group = valid[:, None] & (group < n_groups)[None, :]
        s = tl.load(scales + grid[:, None] + group[None, :], mask=of_group, other=0.0).to(tl.float32)
        z = tl.load(zeros + grid[:, None] + group[None, :], mask=of_group, other=0.0).to(tl.float32)
        inside = start + tl.arange(0, CODES)
        k = (group * GROUP)[:, None] + inside[None, :]
        known = (k < K) & (inside < GROUP)[None, :]
        for t in tl.static_range(TOKENS):
            # Tokens beyond the last repeat it and are not stored.
            at = x + min(t, M - 1) * stride_m + k.to(tl.int64) * stride_k
            values = tl.load(at, mask=known, other=0.0).to(tl.float32)
            part = s * tl.sum(codes * values[None, :, :], 2) + z * tl.sum(values, 1)[None, :]
            if TOKENS == 1:
                acc += part[:, :, None]
            else:
                acc += tl.where((token == t)[None, None, :], part[:, :, None], 0.0)
    y = tl.sum(acc, 1)
    if SPLIT > 1:
        out += split.to(tl.int64) * M * N
    elif HAS_BIAS:
        y += tl.load(bias + rows, mask=valid, other=0.0).to(tl.float32)[:, None]
    at = out + token.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(at, y.to(out.dtype.element_ty), mask=valid[:, None] & (token < M)[None, :])


@triton.jit
def gemm_kernel(
    x, qweight, scales, zeros, bias, out, M, N, K, WIDTH, stride_m, stride_k, stride_q, stride_g,
    GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y^T = W x^T, so that weights are the operand that stays in registers; W is rounded to the type of x."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    tokens = tl.program_id(0) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) // m_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    valid, present = rows < N, tokens < M
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT)
    last = min(tl.cdiv(K, BLOCK_K), (split + 1) * per_split)
    at_token = x + tokens.to(tl.int64) * stride_m
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(split * per_split, last):
        k0 = step * BLOCK_K
        k = k0 + tl.arange(0, BLOCK_K)
        mask = present[:, None] & (k < K)[None, :]
        values = tl.load(at_token[:, None] + k.to(tl.int64)[None, :] * stride_k, mask=mask, other=0.0)
        if UPCAST:
            values = values.to(tl.float32)
        w = _weight(qweight, scales, zeros, rows, valid, k0, K, WIDTH, stride_q, stride_g, GROUP, BITS, BLOCK_K, WHOLE)
        acc = tl.dot(w.to(values.dtype), tl.trans(values), acc, input_precision="ieee")
    y = tl.trans(acc)
    if SPLIT > 1:
        out += split.to(tl.int64) * M * N
    elif HAS_BIAS:
        y += tl.load(bias + rows, mask=valid, other=0.0).to(tl.float32)[None, :]
    at = out + tokens.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=present[:, None] & valid[None, :])


@triton.jit
def sum_kernel(parts, bias, out, N, total, SPLIT: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Partial sums of the splits [SPLIT, total] added in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    y = tl.zeros((BLOCK,), tl.float32)
    part = parts + at
    for _ in range(SPLIT):
        y += tl.load(part, mask=mask, other=0.0)
        part += total
    if HAS_BIAS:
        y += tl.load(bias + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def grad_kernel(
    dy, qweight, scales, zeros, out, M, N, K, WIDTH, stride_m, stride_n, stride_q, stride_g,
    GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx = dy W."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    tokens = tl.program_id(0) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(0) // m_blocks * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    present = tokens < M
    at_token = dy + tokens.to(tl.int64) * stride_m
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        rows = n0 + tl.arange(0, BLOCK_N)
        valid = rows < N
        mask = present[:, None] & valid[None, :]
        values = tl.load(at_token[:, None] + rows.to(tl.int64)[None, :] * stride_n, mask=mask, other=0.0)
        if UPCAST:
            values = values.to(tl.float32)
        w = _weight(qweight, scales, zeros, rows, valid, k0, K, WIDTH, stride_q, stride_g, GROUP, BITS, BLOCK_K, WHOLE)
        acc = tl.dot(values, w.to(values.dtype), acc, input_precision="ieee")
    at = out + tokens.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=present[:, None] & (k < K)[None, :])
