"""Triton kernels of the statistical top-k, and of the Spark FFN for a few tokens. Imported where one is launched.

    theta = mean + std Q(1 - k / c) over the c visible values of a row;  y = max(x - theta, 0), or x where x >= theta
    dx_j = g_j [y_j > 0] - G (1 / c + Q (x_j - mean) / ((c - 1) std)),  G = sum_j g_j [y_j > 0]   (c without unbiased)

Moments of blocks are joined by Chan's formula, in fp32, of differences from a base: one of the row's values.
"""

import triton
import triton.language as tl

from ._kernels import _merge

FLOOR = tl.constexpr(1e-6)


@triton.jit
def _block(x, mask, j, width, stride, mask_stride, MASK: tl.constexpr):
    """Values in fp32 and which of them are visible."""
    seen = j < width
    value = tl.load(x + j * stride, mask=seen, other=0.0).to(tl.float32)
    if MASK:
        seen = seen & (tl.load(mask + j * mask_stride, mask=seen, other=0) != 0)
    return value, seen


@triton.jit
def _statistics(
    x, mask, width, stride, mask_stride, table,
    SOFT: tl.constexpr, UNBIASED: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one row: count, base, and of the differences from it mean, std, quantile, theta and maximum."""
    n = 0.0
    base = 0.0
    mean = 0.0
    m2 = 0.0
    top = float("-inf")
    for j0 in range(0, width, BLOCK):
        value, seen = _block(x, mask, j0 + tl.arange(0, BLOCK), width, stride, mask_stride, MASK)
        n_b = tl.sum(tl.where(seen, 1.0, 0.0), 0)
        here = tl.max(tl.where(seen, value, float("-inf")), 0)
        base = tl.where((n == 0) & (n_b > 0), here, base)
        d = tl.where(seen, value - base, 0.0)
        mean_b = tl.sum(d, 0) / tl.maximum(n_b, 1.0)
        d = tl.where(seen, d - mean_b, 0.0)
        n, mean, m2 = _merge(n, mean, m2, n_b, mean_b, tl.sum(d * d, 0))
        top = tl.maximum(top, here)
    less = n
    if UNBIASED:
        less = n - 1.0
    std = tl.sqrt(m2 / tl.maximum(less, 1.0))
    if SOFT:
        std = tl.maximum(std, FLOOR)
    q = tl.load(table + n.to(tl.int32))
    theta = tl.where(q == float("-inf"), q, mean + tl.where(q == float("-inf"), 0.0, q) * std)
    return n, base, mean, std, q, theta, top - base


@triton.jit
def topk_forward(
    x, y, mask, table, stats, rows, width, x_row, x_col, mask_row, mask_col,
    SOFT: tl.constexpr, UNBIASED: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [rows, width] of one row, and [5, rows] of it: base, and of the differences from the base mean,
    std, quantile and theta; grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    mask += row * mask_row
    y += row * width
    n, base, mean, std, q, theta, top = _statistics(
        x, mask, width, x_col, mask_col, table, SOFT, UNBIASED, MASK, BLOCK
    )
    if not SOFT:
        theta = tl.minimum(theta, top)
    tl.store(stats + row, base)
    tl.store(stats + rows + row, mean)
    tl.store(stats + 2 * rows + row, std)
    tl.store(stats + 3 * rows + row, q)
    tl.store(stats + 4 * rows + row, theta)
    for j0 in range(0, width, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        value, seen = _block(x, mask, j, width, x_col, mask_col, MASK)
        if SOFT:
            shifted = tl.maximum((value - base) - tl.where(theta == float("-inf"), 0.0, theta), 0.0)
            out = tl.where(seen, tl.where(theta == float("-inf"), value, shifted), 0.0)
        else:
            out = tl.where(seen & (value - base >= theta), value, float("-inf"))
        tl.store(y + j, out.to(y.dtype.element_ty), mask=j < width)


@triton.jit
def topk_backward(
    x, g, dx, mask, stats, count, rows, width, x_row, x_col, g_row, g_col, mask_row, mask_col,
    SOFT: tl.constexpr, UNBIASED: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [rows, width] of one row; grid (rows). count is that of visible values, [rows], where there is a mask."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    g += row * g_row
    dx += row * width
    mask += row * mask_row
    base = tl.load(stats + row)
    mean = tl.load(stats + rows + row)
    std = tl.load(stats + 2 * rows + row)
    q = tl.load(stats + 3 * rows + row)
    theta = tl.load(stats + 4 * rows + row)
    n = width.to(tl.float32)
    if MASK:
        n = tl.load(count + row)
    total = 0.0
    slope = 0.0
    if SOFT:
        for j0 in range(0, width, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            value, seen = _block(x, mask, j, width, x_col, mask_col, MASK)
            grad = tl.load(g + j * g_col, mask=j < width, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(seen & (value - base > theta), grad, 0.0), 0)
        less = n
        if UNBIASED:
            less = n - 1.0
        # Where all are kept theta is no function of x; at the floor std is none.
        kept_all = theta == float("-inf")
        total = tl.where(kept_all, 0.0, total)
        slope = tl.where(kept_all | (std <= FLOOR), 0.0, q / (tl.maximum(less, 1.0) * std))
    for j0 in range(0, width, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        value, seen = _block(x, mask, j, width, x_col, mask_col, MASK)
        grad = tl.load(g + j * g_col, mask=j < width, other=0.0).to(tl.float32)
        value = value - base
        if SOFT:
            out = tl.where(value > theta, grad, 0.0) - total * (1.0 / tl.maximum(n, 1.0) + slope * (value - mean))
        else:
            out = tl.where(value >= theta, grad, 0.0)
        tl.store(dx + j, tl.where(seen, out, 0.0).to(dx.dtype.element_ty), mask=j < width)


@triton.jit
def ffn_predict(
    x, k1, s, x_row, k1_row, r, units, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s [rows, units] fp32 = <k1_f, x1>; grid (tiles of units, rows)."""
    row = tl.program_id(1).to(tl.int64)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    d = tl.arange(0, BLOCK_D)
    at = k1 + f.to(tl.int64)[:, None] * k1_row + d[None, :]
    total = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, r, BLOCK_D):
        inside = start + d < r
        value = tl.load(x + row * x_row + start + d, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(at + start, mask=(f < units)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(w * value[None, :], 1)
    tl.store(s + row * units + f, total, mask=f < units)


@triton.jit
def ffn_compact(
    s, index, h, count, table, units, UNBIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Active units of one row in their order: index [rows, units], h = gelu(s - theta), their count; grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    s += row * units
    index += row * units
    h += row * units
    n, base, mean, std, q, theta, top = _statistics(s, s, units, 1, 0, table, True, UNBIASED, False, BLOCK)
    least = tl.where(theta == float("-inf"), theta, 0.0)  # where all are kept, negative ones are active too
    base = tl.where(theta == float("-inf"), 0.0, base)
    shift = tl.where(theta == float("-inf"), 0.0, theta)
    found = 0
    for j0 in range(0, units, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        value = (tl.load(s + j, mask=j < units, other=0.0) - base) - shift
        active = (j < units) & (value > least)
        here = active.to(tl.int32)
        place = found + tl.cumsum(here, 0) - here
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
        tl.store(index + place, j, mask=active)
        tl.store(h + place, value, mask=active)
        found += tl.sum(here, 0)
    tl.store(count + row, found)


@triton.jit
def ffn_gate(
    x, k2, index, h, count, x_row, k2_row, width, units, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h <- h <k2_f, x2> for the active units f; grid (tiles of units, rows); tiles behind the count have nothing to
    do."""
    row = tl.program_id(1).to(tl.int64)
    found = tl.load(count + row)
    a0 = tl.program_id(0) * BLOCK_A
    if a0 < found:
        a = a0 + tl.arange(0, BLOCK_A)
        active = a < found
        f = tl.load(index + row * units + a, mask=active, other=0)
        d = tl.arange(0, BLOCK_D)
        at = k2 + f.to(tl.int64)[:, None] * k2_row + d[None, :]
        total = tl.zeros([BLOCK_A], tl.float32)
        for start in range(0, width, BLOCK_D):
            inside = start + d < width
            value = tl.load(x + row * x_row + start + d, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(at + start, mask=active[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(w * value[None, :], 1)
        value = tl.load(h + row * units + a, mask=active, other=0.0)
        tl.store(h + row * units + a, value * total, mask=active)


@triton.jit
def ffn_output(
    v, index, h, count, parts, v_row, width, units, rows, SPLITS, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts [SPLITS, rows, width] fp32: sums of h_f v_f over a share of the active units; grid (tiles of width,
    SPLITS, rows)."""
    row = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    found = tl.load(count + row)
    share = ((found + SPLITS - 1) // SPLITS + BLOCK_A - 1) // BLOCK_A * BLOCK_A
    end = tl.minimum((part + 1) * share, found)
    total = tl.zeros([BLOCK_D], tl.float32)
    for a0 in range(part * share, end, BLOCK_A):
        a = a0 + tl.arange(0, BLOCK_A)
        active = a < end
        f = tl.load(index + row * units + a, mask=active, other=0)
        value = tl.load(h + row * units + a, mask=active, other=0.0)
        at = v + f.to(tl.int64)[:, None] * v_row + d[None, :]
        w = tl.load(at, mask=active[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(w * value[:, None], 0)
    tl.store(parts + (part * rows + row) * width + d, total, mask=d < width)
