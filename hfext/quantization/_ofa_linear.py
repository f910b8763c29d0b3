"""`OFALinear`: one linear layer at several bit-widths, each with its own codes, grid and low-rank adapter.

    y = x W_b^T + (alpha / rank) (x down_b^T) up_b^T + bias        for the width b that is set

Tensors for each width b: `qweight_b`, `scales_b`, `zeros_b` as of `QuantLinear`, `down_b` [rank, in] and `up_b`
[out, rank] in float32; `bias` [out] is shared. Nothing else of the weight is held.
"""

import math
import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._packing import packed_length
from ._linear import QuantLinear, ReadOnlyWeight, misfit


class OFALinear(QuantLinear):
    """A linear layer of several widths, empty until `take` or a checkpoint fills it. `bits` is the width that runs.

    Args:
        in_features, out_features (`int`): As of `nn.Linear`.
        choices (`tuple[int, ...]`): Its widths, of 2, 3, 4 and 8.
        bits (`int`): The width that runs.
        group_size (`int`): Consecutive inputs that share a scale and an offset; -1 for all of them.
        rank (`int`): Of the adapters.
        alpha (`float`): Adapters are multiplied by alpha / rank.
        bias (`bool`): Whether there is a bias.
        dtype (`torch.dtype`): Type of the model; that of the bias and of `weight`.
        scale_dtype (`torch.dtype`): Type of scales and offsets.
        device (`torch.device` or `str`, *optional*): Where the tensors are made.

    Raises:
        ValueError: The group size does not divide the inputs, or codes of a row do not fill whole bytes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        choices: tuple[int, ...],
        bits: int,
        group_size: int,
        rank: int,
        alpha: float,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)
        for b in choices:
            problem = misfit(in_features, b, group_size)
            if problem:
                raise ValueError(problem)
        self.in_features, self.out_features, self.choices, self.bits = in_features, out_features, choices, bits
        self.group_size = in_features if group_size == -1 else group_size
        self.rank, self.scaling, self.compute_dtype = rank, alpha / rank, dtype
        groups = in_features // self.group_size
        for b in choices:
            codes = torch.zeros(out_features, packed_length(in_features, b), dtype=torch.uint8, device=device)
            self.register_buffer(f"qweight_{b}", codes)
            for key, sizes, kind in (
                ("scales", (out_features, groups), scale_dtype),
                ("zeros", (out_features, groups), scale_dtype),
                ("down", (rank, in_features), torch.float32),
                ("up", (out_features, rank), torch.float32),
            ):
                made = torch.zeros(*sizes, dtype=kind, device=device)
                self.register_parameter(f"{key}_{b}", nn.Parameter(made, requires_grad=False))
        made = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", made if bias else None)

    def of(self, key: str, bits: int | None = None) -> Tensor:
        """One of `qweight`, `scales`, `zeros`, `down` and `up`, of a width or of the one that runs."""
        return getattr(self, f"{key}_{bits or self.bits}")

    qweight = property(lambda self: self.of("qweight"))
    scales = property(lambda self: self.of("scales"))
    zeros = property(lambda self: self.of("zeros"))

    def take(self, layer: QuantLinear, seed: int, name: str) -> None:
        """Hold what a quantised layer holds, for its width, with a new adapter: `down` uniform in
        +-1 / sqrt(in) as peft draws it, by seed, name and width, and `up` zero."""
        for key in ("qweight", "scales", "zeros"):
            self.of(key, layer.bits).data.copy_(getattr(layer, key))
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{layer.bits}".encode()))
        drawn = torch.rand(self.rank, self.in_features, generator=generator).mul_(2).sub_(1)
        self.of("down", layer.bits).data.copy_(drawn / math.sqrt(self.in_features))
        self.of("up", layer.bits).data.zero_()

    def single(self) -> QuantLinear:
        """The width that runs as an ordinary layer, without its adapter; a copy."""
        sizes = self.in_features, self.out_features, self.bits, self.group_size, self.bias is not None
        device = self.qweight.device
        made = QuantLinear(*sizes, dtype=self.compute_dtype, scale_dtype=self.scales.dtype, device=device)
        for key in ("qweight", "scales", "zeros"):
            getattr(made, key).data.copy_(self.of(key))
        if self.bias is not None:
            made.bias.data.copy_(self.bias)
        return made.train(self.training)

    def merged(self, dtype: torch.dtype) -> Tensor:
        """Weight [out, in] of the width that runs with its adapter."""
        with torch.no_grad():
            whole = self.dequantized(torch.float32)
            return whole.addmm_(self.of("up"), self.of("down"), alpha=self.scaling).to(dtype)

    @property
    def weight(self) -> Tensor:
        return self.merged(self.compute_dtype).as_subclass(ReadOnlyWeight)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        adapted = F.linear(F.linear(x.to(self.of("down").dtype), self.of("down")), self.of("up"))
        return (y + adapted * self.scaling).to(y.dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        made = super().to_linear(dtype)
        made.weight.data = self.merged(made.weight.dtype)
        return made

    def kept_types(self) -> tuple[str, ...]:
        return tuple(f"{key}_{b}" for b in self.choices for key in ("scales", "zeros", "down", "up"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, choices={self.choices}, rank={self.rank}"
