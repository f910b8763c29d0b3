"""Training as if the matrix products had fewer exponent and mantissa bits: how near is a run to instability?

Before every product of a linear layer, forward (x, w) and backward (g with w, g with x), both operands are rounded to
the format E_xM_y; sums, biases, norms, attention products, the optimizer and what is stored stay as they are.

    value = +-m 2^e,  m = 1.f with y bits of f,  1 - B <= e <= B,  B = 2^(x-1) - 1

`rne` rounds the mantissa to nearest, ties to even; `trunc` cuts it. Larger magnitudes become the largest finite value
(2 - 2^-y) 2^B, those below 2^(1-B) become 0 (no subnormals). Infinities and NaN stay. At x = 8, the exponent of
bfloat16 and float32, exponents are left alone and subnormals are kept, so that E8M7 changes no bfloat16 tensor.

To FP8 and Back Again: Quantifying Reduced Precision Effects on LLM Training Stability, arXiv 2405.18710. The
rules for exponents are those of the summaries we had. See [`LogitSharpnessCallback`] for the paper's measure.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..registry import Method, Result

logger = logging.get_logger(__name__)

# Bits of the stored mantissa, the integer of the same width, and the exponent of infinity and NaN.
LAYOUT = {torch.bfloat16: (7, torch.int16, 0x7F80), torch.float32: (23, torch.int32, 0x7F800000)}


def check_format(exp_bits: int, man_bits: int, mode: str) -> None:
    """`ValueError` for a format that is not one."""
    for name, value, low, high in (("exp_bits", exp_bits, 2, 8), ("man_bits", man_bits, 0, 23)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r} but must be an integer in [{low}, {high}].")
    if mode not in ("rne", "trunc"):
        raise ValueError(f"mode is {mode!r} but must be one of rne, trunc.")


def quantize_to_format(x: Tensor, exp_bits: int, man_bits: int, mode: Literal["rne", "trunc"] = "rne") -> Tensor:
    """`x` [...], bfloat16 or float32, with each value as E_xM_y has it, in the type of `x`; a new tensor.

    More mantissa bits than the type has change nothing. The relative error of a value in range is at most 2^-(y+1)
    (`rne`) or below 2^-y (`trunc`).
    """
    check_format(exp_bits, man_bits, mode)
    if x.dtype not in LAYOUT:
        raise TypeError(f"x is {x.dtype} but must be torch.bfloat16 or torch.float32, which have 8 exponent bits.")
    stored, integer, infinity = LAYOUT[x.dtype]
    x, bits, cut = x.detach(), x.detach().view(integer), stored - man_bits
    rounded = x.clone()
    if cut > 0:
        # The integer order of the bits is that of the magnitudes: a carry out of the mantissa raises the exponent.
        new = rounded.view(integer)
        if mode == "rne":
            new += ((bits >> cut) & 1).add_((1 << (cut - 1)) - 1)
        new &= -(1 << cut)
    bias = 2 ** (exp_bits - 1) - 1
    largest = (2 - 2.0 ** -min(man_bits, stored)) * 2.0**bias
    rounded.clamp_(-largest, largest)
    if exp_bits < 8:
        rounded *= rounded.abs() >= 2.0 ** (1 - bias)  # keeps the sign of what becomes 0
    return torch.where((bits & infinity) == infinity, x, rounded)


class ReducedLinear(torch.autograd.Function):
    """x [..., in] w^T [in, out] + b, with the operands of this product and of its two gradients in E_xM_y.

    Saves x and w as they are and rounds them again in the backward pass, so no memory is added.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, form):
        ctx.save_for_backward(x, weight)
        ctx.form = form
        return F.linear(quantize_to_format(x, *form), quantize_to_format(weight, *form), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g = quantize_to_format(grad, *ctx.form)
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ quantize_to_format(weight, *ctx.form)
        if ctx.needs_input_grad[1]:
            grad_w = g.flatten(0, -2).T @ quantize_to_format(x, *ctx.form).flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_b = grad.flatten(0, -2).sum(0)
        return grad_x, grad_w, grad_b, None


def reduced_linear(x: Tensor, weight: Tensor, bias: Tensor | None, form: tuple[int, int, str]) -> Tensor:
    """[`ReducedLinear`] in the type of autocast where that is on, as `F.linear`."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    # One row needs no special case when it is a matrix.
    y = ReducedLinear.apply(x[None] if x.dim() == 1 else x, weight, bias, form)
    return y[0] if x.dim() == 1 else y


class _ReducedLinearLayer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return reduced_linear(x, self.weight, self.bias, self._hfext_format)


class _ReducedConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return reduced_linear(x, self.weight.T, self.bias, self._hfext_format)


REDUCED = {nn.Linear: _ReducedLinearLayer, Conv1D: _ReducedConv1D}


class PrecisionEmulator:
    """Gives the linear layers of a model E_xM_y products until it is left: `with PrecisionEmulator(model, 8, 3):
    trainer.train()`.

    It works at once, as a handle with `remove()`, and as a context manager. Layers are of type `nn.Linear` or GPT-2's
    `Conv1D` exactly; their parameters, names and `state_dict` stay, so optimizers, checkpoints and PEFT see nothing.
    Embeddings are left out, and the output head of language models. An emulated layer that is copied or pickled stays
    emulated.

    Args:
        model (`nn.Module`): Changed in place; parameters in bfloat16 or float32 (autocast to bfloat16 works).
        exp_bits (`int`): Exponent bits x, 2 to 8.
        man_bits (`int`): Mantissa bits y, 0 to 23; 7 is bfloat16.
        mode (`str`, *optional*, defaults to `"rne"`): `rne` or `trunc`.
        exclude (`Iterable[str]`, *optional*): Names of further layers, or their last parts, such as `down_proj`.
        include_head (`bool`, *optional*, defaults to `False`): Reduce the output head too.

    Raises:
        `ValueError`: A format out of range, a name in `exclude` that no layer has, no layer to change, or a model that
            is emulated already.
    """

    def __init__(
        self,
        model: nn.Module,
        exp_bits: int,
        man_bits: int,
        mode: Literal["rne", "trunc"] = "rne",
        exclude: Iterable[str] = (),
        include_head: bool = False,
    ):
        check_format(exp_bits, man_bits, mode)
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        heads = {id(m.get_output_embeddings()) for m in model.modules() if isinstance(m, PreTrainedModel)}
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        out = {e: {n for n in linear if n == e or n.endswith(f".{e}")} for e in exclude}
        unknown = [e for e, names in out.items() if not names]
        if unknown:
            raise ValueError(f"exclude has {unknown[0]!r}, which no linear layer of the model is called.")
        if any(type(m) in REDUCED.values() for m in linear.values()):
            raise ValueError("The model is emulated already: call remove() on the other PrecisionEmulator first.")
        left = set().union(*out.values()) | {n for n, m in linear.items() if id(m) in heads and not include_head}
        strange = [n for n, m in linear.items() if n not in left and type(m) not in REDUCED]
        self.layers = {n: m for n, m in linear.items() if n not in left and type(m) in REDUCED}
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no nn.Linear or Conv1D to emulate ({len(linear)} left out).")
        if strange:
            logger.warning(f"PrecisionEmulator leaves {len(strange)} layers of other types alone, as {strange[0]}.")
        for layer in self.layers.values():
            layer._hfext_format = (exp_bits, man_bits, mode)
            layer.__class__ = REDUCED[type(layer)]

    def remove(self) -> None:
        """Give the layers their own products back. A second call does nothing."""
        for layer in self.layers.values():
            layer.__class__ = type(layer).__bases__[0]
            del layer._hfext_format
        self.layers = {}

    def __enter__(self) -> "PrecisionEmulator":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()


METHOD = Method(
    name="reduced_precision",
    family="training",
    title="To FP8 and Back Again: Quantifying Reduced Precision Effects on LLM Training Stability",
    authors="Lee et al.",
    arxiv="2405.18710",
    year=2024,
    status="variant",
    difference="Only the products of linear layers are reduced, not those inside attention. Built from "
    "summaries: how exponents are cut (IEEE bias, saturating, no subnormals) and what counts as unstable are ours.",
    target="hfext.training.reduced_precision:PrecisionEmulator",
    usage="hfext.training.PrecisionEmulator(model, exp_bits=8, man_bits=3)",
    summary="Trains with the products of linear layers in E_xM_y and logs how sharp the loss is in the logits.",
    claim="Fewer mantissa bits narrow the range of learning rates that train, and E7 breaks training.",
    headline=Result(
        metric="runs that diverge",
        setting="nanoGPT and TinyLlama (summary)",
        value="mantissa cuts narrow the usable learning rates; E7 does not train",
        baseline="about 10 % of bfloat16 runs diverge in some settings",
    ),
    recipe="training/reduced_precision-llama-shakespeare.yaml",
    notes="It simulates: nothing is faster. `LogitSharpnessCallback(trainer, every=50)` logs the paper's sharpness.",
)
