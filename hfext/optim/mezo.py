"""MeZO: fine-tuning in the memory of inference, from two forward passes and a seed.

    z ~ N(0, I);  w += eps z;  l1 = L(w);  w -= 2 eps z;  l2 = L(w);  w += eps z
    pg = (l1 - l2) / (2 eps);   w <- w - lr (pg z + wd w)

z is drawn again from its seed each time it is needed. L is evaluated in eval mode (no dropout, no NEFTune) without
gradients and need not be differentiable: what `compute_loss_func` returns may be an error rate. The three in-place
moves leave a rounding of a few ulp in the weights; `restore=exact` avoids it with a copy of them.

Fine-Tuning Language Models with Just Forward Passes, arXiv 2305.17333.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import Method, Result
from ._zeroth import Move, ZerothOrder, ZerothOrderConfig, apply_, undisturbed


@dataclass(frozen=True, kw_only=True)
class MeZOConfig(ZerothOrderConfig):
    """
    Args:
        directions: Directions in an update, whose estimates are averaged; each costs two forward passes.
        restore: `copyless` walks back in place; `exact` restores from a copy of the trained weights.
    """

    directions: int = 1
    restore: str = "copyless"

    def __post_init__(self):
        super().__post_init__()
        self.whole("directions", 1)
        if self.restore not in ("copyless", "exact"):
            raise ValueError(f"restore is {self.restore!r} but must be one of copyless, exact.")


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
    trajectory_of = "MeZO"

    def __init__(self, params, lr: float = 1e-6, weight_decay: float = 0.0, run_seed: int = 0, **options):
        super().__init__(params, lr, weight_decay, run_seed, **options)
        self._away: dict[int, float] = {}  # how far each weight is from its place along the direction `_seed`
        self._seed = 0
        self._backup: dict[int, Tensor] = {}

    @property
    def exact(self) -> bool:
        """Whether weights come back from a copy."""
        return self.config.restore == "exact"

    def pair(self, closures: Sequence[Callable[..., Tensor]], seed: int, count: bool) -> tuple[float, float]:
        eps = self.config.eps
        if self.exact:
            self._backup = {place: weight.detach().clone() for place, _, weight in self.weights()}
        self._away, self._seed = {place: 0.0 for place, _, _ in self.weights()}, seed
        try:
            self._walk(eps)
            up = sum(float(closure(count=count)) for closure in closures)
            self._walk(-2 * eps)
            down = sum(float(closure(count=False)) for closure in closures)
        finally:
            self.restore()
        return up, down

    def _walk(self, distance: float) -> None:
        with undisturbed():
            for place, _, weight in self.weights():
                apply_(weight, [Move(self._seed, distance)], place)
                self._away[place] += distance

    @torch.no_grad()
    def restore(self) -> None:
        with undisturbed():
            for place, _, weight in self.weights() if self._away else ():
                if self._backup:
                    weight.copy_(self._backup[place])
                elif self._away[place]:
                    apply_(weight, [Move(self._seed, -self._away[place])], place)
            self._away, self._backup = {}, {}

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
    notes="Learning rates are of the order of 1e-6 for all weights of a large language model and 1e-4 to 1e-3 for "
    "LoRA; a model that was not pretrained hardly learns. The log's grad_norm is 0, for there is none: "
    "mezo/projected_grad is what was measured. Accumulation and processes make an exact mean of a direction's two "
    "losses. The update is the same on every process because all draw the same noise on the same kind of device.",
)
