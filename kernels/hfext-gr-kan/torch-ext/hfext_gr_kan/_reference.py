"""Plain torch: the formula, differentiable any number of times, and the analytic backward pass that saves x alone."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 16  # elements that are worked on at once: what fits the cache of a core


def _sign(x: Tensor) -> Tensor:
    """-1 below 0 and +1 elsewhere: the one-sided derivative of |.| that lets coefficients of 0 learn."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rational_reference(x: Tensor, numerator: Tensor, denominator: Tensor, form: str = "abs_terms") -> Tensor:
    """y of `rational`, [..., channels], by the textbook: a graph of torch operations, in float32 or float64."""
    dtype = _compute_dtype(x)
    groups = max(len(numerator), len(denominator))
    z = x.to(dtype).unflatten(-1, (groups, -1))  # [..., groups, width]
    a, b = numerator.to(dtype), denominator.to(dtype)
    p = a[:, -1:] + torch.zeros_like(z)
    for i in range(a.shape[1] - 2, -1, -1):
        p = p * z + a[:, i : i + 1]
    if form == "abs_terms":
        z, b = z.abs(), b * _sign(b.detach())
    q = torch.zeros_like(z)
    for j in range(b.shape[1] - 1, -1, -1):
        q = (q + b[:, j : j + 1]) * z
    if form == "abs_sum":
        q = q * _sign(q.detach())
    return (p / (1 + q)).flatten(-2).to(x.dtype)


def _horner(z: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of sum_i c_i z^i, for z [rows, groups, width] and c [groups, order + 1]."""
    value = torch.zeros_like(z) + coefficients[:, -1:]
    slope = torch.zeros_like(z)
    for i in range(coefficients.shape[1] - 2, -1, -1):
        slope.mul_(z).add_(value)
        value.mul_(z).add_(coefficients[:, i : i + 1])
    return value, slope


def _parts(z: Tensor, a: Tensor, b: Tensor, form: str):
    """P, P', Q, Q', and what the derivatives of Q by its coefficients multiply: |x| or x, and a sign or None."""
    p, dp = _horner(z, a)
    base = z.abs() if form == "abs_terms" else z
    b = b.abs() if form == "abs_terms" else b
    q, dq = _horner(base, torch.cat([torch.zeros_like(b[:, :1]) if b.shape[1] else b.new_zeros(len(b), 1), b], 1))
    sign = None
    if form == "abs_terms":
        dq.mul_(z.sign())
    else:
        sign = _sign(q)
        q, dq = q * sign, dq * sign
    return p, dp, q.add_(1), dq, base, sign


def _chunks(x: Tensor, groups: int):
    flat = x.reshape(-1, groups, x.shape[-1] // groups)
    step = max(1, CHUNK // max(1, x.shape[-1]))
    return flat, range(0, len(flat), step), step


def forward(x: Tensor, a: Tensor, b: Tensor, form: str) -> Tensor:
    """y from x and coefficients [groups, m + 1], [groups, n] in the dtype of the computation."""
    flat, starts, step = _chunks(x, len(a))
    y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    b = b.abs() if form == "abs_terms" else b
    for i in starts:
        z = flat[i : i + step].to(a.dtype)
        p = torch.zeros_like(z) + a[:, -1:]
        for k in range(a.shape[1] - 2, -1, -1):
            p.mul_(z).add_(a[:, k : k + 1])
        if form == "abs_terms":
            z = z.abs()
        q = torch.zeros_like(z)
        for k in range(b.shape[1] - 1, -1, -1):
            q.add_(b[:, k : k + 1]).mul_(z)
        if form == "abs_sum":
            q.abs_()
        y[i : i + step] = p.div_(q.add_(1))
    return y.view(x.shape)


def backward(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b; sums over a chunk in the dtype of the computation, over chunks in float64."""
    flat, starts, step = _chunks(x, len(a))
    grad = grad.reshape(flat.shape)
    dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    da = torch.zeros(a.shape, dtype=torch.float64, device=x.device)
    db = torch.zeros(b.shape, dtype=torch.float64, device=x.device)
    for i in starts:
        z, g = flat[i : i + step].to(a.dtype), grad[i : i + step].to(a.dtype)
        p, dp, q, dq, base, sign = _parts(z, a, b, form)
        p.div_(q)  # y
        t = g / q
        dx[i : i + step] = dq.mul_(p).neg_().add_(dp).mul_(t)
        u = p.mul_(t) if sign is None else p.mul_(t).mul_(sign)
        for k in range(b.shape[1]):
            db[:, k] -= u.mul_(base).sum((0, 2))
        for k in range(a.shape[1]):
            da[:, k] += t.sum((0, 2))
            if k + 1 < a.shape[1]:
                t.mul_(z)
    if form == "abs_terms":
        db *= _sign(b)
    return dx.view(x.shape), da.to(a.dtype), db.to(b.dtype)
