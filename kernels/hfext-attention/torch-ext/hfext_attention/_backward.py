"""Triton kernels of the gradient of softmax attention: no atomics, so that every run gives the same bits.

Delta_i = <do_i, o_i> - dlse_i;  P_ij = exp(s_ij - L_i);  dS_ij = P_ij (<do_i, v_j> - Delta_i)
dv_j = sum_i P_ij do_i;  dq_i = scale sum_j dS_ij k_j;  dk_j = scale sum_i dS_ij q_i;  dbias_ij = dS_ij
"""

import triton
import triton.language as tl

from ._kernels import LOG2E, _interval, _kept, _rows, _scores, _tiles


@triton.jit
def attention_delta(
    o, do, grad_lse, delta, do_b, do_m, do_h, do_d, H, M,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Delta_i = <do_i, o_i> - dlse_i [B, H, M]; o is [B, M, H, DV]. Grid (tiles of M, B H)."""
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i0 = tl.program_id(0) * BM
    rows, d = tl.arange(0, BM), tl.arange(0, BDV)
    i = i0 + rows
    x = _rows(o + b * M * H * DV + h * DV, i0, rows, H * DV, d, 1, M, DV, DV == BDV, False, True)
    g = _rows(do + b * do_b + h * do_h, i0, rows, do_m, d, do_d, M, DV, DV == BDV, False, True)
    total = tl.sum(x * g, 1)
    if LSE:
        total -= tl.load(grad_lse + bh.to(tl.int64) * M + i, mask=i < M, other=0.0)
    tl.store(delta + bh.to(tl.int64) * M + i, total, mask=i < M)


@triton.jit
def _weights(s, lse):
    """P from scores in units of log 2 and the log-sum-exp; 0 for rows that see nothing."""
    return tl.exp2(s - tl.where(lse == float("-inf"), 0.0, lse) * LOG2E)


@triton.jit
def _query_step(
    acc, q, do, lse, delta, k, v, j0, i, lo, hi, k_n, k_d, v_n, v_d, bias, bias_at, bias_n, mask, mask_at, mask_n,
    keys,
    scale, unit, softcap, slope, off, seed, p_drop, M, N,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, BOUND: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BN)
    kt = _rows(k, j0, cols, k_n, tl.arange(0, BD), k_d, N, D, D == BD, not BOUND, UPCAST)
    vt = _rows(v, j0, cols, v_n, tl.arange(0, BDV), v_d, N, DV, DV == BDV, not BOUND, UPCAST)
    s = tl.dot(q, tl.trans(kt), input_precision=PRECISION) * unit
    s, t = _scores(
        s, i[:, None], j0, cols[None, :], lo[:, None], hi[:, None], bias, bias_at, bias_n, mask, mask_at, mask_n,
        keys, softcap, slope, off,
        M, N, SOFTCAP, BIAS, MASK, KEYS, ALIBI, BOUND,
    )  # fmt: skip
    p = _weights(s, lse[:, None])
    dp = tl.dot(do, tl.trans(vt), input_precision=PRECISION)
    if DROPOUT:
        dp = dp * _kept(seed, i[:, None], j0 + cols[None, :], N, p_drop)
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        ds = ds * (1.0 - t * t)
    return tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PRECISION)


@triton.jit
def attention_query_gradient(
    q, k, v, do, lse, delta, dq, lo, hi, keys, mask, bias, slopes, seed_at,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_m, do_h, do_d, dq_b, dq_h, dq_m,
    lo_b, keys_b, mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    H, G, M, N, off, scale, softcap, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERVAL: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; grid (tiles of M, B H)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i0 = tile * BM
    rows, d = tl.arange(0, BM), tl.arange(0, BD)
    i = i0 + rows
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M, N, INTERVAL)
    start, full_start, full_end, end = _tiles(row_lo, row_hi, i, M, N, BN, SPLIT)

    qt = _rows(q + b * q_b + h * q_h, i0, rows, q_m, d, q_d, M, D, D == BD, False, UPCAST)
    g = _rows(do + b * do_b + h * do_h, i0, rows, do_m, tl.arange(0, BDV), do_d, M, DV, DV == BDV, False, UPCAST)
    row_lse = tl.load(lse + bh.to(tl.int64) * M + i, mask=i < M, other=float("inf"))
    row_delta = tl.load(delta + bh.to(tl.int64) * M + i, mask=i < M, other=0.0)
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
    keys += b * keys_b
    mask += b * mask_b + h * mask_h + i0.to(tl.int64) * mask_m
    bias += b * bias_b + h * bias_h + i0.to(tl.int64) * bias_m
    mask_at = (tl.arange(0, BM) * mask_m)[:, None]
    bias_at = (tl.arange(0, BM) * bias_m)[:, None]
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + h)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_at) + bh
    unit = scale
    if not (SOFTCAP or BIAS or ALIBI):
        unit = scale * LOG2E

    acc = tl.zeros([BM, BD], tl.float32)
    if SPLIT:
        for j0 in tl.range(full_start, full_end, BN):
            acc = _query_step(
                acc, qt, g, row_lse, row_delta, k, v, j0, i, row_lo, row_hi, k_n, k_d, v_n, v_d, bias, bias_at, bias_n,
                mask, mask_at, mask_n, keys, scale, unit, softcap, slope, off, seed, p_drop, M, N, D, DV, BD, BDV,
                BN, SOFTCAP,
                BIAS, MASK, KEYS, ALIBI, DROPOUT, False, UPCAST, PRECISION,
            )  # fmt: skip
    left = full_start - start
    for t in tl.range(0, left + end - full_end, BN):
        if SPLIT:
            j0 = tl.where(t < left, start + t, full_end + t - left)
        else:
            j0 = start + t
        acc = _query_step(
            acc, qt, g, row_lse, row_delta, k, v, j0, i, row_lo, row_hi, k_n, k_d, v_n, v_d, bias, bias_at, bias_n,
            mask, mask_at, mask_n, keys, scale, unit, softcap, slope, off, seed, p_drop, M, N, D, DV, BD, BDV, BN,
            SOFTCAP,
            BIAS, MASK, KEYS, ALIBI, DROPOUT, True, UPCAST, PRECISION,
        )  # fmt: skip
    at = dq + b * dq_b + h * dq_h + i[:, None].to(tl.int64) * dq_m + d[None, :]
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=(i[:, None] < M) & (d[None, :] < D))


@triton.jit
def attention_key_gradient(
    q, k, v, do, lse, delta, dk, dv, lo, hi, q_first, q_last, keys, mask, bias, slopes, seed_at,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_m, do_h, do_d,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, lo_b, range_b, keys_b, mask_b, mask_h, mask_m, mask_n,
    bias_b, bias_h, bias_m, bias_n, HK, G, M, N, off, scale, softcap, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERVAL: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, over the G heads and the queries that see it; grid (tiles of N, B HK).

    Everything is transposed, [keys, queries], so that the weights enter their product without a change of layout.
    WITH_K and WITH_V make only one of the two, for heads whose sums would not fit the registers together."""
    tile = tl.program_id(0)
    bh = tl.program_id(1)
    b, hk = (bh // HK).to(tl.int64), (bh % HK).to(tl.int64)
    j0 = tile * BN
    cols, d, e = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    j = (j0 + cols)[:, None]
    kt = _rows(k + b * k_b + hk * k_h, j0, cols, k_n, d, k_d, N, D, D == BD, False, UPCAST)
    vt = _rows(v + b * v_b + hk * v_h, j0, cols, v_n, e, v_d, N, DV, DV == BDV, False, UPCAST)
    lo += b * lo_b
    hi += b * lo_b
    keys += b * keys_b
    first, last = 0, M
    if INTERVAL:
        first = tl.load(q_first + b * range_b + tile) // BM * BM
        last = tl.load(q_last + b * range_b + tile)
    unit = scale
    if not (SOFTCAP or BIAS or ALIBI):
        unit = scale * LOG2E

    acc_k = tl.zeros([BN, BD], tl.float32)
    acc_v = tl.zeros([BN, BDV], tl.float32)
    for g in range(G):
        h = hk * G + g
        row = (b * HK * G + h) * M
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + h)
        seed = 0
        if DROPOUT:
            seed = tl.load(seed_at) + (b * HK * G + h).to(tl.int32)
        for i0 in tl.range(first, last, BM):
            rows = tl.arange(0, BM)
            i = i0 + rows
            qt = _rows(q + b * q_b + h * q_h, i0, rows, q_m, d, q_d, M, D, D == BD, False, UPCAST)
            gt = _rows(do + b * do_b + h * do_h, i0, rows, do_m, e, do_d, M, DV, DV == BDV, False, UPCAST)
            row_lse = tl.load(lse + row + i, mask=i < M, other=float("inf"))
            row_delta = tl.load(delta + row + i, mask=i < M, other=0.0)
            row_lo, row_hi = _interval(lo, hi, i, M, N, INTERVAL)
            s = tl.dot(kt, tl.trans(qt), input_precision=PRECISION) * unit
            s, t = _scores(
                s, i[None, :], j0, cols[:, None], row_lo[None, :], row_hi[None, :],
                bias + b * bias_b + h * bias_h + tl.cast(i0, tl.int64) * bias_m, (rows * bias_m)[None, :], bias_n,
                mask + b * mask_b + h * mask_h + tl.cast(i0, tl.int64) * mask_m, (rows * mask_m)[None, :], mask_n,
                keys,
                softcap, slope, off, M, N, SOFTCAP, BIAS, MASK, KEYS, ALIBI, INTERVAL,
            )  # fmt: skip
            p = _weights(s, row_lse[None, :])
            keep = 1.0
            if DROPOUT:
                keep = _kept(seed, i[None, :], j, N, p_drop)
            if WITH_V:
                acc_v = tl.dot((p * keep).to(gt.dtype), gt, acc_v, input_precision=PRECISION)
            if WITH_K:
                dp = tl.dot(vt, tl.trans(gt), input_precision=PRECISION) * keep
                ds = p * (dp - row_delta[None, :])
                if SOFTCAP:
                    ds = ds * (1.0 - t * t)
                acc_k = tl.dot(ds.to(qt.dtype), qt, acc_k, input_precision=PRECISION)
    if WITH_K:
        at = dk + b * dk_b + hk * dk_h + j.to(tl.int64) * dk_n + d[None, :]
        tl.store(at, (acc_k * scale).to(dk.dtype.element_ty), mask=(j < N) & (d[None, :] < D))
    if WITH_V:
        at = dv + b * dv_b + hk * dv_h + j.to(tl.int64) * dv_n + e[None, :]
        tl.store(at, acc_v.to(dv.dtype.element_ty), mask=(j < N) & (e[None, :] < DV))


@triton.jit
def attention_bias_gradient(
    q, k, v, do, lse, delta, db, lo, hi, keys, mask, bias, slopes, seed_at,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_m, do_h, do_d,
    lo_b, keys_b, mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    B, H, BB, HB, G, M, N, off, scale, softcap, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERVAL: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the bias' gradient [BB, HB, M, N], summed over the batch and heads that share it, in their order;
    grid (tiles of M x N, BB HB)."""
    tiles = (N + BN - 1) // BN
    i0 = tl.program_id(0) // tiles * BM
    j0 = tl.program_id(0) % tiles * BN
    own = tl.program_id(1)
    rows, cols, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    i, j = i0 + rows, (j0 + cols)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for index in range((B // BB) * (H // HB)):
        b = (own // HB + index // (H // HB) * (BB != B).to(tl.int32)).to(tl.int64)
        h = (own % HB + index % (H // HB) * (HB != H).to(tl.int32)).to(tl.int64)
        row = (b * H + h) * M
        row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M, N, INTERVAL)
        qt = _rows(q + b * q_b + h * q_h, i0, rows, q_m, d, q_d, M, D, D == BD, False, UPCAST)
        gt = _rows(do + b * do_b + h * do_h, i0, rows, do_m, e, do_d, M, DV, DV == BDV, False, UPCAST)
        kt = _rows(k + b * k_b + (h // G) * k_h, j0, cols, k_n, d, k_d, N, D, D == BD, False, UPCAST)
        vt = _rows(v + b * v_b + (h // G) * v_h, j0, cols, v_n, e, v_d, N, DV, DV == BDV, False, UPCAST)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + h)
        s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * scale
        s, t = _scores(
            s, i[:, None], j0, cols[None, :], row_lo[:, None], row_hi[:, None],
            bias + b * bias_b + h * bias_h + i0.to(tl.int64) * bias_m, (rows * bias_m)[:, None], bias_n,
            mask + b * mask_b + h * mask_h + i0.to(tl.int64) * mask_m, (rows * mask_m)[:, None], mask_n,
            keys + b * keys_b,
            softcap, slope, off, M, N, SOFTCAP, True, MASK, KEYS, ALIBI, True,
        )  # fmt: skip
        p = _weights(s, tl.load(lse + row + i, mask=i < M, other=float("inf"))[:, None])
        dp = tl.dot(gt, tl.trans(vt), input_precision=PRECISION)
        if DROPOUT:
            seed = tl.load(seed_at) + (b * H + h).to(tl.int32)
            dp = dp * _kept(seed, i[:, None], j, N, p_drop)
        # The bias is added behind the soft cap, so the cap's derivative is not in its gradient.
        acc += p * (dp - tl.load(delta + row + i, mask=i < M, other=0.0)[:, None])
    at = db + (own.to(tl.int64) * M + i[:, None]) * N + j
    tl.store(at, acc, mask=(i[:, None] < M) & (j < N))
