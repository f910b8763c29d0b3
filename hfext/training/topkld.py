"""TopKLD: a quantised student learns the teacher's top choices and, apart from them, the shape of the rest.

S are the K tokens that the teacher p likes best, P and Q what teacher and student q leave to all others:

    L_exp = sum_{i in S} p_i log(p_i / q_i) + P log(P / Q)               explicit: the top K and one bucket
    L_imp = sum_{j not in S} (p_j / P) log((p_j / P) / (q_j / Q))        implicit: the rest, as a distribution
    loss  = L_exp + max(weight, P) L_imp          mean over the tokens with a label;  alpha CE + (1 - alpha) loss

By the chain rule KL(p || q) = L_exp + P L_imp, so `weight=0` is the plain KL, as are K = 0 and K = V at any weight.
`weight=1` counts the rest as much as the top however little mass it has; `weight=None` leaves L_imp out. Everything is
in float32 (float64 for float64 logits) and in logarithms, so that a P that underflows harms nothing. The gradient
q - p on S and (Q - P) q_j / Q + w (q_j / Q - p_j / P) elsewhere is made on the way, chunk by chunk.

Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models, arXiv 2501.06218: the loss is built from the
abstract alone.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Trainer

from ..compat import keep_column
from ..optim._objective import mean_over_update
from ..registry import Method, Result
from ._teacher_top_k import IDS, LOG_PROBS, CacheCollator, cut
from ._trajectory import CHUNK, check, logits_of, rows_with_label
from .mesa import without_labels


@dataclass(frozen=True, kw_only=True)
class TopKLDConfig:
    """Options of [`TopKLDMixin`].

    Args:
        k: Size of S, >= 0; larger than the vocabulary is the whole of it.
        weight: Of the implicit part, in [0, 1], never below P: 0 is the plain KL. `None` leaves the part out, which
            is all that a cached teacher can give.
        alpha: Share of the task's own loss, in [0, 1). At 0 that loss is not computed.
    """

    k: int = 50
    weight: float | None = 1.0
    alpha: float = 0.0

    def __post_init__(self):
        check(self, "k", isinstance(self.k, int) and self.k >= 0, "an integer >= 0")
        check(self, "weight", self.weight is None or 0 <= self.weight <= 1, "None or in [0, 1]")
        check(self, "k", self.k > 0 or self.weight is not None, ">= 1 when weight is None: nothing is left to learn")
        check(self, "alpha", 0 <= self.alpha < 1 and math.isfinite(self.alpha), "in [0, 1)")


def _dot(p: Tensor, log_ratio: Tensor) -> Tensor:
    """sum p log_ratio over the last axis, where 0 times anything is 0."""
    return torch.where(p > 0, p * log_ratio, 0.0).sum(-1)


def _share(log_part: Tensor, log_whole: Tensor) -> Tensor:
    """log of each share in a whole that may be empty; -inf where it is."""
    return log_part - log_whole.clamp(min=torch.finfo(log_whole.dtype).min)[..., None]


def explicit_rows(logits: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """L_exp [rows] and its gradient [rows, vocab]; ids [rows, k], log_p [rows, k + 1] with log P last."""
    log_q = torch.log_softmax(logits, -1)
    rest = log_q.scatter(-1, ids, -torch.inf)
    log_rest = rest.logsumexp(-1)
    p, q = log_p.exp(), torch.cat([log_q.gather(-1, ids), log_rest[..., None]], -1)
    loss = _dot(p, log_p - q)
    gradient = _share(rest, log_rest).exp() * (log_rest.exp() - p[..., -1])[..., None]
    return loss, gradient.scatter(-1, ids, (q.exp() - p)[..., :-1])


def topkld_rows(logits: Tensor, teacher: Tensor, k: int, weight: float | None) -> tuple[Tensor, Tensor]:
    """The loss [rows] and its gradient [rows, vocab], from logits [rows, vocab] twice."""
    log_p = torch.log_softmax(teacher, -1)
    ids = log_p.topk(min(k, log_p.shape[-1]), -1).indices
    rest = log_p.scatter(-1, ids, -torch.inf)
    log_rest = rest.logsumexp(-1)
    loss, gradient = explicit_rows(logits, ids, torch.cat([log_p.gather(-1, ids), log_rest[..., None]], -1))
    if weight is None:
        return loss, gradient
    w = log_rest.exp().clamp(min=weight)
    theirs = _share(rest, log_rest)
    student = torch.log_softmax(logits, -1).scatter_(-1, ids, -torch.inf)
    ours = _share(student, student.logsumexp(-1))
    implicit = _dot(theirs.exp(), theirs - ours)
    return loss + w * implicit, gradient + w[..., None] * (ours.exp() - theirs.exp())


class _Rows(torch.autograd.Function):
    """`compute(logits, *teacher) -> (loss, gradient)` where `mask` [rows]; other rows are never read, and are 0."""

    @staticmethod
    def forward(ctx, logits, mask, chunk, compute, *teacher):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        losses = logits.new_zeros(mask.shape, dtype=dtype)
        gradients = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        for where in mask.nonzero()[:, 0].split(chunk):
            given = [x[where].to(dtype) if x.is_floating_point() else x[where] for x in teacher]
            losses[where], gradient = compute(logits[where].to(dtype), *given)
            if gradients is not None:
                gradients[where] = gradient.to(logits.dtype)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        (gradients,) = ctx.saved_tensors
        return (
            gradients * grad_rows[:, None].to(gradients.dtype),
            None,
            None,
            None,
            *(None for _ in ctx.needs_input_grad[4:]),
        )


def chunked_rows(logits: Tensor, mask: Tensor, compute: Callable, *teacher: Tensor, chunk: int = CHUNK) -> Tensor:
    """The loss of each row [...], 0 where `mask` [...] is false; logits and teacher are [..., anything]."""
    flat = [x.reshape(-1, x.shape[-1]) for x in (logits, *teacher)]
    return _Rows.apply(flat[0], mask.reshape(-1), chunk, compute, *flat[1:]).view(mask.shape)


def topkld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    k: int,
    weight: float | None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The loss over the tokens whose label is not `ignore_index`: their mean, or their sum / `num_items_in_batch`.

    Logits [..., vocab] twice; labels [...] lie where they are predicted (a causal model's are shifted before). No
    gradient flows to the teacher.
    """
    mask = labels != ignore_index
    rows = chunked_rows(student_logits, mask, lambda z, t: topkld_rows(z, t, k, weight), teacher_logits.detach())
    return rows.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class TopKLDMixin:
    """For any Trainer of a model with logits: `class T(TopKLDMixin, Trainer)`, then `T(..., teacher=model)`.

    The loss of training and evaluation is that of [`TopKLDConfig`]. Works with PEFT students, whose teacher must be a
    model of its own. The teacher is frozen in place (eval mode, no gradients), moved to the Trainer's device unless it
    was spread over several, and never saved.

    Args:
        teacher (`nn.Module`, *optional*): The model before quantisation, of the student's vocabulary. Without one, the
            datasets must hold the columns that [`teacher_top_k`] makes and `topkld.weight` must be `None`.
        topkld (`TopKLDConfig`, *optional*): Options.
    """

    def __init__(self, *args, teacher: nn.Module | None = None, topkld: TopKLDConfig | None = None, **kwargs):
        self.topkld = TopKLDConfig() if topkld is None else topkld
        if not isinstance(self.topkld, TopKLDConfig):
            raise TypeError(f"topkld is a {type(topkld).__name__} but must be a TopKLDConfig.")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher is a {type(teacher).__name__} but must be a model or None.")
        if teacher is None and self.topkld.weight is not None:
            raise ValueError(
                f"TopKLDConfig: weight is {self.topkld.weight!r} but must be None without a teacher: a cache holds "
                "the top k and the mass of the rest, from which only the explicit part can be had. Or pass teacher=."
            )
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise NotImplementedError(
                "TopKLD does not run with DataParallel: start one process per device (torchrun)."
            )
        self.teacher = teacher
        self._hfext_topkld = (0.0, 0)
        if teacher is None:
            self.data_collator = CacheCollator(self.data_collator)
            keep_column(self, IDS)
            keep_column(self, LOG_PROBS)
            return
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        if any(id(p) in trained for p in teacher.parameters()):
            raise ValueError("teacher shares trained parameters with the model: pass a copy made before (deepcopy).")
        teacher.eval().requires_grad_(False)
        if len({p.device for p in teacher.parameters()}) == 1:
            teacher.to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        c, inputs = self.topkld, dict(inputs)
        cached = [inputs.pop(name, None) for name in (IDS, LOG_PROBS)]
        labels = {name: inputs[name] for name in ("labels", "shift_labels") if inputs.get(name) is not None}
        if not labels:
            raise ValueError(f"TopKLD: the batch has no `labels` ({', '.join(inputs)}), which say what tokens count.")
        theirs = None if self.teacher is None else self._ask(inputs)
        if c.alpha:
            task, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch, **kwargs)
        else:
            task, outputs = 0.0, model(**without_labels(self.accelerator.unwrap_model(model), inputs))
        logits = logits_of(self, outputs, "TopKLD")
        mask = rows_with_label(self, labels, logits, "TopKLD").to(logits.device)
        if theirs is None:
            if cached[0] is None or cached[1] is None:
                raise ValueError(
                    f"TopKLD without a teacher needs the columns {IDS} and {LOG_PROBS}: see teacher_top_k."
                )
            rows = chunked_rows(logits, mask, explicit_rows, *cut(*cached, c.k))
        else:
            if theirs.shape != logits.shape:
                raise ValueError(
                    f"TopKLD: teacher logits {tuple(theirs.shape)} and student logits {tuple(logits.shape)} must have "
                    "one shape: teacher and student need the same tokenizer and vocabulary."
                )
            theirs = theirs.to(logits.device)
            rows = chunked_rows(logits, mask, lambda z, t: topkld_rows(z, t, c.k, c.weight), theirs)
        distilled = mean_over_update(self, rows, mask, num_items_in_batch)
        if c.alpha and model.training:
            total, count = self._hfext_topkld
            self._hfext_topkld = total + rows.detach().sum(), count + mask.sum()
        loss = c.alpha * task + (1 - c.alpha) * distilled
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _ask(self, inputs: Mapping[str, Any]) -> Tensor:
        if self.teacher.training:
            self.teacher.eval()
        given = without_labels(self.teacher, inputs)
        if "use_cache" in inspect.signature(self.teacher.forward).parameters:
            given["use_cache"] = False
        with self.accelerator.autocast():
            return logits_of(self, self.teacher(**given), "TopKLD")

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            (total, count), self._hfext_topkld = self._hfext_topkld, (0.0, 0)
            logs |= {"topkld_loss": float(total / count)} if count else {}
        return super().log(logs, *args, **kwargs)


class TopKLDTrainer(TopKLDMixin, Trainer):
    """`Trainer` with TopKLD: `TopKLDTrainer(student, args, train_dataset=data, teacher=model)`."""


METHOD = Method(
    name="topkld",
    family="training",
    title="Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models",
    authors="Ding et al.",
    arxiv="2501.06218",
    year=2025,
    status="abstract-only",
    difference="The abstract says that the loss balances explicit and implicit knowledge; its form here, the chain "
    "rule of the KL over the teacher's top K and the rest with a weight of our own, is ours, and so are the defaults.",
    target="hfext.training.topkld:TopKLDMixin",
    config=TopKLDConfig,
    usage="hfext.training.TopKLDTrainer(student, args, train_dataset=data, teacher=model)",
    summary="Distils a model into its quantised self: the teacher's top K tokens, and the shape of the rest apart.",
    claim="TopKLD recovers a quantised language model better than plain KL distillation.",
    headline=Result(
        metric="bit-level scaling",
        setting="quantised autoregressive vision models (abstract)",
        value="better by about one level of bits",
    ),
    recipe="training/topkld-llama-shakespeare.yaml",
    notes="One more forward pass of the teacher, or none with a teacher cached by `teacher_top_k` (then weight=None).",
)
