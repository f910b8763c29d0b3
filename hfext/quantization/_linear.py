"""`QuantLinear`: a linear layer whose weight is held as packed codes on an affine grid, w = s q + z.

Tensors: `qweight` uint8 [out, in bits / 8], `scales` and `zeros` [out, in / group_size], `bias` [out]. The scales and
offsets keep the type in which they are stored through `model.to(dtype)`, so that saving loses nothing; weights are
made in fp32 and cast to the type of the input.

It is an `nn.Linear` to PEFT and to whoever looks for such layers. `weight` is made when it is read and cannot be
written: an adapter that is merged into it would be lost without a word, so that is refused.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._packing import dequantize_packed_minmax, pack, packed_length, unpack
from . import _cpu_kernels
from ._affine import Quantized, away_from_zero


class QuantLinear(nn.Linear):
    """A quantised linear layer, empty until `store` or a checkpoint fills it.

    Args:
        in_features, out_features (`int`): As of `nn.Linear`.
        bits (`int`): Bits of a code: 2, 3, 4 or 8.
        group_size (`int`): Consecutive inputs that share a scale and an offset; -1 for all of them.
        bias (`bool`): Whether there is a bias.
        dtype (`torch.dtype`): Type of the model; that of the bias and of `weight`.
        scale_dtype (`torch.dtype`): Type of `scales` and `zeros`.
        device (`torch.device` or `str`, *optional*): Where the tensors are made.

    Raises:
        ValueError: The group size does not divide the inputs, or codes of a row do not fill whole bytes.
    """

    packed = _cpu_kernels.Packed("dequantize")  # of subclasses that make their tensors themselves

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)
        problem = misfit(in_features, bits, group_size)
        if problem:
            raise ValueError(problem)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size = in_features if group_size == -1 else group_size
        self.compute_dtype = dtype
        self.packed = _cpu_kernels.Packed()
        groups = in_features // self.group_size
        width = packed_length(in_features, bits)
        self.register_buffer("qweight", torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        for name in ("scales", "zeros"):
            made = torch.zeros(out_features, groups, dtype=scale_dtype, device=device)
            setattr(self, name, nn.Parameter(made, requires_grad=False))
        made = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", made if bias else None)

    @classmethod
    def like(cls, linear: nn.Linear, bits: int, group_size: int, scale_dtype: torch.dtype) -> "QuantLinear":
        """An empty layer of the sizes, type and device of `linear`."""
        weight = linear.weight
        sizes = (linear.in_features, linear.out_features, bits, group_size, linear.bias is not None)
        return cls(*sizes, dtype=weight.dtype, scale_dtype=scale_dtype, device=weight.device)

    def store(self, quantized: Quantized, bias: Tensor | None = None) -> None:
        """Hold codes [out, in] and the grid [out, groups]; `bias` [out] replaces that of the layer."""
        scales, zeros = quantized.scales.to(self.scales.dtype), quantized.zeros.to(self.zeros.dtype)
        if not (scales.isfinite().all() and zeros.isfinite().all()):
            raise ValueError(
                f"A scale or an offset is too large for {str(self.scales.dtype).removeprefix('torch.')}: "
                'set scale_dtype="bfloat16" or "float32".'
            )
        self.packed.drop()
        exact = away_from_zero(quantized.scales)
        moved = ((scales - quantized.scales) * (2**self.bits - 1)).abs() + (zeros - quantized.zeros).abs()
        if (moved / exact.abs()).median() > 0.5:
            raise ValueError(
                f"The weights are too small for a grid in {str(self.scales.dtype).removeprefix('torch.')}: set "
                'scale_dtype="float32".'
            )
        self.qweight.copy_(pack(quantized.codes, self.bits))
        self.scales.data.copy_(scales)
        self.zeros.data.copy_(zeros)
        if bias is not None:
            self.bias.data.copy_(bias)

    @property
    def codes(self) -> Tensor:
        """uint8 [out, in]."""
        return unpack(self.qweight, self.bits, self.in_features)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """s q + z [out, in] in `dtype`; no gradient."""
        with torch.no_grad():
            grid = self.scales.float(), self.zeros.float()
            sizes = (self.bits, self.group_size, self.in_features)
            return dequantize_packed_minmax(self.qweight, *grid, *sizes, dtype=dtype)

    def effective(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the layer multiplies by, with all that is added to s q + z."""
        return self.dequantized(dtype)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] that the layer stands for, made anew each time; it cannot be written."""
        return self.effective(self.compute_dtype).as_subclass(ReadOnlyWeight)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # PEFT gives a layer its own weight back when it takes an adapter off.
        if not (isinstance(value, ReadOnlyWeight) and torch.equal(value, self.weight)):
            raise NotImplementedError(MERGING)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise NotImplementedError(MERGING)
        super().register_parameter(name, param)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias
        if torch.is_grad_enabled():
            trained = (x, self.scales, self.zeros, bias)
            if any(t is not None and t.requires_grad for t in trained):
                self.packed.drop()  # the grid may be about to change
                return AffineLinear.apply(*trained, self)
        bias = None if bias is None else bias.to(x.dtype)
        if type(self).dequantized is not QuantLinear.dequantized:  # other weights than s q + z
            return F.linear(x, self.dequantized(x.dtype), bias)
        return _cpu_kernels.linear(self, x, bias)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain layer with the same weights, in `dtype` or the model's type."""
        dtype = dtype or self.compute_dtype
        sizes = (self.in_features, self.out_features, self.bias is not None)
        made = nn.Linear(*sizes, dtype=dtype, device="meta")
        made.weight = nn.Parameter(self.effective(dtype))
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return made.train(self.training)

    def reset_parameters(self) -> None:
        """Nothing: codes come from a method or a checkpoint."""

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, bits={self.bits}, group_size={self.group_size}"

    def _apply(self, fn, recurse=True):
        stored = {name: self._parameters[name].data for name in self.kept_types()}
        self.packed.drop()
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.qweight.device)).dtype
        super()._apply(fn, recurse)
        for name, old in stored.items():
            parameter = self._parameters[name]
            if parameter.dtype != old.dtype:  # a change of the model's type is not one of the stored type
                parameter.data = old.to(parameter.device)
        return self

    def kept_types(self) -> tuple[str, ...]:
        """Parameters that keep their type when the model's type is changed."""
        return ("scales", "zeros")


