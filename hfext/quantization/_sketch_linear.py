"""`SketchLinear`: a linear layer whose weights are looked up in tables, w'_rc = table[r, part(c), code_rc].

Tensors: `qweight` uint8 [out, in bits / 8] as of `QuantLinear`, `sketch` [out, parts, 2^bits], `bias` [out]. A part is
in / parts consecutive inputs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._packing import pack, packed_length
from ._affine import Quantized
from ._linear import QuantLinear, misfit


class SketchLinear(QuantLinear):
    """A linear layer on tables, empty until `store` or a checkpoint fills it.

    Args:
        in_features, out_features (`int`): As of `nn.Linear`.
        bits (`int`): Bits of a code: 2, 3, 4 or 8.
        parts (`int`): Tables of a row.
        bias (`bool`): Whether there is a bias.
        dtype (`torch.dtype`): Type of the model; that of the bias and of `weight`.
        scale_dtype (`torch.dtype`): Type of `sketch`, which it keeps when the model's type is changed.
        device (`torch.device` or `str`, *optional*): Where the tensors are made.

    Raises:
        ValueError: `parts` does not divide the inputs, or codes of a row do not fill whole bytes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        parts: int,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)
        problem = parts_misfit(in_features, bits, parts)
        if problem:
            raise ValueError(problem)
        self.in_features, self.out_features, self.bits, self.parts = in_features, out_features, bits, parts
        self.group_size, self.compute_dtype = in_features // parts, dtype
        width = packed_length(in_features, bits)
        self.register_buffer("qweight", torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        table = torch.zeros(out_features, parts, 2**bits, dtype=scale_dtype, device=device)
        self.sketch = nn.Parameter(table, requires_grad=False)
        made = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", made if bias else None)

    def store(self, quantized: tuple[Tensor, Tensor] | Quantized, bias: Tensor | None = None) -> None:
        """Hold codes [out, in] and tables [out, parts, 2^bits]; of an affine grid, its levels become the tables."""
        if isinstance(quantized, Quantized):
            levels = torch.arange(2**self.bits, device=quantized.scales.device)
            tables = quantized.scales[..., None] * levels + quantized.zeros[..., None]
            tables = tables.repeat_interleave(self.parts // tables.shape[1], 1)
            quantized = quantized.codes, tables
        codes, tables = quantized
        tables = tables.to(self.sketch.dtype)
        if not tables.isfinite().all():
            raise ValueError(
                f"A weight is too large for {str(self.sketch.dtype).removeprefix('torch.')}: "
                'set scale_dtype="bfloat16" or "float32".'
            )
        self.qweight.copy_(pack(codes, self.bits))
        self.sketch.data.copy_(tables)
        if bias is not None:
            self.bias.data.copy_(bias)

    def entries(self) -> Tensor:
        """int32 [out, in]: where in the flat tables each weight stands."""
        tables = torch.arange(self.out_features * self.parts, dtype=torch.int32, device=self.qweight.device)
        codes = self.codes.view(-1, self.group_size).int()
        return codes.add_(tables[:, None] << self.bits).view(self.out_features, self.in_features)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            table = self.sketch.to(dtype).flatten()
            return table.index_select(0, self.entries().flatten()).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        trained = (x, self.sketch, self.bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
            return LookedUpLinear.apply(x, self.sketch, self.bias, self)
        return F.linear(x, self.dequantized(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def kept_types(self) -> tuple[str, ...]:
        return ("sketch",)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, bits={self.bits}, parts={self.parts}"


class LookedUpLinear(torch.autograd.Function):
    """y = x W'^T + bias with W' from the tables, which keeps x and no weight.

    With G = dL/dW' = (dL/dy)^T x the gradient of a table's entry is the sum of G over the weights that use it; that of
    an entry that no weight uses is 0.
    """

    @staticmethod
    def forward(ctx, x: Tensor, sketch: Tensor, bias: Tensor | None, layer: SketchLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x if sketch.requires_grad else x.new_empty(0), sketch)
        return F.linear(x, layer.dequantized(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        layer, (x, sketch) = ctx.layer, ctx.saved_tensors
        for_x = grad @ layer.dequantized(grad.dtype) if ctx.needs_input_grad[0] else None
        for_sketch = for_bias = None
        flat = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            of_weight = flat.mT @ x.flatten(0, -2)
            of_weight = of_weight.to(torch.promote_types(of_weight.dtype, torch.float32))
            for_sketch = torch.zeros(sketch.numel(), dtype=of_weight.dtype, device=sketch.device)
            for_sketch.index_add_(0, layer.entries().flatten(), of_weight.flatten())
            for_sketch = for_sketch.view(sketch.shape).to(sketch.dtype)
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0).to(layer.bias.dtype)
        return for_x, for_sketch, for_bias, None


def parts_misfit(in_features: int, bits: int, parts: int) -> str:
    """Why a row cannot be cut so; empty when it can."""
    if in_features % parts:
        return f"groups_per_row is {parts} but must divide the {in_features} inputs of the layer."
    return misfit(in_features, bits, in_features // parts)
