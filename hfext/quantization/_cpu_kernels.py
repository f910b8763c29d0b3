"""How a quantised layer multiplies when no gradient is needed.

- On a GPU: the Triton kernels of hfext_lowbit, which read packed codes, where they can be imported.
- On a CPU, a few tokens in bfloat16: torch's kernel for 4-bit weights, which reads half a byte a weight. It computes

      y = x W^T,   W = s' (q - m) + z',   m = 2^(b-1),   s' = bf16(s),   z' = bf16(z + m s)

  so with u = 2^-8, the rounding of bfloat16, and y of exact arithmetic each output is within

      u sum_k |x_k| (|s (q_k - m)| + |z + m s|) + u |y|

  of it, and a bias adds one rounding. Fewer bits go through the same kernel, whose 16 codes are centred at 8: codes
  are raised by 8 - m. Codes of 8 bits on one grid a row with z = -128 s have a kernel of their own.
- Else the weights are made in pieces that stay in the cache and multiplied. Where the processor cannot multiply
  bfloat16 this is done in fp32, three to six times faster and closer to exact arithmetic.

torch's kernels need the codes in an order of their own: a copy that is made when it is first used. It is no part of
the state dict, of pickles or of copies. It is thrown away when the layer is moved, filled or run with gradients, and
made again when a tensor of the layer was replaced or changed in place; what is written through `.data` is not noticed.
Measured on AVX2 cores, the kernel is faster up to some 32 tokens.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from .._fields import one_of
from .._packing import dequantize_packed_minmax
from ..compat import cpu_kernels, cpu_multiplies_bf16

if TYPE_CHECKING:
    from ._linear import QuantLinear

logger = logging.get_logger(__name__)

KERNELS = ("auto", "dequantize", "int4")
FEW_TOKENS = 24
PIECE = 1 << 20  # weights, 4 MB in fp32


class Packed:
    """The kernel that is asked for and the packed copy of one layer; copies and pickles keep the first alone."""

    def __init__(self, kernel: str = "auto"):
        self.kernel = kernel
        self.made: tuple | None = None

    def drop(self) -> None:
        self.made = None

    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(t.nbytes for t in self.made[3] if isinstance(t, Tensor)) if self.made else 0

    def __reduce__(self):
        return Packed, (self.kernel,)


def set_kernel(model: nn.Module, kernel: Literal["auto", "dequantize", "int4"] = "auto") -> int:
    """
    Choose how quantised layers multiply, in place. It is not saved. On a GPU "dequantize" turns the kernels off, and
    the other two are alike.

    Args:
        model (`nn.Module`): A model with layers that hfext has quantised.
        kernel (`str`, *optional*, defaults to "auto"):
            - "auto": inputs of up to 24 tokens in bfloat16 go through torch's kernel, in layers of 4 bits and in those
              of 8 bits with `group_size=-1, symmetric=True`. The packed copy doubles the memory of these layers.
            - "int4": layers of 2 and 3 bits do so too; with their copy, which has 4 bits a weight, they take about
              three times their memory.
            - "dequantize": no packed copies; weights are made anew for every input.

    Returns:
        `int`: How many layers have a kernel of their own. Outputs must be a multiple of 16, and groups 32, 64, 128 or
        256 inputs.

    Raises:
        ValueError: An unknown kernel, a model without quantised layers, or "int4" where no layer fits.
    """
    one_of("kernel", kernel, KERNELS)
    layers = [layer for layer in model.modules() if isinstance(vars(layer).get("packed"), Packed)]
    if not layers:
        raise ValueError("The model has no layers that hfext has quantised on an affine grid.")
    count = 0 if kernel == "dequantize" else sum(fits(layer, kernel) for layer in layers)
    if kernel == "int4" and not count:
        raise ValueError(
            "kernel='int4' fits no layer: outputs must be a multiple of 16 and groups 32, 64, 128 or 256 inputs."
        )
    if kernel == "int4" and all(layer.compute_dtype != torch.bfloat16 for layer in layers):
        logger.warning("The int4 kernel takes inputs in bfloat16 alone: call model.to(torch.bfloat16).")
    for layer in layers:
        layer.packed = Packed(kernel)
    return count


def linear(layer: "QuantLinear", x: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias [..., out] without a gradient, for `x` [..., in] and `bias` of its type."""
    # Triton's interpreter runs the same kernels on the CPU.
    on_gpu = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if on_gpu and layer.packed.kernel != "dequantize" and x.dtype != torch.float64 and has_lowbit():
        from hfext_lowbit import quantized_linear

        return quantized_linear(x, layer.qweight, layer.scales, layer.zeros, layer.bits, layer.group_size, bias)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, layer.dequantized(x.dtype), bias)
    packed = packed_copy(layer, x)
    if packed is not None:
        multiply, weights = packed
        y = multiply(x.reshape(-1, layer.in_features).contiguous(), *weights).view(*x.shape[:-1], layer.out_features)
        return y if bias is None else y.add_(bias)
    if x.dtype == torch.bfloat16 and not (cpu_multiplies_bf16() or torch.is_autocast_enabled("cpu")):
        return in_pieces(layer, x.float(), None if bias is None else bias.float()).to(x.dtype)
    return in_pieces(layer, x, bias)


