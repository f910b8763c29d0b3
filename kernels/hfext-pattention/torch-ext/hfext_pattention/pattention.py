"""`pattention`: checks, the two custom operations, and their launches."""

from __future__ import annotations

from typing import Optional, Tuple  # noqa: UP035 (operations are declared by these annotations, on Python 3.9 too)

import torch
from torch import Tensor

from . import _reference
from ._launch import config, interpreted, launch, runs_kernel
from ._ops import add_op_namespace_prefix

MODES = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def pattention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    tau: Tensor | float | None = None,
    mode: str = "l2_norm_gelu",
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of x over learnable tokens, [..., d_out]; no scores are kept for the backward pass.

    The function of a row whose scores are all 0 is 0, and so is its gradient. Gradients of x, keys and values are
    deterministic and cannot be differentiated again; `tau` and `mask` have none.

    Args:
        x: [..., d_in], float32, float16, bfloat16, or float64 (always plain torch).
        keys: [tokens, d_in].
        values: [tokens, d_out].
        tau: A number; sqrt(tokens) when left out, or tokens for "softmax".
        mode: "l2_norm_gelu", gelu(A tau / ||A||); "gelu_l2_norm", gelu(A) tau / ||gelu(A)||; or "softmax",
            tau softmax(A).
        mask: bool, [tokens] or [..., tokens], True where a token counts. Scores of others are 0, or -inf for
            "softmax".
        dropout: Of the scores' function, in [0, 1).
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r} but must be one of {', '.join(MODES)}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout} but must be in [0, 1).")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, keys, values = x.to(dtype), keys.to(dtype), values.to(dtype)
    if x.dtype not in DTYPES or keys.dtype != x.dtype or values.dtype != x.dtype:
        raise TypeError(
            f"x, keys and values are {x.dtype}, {keys.dtype} and {values.dtype} but must have one dtype: float32, "
            "float16, bfloat16 or float64."
        )
    if keys.dim() != 2 or values.dim() != 2 or len(keys) != len(values) or not len(keys):
        raise ValueError(
            f"keys and values have shapes {tuple(keys.shape)} and {tuple(values.shape)} but must be [tokens, d_in] "
            "and [tokens, d_out] with at least one token."
        )
    if x.dim() < 1 or x.shape[-1] != keys.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} but its last size must be the {keys.shape[1]} of the keys.")
    n = len(keys)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(tau, Tensor):
        tau = tau.detach().to(x.device, kind).reshape(())
    else:
        tau = (n if mode == "softmax" else n**0.5) if tau is None else tau
        tau = torch.full((), tau, dtype=kind, device=x.device)
    rows = x.shape[:-1]
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask is {mask.dtype} but must be bool, True where a token counts.")
        try:
            mask = mask.expand(*rows, n).reshape(-1, n)
        except RuntimeError as error:
            raise ValueError(f"mask has shape {tuple(mask.shape)} but must fit {(*rows, n)}.") from error
    seed = torch.randint(1 << 31, (), device=x.device) if dropout else None
    out, _, _ = _forward(x.reshape(rows.numel(), x.shape[-1]), keys, values, tau, mask, seed, mode, float(dropout))
    return out.view(*rows, values.shape[1])


@torch.library.custom_op(add_op_namespace_prefix("forward"), mutates_args=())
def _forward(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    tau: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    seed: Optional[Tensor],  # noqa: UP045
    mode: str,
    dropout: float,
) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
    x, keys, values = x.contiguous(), keys.contiguous(), values.contiguous()
    if not _runs(x):
        return _reference.forward(x, keys, values, tau, mode, mask, seed, dropout)
    run = _Run(x, keys, values, tau, mask, seed, mode, dropout)
    offset, factor = run.statistics()
    return run.by_rows(offset, factor, None, None), offset, factor


@_forward.register_fake
def _(x, keys, values, tau, mask, seed, mode, dropout):
    row = tau.new_empty(x.shape[0])
    return x.new_empty(x.shape[0], values.shape[1]), row, torch.empty_like(row)


