"""Datamodel matching: predict what a retrained model would say, and fine-tune towards it.

    f(x)       mean over the scored tokens of row x of the margin  log p_y - log sum_{y' != y} p_{y'}
    f(x; S)    of a model trained on S,  about  b(x) + sum_{j in S} beta_j(x)          the datamodel
    f_hat(x) = f_0(x) - sum_{j in F} beta_j(x)                                         a model without F, predicted
    loss     = mean over rows of (f_theta(x) - f_hat(x))^2                             datamodel matching

beta is fitted by ridge regression to models trained on random subsets of the rows, with the intercept free. With
retrained models' own outputs in place of f_hat the loss is oracle matching, the ideal it falls short of. Regression is
float64, margins are float32.

Attribute-to-Delete: Machine Unlearning via Datamodel Matching, arXiv 2410.23232: built from the abstract. A row joins
a subset by a coin of its own: with subsets of one size, a constant could move from b to every beta unseen, and the sum
over F would be wrong by |F| times it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from .._fields import in_range
from ..registry import Method, Result
from ._objective import Objective, finite
from ._terms import rows

TrainFn = Callable[[list[int]], Tensor]


def token_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y - log(1 - p_y) = z_y - log sum_{y' != y} exp z_{y'}, [...] from logits [..., classes], in float32.

    0 where the label is -100. With one class there is no other, and the margin is infinite.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = labels.clamp(min=0)[..., None]
    # Not 1 - p_y, which rounds to 0 where the model is sure.
    others = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    return torch.where(labels == -100, 0.0, logits.gather(-1, index)[..., 0] - others)


def row_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """f(x): mean margin of a row's scored tokens [rows]; labels [rows, T] lie where they are predicted.

    A classifier's labels [rows] have one margin each.
    """
    margins = token_margins(logits, labels)
    return margins if labels.ndim == 1 else margins.sum(1) / (labels != -100).sum(1).clamp(min=1)


def matching_loss(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """(f_theta(x) - f_hat(x))^2 of rows [rows]; "mean", "sum" or "none". No gradient flows to the targets."""
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs have the shape {list(outputs.shape)} but targets {list(targets.shape)}.")
    each = (outputs - targets.detach().to(outputs)).square()
    if reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum()


@dataclass(frozen=True)
class Datamodel:
    """f(x; S) ~ `intercept` [points] + the sum over j in S of `beta` [rows, points]."""

    beta: Tensor
    intercept: Tensor

    def predict(self, rows: Sequence[int]) -> Tensor:
        """f(x; rows) [points]."""
        return self.intercept + self.beta[list(rows)].sum(0)


def draw_subsets(n: int, n_models: int, subset_frac: float, seed: int) -> Tensor:
    """Which rows each model is trained on, bool [models, n]: each row by a coin of its own; never none."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(n_models, n, generator=generator) < subset_frac
    drawn[~drawn.any(1), 0] = True
    return drawn


def fit_datamodel(subsets: Tensor, outputs: Tensor, ridge: float) -> Datamodel:
    """min over (b, beta) of ||outputs - b - subsets beta||^2 + ridge ||beta||^2, in float64.

    subsets bool [models, n], outputs [models, points]. Solved in n or in models unknowns, whichever are fewer.
    """
    x, y = subsets.double(), outputs.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    models, n = x.shape
    if n <= models:
        beta = torch.linalg.solve(x.T @ x + ridge * torch.eye(n, dtype=x.dtype), x.T @ y)
    else:
        beta = x.T @ torch.linalg.solve(x @ x.T + ridge * torch.eye(models, dtype=x.dtype), y)
    return Datamodel(beta, mean_y - mean_x @ beta)


def estimate_datamodel(
    train_fn: TrainFn, n: int, n_models: int, subset_frac: float = 0.5, ridge: float = 1e-2, seed: int = 0
) -> Datamodel:
    """Train `n_models` models on random subsets of n rows, and fit the datamodel of their outputs.

    Effects are those of a row in subsets of this size, which are larger than in all n rows: for estimators whose
    variance falls with 1 / n, about 1 / subset_frac times. Take a large `subset_frac` to predict deletions from all.

    Args:
        train_fn (`Callable`): Row numbers to outputs [points] of a model trained on these rows, such as
            [`row_margins`] of the rows to unlearn and of some that stay.
        n (`int`): Number of rows.
        n_models (`int`): Trainings, >= 2.
        subset_frac (`float`, *optional*): Chance of a row to be in a subset, in (0, 1).
        ridge (`float`, *optional*): >= 0; must be > 0 with fewer models than rows.
        seed (`int`, *optional*): Of the subsets.
    """
    in_range("n", n, 1, math.inf)
    in_range("n_models", n_models, 2, math.inf)
    if not 0 < subset_frac < 1:
        raise ValueError(f"subset_frac is {subset_frac} but must be in (0, 1).")
    in_range("ridge", ridge, 0, math.inf)
    if ridge == 0 and n_models <= n:
        raise ValueError(f"ridge is 0 but must be > 0: {n_models} models do not determine {n} effects.")
    subsets = draw_subsets(n, n_models, subset_frac, seed)
    outputs = [
        torch.as_tensor(train_fn(drawn.nonzero()[:, 0].tolist())).detach().cpu()
        for drawn in logging.tqdm(subsets, desc="datamodel")
    ]
    for i, found in enumerate(outputs):
        if found.ndim != 1 or found.shape != outputs[0].shape or not found.isfinite().all():
            raise ValueError(f"train_fn returned {list(found.shape)} for model {i} but must return finite [points].")
    return fit_datamodel(subsets, torch.stack(outputs), ridge)