@torch.compiler.assume_constant_result
def has_lowbit() -> bool:
    """Whether the kernels for packed weights can be imported, tried once."""
    return _has_lowbit()


@lru_cache(maxsize=1)
def _has_lowbit() -> bool:
    try:
        import hfext_lowbit  # noqa: F401
        import triton  # noqa: F401
    except ImportError as error:
        logger.warning(f"Quantised weights are dequantised for every input, as their kernels are missing: {error}.")
        return False
    return True


def in_pieces(layer: "QuantLinear", x: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias with some rows of W in memory at a time."""
    step = max(1, PIECE // layer.in_features)
    if step >= layer.out_features:
        return F.linear(x, layer.dequantized(x.dtype), bias)
    sizes = (layer.bits, layer.group_size, layer.in_features)
    pieces = []
    for i in range(0, layer.out_features, step):
        grid = layer.scales[i : i + step].float(), layer.zeros[i : i + step].float()
        weight = dequantize_packed_minmax(layer.qweight[i : i + step], *grid, *sizes, dtype=x.dtype)
        pieces.append(F.linear(x, weight, None if bias is None else bias[i : i + step]))
    return torch.cat(pieces, -1)


def fits(layer: "QuantLinear", kernel: str) -> bool:
    """Whether torch has a kernel for the codes and sizes of a layer."""
    if layer.bits == 8:
        whole = layer.group_size == layer.in_features
        return whole and not layer.qweight.is_meta and torch.equal(layer.zeros, -128 * layer.scales)
    grouped = layer.group_size in (32, 64, 128, 256) and layer.out_features % 16 == 0
    return grouped and (layer.bits == 4 or kernel == "int4")


def packed_copy(layer: "QuantLinear", x: Tensor) -> tuple[Callable, tuple] | None:
    """The kernel and what it takes beside the input, made or made again when that is not from the layer's tensors;
    None when the input is not for a kernel."""
    held = layer.packed
    if held.kernel == "dequantize" or x.dtype != torch.bfloat16 or not 0 < x.numel() // x.shape[-1] <= FEW_TOKENS:
        return None
    # Not as attributes: a look-up through nn.Module takes a tenth of the kernel's time in a small layer.
    source = (layer._buffers["qweight"], layer._parameters["scales"], layer._parameters["zeros"])
    made = held.made  # read once: another thread may put a new one
    if made is None or made[0] != [t.data_ptr() for t in source] or made[1] != [t._version for t in source]:
        # Changes of tensors that were made in inference mode cannot be noticed.
        ready = not any(t.is_inference() for t in source) and works()
        made = held.made = pack_layer(layer, source) if ready and fits(layer, held.kernel) else None
    return None if made is None else made[2:4]


def pack_layer(layer: "QuantLinear", source: tuple[Tensor, ...]) -> tuple:
    """Addresses and versions of the source tensors, the kernel, what it takes beside the input, and the tensors
    themselves, so that nothing else gets their addresses."""
    with torch.inference_mode(False), torch.no_grad():
        state = [t.data_ptr() for t in source], [t._version for t in source]
        _, by_4, by_8 = cpu_kernels()
        if layer.bits == 8:
            multiply, weights = by_8, ((layer.codes ^ 128).view(torch.int8), layer.scales[:, 0].bfloat16())
        else:
            weight, grid = pack_int4(layer.codes, layer.scales, layer.zeros, layer.bits)
            multiply, weights = by_4, (weight, layer.group_size, grid)
        return *state, multiply, weights, tuple(t.detach() for t in source)


def pack_int4(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of 2 to 4 bits uint8 [out, in] and a grid [out, groups] as the kernel reads them: the grid is bf16
    [groups, out, 2] with s and z + m s."""
    middle = 2 ** (bits - 1)
    scales, zeros = scales.float(), zeros.float()
    grid = torch.stack((scales, zeros + middle * scales), -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    return cpu_kernels()[0](codes.int().add_(8 - middle).contiguous(), 1), grid


@lru_cache(maxsize=1)
def works() -> bool:
    """Whether this build of torch has the kernels and they compute what they should, tried once."""
    problem = ""
    with torch.inference_mode(False), torch.no_grad():
        codes = (torch.arange(16 * 32) * 7 % 16).view(16, 32).to(torch.uint8)
        scales, zeros = torch.full((16, 1), 0.5), torch.full((16, 1), -3.0)
        x = torch.eye(32, dtype=torch.bfloat16)[:4]
        try:
            weight, grid = pack_int4(codes, scales, zeros, bits=4)
            by_4 = cpu_kernels()[1](x, weight, 32, grid)
            by_8 = cpu_kernels()[2](x, (codes ^ 128).view(torch.int8), scales[:, 0].bfloat16())
            wanted = torch.stack((0.5 * codes - 3, 0.5 * codes - 64))[..., :4].mT
            if not torch.equal(torch.stack((by_4, by_8)).float(), wanted):
                problem = "they compute something else"
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            problem = str(error)
    if problem:
        logger.warning(f"torch's kernels for packed weights on the CPU are not used: {problem}.")
    return not problem
