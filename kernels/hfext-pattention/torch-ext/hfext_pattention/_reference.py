"""Plain torch: the formula, differentiable any number of times, and passes that keep no scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-12
CHUNK = 1 << 20  # scores that are worked on at once
_WORD = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit turns half of the output bits (Murmur's finaliser)."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _WORD
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _WORD
    return h ^ (h >> 16)


def keep_mask(seed: Tensor, first_row: int, rows: int, tokens: int, dropout: float) -> Tensor:
    """Which scores dropout keeps, bool [rows, tokens]: a function of seed, row and token, the same on every device."""
    row = torch.arange(first_row, first_row + rows, device=seed.device) & _WORD
    token = torch.arange(tokens, device=seed.device)
    h = _mix(_mix(row ^ (seed & _WORD))[:, None] ^ ((token * 0x9E3779B1) & _WORD))
    return (h >> 8).to(torch.float32) * 2.0**-24 >= dropout


def _scores(a: Tensor, mask: Tensor | None, mode: str) -> Tensor:
    if mask is None:
        return a
    return a.masked_fill(~mask, float("-inf") if mode == "softmax" else 0.0)


def pattention_reference(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    tau: Tensor | float | None = None,
    mode: str = "l2_norm_gelu",
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """O of `pattention`, [..., d_out], by the textbook, in the dtype of `x`; `keep` [rows, tokens] is of dropout."""
    n = len(keys)
    tau = (n if mode == "softmax" else n**0.5) if tau is None else tau
    a = _scores(x @ keys.t(), mask, mode)
    if mode == "softmax":
        s = torch.softmax(a, -1).nan_to_num(0.0) * tau
    elif mode == "gelu_l2_norm":
        s = F.gelu(a)
        s = s * tau / torch.linalg.vector_norm(s, dim=-1, keepdim=True).clamp(min=EPS)
    else:
        s = F.gelu(a * tau / torch.linalg.vector_norm(a, dim=-1, keepdim=True).clamp(min=EPS))
    if keep is not None:
        s = s * keep.view(s.shape) / (1 - dropout)
    return s @ values


def slope(u: Tensor) -> Tensor:
    """Derivative of GELU."""
    return 0.5 * (1 + torch.erf(u * 0.5**0.5)) + u * torch.exp(-0.5 * u * u) * (0.5 / torch.pi) ** 0.5


def _chunks(rows: int, tokens: int):
    step = max(1, CHUNK // max(1, tokens))
    return range(0, rows, step), step


def statistics_of(a: Tensor, tau: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """What is taken from the scores of a row and what their function is multiplied by, each [rows]."""
    offset = torch.zeros_like(a[:, 0])
    if mode == "softmax":
        top = a.amax(-1)
        offset = torch.where(top.isinf(), offset, top)
        size = torch.exp(a - offset[:, None]).sum(-1)
        return offset, torch.where(size > 0, tau / size, 0.0)
    size = torch.linalg.vector_norm(F.gelu(a) if mode == "gelu_l2_norm" else a, dim=-1)
    return offset, torch.where(size > EPS, tau / size, 0.0)


def forward(x, keys, values, tau, mode, mask, seed, dropout) -> tuple[Tensor, Tensor, Tensor]:
    """O [rows, d_out], offset and factor [rows], from x [rows, d_in]; in the compute dtype, row chunk by row chunk."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, n = len(x), len(keys)
    out = torch.empty(rows, values.shape[1], dtype=x.dtype, device=x.device)
    offset = torch.empty(rows, dtype=dtype, device=x.device)
    factor = torch.empty(rows, dtype=dtype, device=x.device)
    starts, step = _chunks(rows, n)
    for i in starts:
        part = slice(i, i + step)
        a = _scores((x[part] @ keys.t()).to(dtype), None if mask is None else mask[part], mode)
        offset[part], factor[part] = statistics_of(a, tau.to(dtype), mode)
        f = factor[part, None]
        if mode == "softmax":
            s = torch.exp(a - offset[part, None]) * f
        else:
            s = F.gelu(a * f) if mode == "l2_norm_gelu" else F.gelu(a) * f
        if dropout:
            s = s * keep_mask(seed, i, len(s), n, dropout) / (1 - dropout)
        out[part] = s.to(x.dtype) @ values
    return out, offset, factor


def backward(grad, x, keys, values, tau, mode, mask, seed, dropout, offset, factor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, keys and values. Those of keys and values are summed over chunks in the compute dtype."""
    dtype = offset.dtype
    n, low = len(keys), x.dtype
    dx = torch.empty_like(x)
    dk = torch.zeros(keys.shape, dtype=dtype, device=x.device)
    dv = torch.zeros(values.shape, dtype=dtype, device=x.device)
    starts, step = _chunks(len(x), n)
    tau = tau.to(dtype)
    for i in starts:
        part = slice(i, i + step)
        m = None if mask is None else mask[part]
        a = _scores((x[part] @ keys.t()).to(dtype), m, mode)
        g = (grad[part] @ values.t()).to(dtype)
        f = factor[part, None]
        keep = None
        if dropout:
            keep = keep_mask(seed, i, len(a), n, dropout).to(dtype) / (1 - dropout)
            g = g * keep
        if mode == "l2_norm_gelu":
            u = a * f
            s, du = F.gelu(u), slope(u) * g
            da = f * (du - u * ((u * du).sum(-1, keepdim=True) / tau**2))
        elif mode == "gelu_l2_norm":
            s = F.gelu(a) * f
            da = slope(a) * f * (g - s * ((s * g).sum(-1, keepdim=True) / tau**2))
        else:
            s = torch.exp(a - offset[part, None]) * f
            da = s * (g - (s * g).sum(-1, keepdim=True) / tau)
        if m is not None and mode != "softmax":
            da = da.masked_fill(~m, 0.0)
        s = s if keep is None else s * keep
        da, s = da.to(low), s.to(low)
        dx[part] = da @ keys
        dk += da.t() @ x[part]
        dv += s.t() @ grad[part]
    return dx, dk.to(low), dv.to(low)
