"""Layers for the Hub's `kernelize`: they take over the parameters of the module whose `forward` they stand in for."""

from __future__ import annotations

import torch
from torch import nn

from .pattention import pattention


class Pattention(nn.Module):
    """Attention over learnable tokens with `keys` [tokens, in], `values` [tokens, out], the buffer `tau`, `mode` and
    the rate `dropout`."""

    has_backward = True
    can_torch_compile = True

    keys: nn.Parameter
    values: nn.Parameter
    tau: torch.Tensor
    mode: str
    dropout: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rate = self.dropout if self.training else 0.0
        return pattention(x, self.keys, self.values, self.tau, self.mode, dropout=rate)
