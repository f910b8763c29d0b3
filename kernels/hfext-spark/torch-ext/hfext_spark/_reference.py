"""The same formulas in plain torch: what the kernels equal, differentiable as often as one likes.

They run on any device and in any dtype: fp16 and bf16 are computed in fp32 and rounded once, fp64 stays fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FLOOR = 1e-6  # of the standard deviation, where values are shifted by the threshold
NEAR = 1e-5  # of the deviation: a score as good as the largest, where none reaches the threshold
_PHILOX = ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))
_WORD = 0xFFFFFFFF


def quantile(k: float, count: Tensor) -> Tensor:
    """Q(1 - k / count) of the standard normal distribution, fp64; -inf where count <= k."""
    count = count.double()
    share = 1 - k / count.clamp(min=1)
    return torch.special.ndtri(share.clamp(min=0.0)).masked_fill(count <= k, -torch.inf)


def moments(x: Tensor, visible: Tensor | None, unbiased: bool, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and standard deviation, of at least `floor`, of the visible values of the last axis, [..., 1]."""
    if visible is None:
        count = torch.full_like(x[..., :1], x.shape[-1])
        mean = x.mean(-1, keepdim=True) if x.shape[-1] else torch.zeros_like(x.sum(-1, keepdim=True))
        centred = x - mean
    else:
        visible = visible.expand_as(x)
        count = visible.sum(-1, keepdim=True).to(x.dtype)
        mean = x.masked_fill(~visible, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
        centred = (x - mean).masked_fill(~visible, 0.0)
    variance = (centred * centred).sum(-1, keepdim=True) / (count - int(unbiased)).clamp(min=1)
    low = variance <= floor**2  # the square root has no derivative at 0
    return count, mean, variance.masked_fill(low, floor**2).sqrt()


def shift(x: Tensor, visible: Tensor | None) -> Tensor:
    """The largest visible value, [..., 1], without a gradient; 0 where there is none."""
    if not x.shape[-1]:
        return x.new_zeros(*x.shape[:-1], 1)
    top = (x if visible is None else x.masked_fill(~visible, -torch.inf)).detach().amax(-1, keepdim=True)
    return top.masked_fill(top == -torch.inf, 0.0)


def threshold(
    x: Tensor, k: float, visible: Tensor | None, unbiased: bool, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """mean + std Q(1 - k / count) of the visible values, -inf where all are kept, and std; both [..., 1]."""
    count, mean, std = moments(x, visible, unbiased, floor)
    q = quantile(k, count).to(x.dtype)
    all_kept = q == -torch.inf
    return (mean + q.masked_fill(all_kept, 0.0) * std).masked_fill(all_kept, -torch.inf), std


def statistical_topk(x: Tensor, k: float, unbiased: bool, soft: bool, visible: Tensor | None) -> Tensor:
    """See `hfext_spark.statistical_topk`."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if not soft:
        return x.masked_fill(~kept(y.detach(), k, unbiased, visible), -torch.inf)
    shifted = y - shift(y, visible)
    theta, _ = threshold(shifted, k, visible, unbiased, FLOOR)
    all_kept = theta == -torch.inf
    out = torch.where(all_kept, y, (shifted - theta.masked_fill(all_kept, 0.0)).relu())
    if visible is not None:
        out = out.masked_fill(~visible, 0.0)
    return out.to(x.dtype)


def kept(x: Tensor, k: float, unbiased: bool, visible: Tensor | None, again: bool = False) -> Tensor:
    """Which visible values reach the threshold; where none does, the largest. bool, as x.

    again: For scores that others make again, rounded otherwise: where none reaches the threshold those within rounding
    of the largest stay as well, and all stay where they differ by no more than that."""
    top = shift(x, visible)
    x = x - top
    theta, std = threshold(x, k, visible, unbiased)
    near = torch.zeros_like(std)
    if again:
        size = torch.finfo(x.dtype).eps * top.abs()
        theta = theta.masked_fill(std <= 4 * size, -torch.inf)
        near = NEAR * std + 8 * size
    found = x >= torch.where(theta > 0, -near, theta)
    return found if visible is None else found & visible


def columns(D: int, r: int, halves: bool, device: torch.device | None = None) -> Tensor:
    """The order of a head's D numbers in which the predictor's r come first."""
    if not halves:
        return torch.arange(D, device=device)
    pairs = torch.arange(D, device=device).view(2, D // 2)
    return torch.cat([pairs[:, : r // 2].flatten(), pairs[:, r // 2 :].flatten()])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int,
    r: int,
    gate: bool,
    halves: bool,
    unbiased: bool,
    scale: float,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """o [B, M, H, DV]; masks as in `hfext_spark.spark_attention`, `scale` is that of a whole head."""
    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    kind = torch.promote_types(q.dtype, torch.float32)
    qs, ks, vs = q.to(kind), k.to(kind), v.to(kind)

    def product(a: Tensor, b: Tensor) -> Tensor:  # the heads of one key head are rows of one product
        return (a.reshape(B, HK, H // HK * M, a.shape[-1]) @ b.mT).view(B, H, M, N)

    if gate:
        order = columns(D, r, halves, q.device)
        q1, q2 = qs[..., order[:r]], qs[..., order[r:]]
        k1, k2 = ks[..., order[:r]], ks[..., order[r:]]
        first, second = scales(scale, D, r)
        s, s2 = product(q1, k1) * first, product(q2, k2) * second
    else:
        s = product(qs, ks) * scale
    visible = visibility(lo, hi, keys, mask, N, q.device)
    chosen = kept(s.detach(), topk, unbiased, visible, again=True)
    s = s.masked_fill(~chosen, -torch.inf)
    top = s.detach().amax(-1, keepdim=True) if N else s.new_zeros(B, H, M, 1)
    e = (s - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = e.sum(-1, keepdim=True)
    w = e / total.masked_fill(total == 0, 1.0)
    if gate:
        w = w * F.softplus(s2, threshold=1e4)
    if dropout_p:
        w = w * dropped(seed, B * H, M, N, dropout_p).view(B, H, M, N).to(kind)
    o = (w.reshape(B, HK, H // HK * M, N) @ vs).view(B, H, M, DV)
    return o.transpose(1, 2).to(q.dtype).contiguous()


def scales(scale: float, D: int, r: int) -> tuple[float, float]:
    """Factors of both parts' products: 1 / sqrt(r) and 1 / sqrt(D - r) where scale is 1 / sqrt(D)."""
    return scale * (D / r) ** 0.5, scale * (D / (D - r)) ** 0.5


def visibility(
    lo: Tensor | None, hi: Tensor | None, keys: Tensor | None, mask: Tensor | None, N: int, device: torch.device
) -> Tensor | None:
    """Which pairs take part, bool [B or 1, H or 1, M or 1, N]; None for all."""
    parts = []
    if lo is not None:
        j = torch.arange(N, device=device)
        parts.append(((j >= lo[..., None]) & (j < hi[..., None])).unsqueeze(1))
    if keys is not None:
        parts.append(keys[:, None, None, :])
    if mask is not None:
        parts.append(mask)
    visible = None
    for part in parts:
        visible = part if visible is None else visible & part
    return visible


def spark_ffn(x: Tensor, k1: Tensor, k2: Tensor, v: Tensor, k: int, unbiased: bool) -> Tensor:
    """v' (gelu(STopk(k1 x1, k)) * (k2 x2)), densely."""
    r = k1.shape[1]
    hidden = statistical_topk(F.linear(x[..., :r], k1), k, unbiased, True, None)
    return (F.gelu(hidden) * F.linear(x[..., r:], k2)) @ v


def spark_ffn_by_rows(x: Tensor, k1: Tensor, k2: Tensor, v: Tensor, k: int, unbiased: bool) -> Tensor:
    """The same for few rows x [rows, d_model] without a gradient: rows of k2 and v are read for active units alone."""
    r = k1.shape[1]
    hidden = statistical_topk(F.linear(x[:, :r], k1), k, unbiased, True, None)
    out = []
    for row, h in zip(x, hidden):
        (active,) = torch.nonzero(h, as_tuple=True)
        if not len(active):  # no bag for `embedding_bag`
            out.append(v.new_zeros(1, v.shape[1]))
            continue
        h = F.gelu(h.index_select(0, active)) * torch.mv(k2.index_select(0, active), row[r:])
        out.append(F.embedding_bag(active[None], v, per_sample_weights=h[None], mode="sum"))
    return torch.cat(out)


def dropped(seed: Tensor, rows: int, M: int, N: int, p: float) -> Tensor:
    """Dropout's factors [rows, M, N], 1 / (1 - p) or 0: Philox 4x32-10 of (seed + row, i N + j), as kernels draw."""
    device = seed.device
    key = seed.view(1).to(torch.int64) + torch.arange(rows, device=device)
    c = torch.arange(M * N, device=device) & _WORD
    c = [c.expand(rows, -1), *(torch.zeros((), dtype=torch.int64, device=device),) * 3]
    k0, k1 = (key & _WORD)[:, None], (key >> 32 & _WORD)[:, None]
    for _ in range(10):
        high0, low0 = _product(c[0], _PHILOX[0][0])
        high1, low1 = _product(c[2], _PHILOX[0][1])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = k0 + _PHILOX[1][0] & _WORD, k1 + _PHILOX[1][1] & _WORD
    signed = torch.where(c[0] >= 1 << 31, c[0] - (1 << 32), c[0])
    uniform = torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
    return torch.where(uniform >= p, 1.0 / (1.0 - p), 0.0).expand(rows, M * N).view(rows, M, N)


def _product(x: Tensor, y: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product of 32-bit words, in int64 without overflow."""
    a, b = (x >> 16) * y, (x & 0xFFFF) * y
    low = ((a & 0xFFFF) << 16) + b
    return (a >> 16) + (low >> 32), low & _WORD
