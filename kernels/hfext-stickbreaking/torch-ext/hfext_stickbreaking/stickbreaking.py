"""`stickbreaking_attention`: attention whose weights break a stick, from each query's own key to the left."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _reference
from ._launch import runs_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_DECODE_ROWS = 64


def stickbreaking_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attend_current: bool = False,
    remainder: bool = False,
    scale: float | None = None,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
    own: Tensor | None = None,
    return_remainder: bool = False,
    parts: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """
    Stick-breaking attention: A_ij = b_ij prod_{m > j} (1 - b_im), b_ij = sigmoid(scale <q_i, k_j>), over the keys that
    query i sees; the nearest takes its part of the stick first.

    A query that sees no key gives 0 and a remainder of 1. The gradient is the same in every run (no atomics). There
    is no second derivative of the kernels: torch raises; the plain path on the CPU has one.

    Args:
        q (`Tensor` [B, H, M, D]): Queries, of any strides; fp32, bf16 or fp16, D <= 256.
        k (`Tensor` [B, HK, N, D]): Keys; H must be a multiple of HK.
        v (`Tensor` [B, HK, N, DV]): Values, DV <= 256.
        attend_current (`bool`, *optional*, defaults to `False`): Whether a query sees its own key.
        remainder (`bool`, *optional*, defaults to `False`): Give what is left of the stick to a query's own value.
        scale (`float`, *optional*, defaults to D ** -0.5): Factor of the products.
        lo, hi (`Tensor` int32 [B or 1, M], *optional*): Query i sees keys lo_i <= j < hi_i, and of these none behind
            its own. All up to its own by default.
        keys (`Tensor` bool [B or 1, N], *optional*): False hides a key, as padding does: it takes nothing.
        mask (`Tensor` bool [B or 1, H or 1, M or 1, N or 1], *optional*): True where a pair takes part.
        own (`Tensor` int [B or 1, M], *optional*, defaults to i + N - M): Where each query's own key stands.
        return_remainder (`bool`, *optional*, defaults to `False`): Also return what is left of the sticks.
        parts (`int`, *optional*, defaults to 0): For a few queries, into how many parts keys are split; 0 lets shapes
            decide.

    Returns:
        `Tensor` [B, M, H, DV], contiguous, in the dtype of `q`; with `return_remainder` also fp32 [B, H, M].
    """
    _check(q, k, v)
    B, H, M, D = q.shape
    HK, N = k.shape[1], k.shape[2]
    if (lo is None) != (hi is None):
        raise ValueError("lo and hi must be given together.")
    for name, rows in (("lo", lo), ("hi", hi)):
        if rows is not None and (rows.dtype != torch.int32 or rows.shape not in ((1, M), (B, M))):
            raise ValueError(f"{name} is {rows.dtype} {tuple(rows.shape)} but must be int32 [{B} or 1, {M}].")
    if keys is not None and (keys.dtype != torch.bool or keys.shape not in ((1, N), (B, N))):
        raise ValueError(f"keys is {keys.dtype} {tuple(keys.shape)} but must be bool [{B} or 1, {N}].")
    whole = (B, H, M, N)
    if mask is not None and (
        mask.dtype != torch.bool or mask.ndim != 4 or any(a not in (1, b) for a, b in zip(mask.shape, whole))
    ):
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)} but must be bool that broadcasts to {whole}.")
    if own is None:
        own = torch.arange(M, device=q.device)[None] + (N - M)
    elif own.dtype not in (torch.int32, torch.int64) or own.shape not in ((1, M), (B, M)):
        raise ValueError(f"own is {own.dtype} {tuple(own.shape)} but must be integers [{B} or 1, {M}].")
    last = (own + int(attend_current)).clamp(0, N).int()
    hi = last if hi is None else torch.minimum(hi, last)
    lo = torch.zeros_like(hi) if lo is None else lo.clamp(min=0).expand(hi.shape)
    scale = D**-0.5 if scale is None else float(scale)
    if runs_kernel(q):
        o, rest = _by_kernel(q, k, v, lo.contiguous(), hi.contiguous(), keys, mask, scale, parts)
    else:
        with torch.autocast(q.device.type, enabled=False):  # it would round the products of an fp32 formula
            o, rest = _reference.stickbreaking(q, k, v, scale, lo, hi, keys, mask)
    if remainder:
        place = own.clamp(0, max(N - 1, 0)).long().expand(B, M)
        mine = v.transpose(1, 2)[torch.arange(B, device=q.device)[:, None], place]  # [B, M, HK, DV]
        mine = mine * ((own >= 0) & (own < N))[..., None, None]
        mine = mine.repeat_interleave(H // HK, 2).to(rest.dtype)
        o = (o + rest.transpose(1, 2)[..., None] * mine).to(q.dtype)
    return (o, rest) if return_remainder else o


def _by_kernel(q, k, v, lo, hi, keys, mask, scale, parts):
    from . import _autograd

    keys = None if keys is None else keys.contiguous().view(torch.uint8)
    mask = None if mask is None else mask.view(torch.uint8)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not learns and q.shape[1] // k.shape[1] * q.shape[2] <= MAX_DECODE_ROWS:
        return _autograd.decode(q, k, v, lo, hi, keys, mask, scale, parts)
    return _autograd.forward(q, k, v, lo, hi, keys, mask, scale)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)} but must be [batch, heads, tokens, head_dim].")
    allowed = DTYPES if runs_kernel(q) else (*DTYPES, torch.float64)
    if q.dtype not in allowed or {k.dtype, v.dtype} != {q.dtype}:
        raise TypeError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype} but must share one of float32, bfloat16 and float16."
        )
    B, H, _, D = q.shape
    HK, DV = k.shape[1], v.shape[3]
    if k.shape[0] != B or v.shape[:3] != k.shape[:3] or k.shape[3] != D:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together.")
    if HK == 0 or H % HK:
        raise ValueError(f"{H} query heads are not a multiple of {HK} key heads.")
    if not 1 <= max(D, DV) <= MAX_HEAD_DIM:
        raise ValueError(f"Head sizes {D} and {DV} must be in [1, {MAX_HEAD_DIM}].")
