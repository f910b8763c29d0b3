"""Worst-case forget set: the k rows that unlearning fails to remove, in place of random ones that flatter it.

Upper weights w in [0, 1]^N with sum k say what is forgotten. An iteration unlearns from the model f_0 by fine-tuning
without the chosen rows, and moves w towards rows that are still known:

    theta(w):  theta <- theta - lr sign(grad sum_i (1 - w_i) loss_i(theta)),  from f_0, some passes over all rows
    w       <- P(w - weight_lr (loss_i(theta(w)) + 2 gamma w_i)),   P(a)_i = min(max(a_i - mu, 0), 1),  sum = k

The sign makes the gradient of theta(w) with respect to w zero almost everywhere, so the direct term is all there is.
Every `binarize_every` iterations w becomes the indicator of its k largest entries, which are the answer at the end.
Losses and weights are float64.

Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning, arXiv 2403.07362. What differs: the
start. From k random rows, which the authors' code starts from, two rows change places only when weight_lr times the
sum of their loss gaps is above 1, which the default rate does not reach in its iterations; from w = k / N the first
step ranks all rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from .._fields import in_range, one_of
from ..registry import Method, Result
from ._data import collate
from ._s3t_layers import own_randomness
from ._terms import Scored

RowLosses = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class WorstCaseConfig:
    """Options of [`worst_case_forget_set`].

    Args:
        iterations: Of w, >= 1.
        unlearn_epochs: Passes of sign descent over all rows in an iteration, >= 1.
        lr: Of sign descent, > 0.
        weight_lr: Of w, > 0.
        gamma: Weight of ||w||^2; > 0 spreads w, < 0 would drive it to the corners.
        binarize_every: Iterations between roundings of w, >= 1.
        start: "uniform" (k / N) or "random" (k rows, the paper's).
        batch_size: Of sign descent and of reading losses.
        seed: Of batches, dropout and the random start.
    """

    iterations: int = 10
    unlearn_epochs: int = 10
    lr: float = 1e-3
    weight_lr: float = 0.01
    gamma: float = 0.0
    binarize_every: int = 20
    start: str = "uniform"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        for name in ("iterations", "unlearn_epochs", "binarize_every", "batch_size"):
            in_range(name, getattr(self, name), 1, math.inf)
        for name in ("lr", "weight_lr"):
            in_range(name, getattr(self, name), 0, math.inf, low_open=True)
        in_range("gamma", self.gamma, -1e6, 1e6)
        one_of("start", self.start, ("uniform", "random"))


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """Row numbers `indices`, the `groups` that they are the rows of, final `weights`, and a record per iteration.

    A record has `objective` (sum of w times loss after unlearning, plus gamma ||w||^2), `stationarity` (the norm of
    the projected step w - P(w - gradient), 0 at a solution) and `changed`, how many of the k chosen are new.
    """

    indices: list[int]
    groups: list[int] | None
    weights: Tensor
    trace: list[dict[str, float]]


def project(a: Tensor, k: float) -> Tensor:
    """The nearest point of {0 <= w <= 1, sum w = k} to a [n], in float64, by bisection for mu and one exact step."""
    if not 0 <= k <= len(a):
        raise ValueError(f"k is {k} but must be in [0, {len(a)}].")
    a = a.double()
    low, high = a.min() - 1, a.max()
    for _ in range(100):
        mu = (low + high) / 2
        if (a - mu).clamp(0, 1).sum() > k:
            low = mu
        else:
            high = mu
    mu = (low + high) / 2
    free = (a > mu) & (a < mu + 1)
    if free.any():
        # On its piece the sum is linear in mu.
        mu = (a[free].sum() + (a >= mu + 1).sum() - k) / free.sum()
    return (a - mu).clamp(0, 1)


def step_weights(w: Tensor, losses: Tensor, k: int, lr: float, gamma: float = 0.0) -> Tensor:
    """P(w - lr (loss + 2 gamma w)), all [n]."""
    return project(w - lr * (losses.double() + 2 * gamma * w), k)


def largest(w: Tensor, k: int) -> Tensor:
    """Numbers of the k largest entries, rising; of equal ones the first."""
    return w.sort(descending=True, stable=True).indices[:k].sort().values


def row_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """[rows]: the mean over scored tokens of a causal model's rows, or cross-entropy where a row has one label."""
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    if batch["labels"].ndim == 1:
        return F.cross_entropy(logits.float(), batch["labels"], reduction="none")
    scored = Scored.shifted(logits, batch["labels"])
    return scored.token_nll.sum(1) / scored.lengths


class _Unlearner:
    """Sign descent from f_0 with weights of rows, and the losses of all rows after it; `model` comes back."""

    def __init__(self, model: nn.Module, dataset: Any, config: WorstCaseConfig, losses: RowLosses, collator: Callable):
        self.model, self.dataset, self.config, self.losses, self.collator = model, dataset, config, losses, collator
        self.params = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("model has no parameter to train.")
        self.before = {name: x.clone() for name, x in model.state_dict().items()}

    def restore(self) -> None:
        self.model.load_state_dict(self.before)

    def batches(self, order: list[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        size, device = self.config.batch_size, self.params[0].device
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = self.collator([self.dataset[i] for i in rows])
            yield rows, {name: x.to(device) for name, x in batch.items()}

    def losses_after(self, keep: Tensor) -> Tensor:
        """Losses of all rows [n] in float64 after unlearning with row weights `keep` [n] (1 - w)."""
        self.restore()
        generator = torch.Generator().manual_seed(self.config.seed)
        self.model.train()
        for _ in range(self.config.unlearn_epochs):
            for rows, batch in self.batches(torch.randperm(len(keep), generator=generator).tolist()):
                weights = keep[rows]
                if not weights.any():
                    continue
                losses = self.losses(self.model, batch)
                loss = (losses * weights.to(losses)).sum()
                grads = torch.autograd.grad(loss, self.params, allow_unused=True)
                with torch.no_grad():
                    for p, g in zip(self.params, grads, strict=True):
                        if g is not None:
                            p -= self.config.lr * g.sign()
        self.model.eval()
        with torch.no_grad():
            found = [self.losses(self.model, batch).double().cpu() for _, batch in self.batches(range(len(keep)))]
        return torch.cat(found)


def worst_case_forget_set(
    model: nn.Module,
    dataset: Any,
    k: int,
    config: WorstCaseConfig | None = None,
    *,
    groups: Sequence[int] | None = None,
    losses: RowLosses = row_losses,
    data_collator: Callable[[list], dict[str, Tensor]] = collate,
) -> WorstCase:
    """The k rows, or the k groups, that are hardest to forget by fine-tuning; the model is given back unchanged.

    Args:
        model (`nn.Module`): f_0; parameters that require gradients are unlearned.
        dataset (`Sequence`): Its training rows.
        k (`int`): Size of the forget set, in [1, rows) or [1, groups).
        config (`WorstCaseConfig`, *optional*): Options.
        groups (`Sequence[int]`, *optional*): The class, author, .. of each row. A group's loss is the mean of its
            rows', which go together.
        losses (`Callable`, *optional*): `(model, batch) -> [rows]`, differentiable.
        data_collator (`Callable`, *optional*): Rows to a batch; by default that of tokenised rows.
    """
    c, n = config or WorstCaseConfig(), len(dataset)
    names = list(range(n)) if groups is None else sorted(set(groups))
    if groups is not None and len(groups) != n:
        raise ValueError(f"groups has {len(groups)} entries but dataset {n} rows.")
    if not isinstance(k, int) or not 1 <= k < len(names):
        raise ValueError(f"k is {k} but must be in [1, {len(names) - 1}]: something must stay.")
    member = torch.tensor([names.index(g) for g in groups] if groups is not None else names)
    sizes = torch.bincount(member, minlength=len(names)).double()
    w = torch.full((len(names),), k / len(names), dtype=torch.float64)
    if c.start == "random":
        w.zero_()[torch.randperm(len(names), generator=torch.Generator().manual_seed(c.seed))[:k]] = 1
    trace, training = [], model.training
    unlearner = _Unlearner(model, dataset, c, losses, data_collator)
    try:
        for i in logging.tqdm(range(c.iterations), desc="worst case"):
            with own_randomness():
                torch.manual_seed(c.seed)
                loss = unlearner.losses_after(1 - w[member])
            if not loss.isfinite().all():
                raise RuntimeError(f"Iteration {i}: a loss after unlearning is not finite; lr is {c.lr}.")
            loss = torch.zeros_like(w).index_add_(0, member, loss) / sizes
            before = set(largest(w, k).tolist())
            moved = step_weights(w, loss, k, 1.0, c.gamma)
            trace.append(
                {
                    "objective": float((w * loss).sum() + c.gamma * w.square().sum()),
                    "stationarity": float((w - moved).norm()),
                }
            )
            w = step_weights(w, loss, k, c.weight_lr, c.gamma)
            chosen = largest(w, k)
            trace[-1]["changed"] = k - len(before & set(chosen.tolist()))
            if (i + 1) % c.binarize_every == 0:
                w = torch.zeros_like(w).index_fill_(0, chosen, 1)
    finally:
        unlearner.restore()
        model.train(training)
    chosen = largest(w, k)
    rows = torch.isin(member, chosen).nonzero()[:, 0].tolist()
    return WorstCase(
        indices=rows, groups=None if groups is None else [names[i] for i in chosen], weights=w, trace=trace
    )


def loss_after_unlearning(
    model: nn.Module,
    dataset: Any,
    forget: Sequence[int],
    config: WorstCaseConfig | None = None,
    *,
    losses: RowLosses = row_losses,
    data_collator: Callable[[list], dict[str, Tensor]] = collate,
) -> float:
    """Mean loss of the rows `forget` after they were unlearned as above: low means that they still are known."""
    keep, training = torch.ones(len(dataset), dtype=torch.float64), model.training
    keep[list(forget)] = 0
    unlearner = _Unlearner(model, dataset, config or WorstCaseConfig(), losses, data_collator)
    try:
        with own_randomness():
            torch.manual_seed(unlearner.config.seed)
            return float(unlearner.losses_after(keep)[list(forget)].mean())
    finally:
        unlearner.restore()
        model.train(training)


METHOD = Method(
    name="worst_case",
    family="unlearning",
    title="Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning",
    authors="Fan et al.",
    arxiv="2403.07362",
    year=2024,
    repo="OPTML-Group/Unlearn-WorstCase",
    status="variant",
    difference="Starts from equal weights; the default rate hardly leaves k random rows, the paper's start.",
    target="hfext.unlearning.worst_case:worst_case_forget_set",
    config=WorstCaseConfig,
    usage="hfext.unlearning.worst_case_forget_set(model, rows, k=40).indices",
    summary="Finds the rows or groups that unlearning removes least, by bilevel optimisation.",
    claim="The set found is harder to unlearn than random sets of its size.",
    headline=Result(
        metric="unlearning accuracy",
        setting="10 % of CIFAR-10, ResNet-18 (not re-checked)",
        value="worst-case sets stay known where random ones are forgotten",
    ),
    notes="A tool of evaluation: unlearn its rows with the method under test. No recipe: the tests compare the set "
    "with all others of its size on models where that can be done.",
)
