"""Triton kernels of Spark attention. Imported only where one is launched, so that the package needs torch alone.

One (batch, head) at a time; a head's numbers are split into the predictor's part 1 and the gate's part 2:

    s_ij = scale1 <q1_i, k1_j>;   theta_i = mean_j s_ij + std_j s_ij Q(1 - k / c_i)     over the c_i visible keys
    P_ij = softmax over the keys with s_ij >= theta_i; w_ij = P_ij softplus(scale2 <q2_i, k2_j>);  o_i = sum_j w_ij v_j

Pass A meets the moments of tiles of keys by Chan's formula, of differences from one score of the row, pass B makes the
scores again. Values are not shifted by the threshold, so its own derivative is 0 almost everywhere, and with u_ij =
<do_i, v_j>:

    ds_ij = P_ij (u_ij g_ij - <do_i, o_i>),   dt_ij = P_ij u_ij sigmoid(t_ij),   t = scale2 <q2, k2>,  g = softplus(t)

Inside, scores s and thresholds are in units of log 2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEAR = tl.constexpr(1e-5)
EPS = tl.constexpr(2.0**-23)


@triton.jit
def _softplus(t):
    """log(1 + exp(t)), by a series where 1 + exp(-|t|) would lose the small one."""
    e = tl.exp(-tl.abs(t))
    series = e * (1.0 - e * (0.5 - e * (1.0 / 3 - e * (0.25 - e * 0.2))))
    return tl.maximum(t, 0.0) + tl.where(e < 0.03125, series, tl.log(1.0 + e))


@triton.jit
def _sigmoid(t):
    e = tl.exp(-tl.abs(t))
    return tl.where(t < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _kept(seed, i, j, N, p_drop):
    """1 / (1 - p) where a weight is kept, 0 where it is dropped: a function of the pair alone, whatever the tiles."""
    return tl.where(tl.rand(seed, i * N + j) >= p_drop, 1.0 / (1.0 - p_drop), 0.0)


@triton.jit
def _first(d, D: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr):
    """Columns of the predictor's part."""
    if HALVES:
        d = tl.max_contiguous(tl.multiple_of(d + tl.where(d >= R // 2, D // 2 - R // 2, 0), ALIGN), ALIGN)
    return d


@triton.jit
def _second(d, D: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr):
    """Columns of the gate's part."""
    if HALVES:
        c = d + tl.where(d >= (D - R) // 2, R, R // 2)
    else:
        c = d + R
    return tl.max_contiguous(tl.multiple_of(c, ALIGN), ALIGN)


@triton.jit
def _rows(base, first, rows, stride, d, cols, limit, WIDTH: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr):
    """Rows first + rows of a matrix as a tile of the columns at offsets `cols`, of which d < WIDTH count; zeros
    outside."""
    base += tl.cast(first, tl.int64) * stride
    offsets = rows[:, None] * stride + cols[None, :]
    if EVEN:
        x = tl.load(base + offsets, mask=first + rows[:, None] < limit, other=0.0)
    else:
        x = tl.load(base + offsets, mask=(first + rows[:, None] < limit) & (d[None, :] < WIDTH), other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _hide(
    s, i, j0, cols, lo, hi, mask, mask_at, mask_n, keys, M, N, MASK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Scores with -inf for hidden pairs. i, lo, hi and the rows' offsets have the shape of one side of the tile, cols
    that of the other."""
    j = j0 + cols
    s = tl.where((j >= lo) & (j < hi), s, float("-inf"))
    if KEYS:
        s = tl.where(tl.load(keys + j, mask=j < N, other=0) != 0, s, float("-inf"))
    if MASK:
        at = mask + tl.cast(j0, tl.int64) * mask_n + (mask_at + cols * mask_n)
        s = tl.where(tl.load(at, mask=(i < M) & (j < N), other=0) != 0, s, float("-inf"))
    return s


@triton.jit
def _interval(lo, hi, rows, M, N, INTERVAL: tl.constexpr):
    """Visible keys of some rows; a row that is none sees nothing."""
    if INTERVAL:
        first = tl.load(lo + rows, mask=rows < M, other=0)
        last = tl.load(hi + rows, mask=rows < M, other=0)
    else:
        first = tl.zeros_like(rows)
        last = tl.where(rows < M, N, 0)
    return first, last


@triton.jit
def _range(lo, hi, rows, M, N, BN: tl.constexpr):
    """Tiles of keys that rows with these intervals visit."""
    seen = (rows < M) & (hi > lo)
    start = tl.min(tl.where(seen, lo, N)) // BN * BN
    return start, tl.max(tl.where(seen, hi, 0))


@triton.jit
def _merge(n, mean, m2, n_b, mean_b, m2_b):
    """Chan's formula: count, mean and sum of squared deviations of two sets together."""
    total = n + n_b
    share = n_b / tl.where(total == 0, 1.0, total)
    delta = mean_b - mean
    return total, mean + delta * share, m2 + m2_b + delta * delta * (n * share)


@triton.jit
def _moments(n, mean, m2, top, base, s):
    """Moments and maximum of rows with one more tile of scores; base is the largest of the first tile that has any,
    and the mean is that of the differences from it."""
    seen = s > float("-inf")
    here = tl.max(s, 1)
    base = tl.where((n == 0) & (here > float("-inf")), here, base)
    n_b = tl.sum(tl.where(seen, 1.0, 0.0), 1)
    d = tl.where(seen, s - base[:, None], 0.0)
    mean_b = tl.sum(d, 1) / tl.where(n_b == 0, 1.0, n_b)
    d = tl.where(seen, d - mean_b[:, None], 0.0)
    n, mean, m2 = _merge(n, mean, m2, n_b, mean_b, tl.sum(d * d, 1))
    return n, mean, m2, tl.maximum(top, here), base


@triton.jit
def _threshold(n, mean, m2, top, base, table, UNBIASED: tl.constexpr):
    """theta, and just below the largest score where nothing reaches it: other passes round scores otherwise. -inf
    where scores differ by no more than that. Everything in units of log 2."""
    less = n
    if UNBIASED:
        less = n - 1.0
    std = tl.sqrt(m2 / tl.maximum(less, 1.0))
    q = tl.load(table + n.to(tl.int32))
    size = EPS * tl.abs(top)
    theta = mean + tl.where(q == float("-inf"), 0.0, q) * std
    theta = tl.where(theta > top - base, top - (NEAR * std + 8 * size), base + theta)
    return tl.where((q == float("-inf")) | (std <= 4 * size), float("-inf"), theta)


@triton.jit
def _attend(
    acc, l, m, q1, q2, k, v, j0, i, lo, hi, theta, k_n, k_d, v_n, v_d, mask, mask_at, mask_n, keys,
    scale1, scale2, seed, p_drop, M, N,
    D: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, BD1: tl.constexpr, BD2: tl.constexpr, BDV: tl.constexpr,
    BN: tl.constexpr, GATE: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr,
    KEYS: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of pass B: the online softmax of those that reach theta, gated."""
    cols, d, e = tl.arange(0, BN), tl.arange(0, BD1), tl.arange(0, BDV)
    kt = _rows(k, j0, cols, k_n, d, _first(d, D, R, HALVES, ALIGN) * k_d, N, R, R == BD1, UPCAST)
    s = tl.dot(q1, tl.trans(kt), input_precision=PRECISION) * scale1
    s = _hide(
        s, i[:, None], j0, cols[None, :], lo[:, None], hi[:, None], mask, mask_at, mask_n, keys, M, N, MASK, KEYS
    )
    s = tl.where(s >= theta[:, None], s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - base[:, None])
    a = tl.exp2(m - base)
    l = l * a + tl.sum(p, 1)
    if GATE:
        d2 = tl.arange(0, BD2)
        k2 = _rows(k, j0, cols, k_n, d2, _second(d2, D, R, HALVES, ALIGN) * k_d, N, D - R, D - R == BD2, UPCAST)
        p = p * _softplus(tl.dot(q2, tl.trans(k2), input_precision=PRECISION) * scale2)
    if DROPOUT:
        p = p * _kept(seed, i[:, None], j0 + cols[None, :], N, p_drop)
    vt = _rows(v, j0, cols, v_n, e, e * v_d, N, DV, DV == BDV, UPCAST)
    acc = tl.dot(p.to(vt.dtype), vt, acc * a[:, None], input_precision=PRECISION)
    return acc, l, new


@triton.jit
def spark_forward(
    q, k, v, o, lse, thetas, table, lo, hi, keys, mask, seed_at,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, lo_b, keys_b, mask_b, mask_h, mask_m, mask_n,
    H, G, M, N, scale1, scale2, p_drop,
    D: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, BD1: tl.constexpr, BD2: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr,
    UNBIASED: tl.constexpr, INTERVAL: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [B, M, H, DV]; lse and theta [B, H, M] in units of log 2, of one tile of queries; grid (tiles of M, B H)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later tiles see more keys: they go first
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    i0 = tile * BM
    rows, cols, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD1)
    i = i0 + rows
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M, N, INTERVAL)
    start, end = _range(row_lo, row_hi, i, M, N, BN)

    q += b * q_b + h * q_h
    c = _first(d, D, R, HALVES, ALIGN)
    q1 = _rows(q, i0, rows, q_m, d, c * q_d, M, R, R == BD1, UPCAST)
    q2 = q1
    if GATE:
        d2 = tl.arange(0, BD2)
        c2 = _second(d2, D, R, HALVES, ALIGN)
        q2 = _rows(q, i0, rows, q_m, d2, c2 * q_d, M, D - R, D - R == BD2, UPCAST)
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
    keys += b * keys_b
    mask += b * mask_b + h * mask_h + i0.to(tl.int64) * mask_m
    mask_at = (rows * mask_m)[:, None]
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_at) + bh
    scale1 = scale1 * LOG2E

    n = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM], tl.float32)
    m2 = tl.zeros([BM], tl.float32)
    base = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    for j0 in tl.range(start, end, BN):
        kt = _rows(k, j0, cols, k_n, d, c * k_d, N, R, R == BD1, UPCAST)
        s = tl.dot(q1, tl.trans(kt), input_precision=PRECISION) * scale1
        s = _hide(
            s, i[:, None], j0, cols[None, :], row_lo[:, None], row_hi[:, None], mask, mask_at, mask_n, keys, M, N,
            MASK, KEYS,
        )  # fmt: skip
        n, mean, m2, m, base = _moments(n, mean, m2, m, base, s)
    theta = _threshold(n, mean, m2, m, base, table, UNBIASED)

    acc = tl.zeros([BM, BDV], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    for j0 in tl.range(start, end, BN):
        acc, l, m = _attend(
            acc, l, m, q1, q2, k, v, j0, i, row_lo, row_hi, theta, k_n, k_d, v_n, v_d, mask, mask_at, mask_n, keys,
            scale1, scale2, seed, p_drop, M, N, D, R, DV, BD1, BD2, BDV, BN, GATE, HALVES, ALIGN, MASK, KEYS, DROPOUT,
            UPCAST, PRECISION,
        )  # fmt: skip
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    at = bh.to(tl.int64) * M + i
    tl.store(lse + at, m + tl.log2(l), mask=i < M)
    tl.store(thetas + at, theta, mask=i < M)
    e = tl.arange(0, BDV)
    at = o + ((b * M + i[:, None]) * H + h) * DV + e[None, :]
    tl.store(at, acc.to(o.dtype.element_ty), mask=(i[:, None] < M) & (e[None, :] < DV))
