"""Triton kernels of Spark attention for a few queries and many keys: keys are split, each part read for all heads.

`spark_moments` leaves the moments of each part; `spark_decode` joins them in their order, by Chan's formula, to the
threshold of the row and attends to its own part; parts meet by their log-sum-exp. A weight is softmax times gate, and
the log-sum-exp is that of the softmax alone, so gates need no thought when parts are joined.
"""

import triton
import triton.language as tl

from ._kernels import LOG2E, _attend, _first, _hide, _interval, _merge, _moments, _range, _rows, _second, _threshold


@triton.jit
def _row_tile(q, r, valid, h, i, q_h, q_m, d, cols, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """Rows (head, query) of q at the columns of offsets `cols`."""
    at = q + (h * q_h + i * q_m)[:, None] + cols[None, :]
    x = tl.load(at, mask=valid[:, None] & (d[None, :] < WIDTH), other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def spark_moments(
    q, k, stats, lo, hi, keys, mask, q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, lo_b, keys_b, mask_b, mask_h, mask_m,
    mask_n, B, H, G, M, N, chunk, scale1,
    D: tl.constexpr, R: tl.constexpr, BD1: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr,
    ALIGN: tl.constexpr, INTERVAL: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """stats [5, parts, B, H, M] of the predictor's scores, in units of log 2: count, mean of the differences from the
    base, sum of squared deviations, maximum, and the base, one of the scores; grid (parts, B HK). chunk is a multiple
    of BN."""
    part = tl.program_id(0)
    heads = H // G
    b = (tl.program_id(1) // heads).to(tl.int64)
    hk = (tl.program_id(1) % heads).to(tl.int64)
    r, cols, d = tl.arange(0, BR), tl.arange(0, BN), tl.arange(0, BD1)
    valid = r < G * M
    i = tl.where(valid, r % M, M)
    h = hk * G + tl.where(valid, r // M, 0)
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M, N, INTERVAL)
    start, end = _range(row_lo, row_hi, i, M, N, BN)
    start = tl.maximum(start, part * chunk)
    end = tl.minimum(end, (part + 1) * chunk)
    c = _first(d, D, R, HALVES, ALIGN)
    q1 = _row_tile(q + b * q_b, r, valid, h, i, q_h, q_m, d, c * q_d, R, UPCAST)
    k += b * k_b + hk * k_h
    keys += b * keys_b
    mask += b * mask_b + hk * G * mask_h
    mask_at = (r // M * mask_h + i * mask_m)[:, None]
    n = tl.zeros([BR], tl.float32)
    mean = tl.zeros([BR], tl.float32)
    m2 = tl.zeros([BR], tl.float32)
    base = tl.zeros([BR], tl.float32)
    top = tl.full([BR], float("-inf"), tl.float32)
    for j0 in tl.range(start, end, BN):
        kt = _rows(k, j0, cols, k_n, d, c * k_d, N, R, R == BD1, UPCAST)
        s = tl.dot(q1, tl.trans(kt), input_precision=PRECISION) * (scale1 * LOG2E)
        s = _hide(
            s, i[:, None], j0, cols[None, :], row_lo[:, None], row_hi[:, None], mask, mask_at, mask_n, keys, M, N,
            MASK, KEYS,
        )  # fmt: skip
        n, mean, m2, top, base = _moments(n, mean, m2, top, base, s)
    step = tl.num_programs(0) * (B * H).to(tl.int64) * M
    at = stats + ((part * B + b) * H + h) * M + i
    tl.store(at, n, mask=valid)
    tl.store(at + step, mean, mask=valid)
    tl.store(at + 2 * step, m2, mask=valid)
    tl.store(at + 3 * step, top, mask=valid)
    tl.store(at + 4 * step, base, mask=valid)


@triton.jit
def spark_decode(
    q, k, v, o, lse, stats, table, lo, hi, keys, mask,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, lo_b, keys_b, mask_b, mask_h, mask_m, mask_n,
    B, H, G, M, N, chunk, scale1, scale2,
    D: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, BD1: tl.constexpr, BD2: tl.constexpr, BDV: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr,
    UNBIASED: tl.constexpr, INTERVAL: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o [parts, B, H, M, DV] fp32, over the part's own softmax, and lse [parts, B, H, M] in units of log 2."""
    part = tl.program_id(0)
    heads = H // G
    b = (tl.program_id(1) // heads).to(tl.int64)
    hk = (tl.program_id(1) % heads).to(tl.int64)
    r, d, e = tl.arange(0, BR), tl.arange(0, BD1), tl.arange(0, BDV)
    valid = r < G * M
    i = tl.where(valid, r % M, M)
    h = hk * G + tl.where(valid, r // M, 0)
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M, N, INTERVAL)
    start, end = _range(row_lo, row_hi, i, M, N, BN)
    start = tl.maximum(start, part * chunk)
    end = tl.minimum(end, (part + 1) * chunk)

    n = tl.zeros([BR], tl.float32)
    mean = tl.zeros([BR], tl.float32)
    m2 = tl.zeros([BR], tl.float32)
    base = tl.zeros([BR], tl.float32)
    top = tl.full([BR], float("-inf"), tl.float32)
    parts = tl.num_programs(0)
    step = parts * (B * H).to(tl.int64) * M
    for other in range(parts):
        at = stats + ((other * B + b) * H + h) * M + i
        n_b = tl.load(at, mask=valid, other=0.0)
        mean_b = tl.load(at + step, mask=valid, other=0.0)
        m2_b = tl.load(at + 2 * step, mask=valid, other=0.0)
        top = tl.maximum(top, tl.load(at + 3 * step, mask=valid, other=float("-inf")))
        base_b = tl.load(at + 4 * step, mask=valid, other=0.0)
        base = tl.where(n == 0, base_b, base)
        n, mean, m2 = _merge(n, mean, m2, n_b, mean_b + (base_b - base), m2_b)
    theta = _threshold(n, mean, m2, top, base, table, UNBIASED)

    c = _first(d, D, R, HALVES, ALIGN)
    q1 = _row_tile(q + b * q_b, r, valid, h, i, q_h, q_m, d, c * q_d, R, UPCAST)
    q2 = q1
    if GATE:
        d2 = tl.arange(0, BD2)
        c2 = _second(d2, D, R, HALVES, ALIGN)
        q2 = _row_tile(q + b * q_b, r, valid, h, i, q_h, q_m, d2, c2 * q_d, D - R, UPCAST)
    k += b * k_b + hk * k_h
    v += b * v_b + hk * v_h
    keys += b * keys_b
    mask += b * mask_b + hk * G * mask_h
    mask_at = (r // M * mask_h + i * mask_m)[:, None]
    acc = tl.zeros([BR, BDV], tl.float32)
    m = tl.full([BR], float("-inf"), tl.float32)
    l = tl.zeros([BR], tl.float32)
    for j0 in tl.range(start, end, BN):
        acc, l, m = _attend(
            acc, l, m, q1, q2, k, v, j0, i, row_lo, row_hi, theta, k_n, k_d, v_n, v_d, mask, mask_at, mask_n, keys,
            scale1 * LOG2E, scale2, 0, 0.0, M, N, D, R, DV, BD1, BD2, BDV, BN, GATE, HALVES, ALIGN, MASK, KEYS, False,
            UPCAST, PRECISION,
        )  # fmt: skip
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    row = ((part * B + b) * H + h) * M + i
    tl.store(lse + row, m + tl.log2(l), mask=valid)
    tl.store(o + row[:, None] * DV + e[None, :], acc, mask=valid[:, None] & (e[None, :] < DV))


@triton.jit
def spark_combine(
    parts, part_lse, o, B, H, M, PARTS, DV: tl.constexpr, BDV: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """o [B, M, H, DV] from the parts; grid (B H M)."""
    row = tl.program_id(0).to(tl.int64)
    rows = (B * H).to(tl.int64) * M
    h = row // M % H
    p, e = tl.arange(0, BP), tl.arange(0, BDV)
    L = tl.load(part_lse + p * rows + row, mask=p < PARTS, other=float("-inf"))
    top = tl.max(L, 0)
    w = tl.exp2(L - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(w, 0)
    at = parts + (p[:, None] * rows + row) * DV + e[None, :]
    x = tl.load(at, mask=(p[:, None] < PARTS) & (e[None, :] < DV), other=0.0)
    x = tl.sum(x * w[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out = ((row // (H * M)) * M + row % M) * H + h
    tl.store(o + out * DV + e, x.to(o.dtype.element_ty), mask=e < DV)
