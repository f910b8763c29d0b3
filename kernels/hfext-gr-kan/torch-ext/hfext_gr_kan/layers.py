"""Layers for the Hub's `kernelize`: they take over the parameters of the module whose `forward` they stand in for."""

from __future__ import annotations

import torch
from torch import nn

from .rational import rational


class GroupRational(nn.Module):
    """A group-rational activation with `numerator_bias` [1 | groups, m + 1], `denominator_bias` [1 | groups, n] and
    the form of its denominator in `denominator`."""

    has_backward = True
    can_torch_compile = True

    numerator_bias: nn.Parameter
    denominator_bias: nn.Parameter
    denominator: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rational(x, self.numerator_bias, self.denominator_bias, self.denominator)
