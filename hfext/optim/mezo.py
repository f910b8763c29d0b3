"""MeZO: fine-tuning in the memory of inference, from two forward passes and a seed.

    z ~ N(0, I);  w += eps z;  l1 = L(w);  w -= 2 eps z;  l2 = L(w);  w += eps z
    pg = (l1 - l2) / (2 eps);   w <- w - lr (pg z + wd w)

z is drawn again from its seed each time it is needed. L is evaluated in eval mode without gradients and need not be
differentiable: what `compute_loss_func` returns may be an error rate. The three in-place moves leave a rounding of a
few ulp in the weights; `restore=exact` avoids it with a copy of them.

Fine-Tuning Language Models with Just Forward Passes, arXiv 2305.17333.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import Method, Result
from ._zeroth import Move, ZerothOrder, apply_


@dataclass(frozen=True, kw_only=True)
class MeZOConfig:
    """
    Args:
        eps: Length of the step to either side, in units of the noise; > 0.
        directions: Directions in an update, whose estimates are averaged; each costs two forward passes.
        restore: `copyless` walks back in place; `exact` restores from a copy of the trained weights.
        seed: Of the directions; the Trainer's `seed` by default.
    """

    eps: float = 1e-3
    directions: int = 1
    restore: str = "copyless"
    seed: int | None = None

    def __post_init__(self):
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"eps is {self.eps!r} but must be above 0 and finite.")
        if self.directions < 1:
            raise ValueError(f"directions is {self.directions!r} but must be >= 1.")
        if self.restore not in ("copyless", "exact"):
            raise ValueError(f"restore is {self.restore!r} but must be one of copyless, exact.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r} but must be >= 0 and below 2^63.")


class MeZO(ZerothOrder):
    """Zeroth-order SGD: `MeZO(model.parameters(), lr=1e-6).step(lambda: model(**batch).loss)`.

    Args:
        params: As for every optimizer of torch.
        lr: Learning rate; of the order of 1e-6 for all weights of a language model, 1e-4 to 1e-3 for LoRA.
        weight_decay: Decoupled from the direction, times `lr`.
        run_seed: Seed where the config has none.
        **options: Fields of [`MeZOConfig`].
    """

    Config = MeZOConfig

    def __init__(self, params, lr: float = 1e-6, weight_decay: float = 0.0, run_seed: int = 0, **options):
        super().__init__(params, lr, weight_decay, run_seed, **options)
        self._away: list[float] = []  # how far each weight is from its place, in units of the direction `_seed`
        self._seed = 0
        self._backup: list[Tensor] = []

    def pair(self, closures: Sequence[Callable[..., Tensor]], seed: int, count: bool) -> tuple[float, float]:
        eps, weights = self.config.eps, self.weights()
        if self.config.restore == "exact":
            self._backup = [weight.detach().clone() for _, _, weight in weights]
        self._away, self._seed = [0.0] * len(weights), seed
        try:
            self._walk(eps)
            up = sum(float(closure(count=count)) for closure in closures)
            self._walk(-2 * eps)
            down = sum(float(closure(count=False)) for closure in closures)
        finally:
            self.restore()
        return up, down

    def _walk(self, distance: float) -> None:
        for place, _, weight in self.weights():
            apply_(weight, [Move(self._seed, distance)], place)
            self._away[place] += distance

    @torch.no_grad()
    def restore(self) -> None:
        for place, _, weight in self.weights() if self._away else ():
            if self._backup:
                weight.copy_(self._backup[place])
            elif self._away[place]:
                apply_(weight, [Move(self._seed, -self._away[place])], place)
        self._away, self._backup = [], []

    @property
    def is_perturbed(self) -> bool:
        return bool(self._away)


METHOD = Method(
    name="mezo",
    family="optim",
    title="Fine-Tuning Language Models with Just Forward Passes",
    authors="Malladi et al.",
    arxiv="2305.17333",
    year=2023,
    repo="princeton-nlp/MeZO",
    status="faithful",
    target="hfext.optim.mezo:MeZO",
    config=MeZOConfig,
    usage='TrainingArguments(optim="mezo", learning_rate=1e-6, optim_args="eps=1e-3")',
    summary="Fine-tunes from two forward passes an update, in the memory of inference.",
    claim="Fine-tuning with forward passes alone comes close to fine-tuning with gradients, in the memory of "
    "inference.",
    headline=Result(
        metric="accuracy, %, and memory against fine-tuning with Adam",
        setting="OPT-13B on 11 tasks: within 1 % of full fine-tuning on 7, with up to 12 times less memory",
        value="within 1 % on 7 of 11",
    ),
    recipe="optim/mezo-llama-wikipedia.yaml",
    notes="Accumulation, several directions and processes are exact means over one direction's two losses. The update "
    "is the same on every process because all draw the same noise on the same kind of device.",
)
