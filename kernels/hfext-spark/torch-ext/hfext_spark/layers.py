"""Layers for the Hub's `kernelize`: they take over the parameters of the module whose `forward` they stand in for."""

from __future__ import annotations

import torch
from torch import nn

from .ffn import spark_ffn


class SparkFFN(nn.Module):
    """A feed-forward layer with `predictor` [d_ff, r], `gate` [d_ff, d_model - r] and `value` [d_ff, d_out], of which
    about `k` units are active; `unbiased` belongs to the threshold."""

    has_backward = True
    can_torch_compile = True

    predictor: nn.Parameter
    gate: nn.Parameter
    value: nn.Parameter
    k: int
    unbiased: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return spark_ffn(x, self.predictor, self.gate, self.value, self.k, self.unbiased)
