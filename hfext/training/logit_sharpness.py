"""How sharp the loss is around the logits, and whether a run is unstable: the measures of reduced precision.

    phi = 100 (max_{|d_i| <= eps (|z_i| + 1)} CE(z + d, t) - CE(z, t)) / (1 + CE(z, t)),    mean over tokens

The cross-entropy falls in z_t and rises in every other logit, so the maximum is at one corner of the box and needs no
search: d_t = -eps (|z_t| + 1), d_j = +eps (|z_j| + 1). With q = softmax(z) the difference is

    eps (|z_t| + 1) + log(1 + sum_j q_j (e^{d_j} - 1)),

computed so in float32, without a difference of two large numbers. phi is not invariant to anything: adding a constant
to all logits leaves the loss and changes |z|. At eps = 0 it is 0.

To FP8 and Back Again: Quantifying Reduced Precision Effects on LLM Training Stability, arXiv 2405.18710. The
record of the paper stands in `reduced_precision.py`.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Trainer, TrainerCallback

from ..compat import loss_shifts_labels, replaced
from ._trajectory import CHUNK, logits_of


def sharpness_rows(logits: Tensor, labels: Tensor, eps: float = 5e-4) -> Tensor:
    """phi [rows] in float32 (float64 for float64), from logits [rows, vocab] and labels [rows]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = labels[:, None]
    step = logits.abs().add_(1).mul_(eps)
    down = step.gather(-1, own)
    log_q = torch.log_softmax(logits, -1)
    loss = -log_q.gather(-1, own)
    grown = (log_q.exp_() * step.scatter_(-1, own, -down).expm1_()).sum(-1, keepdim=True)
    return (100 * (down + grown.log1p()).clamp(min=0) / (1 + loss))[:, 0]


@torch.no_grad()
def logit_sharpness(
    logits: Tensor, labels: Tensor, eps: float = 5e-4, ignore_index: int = -100, chunk: int = CHUNK
) -> Tensor:
    """Mean phi of the tokens whose label is not `ignore_index`, a scalar; NaN when there is none.

    Args:
        logits (`torch.Tensor`): [..., vocab]. `chunk` rows at a time are in float32.
        labels (`torch.Tensor`): [...], lying where they are predicted (a causal model's are shifted before).
        eps (`float`, *optional*, defaults to 5e-4): Half the box, relative to |z| + 1; >= 0.
        ignore_index (`int`, *optional*, defaults to -100): Label of tokens that do not count.
        chunk (`int`, *optional*, defaults to 1024): Rows at a time.
    """
    check_eps(eps)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} must have the shape of logits {tuple(logits.shape)} less one.")
    flat, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device)
    where = (labels != ignore_index).nonzero()[:, 0]
    parts = [sharpness_rows(flat[part], labels[part], eps) for part in where.split(chunk)]
    return torch.cat(parts).mean()


def check_eps(eps: float) -> None:
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps is {eps!r} but must be finite and >= 0.")


def spikes(losses: Sequence[float], window: int = 50, sds: float = 3.0) -> list[int]:
    """Where a loss lies above mean + `sds` standard deviations of the up to `window` losses before it (at least 5);
    one that is not finite is a spike, and does not enter the mean."""
    found, seen = [], []
    for i, loss in enumerate(losses):
        past = torch.tensor(seen[-window:], dtype=torch.float64)
        if not math.isfinite(loss):
            found.append(i)
            continue
        if len(past) >= 5 and loss > past.mean() + sds * past.std():
            found.append(i)
        seen.append(loss)
    return found


def diverged(losses: Sequence[float]) -> bool:
    """Whether a loss is not finite, or the last tenth of the run lost again more than half of what the best tenth had
    gained on the first loss (a run that never gained anything has diverged)."""
    if not losses or not all(map(math.isfinite, losses)):
        return bool(losses)
    n = max(1, len(losses) // 10)
    means = torch.tensor(losses, dtype=torch.float64).unfold(0, n, 1).mean(-1)
    best = min(means.min().item(), losses[0])
    return means[-1].item() > best + 0.5 * (losses[0] - best) if losses[0] > best else len(losses) > 1


class LogitSharpnessCallback(TrainerCallback):
    """Logs phi of training batches: `trainer.add_callback(LogitSharpnessCallback(trainer, every=50))`.

    Callbacks see no logits, so on each measured step the Trainer's `compute_loss` is asked for its outputs too, which
    costs no second pass and holds for every loss that leaves logits; on other steps nothing is touched. `Trainer.log`
    gets `logit_sharpness` at each measured step, and at the end `loss_spikes` and `diverged` (0 or 1) of the logged
    losses: with `logging_steps=1` those of every step. Two processes log the mean over both; a two-pass optimizer's
    perturbed passes count too.

    Args:
        trainer (`Trainer`): To which the callback is added: only it can log.
        every (`int`, *optional*, defaults to 50): Steps between two measurements, from the first step on.
        eps (`float`, *optional*, defaults to 5e-4): Of [`logit_sharpness`].
        window (`int`, *optional*, defaults to 50): Logged losses over which a spike is judged; >= 5.

    Raises:
        `ValueError`: The outputs have no logits (a fused linear cross-entropy), or the batch no labels that fit them.
    """

    def __init__(self, trainer: Trainer, every: int = 50, eps: float = 5e-4, window: int = 50):
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer is a {type(trainer).__name__} but must be the Trainer: only it can log.")
        for name, value, least in (("every", every, 1), ("window", window, 5)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r} but must be an integer >= {least}.")
        check_eps(eps)
        self.trainer, self.every, self.eps, self.window = trainer, every, eps, window
        self.undo = contextlib.ExitStack()
        self.sums: list[Tensor] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.undo.close()
        self.sums = []
        if state.global_step % self.every == 0:
            self.undo.enter_context(replaced(self.trainer, "compute_loss", self._watch(self.trainer.compute_loss)))

    def on_step_end(self, args, state, control, **kwargs):
        self.undo.close()
        if self.sums:
            total, count = self.trainer.accelerator.reduce(torch.stack(self.sums).sum(0), "sum").tolist()
            self.trainer.log({"logit_sharpness": total / count if count else math.nan})
        self.sums = []

    def on_train_end(self, args, state, control, **kwargs):
        self.undo.close()
        losses = [row["loss"] for row in state.log_history if "loss" in row]
        if losses:
            found = {"loss_spikes": len(spikes(losses, self.window)), "diverged": float(diverged(losses))}
            self.trainer.log(found)

    def _watch(self, compute_loss):
        def watched(model, inputs, return_outputs=False, *args: Any, **kwargs: Any):
            # `compute_loss` may take labels out of the batch.
            given = {name: inputs.get(name) for name in ("labels", "shift_labels")}
            loss, outputs = compute_loss(model, inputs, True, *args, **kwargs)
            if model.training:
                self._measure(logits_of(self.trainer, outputs, "LogitSharpnessCallback").detach(), **given)
            return (loss, outputs) if return_outputs else loss

        return watched

    def _measure(self, logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None) -> None:
        if shift_labels is not None:
            labels = shift_labels
        elif labels is not None and labels.dim() > 1 and loss_shifts_labels(self.trainer):
            labels = pad(labels[:, 1:], (0, 1), value=-100)
        if labels is None or labels.shape != logits.shape[:-1] or labels.is_floating_point():
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(f"LogitSharpnessCallback: labels {found} are no classes of logits {tuple(logits.shape)}.")
        count = (labels != -100).sum()
        total = logit_sharpness(logits, labels, self.eps) * count if count else 0.0 * count
        self.sums.append(torch.stack([total.double(), count.double()]))
