"""Softmax attention in plain torch: the definition that the kernels equal, differentiable as often as one likes.

It runs on any device and in any dtype: fp16 and bf16 are computed in fp32 and rounded once, fp64 stays fp64. It is
the path on the CPU, and where there is no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PHILOX = ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))
_WORD = 0xFFFFFFFF
HIDDEN = -1e37  # scores with a bias that are not above hide their pair


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    slopes: Tensor | None = None,
    off: int = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, M, H, DV] and the natural log-sum-exp [B, H, M], for q [B, H, M, D], k [B, HK, N, D], v [B, HK, N, DV].

    `lo` and `hi` are int32 [B or 1, M], `keys` bool [B or 1, N], `mask` bool and `bias` float [B or 1, H or 1, M, N],
    `sink` and `slopes` [H].
    """
    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    kind = torch.promote_types(q.dtype, torch.float32)
    qs, ks, vs = q.to(kind), k.to(kind), v.to(kind)
    # The heads of one key head are rows of one product, so keys are not repeated.
    s = (qs.reshape(B, HK, H // HK * M, D) @ ks.mT).view(B, H, M, N) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(kind)
    j = torch.arange(N, device=q.device)
    if slopes is not None:
        i = torch.arange(M, device=q.device)
        s = s - slopes.detach().to(kind)[:, None, None] * (j - i[:, None] - off).abs()
    if bias is not None:
        s = s.masked_fill(s <= HIDDEN, -torch.inf)
    visible = visibility(lo, hi, keys, mask, N, q.device)
    if visible is not None:
        s = s.masked_fill(~visible, -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink.to(kind)[None, :, None, None].expand(B, H, M, 1)], -1)
    if s.shape[-1] == 0:  # no key and no sink
        zeros = (qs.sum() + vs.sum()) * 0.0
        return q.new_zeros(B, M, H, DV) + zeros.to(q.dtype), s.new_full((B, H, M), -torch.inf)
    top = s.detach().amax(-1, keepdim=True)
    e = (s - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = e.sum(-1, keepdim=True)
    empty = total == 0  # a row that sees nothing: o = 0, lse = -inf, no gradient
    total = total.masked_fill(empty, 1.0)
    lse = (top.masked_fill(empty, -torch.inf) + total.log()).squeeze(-1)
    p = (e / total)[..., :N]
    if dropout_p:
        p = p * kept(seed, B * H, M, N, dropout_p).view(B, H, M, N).to(kind)
    if hi is not None:  # places behind the last visible key may hold anything
        vs = vs.masked_fill((j >= hi.amax(-1, keepdim=True))[:, None, :, None], 0.0)
    o = (p.reshape(B, HK, H // HK * M, N) @ vs).view(B, H, M, DV)
    return o.transpose(1, 2).to(q.dtype).contiguous(), lse


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


def kept(seed: Tensor, rows: int, M: int, N: int, p: float) -> Tensor:
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
