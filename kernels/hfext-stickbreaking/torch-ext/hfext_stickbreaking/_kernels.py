"""Triton kernels of stick-breaking attention. Imported only where one is launched, so the package needs torch alone.

One (batch, head) at a time, over the visible keys j of query i, lo_i <= j < hi_i without those that masks hide:

    l_ij = scale <q_i, k_j>,  b_ij = sigmoid(l_ij),  A_ij = b_ij prod_{m > j} (1 - b_im),  o_i = sum_j A_ij v_j
    rest_i = prod_j (1 - b_ij)

in logarithms: log A_ij = l_ij - sum_{m >= j} softplus(l_im). Tiles go from right to left with a running sum R_i of
-softplus. With w_ij = A_ij <do_i, v_j> the gradient is

    dl_ij = w_ij - b_ij (sum_{m <= j} w_im + rest_i drest_i)

whose sum runs from left to right, from 0 where the stick is used up: taken as a difference from the whole, its
rounding would meet b_ij, which does not fade with the distance as A_ij does. So the backward pass first writes R at
the right edge of each tile, then runs from the left for dq, leaving the sum of w at each tile's left edge, and with
both edges every tile of keys can be taken alone for dk and dv. Inside, logarithms are of base 2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(l):
    """log2(1 + 2^l), 0 for l = -inf. Small ones by a series: many keys that take little add up."""
    x = tl.exp2(-tl.abs(l))
    series = x * (1.0 - x * (0.5 - x * (1.0 / 3))) * LOG2E
    return tl.maximum(l, 0.0) + tl.where(x < 0.00390625, series, tl.log2(1.0 + x))


@triton.jit
def _rows(
    base, first, rows, stride, d, stride_d, limit, D: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Rows first + rows of a matrix [limit, D] as a tile; zeros outside.

    Offsets in a tile are 32-bit numbers that do not change in a loop; the tile's own place is a 64-bit scalar."""
    at = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + d[None, :] * stride_d)
    if EVEN:
        x = tl.load(at, mask=first + rows[:, None] < limit, other=0.0)
    else:
        x = tl.load(at, mask=(first + rows[:, None] < limit) & (d[None, :] < D), other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _interval(lo, hi, rows, M):
    """Visible keys of some rows; a row that is none sees nothing."""
    return tl.load(lo + rows, mask=rows < M, other=0), tl.load(hi + rows, mask=rows < M, other=0)


@triton.jit
def _tiles(lo, hi, N, BN: tl.constexpr):
    """The tiles of keys that rows with these intervals visit, [start, end)."""
    seen = hi > lo
    start = tl.min(tl.where(seen, lo, N)) // BN * BN
    end = tl.max(tl.where(seen, hi, 0))
    return start, tl.maximum((end + BN - 1) // BN * BN, start)


@triton.jit
def _logits(
    q, kt, j0, i, lo, hi, keys, mask, mask_at, mask_n, unit, M, N,
    BN: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits [rows, keys] in units of log 2, -inf where hidden: such a key takes nothing of the stick."""
    cols = tl.arange(0, BN)
    j = j0 + cols
    l = tl.dot(q, tl.trans(kt), input_precision=PRECISION) * unit
    l = tl.where((j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None]), l, float("-inf"))
    if KEYS:
        shown = tl.load(keys + j, mask=j < N, other=0)
        l = tl.where(shown[None, :] != 0, l, float("-inf"))
    if MASK:
        at = mask + tl.cast(j0, tl.int64) * mask_n + (mask_at + cols[None, :] * mask_n)
        shown = tl.load(at, mask=(i[:, None] < M) & (j[None, :] < N), other=0)
        l = tl.where(shown != 0, l, float("-inf"))
    return l


@triton.jit
def _break(
    acc, R, q, k, v, j0, i, lo, hi, k_n, k_d, v_n, v_d, keys, mask, mask_at, mask_n, unit, M, N,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    KEYS: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys breaks what is left of the stick, 2^R."""
    cols = tl.arange(0, BN)
    kt = _rows(k, j0, cols, k_n, tl.arange(0, BD), k_d, N, D, D == BD, UPCAST)
    l = _logits(q, kt, j0, i, lo, hi, keys, mask, mask_at, mask_n, unit, M, N, BN, KEYS, MASK, PRECISION)
    taken = _softplus(l)
    a = tl.exp2(l - tl.cumsum(taken, 1, reverse=True) + R[:, None])
    vt = _rows(v, j0, cols, v_n, tl.arange(0, BDV), v_d, N, DV, DV == BDV, UPCAST)
    acc = tl.dot(a.to(vt.dtype), vt, acc, input_precision=PRECISION)
    return acc, R - tl.sum(taken, 1)


@triton.jit
def stickbreaking_forward(
    q, k, v, o, rest, lo, hi, keys, mask,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, lo_b, keys_b, mask_b, mask_h, mask_m, mask_n,
    H, G, M, N, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KEYS: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [B, M, H, DV] and rest [B, H, M] of one tile of queries; grid (tiles of M, B H)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later tiles see more keys: they go first
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i0 = tile * BM
    rows = tl.arange(0, BM)
    i = i0 + rows
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M)
    start, end = _tiles(row_lo, row_hi, N, BN)
    qt = _rows(q + b * q_b + h * q_h, i0, rows, q_m, tl.arange(0, BD), q_d, M, D, D == BD, UPCAST)
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
    keys += b * keys_b
    mask += b * mask_b + h * mask_h + i0.to(tl.int64) * mask_m
    mask_at = (rows * mask_m)[:, None]

    acc = tl.zeros([BM, BDV], tl.float32)
    R = tl.zeros([BM], tl.float32)
    for t in tl.range(0, end - start, BN):
        acc, R = _break(
            acc, R, qt, k, v, end - BN - t, i, row_lo, row_hi, k_n, k_d, v_n, v_d, keys, mask, mask_at, mask_n,
            scale * LOG2E, M, N, D, DV, BD, BDV, BN, KEYS, MASK, UPCAST, PRECISION,
        )  # fmt: skip
    tl.store(rest + bh.to(tl.int64) * M + i, tl.exp2(R), mask=i < M)
    e = tl.arange(0, BDV)
    at = o + ((b * M + i[:, None]) * H + h) * DV + e[None, :]
    tl.store(at, acc.to(o.dtype.element_ty), mask=(i[:, None] < M) & (e[None, :] < DV))


@triton.jit
def stickbreaking_edges(
    q, k, right, lo, hi, keys, mask,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, lo_b, keys_b, mask_b, mask_h, mask_m, mask_n,
    H, G, first, tiles, M, N, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    KEYS: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R at the right edge of each tile of keys, right [heads, tiles, M], for one tile of queries of the heads from
    `first` on; grid (tiles of M, heads). A program writes the tiles of BN keys in all tiles of BK keys that its
    queries see."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = first + tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i0 = tile * BM
    rows, cols, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    i = i0 + rows
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M)
    start, end = _tiles(row_lo, row_hi, N, BK)
    qt = _rows(q + b * q_b + h * q_h, i0, rows, q_m, d, q_d, M, D, D == BD, UPCAST)
    k += b * k_b + (h // G) * k_h
    keys += b * keys_b
    mask += b * mask_b + h * mask_h + i0.to(tl.int64) * mask_m
    mask_at = (rows * mask_m)[:, None]
    right += tl.program_id(1).to(tl.int64) * tiles * M

    R = tl.zeros([BM], tl.float32)
    for t in tl.range(0, end - start, BN):
        j0 = end - BN - t
        tl.store(right + tl.cast(j0 // BN, tl.int64) * M + i, R, mask=i < M)
        kt = _rows(k, j0, cols, k_n, d, k_d, N, D, D == BD, UPCAST)
        l = _logits(
            qt, kt, j0, i, row_lo, row_hi, keys, mask, mask_at, mask_n, scale * LOG2E, M, N, BN, KEYS, MASK, PRECISION
        )
        R -= tl.sum(_softplus(l), 1)


@triton.jit
def stickbreaking_query_gradient(
    q, k, v, do, rest, drest, right, left, dq, lo, hi, keys, mask,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_m, do_h, do_d, dq_b, dq_h, dq_m,
    lo_b, keys_b, mask_b, mask_h, mask_m, mask_n, H, G, first, tiles, M, N, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr, REST: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, and the sums at the left edge of each tile of keys, left [heads, tiles, M]; grid
    (tiles of M, heads)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = first + tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i0 = tile * BM
    rows, cols, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    i = i0 + rows
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M)
    start, end = _tiles(row_lo, row_hi, N, BK)
    qt = _rows(q + b * q_b + h * q_h, i0, rows, q_m, d, q_d, M, D, D == BD, UPCAST)
    g = _rows(do + b * do_b + h * do_h, i0, rows, do_m, e, do_d, M, DV, DV == BDV, UPCAST)
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
    keys += b * keys_b
    mask += b * mask_b + h * mask_h + i0.to(tl.int64) * mask_m
    mask_at = (rows * mask_m)[:, None]
    right += tl.program_id(1).to(tl.int64) * tiles * M
    left += tl.program_id(1).to(tl.int64) * tiles * M

    P = tl.zeros([BM], tl.float32)
    if REST:
        row = bh.to(tl.int64) * M + i
        P = tl.load(rest + row, mask=i < M, other=0.0) * tl.load(drest + row, mask=i < M, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    for j0 in tl.range(start, end, BN):
        at = tl.cast(j0 // BN, tl.int64) * M + i
        tl.store(left + at, P, mask=i < M)
        R = tl.load(right + at, mask=i < M, other=0.0)
        kt = _rows(k, j0, cols, k_n, d, k_d, N, D, D == BD, UPCAST)
        vt = _rows(v, j0, cols, v_n, e, v_d, N, DV, DV == BDV, UPCAST)
        l = _logits(
            qt, kt, j0, i, row_lo, row_hi, keys, mask, mask_at, mask_n, scale * LOG2E, M, N, BN, KEYS, MASK, PRECISION
        )
        taken = _softplus(l)
        w = tl.exp2(l - tl.cumsum(taken, 1, reverse=True) + R[:, None])
        w = w * tl.dot(g, tl.trans(vt), input_precision=PRECISION)
        ds = w - tl.exp2(l - taken) * (P[:, None] + tl.cumsum(w, 1))
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PRECISION)
        P += tl.sum(w, 1)
    at = dq + b * dq_b + h * dq_h + i[:, None].to(tl.int64) * dq_m + d[None, :]
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=(i[:, None] < M) & (d[None, :] < D))


@triton.jit
def stickbreaking_key_gradient(
    q, k, v, do, right, left, dk, dv, lo, hi, q_first, q_last, keys, mask,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_m, do_h, do_d,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, lo_b, range_b, keys_b, mask_b, mask_h, mask_m, mask_n,
    HK, G, first, tiles, M, N, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KEYS: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, over the G heads and the queries that see it; grid (tiles of N, key heads).

    WITH_K and WITH_V make only one of the two, for heads whose sums would not fit the registers together. PARTS
    tiles of the edges make one of these."""
    tile = tl.program_id(0)
    own = tl.program_id(1)
    b, hk = ((first + own) // HK).to(tl.int64), ((first + own) % HK).to(tl.int64)
    j0 = tile * BN
    cols, rows, d, e = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    j = (j0 + cols)[:, None]
    kt = _rows(k + b * k_b + hk * k_h, j0, cols, k_n, d, k_d, N, D, D == BD, UPCAST)
    vt = _rows(v + b * v_b + hk * v_h, j0, cols, v_n, e, v_d, N, DV, DV == BDV, UPCAST)
    lo += b * lo_b
    hi += b * lo_b
    keys += b * keys_b
    q_from = tl.load(q_first + b * range_b + tile) // BM * BM
    q_to = tl.load(q_last + b * range_b + tile)

    acc_k = tl.zeros([BN, BD], tl.float32)
    acc_v = tl.zeros([BN, BDV], tl.float32)
    for n in range(G):
        h = hk * G + n
        edge = ((own * G + n).to(tl.int64) * tiles + tile * PARTS) * M
        for i0 in tl.range(q_from, q_to, BM):
            i = i0 + rows
            qt = _rows(q + b * q_b + h * q_h, i0, rows, q_m, d, q_d, M, D, D == BD, UPCAST)
            gt = _rows(do + b * do_b + h * do_h, i0, rows, do_m, e, do_d, M, DV, DV == BDV, UPCAST)
            row_lo, row_hi = _interval(lo, hi, i, M)
            # Edges of rows that do not see the tile were not written.
            seen = (row_lo < j0 + BN) & (row_hi > j0) & (row_hi > row_lo)
            R = tl.load(right + edge + (PARTS - 1) * M + i, mask=seen, other=0.0)
            P = tl.load(left + edge + i, mask=seen, other=0.0)
            at = mask + b * mask_b + h * mask_h + tl.cast(i0, tl.int64) * mask_m
            l = _logits(
                qt, kt, j0, i, row_lo, row_hi, keys, at, (rows * mask_m)[:, None], mask_n, scale * LOG2E, M, N,
                BN, KEYS, MASK, PRECISION,
            )  # fmt: skip
            taken = _softplus(l)
            a = tl.exp2(l - tl.cumsum(taken, 1, reverse=True) + R[:, None])
            if WITH_V:
                acc_v = tl.dot(tl.trans(a.to(gt.dtype)), gt, acc_v, input_precision=PRECISION)
            if WITH_K:
                w = a * tl.dot(gt, tl.trans(vt), input_precision=PRECISION)
                ds = w - tl.exp2(l - taken) * (P[:, None] + tl.cumsum(w, 1))
                acc_k = tl.dot(tl.trans(ds.to(qt.dtype)), qt, acc_k, input_precision=PRECISION)
    if WITH_K:
        at = dk + b * dk_b + hk * dk_h + j.to(tl.int64) * dk_n + d[None, :]
        tl.store(at, (acc_k * scale).to(dk.dtype.element_ty), mask=(j < N) & (d[None, :] < D))
    if WITH_V:
        at = dv + b * dv_b + hk * dv_h + j.to(tl.int64) * dv_n + e[None, :]
        tl.store(at, acc_v.to(dv.dtype.element_ty), mask=(j < N) & (e[None, :] < DV))


@triton.jit
def stickbreaking_decode(
    q, k, v, o, logs, lo, hi, keys, mask,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, lo_b, keys_b, mask_b, mask_h, mask_m, mask_n,
    B, H, G, M, N, chunk, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    KEYS: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A whole stick for each part of the keys: o [parts, B, H, M, DV] fp32 and what it leaves, logs [parts, B, H, M];
    the G M rows of one key head in a program, grid (parts, B HK). chunk is a multiple of BN."""
    part = tl.program_id(0)
    heads = H // G
    b = (tl.program_id(1) // heads).to(tl.int64)
    hk = (tl.program_id(1) % heads).to(tl.int64)
    r = tl.arange(0, BR)
    valid = r < G * M
    i = tl.where(valid, r % M, M)
    h = hk * G + tl.where(valid, r // M, 0)
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M)
    start, end = _tiles(row_lo, row_hi, N, BN)
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
    mask_at = (r // M * mask_h + i * mask_m)[:, None]

    acc = tl.zeros([BR, BDV], tl.float32)
    R = tl.zeros([BR], tl.float32)
    for t in tl.range(0, end - start, BN):
        acc, R = _break(
            acc, R, qt, k, v, end - BN - t, i, row_lo, row_hi, k_n, k_d, v_n, v_d, keys, mask, mask_at, mask_n,
            scale * LOG2E, M, N, D, DV, BD, BDV, BN, KEYS, MASK, UPCAST, PRECISION,
        )  # fmt: skip
    row = ((part * B + b) * H + h) * M + i
    tl.store(logs + row, R, mask=valid)
    e = tl.arange(0, BDV)
    tl.store(o + row[:, None] * DV + e[None, :], acc, mask=valid[:, None] & (e[None, :] < DV))


@triton.jit
def stickbreaking_combine(parts, logs, o, rest, B, H, M, PARTS, DV: tl.constexpr, BDV: tl.constexpr):
    """o [B, M, H, DV] and rest [B, H, M] from the parts, each with what those to its right have left; grid (B H M)."""
    row = tl.program_id(0).to(tl.int64)
    rows = (B * H).to(tl.int64) * M
    h = row // M % H
    e = tl.arange(0, BDV)
    acc = tl.zeros([BDV], tl.float32)
    R = 0.0
    for n in range(PARTS):
        at = (PARTS - 1 - n) * rows + row
        acc += tl.load(parts + at * DV + e, mask=e < DV, other=0.0) * tl.exp2(R)
        R += tl.load(logs + at)
    out = ((row // (H * M)) * M + row % M) * H + h
    tl.store(o + out * DV + e, acc.to(o.dtype.element_ty), mask=e < DV)
    tl.store(rest + row, tl.exp2(R))
