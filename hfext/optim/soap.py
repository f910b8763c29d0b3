"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, which is followed by one power iteration at a time.

For a gradient G [m, n] with left and right factors L, R and orthonormal bases Q_L, Q_R:

    first call:   L <- (1 - b) G G',  R <- (1 - b) G' G,  Q by eigh, largest eigenvalue first; the weights stay
    later calls:  G' = Q_L' G Q_R;   m <- b1 m + (1 - b1) G',   v <- b2 v + (1 - b2) G'^2     (in the rotated basis)
                  W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) Q_L (m / (sqrt(v) + eps)) Q_R';   W <- (1 - lr wd) W
                  L <- b L + (1 - b) G G',  R likewise
    every f:      columns of Q and entries of v sorted by diag(Q' L Q), Q <- qr(L Q), m turned into the new basis

A tensor of more dimensions has a factor for each. Sides above `max_precond_dim` are not rotated, vectors are Adam's.

SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321. Factors, bases and moments are float32 whatever
the weights' dtype (float64 for float64). eps stands inside the corrected root, as in Shampoo's line of programs.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from ..registry import Method, Result
from ._ascent import check
from ._moments import MomentOptimizer, adam_moments, check_types, checked_betas, move, refuse_sharded, wide


@dataclass(frozen=True, kw_only=True)
class SOAPConfig:
    """Options of [`SOAP`].

    Args:
        beta1: Of the first moment, in [0, 1). Left out: `adam_beta1` of the arguments if it is not 0.9, else 0.95.
        beta2: Of the second moment, in [0, 1). Left out: `adam_beta2` of the arguments if it is not 0.999, else 0.95.
        shampoo_beta: Of the factors, in [0, 1); `beta2` when left out.
        precondition_frequency: Updates between two refreshes of the bases, >= 1.
        max_precond_dim: Longest side with a factor, >= 0. At 0 nothing is rotated: Adam without its first update.
        precondition_1d: Give vectors a factor too.
        merge_dims: Join neighbouring dimensions of tensors with more than two, such as kernels of convolutions, while
            their product is at most `max_precond_dim`.
        normalize_grads: Divide each tensor's direction by its root mean square; helps at a frequency of about 100.
    """

    beta1: float | None = None
    beta2: float | None = None
    shampoo_beta: float | None = None
    precondition_frequency: int = 10
    max_precond_dim: int = 10000
    precondition_1d: bool = False
    merge_dims: bool = False
    normalize_grads: bool = False

    def __post_init__(self):
        check_types(self)
        for field in ("beta1", "beta2", "shampoo_beta"):
            value = getattr(self, field)
            check(self, field, value is None or 0 <= value < 1, "in [0, 1)")
        check(self, "precondition_frequency", self.precondition_frequency >= 1, ">= 1")
        check(self, "max_precond_dim", self.max_precond_dim >= 0, ">= 0")


def merged_shape(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Neighbouring dimensions joined from the left, each product at most `limit`."""
    merged: list[int] = []
    for size in shape:
        if merged and merged[-1] * size <= limit:
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(merged)


def factor(grad: Tensor, dim: int) -> Tensor:
    """G G' with `dim` as the rows: [size, size]."""
    others = [d for d in range(grad.dim()) if d != dim]
    return torch.tensordot(grad, grad, dims=(others, others))


def rotate(x: Tensor, bases: list[Tensor | None], back: bool = False) -> Tensor:
    """`x` in the bases' coordinates, or `back` from them; a dimension without a basis stays."""
    for dim, q in enumerate(bases):
        if q is not None:
            x = torch.tensordot(x, q, dims=([dim], [int(back)])).movedim(-1, dim)
    return x


def eigenbasis(covariance: Tensor) -> Tensor:
    """Eigenvectors as columns, the largest eigenvalue first."""
    jitter = 1e-30 * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    try:
        vectors = torch.linalg.eigh(covariance + jitter).eigenvectors
    except torch.linalg.LinAlgError:  # float32 does not always converge
        vectors = torch.linalg.eigh((covariance + jitter).double()).eigenvectors.to(covariance.dtype)
    return vectors.flip(1).contiguous()


def refreshed(covariance: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(order, Q): the columns of `basis` by their estimated eigenvalue, and one power iteration with QR from there."""
    image = covariance @ basis
    order = (image * basis).sum(0).argsort(descending=True, stable=True)
    return order, torch.linalg.qr(image[:, order]).Q.contiguous()


class SOAP(MomentOptimizer):
    """SOAP: `SOAP(model.parameters(), lr=3e-3)`.

    The first call of `step` only builds the bases. With `TrainingArguments`, set `learning_rate` (3e-3 in the paper)
    and `weight_decay` (0.01) there.

    Args:
        params: Parameters or groups.
        lr (`float`, *optional*, defaults to 3e-3): Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.95, 0.95)`): Of the moments, where `beta1` and
            `beta2` are left out.
        eps (`float`, *optional*, defaults to 1e-8): Added to the root.
        weight_decay (`float`, *optional*, defaults to 0.01): Decoupled.
        **options: Fields of [`SOAPConfig`].
    """

    Config = SOAPConfig
    state_options = ("max_precond_dim", "precondition_1d", "merge_dims")

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **options: Any,
    ):
        config = SOAPConfig(**options)
        first, second = checked_betas("SOAP", betas)
        betas = (first if config.beta1 is None else config.beta1, second if config.beta2 is None else config.beta2)
        super().__init__(params, config, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @classmethod
    def check_arguments(cls, args: TrainingArguments) -> None:
        refuse_sharded(args, "soap", "its factors G G' and G' G are those of whole matrices, not of shards.")

    @classmethod
    def trainer_kwargs(cls, context, config: SOAPConfig) -> dict[str, Any]:
        args = context.args
        given = (
            (args.adam_beta1, 0.9),
            (args.adam_beta2, 0.999),
        )  # what was asked for, and the Trainer's own defaults
        betas = tuple(0.95 if value == untouched else value for value, untouched in given)
        return {**super().trainer_kwargs(context, config), "betas": betas}

    def update(self) -> None:
        for group, _, p in self.with_grad():
            grad, state = p.grad.to(wide(p.dtype)), self.state[p]
            if self.config.merge_dims and grad.dim() > 2:
                grad = grad.reshape(merged_shape(tuple(grad.shape), self.config.max_precond_dim))
            beta = group["betas"][1] if self.config.shampoo_beta is None else self.config.shampoo_beta
            if "step" not in state:
                state |= {"step": 0, "exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad)}
                for dim in self._rotated(grad):
                    state[f"factor_{dim}"] = factor(grad, dim).mul_(1 - beta)
                    state[f"basis_{dim}"] = eigenbasis(state[f"factor_{dim}"])
                continue
            state["step"] += 1
            decay = group["lr"] * group["weight_decay"]
            # The decay comes after the update and shrinks that too.
            move(p, self._direction(state, grad, group).reshape(p.shape).mul_(-group["lr"] * (1 - decay)), decay)
            self._follow(state, grad, beta)

    def _rotated(self, grad: Tensor) -> list[int]:
        c = self.config
        if grad.dim() < 2 and not c.precondition_1d:
            return []
        return [dim for dim, size in enumerate(grad.shape) if 1 < size <= c.max_precond_dim]

    def _direction(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        (beta1, beta2), t = group["betas"], state["step"]
        bases = [state.get(f"basis_{dim}") for dim in range(grad.dim())]
        adam_moments(state["exp_avg"], state["exp_avg_sq"], rotate(grad, bases), group["betas"])
        direction = rotate(state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"]), bases, back=True)
        if self.config.normalize_grads:
            direction = direction / (direction.square().mean().sqrt() + 1e-30)
        return direction * (math.sqrt(1 - beta2**t) / (1 - beta1**t))

    def _follow(self, state: dict[str, Any], grad: Tensor, beta: float) -> None:
        """Take the gradient into the factors and, when it is time, the bases to where these point."""
        rotated = self._rotated(grad)
        for dim in rotated:
            state[f"factor_{dim}"].lerp_(factor(grad, dim), 1 - beta)
        if state["step"] % self.config.precondition_frequency or not rotated:
            return
        turns: list[Tensor | None] = [None] * grad.dim()
        for dim in rotated:
            old = state[f"basis_{dim}"]
            order, new = refreshed(state[f"factor_{dim}"], old)
            state["exp_avg_sq"] = state["exp_avg_sq"].index_select(dim, order)
            state[f"basis_{dim}"], turns[dim] = new, old.mT @ new
        state["exp_avg"] = rotate(state["exp_avg"], turns)


METHOD = Method(
    name="soap",
    family="optim",
    title="SOAP: Improving and Stabilizing Shampoo using Adam",
    authors="Vyas et al.",
    arxiv="2409.11321",
    year=2024,
    repo="nikhilvyas/SOAP",
    status="faithful",
    target="hfext.optim.soap:SOAP",
    config=SOAPConfig,
    usage='TrainingArguments(optim="soap", learning_rate=3e-3, weight_decay=0.01)',
    summary="Adam in the slowly turning eigenbasis of Shampoo's preconditioner: fewer tokens to the same loss.",
    claim="SOAP reaches AdamW's loss with at most 0.8 times the tokens, both with their best learning rate.",
    headline=Result(
        metric="steps and wall time to the same loss",
        setting="language models of 360M and 660M weights, large batch",
        value="at least 40 % fewer steps, at least 35 % less time",
        baseline="AdamW",
    ),
    recipe="optim/soap-llama-shakespeare.yaml",
    notes="State of a matrix [m, n]: 2 m n + 2 m^2 + 2 n^2 numbers in float32. A gradient that is not finite leaves "
    "out the whole update, so that it never enters a preconditioner. Where gradients have a lower rank than a side is "
    "long (few tokens, unused embeddings), rounding decides on the basis of the rest: runs that sum in another order, "
    "such as with accumulation or on more processes, then part. `precondition_1d` meets that in every model, since a "
    "vector's gradient has rank 1: on a tiny GPT-2, accumulation then changes weights by 1e-2 in a few updates at a "
    "rate of 1e-3. Measured with the best learning rate at the top of the grid, so that SOAP may have a better one.",
)
