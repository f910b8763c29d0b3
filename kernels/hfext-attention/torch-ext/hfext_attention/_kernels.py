"""Triton kernels of softmax attention. Imported only where one is launched, so that the package needs torch alone.

One (batch, head) at a time, q [M, D], k [N, D], v [N, DV]:

    s_ij = scale <q_i, k_j>;  s <- cap tanh(s / cap);  s <- s + bias_ij - slope |i + off - j|
    P_ij = exp(s_ij) / Z_i over the visible keys,  Z_i = sum_j exp(s_ij) [+ exp(sink)],  o_i = sum_j P_ij v_j

Query i sees the keys of one interval, lo_i <= j < hi_i: causal, sliding, chunked, packed and padded attention all are
such intervals, and the tiles outside of it are never visited. `keys` masks single keys of a row of the batch, `mask`
single pairs. Inside, scores are in units of log 2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1e37)  # scores with a bias that are not above hide their pair


@triton.jit
def _tanh(x):
    """To the last bits of fp32: by exp where that loses none, by its series near 0, where 1 - exp(-2x) would."""
    t = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - t) / (1.0 + t)
    y = tl.where(x < 0, -y, y)
    x2 = x * x
    near = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, y)


@triton.jit
def _scores(
    s, i, j0, cols, lo, hi, bias, bias_at, bias_n, mask, mask_at, mask_n, keys, softcap, slope, off, M, N,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, ALIBI: tl.constexpr,
    BOUND: tl.constexpr,
):  # fmt: skip
    """Masked scores in units of log 2 from scale <q, k> (already in these units where nothing is added), and
    tanh(s / cap). i, lo, hi and the rows' offsets have the shape of one side of the tile, cols that of the other."""
    t = s
    j = j0 + cols
    if SOFTCAP:
        t = _tanh(s / softcap)
        s = softcap * t
    inside = (i < M) & (j < N)
    if BIAS:
        at = bias + tl.cast(j0, tl.int64) * bias_n + (bias_at + cols * bias_n)
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ALIBI:
        s -= slope * tl.abs(j - i - off).to(tl.float32)
    if BIAS:  # what a mask of finite numbers means, whose multiple would not be finite
        s = tl.where(s > HIDDEN, s * LOG2E, float("-inf"))
    elif SOFTCAP or ALIBI:
        s = s * LOG2E
    if BOUND:
        s = tl.where((j >= lo) & (j < hi), s, float("-inf"))
    if KEYS:
        s = tl.where(tl.load(keys + j, mask=j < N, other=0) != 0, s, float("-inf"))
    if MASK:
        at = mask + tl.cast(j0, tl.int64) * mask_n + (mask_at + cols * mask_n)
        s = tl.where(tl.load(at, mask=inside, other=0) != 0, s, float("-inf"))
    return s, t


@triton.jit
def _kept(seed, i, j, N, p_drop):
    """1 / (1 - p) where a weight is kept, 0 where it is dropped: a function of the pair alone, whatever the tiles."""
    return tl.where(tl.rand(seed, i * N + j) >= p_drop, 1.0 / (1.0 - p_drop), 0.0)


