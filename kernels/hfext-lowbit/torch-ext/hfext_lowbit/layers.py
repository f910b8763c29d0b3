"""Layers of the Hub's form: only `forward`; the host module has the tensors."""

from __future__ import annotations

import torch
from torch import nn

from .functional import quantized_linear


class QuantLinear(nn.Module):
    """Forward of a linear layer with packed weights: its tensors are `qweight`, `scales`, `zeros` and `bias`."""

    has_backward = True
    can_torch_compile = True

    bits: int
    group_size: int
    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_linear(x, self.qweight, self.scales, self.zeros, self.bits, self.group_size, self.bias)