class AffineLinear(torch.autograd.Function):
    """y = x W^T + bias with W = s q + z, whose backward makes W again instead of keeping it.

    With G = dL/dW = (dL/dy)^T x, summed over the columns of each group: dL/ds = sum G q, dL/dz = sum G.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x if scales.requires_grad or zeros.requires_grad else x.new_empty(0), scales, zeros)
        return F.linear(x, layer.dequantized(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        layer, (x, scales, zeros) = ctx.layer, ctx.saved_tensors
        for_x = grad @ layer.dequantized(grad.dtype) if ctx.needs_input_grad[0] else None
        for_scales = for_zeros = for_bias = None
        flat = grad.flatten(0, -2)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight = (flat.mT @ x.flatten(0, -2)).float().unflatten(-1, (scales.shape[-1], layer.group_size))
            for_scales = (of_weight * layer.codes.view(of_weight.shape)).sum(-1).to(scales.dtype)
            for_zeros = of_weight.sum(-1).to(zeros.dtype)
        if ctx.needs_input_grad[3]:
            for_bias = flat.sum(0).to(layer.bias.dtype)
        return for_x, for_scales, for_zeros, for_bias, None


MERGING = (
    "The weight of a quantised layer cannot be written, so an adapter cannot be merged into it. Keep the adapter "
    "beside the model, or call hfext.quantization.dequantize(model) first and merge then."
)
AUGMENTED = ("__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul",
                                                          "and", "or", "xor", "lshift", "rshift", "pow")))  # fmt: skip


class ReadOnlyWeight(Tensor):
    """The weight of a quantised layer as others read it: it and its views refuse to be written, as that would be lost;
    every other result is a plain tensor."""

    _is_hf_initialized = True  # transformers is not to fill it with random numbers

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = function.__name__
        in_place = name in AUGMENTED or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        if in_place and args and isinstance(args[0], cls):
            raise NotImplementedError(MERGING)
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            if type(result) is Tensor and args and isinstance(args[0], cls) and not result.is_meta:
                whole = args[0].untyped_storage().data_ptr()
                return result.as_subclass(cls) if result.untyped_storage().data_ptr() == whole else result
        return result

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise NotImplementedError(MERGING)


def misfit(in_features: int, bits: int, group_size: int) -> str:
    """Why a layer with so many inputs cannot be quantised so; empty when it can."""
    if group_size != -1 and in_features % group_size:
        return f"group_size is {group_size} but must divide the {in_features} inputs of the layer."
    if in_features * bits % (24 if bits == 3 else 8):
        return f"{in_features} inputs of {bits} bits do not fill whole bytes."
    return ""
