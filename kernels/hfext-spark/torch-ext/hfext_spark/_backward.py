"""Triton kernels of the gradient of Spark attention; its formulas stand in `_kernels.py`. No atomics."""

import triton
import triton.language as tl

from ._kernels import LOG2E, _first, _hide, _interval, _kept, _range, _rows, _second, _sigmoid, _softplus


@triton.jit
def spark_delta(
    o, do, delta, do_b, do_m, do_h, do_d, H, M, DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Delta_i = <do_i, o_i> [B, H, M]; o is [B, M, H, DV]. Grid (tiles of M, B H)."""
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i0 = tl.program_id(0) * BM
    rows, d = tl.arange(0, BM), tl.arange(0, BDV)
    i = i0 + rows
    x = _rows(o + b * M * H * DV + h * DV, i0, rows, H * DV, d, d, M, DV, DV == BDV, True)
    g = _rows(do + b * do_b + h * do_h, i0, rows, do_m, d, d * do_d, M, DV, DV == BDV, True)
    tl.store(delta + bh.to(tl.int64) * M + i, tl.sum(x * g, 1), mask=i < M)


@triton.jit
def _weights(s, theta, lse):
    """P from scores, thresholds and log-sum-exp; 0 for rows that see nothing."""
    s = tl.where(s >= theta, s, float("-inf"))
    return tl.exp2(s - tl.where(lse == float("-inf"), 0.0, lse))


@triton.jit
def spark_query_gradient(
    q, k, v, do, lse, thetas, delta, dq, lo, hi, keys, mask, seed_at,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_m, do_h, do_d, dq_b, dq_h, dq_m,
    lo_b, keys_b, mask_b, mask_h, mask_m, mask_n, H, G, M, N, scale1, scale2, p_drop,
    D: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, BD1: tl.constexpr, BD2: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr,
    INTERVAL: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; grid (tiles of M, B H)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i0 = tile * BM
    rows, cols, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD1), tl.arange(0, BDV)
    i = i0 + rows
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M, N, INTERVAL)
    start, end = _range(row_lo, row_hi, i, M, N, BN)

    q += b * q_b + h * q_h
    c = _first(d, D, R, HALVES, ALIGN)
    d2 = tl.arange(0, BD2)
    c2 = _second(d2, D, R, HALVES, ALIGN)
    q1 = _rows(q, i0, rows, q_m, d, c * q_d, M, R, R == BD1, UPCAST)
    q2 = q1
    if GATE:
        q2 = _rows(q, i0, rows, q_m, d2, c2 * q_d, M, D - R, D - R == BD2, UPCAST)
    g = _rows(do + b * do_b + h * do_h, i0, rows, do_m, e, e * do_d, M, DV, DV == BDV, UPCAST)
    at = bh.to(tl.int64) * M + i
    row_lse = tl.load(lse + at, mask=i < M, other=0.0)
    row_theta = tl.load(thetas + at, mask=i < M, other=0.0)
    row_delta = tl.load(delta + at, mask=i < M, other=0.0)
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
    keys += b * keys_b
    mask += b * mask_b + h * mask_h + i0.to(tl.int64) * mask_m
    mask_at = (rows * mask_m)[:, None]
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_at) + bh

    acc1 = tl.zeros([BM, BD1], tl.float32)
    acc2 = tl.zeros([BM, BD2], tl.float32)
    for j0 in tl.range(start, end, BN):
        k1 = _rows(k, j0, cols, k_n, d, c * k_d, N, R, R == BD1, UPCAST)
        s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION) * (scale1 * LOG2E)
        s = _hide(
            s, i[:, None], j0, cols[None, :], row_lo[:, None], row_hi[:, None], mask, mask_at, mask_n, keys, M, N,
            MASK, KEYS,
        )  # fmt: skip
        p = _weights(s, row_theta[:, None], row_lse[:, None])
        vt = _rows(v, j0, cols, v_n, e, e * v_d, N, DV, DV == BDV, UPCAST)
        u = tl.dot(g, tl.trans(vt), input_precision=PRECISION)
        if DROPOUT:
            u = u * _kept(seed, i[:, None], j0 + cols[None, :], N, p_drop)
        if GATE:
            k2 = _rows(k, j0, cols, k_n, d2, c2 * k_d, N, D - R, D - R == BD2, UPCAST)
            t = tl.dot(q2, tl.trans(k2), input_precision=PRECISION) * scale2
            acc2 = tl.dot((p * u * _sigmoid(t)).to(k2.dtype), k2, acc2, input_precision=PRECISION)
            u = u * _softplus(t)
        acc1 = tl.dot((p * (u - row_delta[:, None])).to(k1.dtype), k1, acc1, input_precision=PRECISION)
    at = dq + b * dq_b + h * dq_h + tl.cast(i0, tl.int64) * dq_m + (rows * dq_m)[:, None]
    tl.store(at + c[None, :], (acc1 * scale1).to(dq.dtype.element_ty), mask=(i[:, None] < M) & (d[None, :] < R))
    if GATE:
        inside = (i[:, None] < M) & (d2[None, :] < D - R)
        tl.store(at + c2[None, :], (acc2 * scale2).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def spark_key_gradient(
    q, k, v, do, lse, thetas, delta, dk, dv, lo, hi, q_first, q_last, keys, mask, seed_at,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_m, do_h, do_d,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, lo_b, range_b, keys_b, mask_b, mask_h, mask_m, mask_n,
    HK, G, M, N, scale1, scale2, p_drop,
    D: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, BD1: tl.constexpr, BD2: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr,
    INTERVAL: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, C0: tl.constexpr, CW: tl.constexpr, DK2: tl.constexpr, DVALUE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, over the G heads and the queries that see it; grid (tiles of N, B HK). A launch
    makes CW columns of the first part of dk from C0 on (none with 0), the second part (DK2), and dv (DVALUE): the sums
    of wide heads are too many for the registers of one launch.

    Everything is transposed, [keys, queries], so that the weights enter their product without a change of layout."""
    tile = tl.program_id(0)
    bh = tl.program_id(1)
    b, hk = (bh // HK).to(tl.int64), (bh % HK).to(tl.int64)
    j0 = tile * BN
    rows, cols, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD1), tl.arange(0, BDV)
    j = (j0 + cols)[:, None]
    c = _first(d, D, R, HALVES, ALIGN)
    d2 = tl.arange(0, BD2)
    c2 = _second(d2, D, R, HALVES, ALIGN)
    k += b * k_b + hk * k_h
    k1 = _rows(k, j0, cols, k_n, d, c * k_d, N, R, R == BD1, UPCAST)
    k2 = k1
    if GATE:
        k2 = _rows(k, j0, cols, k_n, d2, c2 * k_d, N, D - R, D - R == BD2, UPCAST)
    v += b * v_b + hk * v_h
    vt = _rows(v, j0, cols, v_n, e, e * v_d, N, DV, DV == BDV, UPCAST)
    lo += b * lo_b
    hi += b * lo_b
    keys += b * keys_b
    first, last = 0, M
    if INTERVAL:
        first = tl.load(q_first + b * range_b + tile) // BM * BM
        last = tl.load(q_last + b * range_b + tile)

    if CW > 0:
        dc = C0 + tl.arange(0, CW)
        cc = _first(dc, D, R, HALVES, ALIGN)
        acc1 = tl.zeros([BN, CW], tl.float32)
    acc2 = tl.zeros([BN, BD2], tl.float32)
    acc_v = tl.zeros([BN, BDV], tl.float32)
    for head in range(G):
        h = hk * G + head
        row = (b * HK * G + h) * M
        seed = 0
        if DROPOUT:
            seed = tl.load(seed_at) + (b * HK * G + h).to(tl.int32)
        for i0 in tl.range(first, last, BM):
            i = i0 + rows
            at = q + b * q_b + h * q_h
            q1 = _rows(at, i0, rows, q_m, d, c * q_d, M, R, R == BD1, UPCAST)
            g = _rows(do + b * do_b + h * do_h, i0, rows, do_m, e, e * do_d, M, DV, DV == BDV, UPCAST)
            row_lse = tl.load(lse + row + i, mask=i < M, other=0.0)
            row_theta = tl.load(thetas + row + i, mask=i < M, other=0.0)
            row_delta = tl.load(delta + row + i, mask=i < M, other=0.0)
            row_lo, row_hi = _interval(lo, hi, i, M, N, INTERVAL)
            s = tl.dot(k1, tl.trans(q1), input_precision=PRECISION) * (scale1 * LOG2E)
            s = _hide(
                s, i[None, :], j0, cols[:, None], row_lo[None, :], row_hi[None, :],
                mask + b * mask_b + h * mask_h + tl.cast(i0, tl.int64) * mask_m, (rows * mask_m)[None, :], mask_n,
                keys, M, N, MASK, KEYS,
            )  # fmt: skip
            p = _weights(s, row_theta[None, :], row_lse[None, :])
            w = p
            if DROPOUT:
                w = p * _kept(seed, i[None, :], j, N, p_drop)
            gate = 1.0
            if GATE:
                q2 = _rows(at, i0, rows, q_m, d2, c2 * q_d, M, D - R, D - R == BD2, UPCAST)
                t = tl.dot(k2, tl.trans(q2), input_precision=PRECISION) * scale2
                gate = _softplus(t)
            if DVALUE:
                acc_v = tl.dot((w * gate).to(g.dtype), g, acc_v, input_precision=PRECISION)
            if CW > 0 or DK2:
                u = tl.dot(vt, tl.trans(g), input_precision=PRECISION) * w
            if CW > 0:
                qc = q1
                if CW < BD1:
                    qc = _rows(at, i0, rows, q_m, dc, cc * q_d, M, R, R == BD1, UPCAST)
                ds = u * gate - p * row_delta[None, :]
                acc1 = tl.dot(ds.to(qc.dtype), qc, acc1, input_precision=PRECISION)
            if DK2:
                acc2 = tl.dot((u * _sigmoid(t)).to(q2.dtype), q2, acc2, input_precision=PRECISION)
    at = dk + b * dk_b + hk * dk_h + tl.cast(j0, tl.int64) * dk_n + (cols * dk_n)[:, None]
    if CW > 0:
        tl.store(at + cc[None, :], (acc1 * scale1).to(dk.dtype.element_ty), mask=(j < N) & (dc[None, :] < R))
    if DK2:
        tl.store(at + c2[None, :], (acc2 * scale2).to(dk.dtype.element_ty), mask=(j < N) & (d2[None, :] < D - R))
    if DVALUE:
        at = dv + b * dv_b + hk * dv_h + tl.cast(j0, tl.int64) * dv_n + (cols * dv_n)[:, None]
        tl.store(at + e[None, :], acc_v.to(dv.dtype.element_ty), mask=(j < N) & (e[None, :] < DV))
