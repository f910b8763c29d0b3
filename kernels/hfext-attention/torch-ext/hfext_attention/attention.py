"""`attention`: softmax attention with every modifier, as a function; `causal`, `packed` and friends make intervals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _reference
from ._launch import runs_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_DECODE_ROWS = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    offset: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    parts: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """
    Softmax attention: scale, soft cap, bias, mask, softmax, dropout, in this order.

    A query that sees no key gives 0, a log-sum-exp of -inf and no gradient. The gradient is the same in every run
    (no atomics). There is no second derivative of the kernels: torch raises; the plain path on the CPU has one.

    Args:
        q (`Tensor` [B, H, M, D]): Queries, of any strides; fp32, bf16 or fp16, D <= 256.
        k (`Tensor` [B, HK, N, D]): Keys; H must be a multiple of HK.
        v (`Tensor` [B, HK, N, DV]): Values, DV <= 256.
        scale (`float`, *optional*, defaults to D ** -0.5): Factor of the products.
        lo, hi (`Tensor` int32 [B or 1, M], *optional*): Query i sees keys lo_i <= j < hi_i.
        causal (`bool`, *optional*, defaults to `False`): Query i sees keys up to i + offset. Not with `lo` and `hi`.
        window (`int` or `(int, int)`, *optional*): With `causal`, an `int` W lets a query see the W latest keys, its
            own counted; a pair (left, right) lets it see that many keys on each side, -1 for all. Not with `lo`.
        keys (`Tensor` bool [B or 1, N], *optional*): False hides a key, as padding does.
        mask (`Tensor` bool [B or 1, H or 1, M or 1, N], *optional*): True where a pair takes part.
        bias (`Tensor` float [B or 1, H or 1, M or 1, N or 1], *optional*): Is added to scores; has a gradient. A score
            of -1e37 or less after that hides its pair, as the masks of finite numbers in transformers mean it.
        sink (`Tensor` float [H], *optional*): The score of one more key with value 0; has a gradient.
        alibi_slopes (`Tensor` float [H], *optional*): Subtracts slope |i + offset - j|. No gradient.
        offset (`int`, *optional*, defaults to N - M): Key that stands where query 0 does.
        softcap (`float`, *optional*): Scores become softcap tanh(score / softcap).
        dropout_p (`float`, *optional*, defaults to 0.0): Part of the weights that is dropped, in [0, 1).
        seed (`Tensor` int64 [1], *optional*): Of the dropout; drawn from torch's generator otherwise.
        return_lse (`bool`, *optional*, defaults to `False`): Also return the natural log-sum-exp with the sink.
        parts (`int`, *optional*, defaults to 0): For a few queries, into how many parts keys are split; 0 lets shapes
            decide.

    Returns:
        `Tensor` [B, M, H, DV], contiguous, in the dtype of `q`; with `return_lse` also fp32 [B, H, M].
    """
    _check(q, k, v, softcap, dropout_p, sink, alibi_slopes)
    B, H, M, D = q.shape
    N = k.shape[2]
    if offset is None:
        offset = N - M
    if causal or window is not None:
        if lo is not None or hi is not None:
            raise ValueError("causal and window cannot be given beside lo and hi: intersect them before.")
        lo, hi = intervals(M, N, offset, causal, window, device=q.device)
    lo, hi = check_keys(B, M, N, lo, hi, keys)
    _check_pairs("mask", mask, q, N, (torch.bool,))
    _check_pairs("bias", bias, q, N, (*DTYPES, torch.float64))
    scale = D**-0.5 if scale is None else float(scale)
    softcap = 0.0 if softcap is None else float(softcap)
    if dropout_p and seed is None:
        # The CPU's generator: no synchronisation, and gradient checkpointing restores it.
        seed = torch.randint(2**62, (1,)).to(q.device, non_blocking=True)
    if not runs_kernel(q) or not (q.numel() and k.numel() and v.numel()):
        with torch.autocast(q.device.type, enabled=False):  # it would round the products of an fp32 formula
            o, lse = _reference.attention(
                q, k, v, scale, lo, hi, keys, mask, bias, sink, alibi_slopes, offset, softcap, dropout_p, seed
            )
        return (o, lse) if return_lse else o
    o, lse = _by_kernel(
        q, k, v, lo, hi, keys, mask, bias, sink, alibi_slopes, scale, softcap, offset, dropout_p, seed, parts
    )
    return (o, lse) if return_lse else o


def _by_kernel(q, k, v, lo, hi, keys, mask, bias, sink, slopes, scale, softcap, offset, dropout_p, seed, parts):
    from . import _autograd

    keys = None if keys is None else keys.contiguous().view(torch.uint8)
    mask = None if mask is None else mask.view(torch.uint8)
    slopes = None if slopes is None else slopes.contiguous()
    sink = None if sink is None else sink.contiguous()
    if bias is not None and bias.requires_grad:
        bias = bias.expand(*bias.shape[:2], q.shape[2], k.shape[2])
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias, sink))
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    if not learns and not dropout_p and rows <= MAX_DECODE_ROWS:
        return _autograd.decode(q, k, v, lo, hi, keys, mask, bias, sink, slopes, scale, softcap, offset, parts)
    return _autograd.forward(
        q, k, v, lo, hi, keys, mask, bias, sink, slopes, seed, scale, softcap, offset, float(dropout_p)
    )


def intervals(
    M: int,
    N: int,
    offset: int,
    causal: bool = True,
    window: int | tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """lo and hi, int32 [1, M], of causal and windowed attention."""
    left, right = (-1, 0) if causal else (-1, -1)
    if isinstance(window, int):
        if not causal:
            raise ValueError("window as one number needs causal=True; give (left, right) instead.")
        if window < 1:
            raise ValueError(f"window is {window} but must be >= 1: a query counts itself.")
        left = window - 1
    elif window is not None:
        if len(window) != 2 or min(window) < -1:
            raise ValueError(f"window is {window} but its numbers must be >= 0, or -1 for all keys of a side.")
        left, right = window[0], 0 if causal else window[1]
    i = torch.arange(M, device=device, dtype=torch.int32) + offset
    lo = (i - left).clamp(0, N) if left >= 0 else torch.zeros_like(i)
    hi = (i + right + 1).clamp(0, N) if right >= 0 else torch.full_like(i, N)
    return lo[None], hi[None]


def check_keys(
    B: int, M: int, N: int, lo: Tensor | None, hi: Tensor | None, keys: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """lo and hi as they are read, of one shape; ValueError for what cannot be read."""
    if (lo is None) != (hi is None):
        raise ValueError("lo and hi must be given together.")
    for name, rows in (("lo", lo), ("hi", hi)):
        if rows is not None and (rows.dtype != torch.int32 or rows.shape not in ((1, M), (B, M))):
            raise ValueError(f"{name} is {rows.dtype} {tuple(rows.shape)} but must be int32 [{B} or 1, {M}].")
    if keys is not None and (keys.dtype != torch.bool or keys.shape not in ((1, N), (B, N))):
        raise ValueError(f"keys is {keys.dtype} {tuple(keys.shape)} but must be bool [{B} or 1, {N}].")
    if lo is not None and lo.shape != hi.shape:
        lo, hi = lo.expand(B, M), hi.expand(B, M)
    return (None, None) if lo is None else (lo.contiguous(), hi.contiguous())


def check_softcap(softcap: float | None) -> None:
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap is {softcap} but must be > 0; None for none.")


def check_heads(name: str, x: Tensor | None, H: int) -> None:
    if x is not None and (x.shape != (H,) or not x.is_floating_point()):
        raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)} but must be floating point [{H}].")


def _check(q, k, v, softcap, dropout_p, sink, slopes) -> None:
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
        raise ValueError(f"Head sizes {D} and {DV} must be in [1, {MAX_HEAD_DIM}]; take attn_implementation='sdpa'.")
    check_softcap(softcap)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p} but must be in [0, 1).")
    check_heads("sink", sink, H)
    check_heads("alibi_slopes", slopes, H)


def _check_pairs(name: str, x: Tensor | None, q: Tensor, N: int, dtypes: tuple) -> None:
    if x is None:
        return
    whole = (*q.shape[:3], N)
    if x.dtype not in dtypes or x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, whole)):
        raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)} but must be {dtypes[0]} that broadcasts to {whole}.")
