"""`spark_attention`: attention to about k keys of each query, found by a statistical threshold, gated or not."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _reference
from ._launch import runs_kernel
from .topk import DTYPES, check_k

MAX_HEAD_DIM = 256
MAX_DECODE_ROWS = 64


def spark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int = 256,
    *,
    r: int | None = None,
    gate: bool = True,
    halves: bool = False,
    unbiased: bool = True,
    scale: float | None = None,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    causal: bool = False,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    parts: int = 0,
) -> Tensor:
    """
    Spark attention, w_ij = softmax_j(topk(<q1_i, k1_j> / sqrt(r))) softplus(<q2_i, k2_j> / sqrt(D - r)); without the
    gate, softmax_j(topk(scale <q_i, k_j>)).

    topk keeps the scores >= theta = mean + std Q(1 - k / c), moments over the c keys that the query sees, of
    differences from one of their scores: about k of them, and all where c <= k or where scores differ by no more than
    rounding (std <= 2^-21 |largest|). Where no score reaches theta the largest stays, with those within
    1e-5 std + 2^-20 |largest| of it: the pass that reads values and the backward pass make scores again.
    Kept scores are not shifted. A query that sees no key gives 0. Gradients are the same in every run (no atomics);
    that of the threshold is 0 almost everywhere and left out, exactly. There is no second derivative of the kernels:
    torch raises; the plain path on the CPU has one.

    Args:
        q (`Tensor` [B, H, M, D]): Queries, of any strides; fp32, bf16 or fp16, D <= 256.
        k (`Tensor` [B, HK, N, D]): Keys; H must be a multiple of HK.
        v (`Tensor` [B, HK, N, DV]): Values, DV <= 256.
        topk (`int`, *optional*, defaults to 256): How many keys a query keeps, about; >= 1.
        r (`int`): With `gate`, how many numbers of a head predict, in [1, D - 1].
        gate (`bool`, *optional*, defaults to `True`): `False` for ordinary scores of whole heads and no softplus.
        halves (`bool`, *optional*, defaults to `False`): The predictor's numbers are r / 2 from the beginning of each
            half of a head, so that pairs (i, i + D / 2), which rotary embeddings turn, stay together; else the
            first r.
        unbiased (`bool`, *optional*, defaults to `True`): The deviation divides by c - 1, else by c.
        scale (`float`, *optional*, defaults to D ** -0.5): Another one scales both parts' 1 / sqrt(r) and
            1 / sqrt(D - r) by scale sqrt(D).
        lo, hi (`Tensor` int32 [B or 1, M], *optional*): Query i sees keys lo_i <= j < hi_i.
        causal (`bool`, *optional*, defaults to `False`): Query i sees keys up to i + N - M. Not with `lo` and `hi`.
        keys (`Tensor` bool [B or 1, N], *optional*): False hides a key, as padding does.
        mask (`Tensor` bool [B or 1, H or 1, M or 1, N], *optional*): True where a pair takes part.
        dropout_p (`float`, *optional*, defaults to 0.0): Part of the weights that is dropped, in [0, 1).
        seed (`Tensor` int64 [1], *optional*): Of the dropout; drawn from torch's generator otherwise.
        parts (`int`, *optional*, defaults to 0): For a few queries, into how many parts keys are split; 0 lets shapes
            decide.

    Returns:
        `Tensor` [B, M, H, DV], contiguous, in the dtype of `q`.
    """
    check_k("topk", topk, whole=True)
    _check(q, k, v, r, gate, halves, dropout_p)
    B, H, M, D = q.shape
    N = k.shape[2]
    r = r if gate else D
    if (lo is None) != (hi is None):
        raise ValueError("lo and hi must be given together.")
    if causal:
        if lo is not None:
            raise ValueError("causal cannot be given beside lo and hi: intersect them before.")
        hi = (torch.arange(N - M + 1, N + 1, device=q.device, dtype=torch.int32)).clamp(min=0)[None]
        lo = torch.zeros_like(hi)
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
    scale = D**-0.5 if scale is None else float(scale)
    if dropout_p and seed is None:
        # The CPU's generator: no synchronisation, and gradient checkpointing restores it.
        seed = torch.randint(2**62, (1,)).to(q.device, non_blocking=True)
    if not runs_kernel(q):
        with torch.autocast(q.device.type, enabled=False):  # it would round the products of an fp32 formula
            return _reference.attention(
                q, k, v, topk, r, gate, halves, unbiased, scale, lo, hi, keys, mask, dropout_p, seed
            )
    from . import _autograd

    lo, hi = (None, None) if lo is None else (lo.contiguous(), hi.contiguous())
    keys = None if keys is None else keys.contiguous().view(torch.uint8)
    mask = None if mask is None else mask.view(torch.uint8)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not learns and not dropout_p and H // k.shape[1] * M <= MAX_DECODE_ROWS:
        return _autograd.decode(q, k, v, lo, hi, keys, mask, topk, r, gate, halves, unbiased, scale, parts)
    return _autograd.forward(
        q, k, v, lo, hi, keys, mask, seed, topk, r, gate, halves, unbiased, scale, float(dropout_p)
    )[0]


def _check(q, k, v, r, gate, halves, dropout_p) -> None:
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
    if gate and (not isinstance(r, int) or not 1 <= r <= D - 1):
        raise ValueError(f"r is {r} but must be an integer in [1, {D - 1}], for heads of {D}.")
    if gate and halves and (D % 2 or r % 2):
        raise ValueError(f"r is {r} and heads have {D} numbers: both must be even with halves=True.")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p} but must be in [0, 1).")