@torch.library.custom_op(add_op_namespace_prefix("backward"), mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    tau: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    seed: Optional[Tensor],  # noqa: UP045
    mode: str,
    dropout: float,
    offset: Tensor,
    factor: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
    grad, x, keys, values = (t.contiguous() for t in (grad, x, keys, values))
    if not _runs(x):
        return _reference.backward(grad, x, keys, values, tau, mode, mask, seed, dropout, offset, factor)
    run = _Run(x, keys, values, tau, mask, seed, mode, dropout)
    inner = run.inner(grad, offset, factor)
    return (
        run.by_rows(offset, factor, grad, inner),
        run.by_tokens(offset, factor, grad, inner, keys=True),
        run.by_tokens(offset, factor, grad, inner, keys=False),
    )


@_backward.register_fake
def _(grad, x, keys, values, tau, mask, seed, mode, dropout, offset, factor):
    return tuple(t.new_empty(t.shape) for t in (x, keys, values))


def _setup(ctx, inputs, output):
    x, keys, values, tau, mask, seed, ctx.mode, ctx.dropout = inputs
    ctx.save_for_backward(x, keys, values, tau, mask, seed, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _differentiate(ctx, grad, _offset, _factor):
    x, keys, values, tau, mask, seed, offset, factor = ctx.saved_tensors
    found = _backward(grad, x, keys, values, tau, mask, seed, ctx.mode, ctx.dropout, offset, factor)
    return (*found, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup)


def _runs(x: Tensor) -> bool:
    return runs_kernel(x) and x.dtype != torch.float64 and x.numel() > 0


class _Run:
    """The launches of one pass, with what they share."""

    def __init__(self, x, keys, values, tau, mask, seed, mode, dropout):
        self.x, self.keys, self.values, self.tau, self.mode = x, keys, values, tau, mode
        self.rows, self.tokens = len(x), len(keys)
        self.tail = (self.rows, self.tokens, x.shape[1], values.shape[1], dropout)
        self.mask = x if mask is None else mask.contiguous().view(torch.uint8)
        self.seed = tau if seed is None else seed
        self.constants = {
            "MODE": MODES.index(mode),
            "MASKED": mask is not None,
            "DROPOUT": dropout > 0,
            "UPCAST": interpreted() or x.dtype == torch.float32,
        }

    def _config(self, op: str) -> dict:
        return config(op, self.x, dtype=str(self.x.dtype).replace("torch.", ""), rows=self.rows, tokens=self.tokens)

    def statistics(self) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        """Offset and factor of each row."""
        parts, tops = self._partial(None, None, None)
        zero = torch.zeros(self.rows, dtype=torch.float32, device=self.x.device)
        if self.mode == "softmax":
            top = tops.amax(0)
            offset = torch.where(top.isinf(), zero, top)
            scale = torch.where(tops.isinf(), zero, torch.exp(tops - offset))
            size = (parts.double() * scale).sum(0)
            return offset, torch.where(size > 0, self.tau.double() / size, 0.0).float()
        size = parts.sum(0, dtype=torch.float64).sqrt()
        return zero, torch.where(size > _reference.EPS, self.tau.double() / size, 0.0).float()

    def inner(self, grad, offset, factor) -> Tensor:
        """<S, dS> of each row over tau^2, or over tau for "softmax"."""
        parts, _ = self._partial(grad, offset, factor)
        total, tau = parts.sum(0, dtype=torch.float64), self.tau.double()
        return (total / (tau if self.mode == "softmax" else tau * tau)).float()

    def _partial(self, grad, offset, factor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        import triton

        from ._kernels import pattention_statistics_kernel

        cfg = self._config("statistics" if grad is None else "statistics_backward")
        tiles = triton.cdiv(self.tokens, cfg["BLOCK_N"])
        parts = torch.empty(tiles, self.rows, dtype=torch.float32, device=self.x.device)
        tops = torch.empty_like(parts) if self.mode == "softmax" and grad is None else parts
        launch(
            pattention_statistics_kernel,
            (triton.cdiv(self.rows, cfg["BLOCK_M"]), tiles),
            *self._tensors(grad),
            parts if offset is None else offset,
            parts if factor is None else factor,
            parts,
            tops,
            *self.tail,
            BACKWARD=grad is not None,
            **self.constants,
            **cfg,
        )
        return parts, tops

    def by_rows(self, offset, factor, grad, inner) -> Tensor:
        """O, or the gradient of x."""
        import triton

        from ._kernels import pattention_rows_kernel

        cfg = self._config("rows" if grad is None else "rows_backward")
        width = (self.values if grad is None else self.x).shape[1]
        out = torch.empty(self.rows, width, dtype=self.x.dtype, device=self.x.device)
        launch(
            pattention_rows_kernel,
            (triton.cdiv(self.rows, cfg["BLOCK_M"]), triton.cdiv(width, cfg["BLOCK_O"])),
            *self._tensors(grad),
            offset,
            factor,
            factor if inner is None else inner,
            out,
            *self.tail,
            BACKWARD=grad is not None,
            **self.constants,
            **cfg,
        )
        return out

    def by_tokens(self, offset, factor, grad, inner, keys: bool) -> Tensor:
        """The gradient of keys or values."""
        import triton

        from ._kernels import pattention_tokens_kernel

        cfg = self._config("tokens")
        out = torch.empty_like(self.keys if keys else self.values)
        launch(
            pattention_tokens_kernel,
            (triton.cdiv(self.tokens, cfg["BLOCK_N"]), triton.cdiv(out.shape[1], cfg["BLOCK_O"])),
            *self._tensors(grad),
            offset,
            factor,
            inner,
            out,
            *self.tail,
            KEYS=keys,
            **self.constants,
            **cfg,
        )
        return out

    def _tensors(self, grad):
        return self.x, self.keys, self.values, self.x if grad is None else grad, self.mask, self.seed
