"""z-loss: holds the output logits near log probabilities by a penalty on the logarithm of their normaliser.

    loss + coefficient * mean over scored tokens of (log Z)^2,   Z = sum_j e^{z_j}
    gradient at z_j:  2 * coefficient * log Z * softmax(z)_j / tokens

A softmax does not see a constant added to all logits, so log Z is free to drift, and in low precision the drift ends
in divergence. The penalty is taken over the same tokens as the loss and scaled as the Trainer scales its loss: with
accumulation, and over processes, it is the mean over all tokens of the update. In float32, chunk by chunk.

Small-scale proxies for large-scale Transformer training instabilities, arXiv 2309.14322, where it is the remedy for
output logit divergence; it comes from PaLM, arXiv 2204.02311. Coefficient 1e-4 in both.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import Trainer

from .._fields import coerce
from ..optim._objective import mean_over_update
from ..registry import Method, Result
from ._trajectory import CHUNK, check, logits_of, rows_with_label


@dataclass(frozen=True, kw_only=True)
class ZLossConfig:
    """Options of [`ZLossMixin`].

    Args:
        coefficient: Weight of the penalty, >= 0. At 0 training is plain, bit for bit.
    """

    coefficient: float = 1e-4

    def __post_init__(self):
        coerce("ZLossConfig: coefficient", float, self.coefficient)
        check(self, "coefficient", self.coefficient >= 0 and math.isfinite(self.coefficient), "finite and >= 0")


class _LogZ(torch.autograd.Function):
    """log Z [rows] of logits [rows, vocab] where `mask` [rows], else 0; masked rows are never read."""

    @staticmethod
    def forward(ctx, logits, mask, chunk):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_z = logits.new_zeros(mask.shape, dtype=dtype)
        for where in mask.nonzero()[:, 0].split(chunk):
            log_z[where] = logits[where].to(dtype).logsumexp(-1)
        ctx.save_for_backward(logits, mask, log_z)
        ctx.chunk = chunk
        return log_z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        logits, mask, log_z = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        for where in mask.nonzero()[:, 0].split(ctx.chunk):
            q = (logits[where].to(log_z.dtype) - log_z[where, None]).exp_()
            grad[where] = q.mul_(grad_rows[where, None]).to(logits.dtype)
        return grad, None, None


def log_z(logits: Tensor, mask: Tensor, chunk: int = CHUNK) -> Tensor:
    """log sum_j e^{z_j} [...] of logits [..., vocab] where `mask` [...], else 0, `chunk` rows at a time."""
    return _LogZ.apply(logits.reshape(-1, logits.shape[-1]), mask.reshape(-1), chunk).view(mask.shape)


def z_loss(
    logits: Tensor,
    labels: Tensor,
    coefficient: float = 1e-4,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """coefficient * mean (log Z)^2 over the tokens whose label is not `ignore_index`, or their sum / num_items.

    Logits [..., vocab]; labels [...] lie where they are predicted (a causal model's are shifted before).
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} must have the shape of logits {tuple(logits.shape)} less one.")
    mask = labels.to(logits.device) != ignore_index
    total = log_z(logits, mask).square().sum()
    return coefficient * total / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class ZLossMixin:
    """For any Trainer of a model with logits: `class T(ZLossMixin, Trainer)`, then `T(..., z_loss=ZLossConfig())`.

    The penalty is added to whatever the Trainer's loss is (label smoothing, an auxiliary loss, `compute_loss_func`)
    while training; evaluation reports the plain loss. `Trainer.log` gets `z_loss` beside `loss`: the penalty, a mean
    over the tokens of this process. Works with PEFT, DDP and two-pass optimizers.

    Args:
        z_loss (`ZLossConfig`, *optional*): Options.
    """

    def __init__(self, *args, z_loss: ZLossConfig | None = None, **kwargs):
        self.z_loss = ZLossConfig() if z_loss is None else z_loss
        if not isinstance(self.z_loss, ZLossConfig):
            raise TypeError(f"z_loss is a {type(z_loss).__name__} but must be a ZLossConfig.")
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise NotImplementedError(
                "z-loss does not run with DataParallel: start one process per device (torchrun)."
            )
        self._hfext_z_loss = (0.0, 0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        if not model.training or self.z_loss.coefficient == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        # `compute_loss` may take labels out of the batch.
        labels = {name: inputs[name] for name in ("labels", "shift_labels") if inputs.get(name) is not None}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch, **kwargs)
        logits = logits_of(self, outputs, "z-loss")
        mask = rows_with_label(self, labels, logits, "z-loss").to(logits.device)
        squares = log_z(logits, mask).square()
        total, count = self._hfext_z_loss
        self._hfext_z_loss = total + squares.detach().sum(), count + mask.sum()
        loss = loss + self.z_loss.coefficient * mean_over_update(self, squares, mask, num_items_in_batch).to(loss)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            (total, count), self._hfext_z_loss = self._hfext_z_loss, (0.0, 0)
            logs |= {"z_loss": self.z_loss.coefficient * float(total / count)} if count else {}
        return super().log(logs, *args, **kwargs)


class ZLossTrainer(ZLossMixin, Trainer):
    """`Trainer` with z-loss: `ZLossTrainer(model, args, train_dataset=data, z_loss=ZLossConfig(coefficient=1e-4))`."""


METHOD = Method(
    name="z_loss",
    family="training",
    title="Small-scale proxies for large-scale Transformer training instabilities",
    authors="Wortsman et al.",
    arxiv="2309.14322",
    year=2023,
    status="faithful",
    target="hfext.training.z_loss:ZLossMixin",
    config=ZLossConfig,
    usage="hfext.training.ZLossTrainer(model, args, train_dataset=data)",
    summary="Holds output logits near log probabilities, by a penalty on (log Z)^2.",
    claim="z-loss holds log Z of the output logits near 0.",
    headline=Result(
        metric="range of learning rates without output logit divergence",
        setting="small decoder-only models on C4 (as recalled from the paper)",
        value="divergence at the highest learning rates removed",
    ),
    notes="The claim is the paper's. The only measurement here is in the recipe of `proxy_diagnostics` and shows no "
    "effect at 1e-4: at the highest learning rate |log Z| is 4.27 without and 4.20 with it, 4.13 and 4.11 in the "
    "larger model, where nothing drifts either way. First used in PaLM, arXiv 2204.02311.",
)