@triton.jit
def _rows(
    base, first, rows, stride, d, stride_d, limit,
    D: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows first + rows of a matrix [limit, D] as a tile; zeros outside. WHOLE says that all rows are inside.

    Offsets in a tile are 32-bit numbers that do not change in a loop; the tile's own place is a 64-bit scalar."""
    offsets = rows[:, None] * stride + d[None, :] * stride_d
    base += tl.cast(first, tl.int64) * stride
    if WHOLE and EVEN:
        x = tl.load(base + offsets)
    elif WHOLE:
        x = tl.load(base + offsets, mask=d[None, :] < D, other=0.0)
    elif EVEN:
        x = tl.load(base + offsets, mask=first + rows[:, None] < limit, other=0.0)
    else:
        x = tl.load(base + offsets, mask=(first + rows[:, None] < limit) & (d[None, :] < D), other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _interval(lo, hi, rows, M, N, INTERVAL: tl.constexpr):
    """Visible keys of some rows; a row that is none sees nothing."""
    if INTERVAL:
        first = tl.maximum(tl.load(lo + rows, mask=rows < M, other=0), 0)
        last = tl.minimum(tl.load(hi + rows, mask=rows < M, other=0), N)
    else:
        first = tl.zeros_like(rows)
        last = tl.where(rows < M, N, 0)
    return first, last


@triton.jit
def _tiles(lo, hi, rows, M, N, BN: tl.constexpr, SPLIT: tl.constexpr):
    """Tiles of keys that rows with these intervals visit: [start, full_start) and [full_end, end) need a mask. Without
    SPLIT all are masked, in one loop, which takes fewer registers than two."""
    valid = rows < M
    seen = valid & (hi > lo)
    start = tl.min(tl.where(seen, lo, N)) // BN * BN
    end = tl.max(tl.where(seen, hi, 0))
    end = tl.maximum((end + BN - 1) // BN * BN, start)
    full_start = (tl.max(tl.where(valid, lo, 0)) + BN - 1) // BN * BN
    full_end = tl.min(tl.where(valid, hi, N)) // BN * BN
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    full_end = tl.minimum(tl.maximum(full_end, full_start), end)
    if not SPLIT:
        full_start = start
        full_end = start
    return start, full_start, full_end, end


@triton.jit
def _attend(
    acc, l, m, q, k, v, j0, i, lo, hi, k_n, k_d, v_n, v_d, bias, bias_at, bias_n, mask, mask_at, mask_n, keys,
    scale, softcap, slope, off, seed, p_drop, M, N,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, BOUND: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of the online softmax."""
    cols = tl.arange(0, BN)
    kt = _rows(k, j0, cols, k_n, tl.arange(0, BD), k_d, N, D, D == BD, not BOUND, UPCAST)
    s = tl.dot(q, tl.trans(kt), input_precision=PRECISION) * scale
    s, _ = _scores(
        s, i[:, None], j0, cols[None, :], lo[:, None], hi[:, None], bias, bias_at, bias_n, mask, mask_at, mask_n,
        keys, softcap, slope, off,
        M, N, SOFTCAP, BIAS, MASK, KEYS, ALIBI, BOUND,
    )  # fmt: skip
    new = tl.maximum(m, tl.max(s, 1))
    if BOUND or KEYS or MASK or BIAS:
        base = tl.where(new == float("-inf"), 0.0, new)
    else:
        base = new
    p = tl.exp2(s - base[:, None])
    a = tl.exp2(m - base)
    l = l * a + tl.sum(p, 1)
    if DROPOUT:
        p = p * _kept(seed, i[:, None], j0 + cols[None, :], N, p_drop)
    stop = N
    if BOUND:  # places behind the last visible key may hold anything
        stop = tl.minimum(N, tl.max(hi, 0))
    vt = _rows(v, j0, cols, v_n, tl.arange(0, BDV), v_d, stop, DV, DV == BDV, not BOUND, UPCAST)
    acc = tl.dot(p.to(vt.dtype), vt, acc * a[:, None], input_precision=PRECISION)
    return acc, l, new


@triton.jit
def attention_forward(
    q, k, v, o, lse, lo, hi, keys, mask, bias, sink, slopes, seed_at,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, lo_b, keys_b, mask_b, mask_h, mask_m, mask_n,
    bias_b, bias_h, bias_m, bias_n, H, G, M, N, off, scale, softcap, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERVAL: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr,
    ALIBI: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """o [B, M, H, DV] and lse [B, H, M] of one tile of queries; grid (tiles of M, B H)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later tiles see more keys: they go first
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i0 = tile * BM
    i = i0 + tl.arange(0, BM)
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M, N, INTERVAL)
    start, full_start, full_end, end = _tiles(row_lo, row_hi, i, M, N, BN, SPLIT)

    qt = _rows(q + b * q_b + h * q_h, i0, tl.arange(0, BM), q_m, tl.arange(0, BD), q_d, M, D, D == BD, False, UPCAST)
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
    if not (SOFTCAP or BIAS or ALIBI):
        scale = scale * LOG2E

    acc = tl.zeros([BM, BDV], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    if SINK:
        z = tl.load(sink + h).to(tl.float32) * LOG2E
        m = tl.zeros([BM], tl.float32) + z
        l += tl.where(z == float("-inf"), 0.0, 1.0)
    if SPLIT:
        for j0 in tl.range(full_start, full_end, BN):
            acc, l, m = _attend(
                acc, l, m, qt, k, v, j0, i, row_lo, row_hi, k_n, k_d, v_n, v_d, bias, bias_at, bias_n, mask, mask_at,
                mask_n, keys,
                scale, softcap, slope, off, seed, p_drop, M, N, D, DV, BD, BDV, BN, SOFTCAP, BIAS, MASK, KEYS, ALIBI,
                DROPOUT, False, UPCAST, PRECISION,
            )  # fmt: skip
    left = full_start - start
    for t in tl.range(0, left + end - full_end, BN):
        if SPLIT:
            j0 = tl.where(t < left, start + t, full_end + t - left)
        else:
            j0 = start + t
        acc, l, m = _attend(
            acc, l, m, qt, k, v, j0, i, row_lo, row_hi, k_n, k_d, v_n, v_d, bias, bias_at, bias_n, mask, mask_at,
            mask_n, keys,
            scale, softcap, slope, off, seed, p_drop, M, N, D, DV, BD, BDV, BN, SOFTCAP, BIAS, MASK, KEYS, ALIBI,
            DROPOUT, True, UPCAST, PRECISION,
        )  # fmt: skip

    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(lse + bh.to(tl.int64) * M + i, (m + tl.log2(l)) * LN2, mask=i < M)
    dv = tl.arange(0, BDV)
    at = o + ((b * M + i[:, None]) * H + h) * DV + dv[None, :]
    tl.store(at, acc.to(o.dtype.element_ty), mask=(i[:, None] < M) & (dv[None, :] < DV))
