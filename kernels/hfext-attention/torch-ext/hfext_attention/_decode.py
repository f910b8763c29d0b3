"""Triton kernels of attention for a few queries and many keys: keys are split, each part read once for all its heads.

A program holds the G M rows of one key head and a chunk of the keys; parts meet by their log-sum-exp:

    L = log sum_s exp(L_s) [+ exp(sink)],   o = sum_s exp(L_s - L) o_s
"""

import triton
import triton.language as tl

from ._kernels import LN2, LOG2E, _attend, _interval, _tiles


@triton.jit
def attention_decode(
    q, k, v, o, lse, lo, hi, keys, mask, bias, slopes,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, lo_b, keys_b, mask_b, mask_h, mask_m, mask_n,
    bias_b, bias_h, bias_m, bias_n, B, H, G, M, N, chunk, off, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    INTERVAL: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr,
    ALIBI: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [parts, B, H, M, DV] fp32, normalised, and lse [parts, B, H, M] in units of log 2; grid (parts, B HK).
    chunk is a multiple of BN."""
    part = tl.program_id(0)
    heads = H // G
    b = (tl.program_id(1) // heads).to(tl.int64)
    hk = (tl.program_id(1) % heads).to(tl.int64)
    r = tl.arange(0, BR)
    valid = r < G * M
    i = tl.where(valid, r % M, M)
    h = hk * G + tl.where(valid, r // M, 0)
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M, N, INTERVAL)
    start, _, _, end = _tiles(row_lo, row_hi, i, M, N, BN, False)
    start = tl.maximum(start, part * chunk)
    end = tl.minimum(end, (part + 1) * chunk)

    d = tl.arange(0, BD)
    at = q + b * q_b + (h * q_h + i * q_m)[:, None] + d[None, :] * q_d
    qt = tl.load(at, mask=valid[:, None] & (d[None, :] < D), other=0.0)
    if UPCAST:
        qt = qt.to(tl.float32)
    k += b * k_b + hk * k_h
    v += b * v_b + hk * v_h
    keys += b * keys_b
    mask += b * mask_b + hk * G * mask_h
    bias += b * bias_b + hk * G * bias_h
    mask_at = (r // M * mask_h + i * mask_m)[:, None]
    bias_at = (r // M * bias_h + i * bias_m)[:, None]
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + h)[:, None]
    if not (SOFTCAP or BIAS or ALIBI):
        scale = scale * LOG2E

    acc = tl.zeros([BR, BDV], tl.float32)
    m = tl.full([BR], float("-inf"), tl.float32)
    l = tl.zeros([BR], tl.float32)
    for j0 in tl.range(start, end, BN):
        acc, l, m = _attend(
            acc, l, m, qt, k, v, j0, i, row_lo, row_hi, k_n, k_d, v_n, v_d, bias, bias_at, bias_n, mask, mask_at,
            mask_n, keys,
            scale, softcap, slope, off, 0, 0.0, M, N, D, DV, BD, BDV, BN, SOFTCAP, BIAS, MASK, KEYS, ALIBI,
            False, True, UPCAST, PRECISION,
        )  # fmt: skip
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    row = ((part * B + b) * H + h) * M + i
    tl.store(lse + row, m + tl.log2(l), mask=valid)
    e = tl.arange(0, BDV)
    tl.store(o + row[:, None] * DV + e[None, :], acc, mask=valid[:, None] & (e[None, :] < DV))


@triton.jit
def attention_combine(
    parts, part_lse, sink, o, lse, B, H, M, PARTS,
    DV: tl.constexpr, BDV: tl.constexpr, BP: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """o [B, M, H, DV] and lse [B, H, M], natural, from the parts; grid (B H M)."""
    row = tl.program_id(0).to(tl.int64)
    rows = (B * H).to(tl.int64) * M
    h = row // M % H
    p = tl.arange(0, BP)
    e = tl.arange(0, BDV)
    L = tl.load(part_lse + p * rows + row, mask=p < PARTS, other=float("-inf"))
    top = tl.max(L, 0)
    if SINK:
        z = tl.load(sink + h).to(tl.float32) * LOG2E
        top = tl.maximum(top, z)
    base = tl.where(top == float("-inf"), 0.0, top)
    w = tl.exp2(L - base)
    total = tl.sum(w, 0)
    if SINK:
        total += tl.exp2(z - base)
    at = parts + (p[:, None] * rows + row) * DV + e[None, :]
    x = tl.load(at, mask=(p[:, None] < PARTS) & (e[None, :] < DV), other=0.0)
    x = tl.sum(x * w[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out = ((row // (H * M)) * M + row % M) * H + h
    tl.store(o + out * DV + e, x.to(o.dtype.element_ty), mask=e < DV)
    tl.store(lse + row, (base + tl.log2(total)) * LN2)
