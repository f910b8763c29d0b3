"""BiSAM: the perturbation maximises a lower bound of the 0-1 loss, while the step minimises the training loss.

    F_j = z_j - z_y;  Q = mean_i (1/mu) log sum_j exp(mu * phi(F_ij));  e = rho * grad Q / (||grad Q|| + eps)
    tanh: phi(x) = tanh(alpha x);  log: phi(x) = 1 - log(1 + exp(gamma - x)), gamma = log(e - 1), so that phi(0) = 0

SAM's perturbation pushes hardest on samples that are wrong already; phi saturates, so BiSAM's pushes on those near
the decision boundary. log-sum-exp exceeds max_j phi by up to log(K) / mu: Q is a bound up to that slack.

Improving SAM Requires Rethinking its Optimization Formulation, arXiv 2407.12993. The authors' code leaves out 1/mu,
which the normalisation of e removes anyway.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..registry import Method, Result
from ._ascent import AscentConfig, AscentOptimizer, check
from ._objective import mean_over_update, predictions
from .asam import asam_direction
from .sam import sam_direction

GAMMA = math.log(math.e - 1)
MU = {"tanh": 10.0, "log": 1.0, "identity": 1.0}


@dataclass(frozen=True, kw_only=True)
class BiSAMConfig(AscentConfig):
    """Options of [`BiSAM`], besides those of [`AscentConfig`].

    Args:
        surrogate: phi: `tanh`, `log`, or `identity` (then Q is the cross entropy and BiSAM is SAM).
        mu: Sharpness of the soft maximum, > 0; by default 10 for tanh and 1 for log.
        alpha: Slope of tanh, > 0.
        scale_mu: Multiply mu by log K / log 10, for vocabularies; not in the paper.
        topk: Let only the `topk` largest logits and the label compete, for vocabularies; not in the paper. 0 is off.
        adaptive: ASAM's ball instead of SAM's, with `eta`.
        eta: Added to |w| when `adaptive`, >= 0.
    """

    surrogate: Literal["tanh", "log", "identity"] = "tanh"
    mu: float | None = None
    alpha: float = 0.1
    scale_mu: bool = False
    topk: int = 0
    adaptive: bool = False
    eta: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        check(self, "surrogate", self.surrogate in MU, f"one of {', '.join(MU)}")
        check(self, "mu", self.mu is None or self.mu > 0, "> 0")
        check(self, "alpha", self.alpha > 0, "> 0")
        check(self, "topk", self.topk >= 0, ">= 0 (0 is off)")
        check(self, "eta", self.eta >= 0, ">= 0")


def phi(x: Tensor, surrogate: str, alpha: float) -> tuple[Tensor, Tensor]:
    """phi(x) and phi'(x), both of the shape of x."""
    match surrogate:
        case "tanh":
            t = torch.tanh(alpha * x)
            return t, torch.addcmul(torch.ones((), dtype=t.dtype, device=t.device), t, t, value=-1).mul_(alpha)
        case "log":
            u = x - GAMMA
            return F.logsigmoid(u).add_(1), u.neg_().sigmoid_()
    return x, torch.ones_like(x)


class _RowSurrogate(torch.autograd.Function):
    """Q of each row, with its gradient computed chunk by chunk on the way."""

    @staticmethod
    def forward(ctx, logits, labels, surrogate, mu, alpha, topk, reduction, chunk):
        q = logits.new_zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        grad = torch.empty_like(logits)
        for i in range(0, len(logits), chunk):
            rows = slice(i, i + chunk)
            counts = (labels[rows] >= 0)[:, None]
            y = labels[rows, None].clamp(min=0)
            z = logits[rows].to(q.dtype)
            value, slope = phi(z - z.gather(1, y), surrogate, alpha)
            if topk and topk < z.shape[1]:
                competes = torch.zeros_like(z, dtype=torch.bool)
                competes.scatter_(1, z.topk(topk, dim=1).indices, True).scatter_(1, y, True)
                value = value.masked_fill(~competes, -math.inf)
            best, where = value.max(dim=1, keepdim=True)
            if reduction == "max":
                weight = torch.zeros_like(z).scatter_(1, where, 1.0)
            else:
                weight = value.sub_(best).mul_(mu).exp_()
                total = weight.sum(dim=1, keepdim=True)
                best += total.log() / mu
                weight /= total
            weight *= slope
            weight.scatter_add_(1, y, -weight.sum(dim=1, keepdim=True))  # each margin holds -z_y
            q[rows] = torch.where(counts, best, 0.0).squeeze(1)
            grad[rows] = weight.masked_fill_(~counts, 0.0)
        ctx.grad = grad
        return q

    @staticmethod
    def backward(ctx, grad_q):
        if ctx.grad is None:
            raise RuntimeError("bisam_rows: its backward pass ran already. Evaluate it again.")
        grad, ctx.grad = ctx.grad, None  # scaled in place: no third tensor of the size of the logits
        return grad.mul_(grad_q[:, None]), *[None] * 7


