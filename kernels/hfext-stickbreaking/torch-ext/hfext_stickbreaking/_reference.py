"""Stick-breaking attention in plain torch: the definition that the kernels equal, with derivatives of every order.

It runs on any device and in any dtype: fp16 and bf16 are computed in fp32 and rounded once, fp64 stays fp64. It is
the path on the CPU, and where there is no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def stickbreaking(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lo: Tensor,
    hi: Tensor,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, M, H, DV] and the remainder [B, H, M], for q [B, H, M, D], k [B, HK, N, D], v [B, HK, N, DV].

    `lo` and `hi` are int32 [B or 1, M], `keys` bool [B or 1, N], `mask` bool [B or 1, H or 1, M or 1, N or 1].
    """
    B, H, M, _ = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    kind = torch.promote_types(q.dtype, torch.float32)
    # The heads of one key head are rows of one product, so keys are not repeated.
    s = (q.to(kind).reshape(B, HK, H // HK * M, -1) @ k.to(kind).mT).view(B, H, M, N) * scale
    j = torch.arange(N, device=q.device)
    visible = ((j >= lo[..., None]) & (j < hi[..., None])).unsqueeze(1)
    if keys is not None:
        visible = visible & keys[:, None, None, :]
    if mask is not None:
        visible = visible & mask
    left = F.logsigmoid(-s).masked_fill(~visible, 0.0)  # log of what a key leaves of the stick
    after = left.flip(-1).cumsum(-1).flip(-1)
    before = F.pad(after[..., 1:], (0, 1))  # what the keys to the right have left
    a = (F.logsigmoid(s) + before).exp().masked_fill(~visible, 0.0)
    o = (a.reshape(B, HK, H // HK * M, N) @ v.to(kind)).view(B, H, M, DV)
    return o.transpose(1, 2).to(q.dtype).contiguous(), left.sum(-1).exp()