def predicted_oracle(f0: Tensor, beta: Tensor, forget: Sequence[int]) -> Tensor:
    """f_hat(x) = f_0(x) - sum_{j in F} beta_j(x), [points] from f_0 [points] and beta [rows, points].

    The intercept is not in it: f_0 is a real model's, of which only F is taken away.
    """
    if f0.shape != beta.shape[1:]:
        raise ValueError(f"f0 has the shape {list(f0.shape)} but beta is of {list(beta.shape[1:])} points.")
    wrong = [j for j in forget if not 0 <= j < len(beta)]
    if wrong or len(set(forget)) < len(forget):
        raise ValueError(f"forget is {list(forget)} but must hold different rows of 0 to {len(beta) - 1}.")
    return (f0.double() - beta[list(forget)].sum(0)).to(f0.dtype)


@dataclass(frozen=True, kw_only=True)
class DMMConfig:
    """Options of [`DMM`].

    Args:
        targets: f_hat of every row of the parts "forget" and "retain", in their order: lists or tensors by part, or
            the path of a safetensors file with two such tensors.
        gamma, alpha: Weights of the forget and the retain rows, >= 0.
    """

    targets: Any = None
    gamma: float = 1.0
    alpha: float = 1.0

    def __post_init__(self):
        finite(self, "gamma", "alpha")


class DMM(Objective):
    """Fine-tuning towards predicted margins: `UnlearningTrainer(model, args, f, r, objective=DMM(targets=...))`."""

    Config = DMMConfig

    def __init__(self, **options):
        super().__init__(**options)
        given = self.config.targets
        if given is None:
            raise ValueError("DMMConfig: targets is None but must be predicted margins of forget and retain rows.")
        given = load_file(given) if isinstance(given, str | Path) else dict(given)
        if set(given) != set(self.needs):
            raise ValueError(f"DMMConfig: targets has {', '.join(map(str, given))} but must have forget and retain.")
        self.targets = {part: torch.as_tensor(values, dtype=torch.float32) for part, values in given.items()}
        for part, values in self.targets.items():
            if values.ndim != 1 or not values.isfinite().all():
                raise ValueError(f"DMMConfig: targets[{part!r}] must hold one finite number for each row.")

    def prepare(self, model, data):
        for part, values in self.targets.items():
            if len(values) != len(data.parts[part]):
                raise ValueError(
                    f"DMMConfig: targets[{part!r}] has {len(values)} numbers for {len(data.parts[part])} rows."
                )

    def forward(self, model, batch, **kwargs):
        now = super().forward(model, batch, **kwargs)
        for part, one in now.items():
            one.index = batch[part]["index"].cpu()
        return now

    def with_row_loss(self, now, of_tokens):
        return now  # margins are no sums of token losses

    def terms(self, now, reference):
        weights, found = {"forget": self.config.gamma, "retain": self.config.alpha}, {}
        for part, one in now.items():
            apart = matching_loss(row_margins(one.logits, one.labels), self.targets[part][one.index], "none")
            found[part] = rows(part, apart, weights[part])
        return found


METHOD = Method(
    name="dmm",
    family="unlearning",
    title="Attribute-to-Delete: Machine Unlearning via Datamodel Matching",
    authors="Georgiev et al.",
    arxiv="2410.23232",
    year=2024,
    status="abstract-only",
    difference="Built from the abstract: what is matched (the mean margin of a row's scored tokens), the regression "
    "and its defaults are ours.",
    target="hfext.unlearning.dmm:DMM",
    config=DMMConfig,
    usage="UnlearningTrainer(model, args, f, r, objective=DMM(targets={'forget': f_hat, 'retain': r_hat}))",
    summary="Predicts by data attribution what a retrained model would say, and fine-tunes towards that.",
    claim="Matching predicted oracle outputs comes close to retraining, where gradient ascent does not.",
    headline=Result(
        metric="KLoM of forget points, distance to retraining",
        setting="image classification (abstract, figures not known to us)",
        value="below existing approximate methods",
    ),
    notes="`estimate_datamodel` and `predicted_oracle` make the targets from models trained on subsets. No recipe: "
    "hundreds of trainings; the tests have regressions, whose retrained models are known in closed form.",
)