def bisam_rows(
    logits: Tensor,
    labels: Tensor,
    surrogate: str = "tanh",
    mu: float | None = None,
    alpha: float = 0.1,
    topk: int = 0,
    reduction: str = "logsumexp",
    chunk: int | None = None,
) -> Tensor:
    """Q of each row: logits [rows, classes], labels [rows] -> [rows] in float32 or wider; label < 0 gives 0.

    `reduction="max"` is the limit mu -> inf. At most `chunk` rows are held in float32 at a time: by default 1024 on an
    accelerator, and on a CPU what fits its cache.
    """
    if chunk is None:
        chunk = 1024 if logits.device.type != "cpu" else max(1, min(1024, (1 << 17) // logits.shape[1]))
    return _RowSurrogate.apply(logits, labels, surrogate, mu or MU[surrogate], alpha, topk, reduction, chunk)


def bisam_multilabel(logits: Tensor, targets: Tensor, surrogate: str = "tanh", mu=None, alpha: float = 0.1) -> Tensor:
    """Q of each label of a multi-label task: the two-class case with logits (0, z). [batch, labels] -> the same."""
    mu = mu or MU[surrogate]
    signed = torch.where(targets > 0.5, -logits, logits).to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(targets < 0, 0.0, F.softplus(mu * phi(signed, surrogate, alpha)[0]) / mu)


class BiSAM(AscentOptimizer):
    """Bilevel SAM.

    Args:
        base_optimizer (`torch.optim.Optimizer`): Makes the step.
        model (`torch.nn.Module`, *optional*): For `adaptive=True`: tells weights by name.
        rows (`Callable`, *optional*): `rows(outputs, inputs) -> (Q, mask)` for a loss that is no classification of
            `labels`: Q of each item and which items count, both of one shape.
        **options: Fields of [`BiSAMConfig`].
    """

    Config = BiSAMConfig

    def __init__(self, base_optimizer, model=None, rows: Callable | None = None, **options):
        super().__init__(base_optimizer, model, **options)
        self.rows = rows

    def first_objective(self, trainer, model, inputs, outputs, num_items) -> Tensor:
        """Mean Q of a micro-batch, normalised over the update exactly as the Trainer normalises its loss."""
        if self.rows is not None:
            return mean_over_update(trainer, *self.rows(outputs, inputs), num_items)
        c, parts = self.config, []
        for part in predictions(trainer, model, inputs, outputs, "BiSAM"):
            if part.kind == "regression":
                raise ValueError("BiSAM: a regression has no 0-1 loss. Use optim='sam'.")
            if part.kind == "multilabel":
                q = bisam_multilabel(part.logits, part.labels, c.surrogate, self._mu(2), c.alpha)
            else:
                mu = self._mu(part.logits.shape[-1])
                q = bisam_rows(part.logits, part.labels, c.surrogate, mu, c.alpha, c.topk)
            parts.append(mean_over_update(trainer, q, part.labels >= 0, num_items))
        return sum(parts) / len(parts)

    def _mu(self, classes: int) -> float:
        mu = self.config.mu or MU[self.config.surrogate]
        return mu * math.log(classes) / math.log(10) if self.config.scale_mu else mu

    def direction(self, params: list[Tensor], grads: list[Tensor]) -> Tensor:
        if self.config.adaptive:
            return asam_direction(params, grads, self.weights_among(params), self.config.eta)
        return sam_direction(grads)


METHOD = Method(
    name="bisam",
    family="optim",
    title="Improving SAM Requires Rethinking its Optimization Formulation",
    authors="Xie et al.",
    arxiv="2407.12993",
    year=2024,
    repo="LIONS-EPFL/BiSAM",
    status="faithful",
    target="hfext.optim.bisam:BiSAM",
    config=BiSAMConfig,
    usage='TrainingArguments(optim="bisam", optim_args="rho=0.05,surrogate=tanh")',
    summary="SAM whose perturbation maximises a lower bound of the 0-1 loss instead of the training loss.",
    claim="At equal rho BiSAM's perturbation flips more training samples than SAM's.",
    headline=Result(
        metric="top-1 accuracy, %",
        setting="ResNet-50, a third of ImageNet-1k, 90 epochs (authors' rebuttal)",
        value="66.64 +- 0.80 (tanh), 66.71 +- 0.21 (log)",
        baseline="66.62 +- 0.43 (SAM)",
    ),
    recipe="optim/bisam-mlp-digits.yaml",
)
