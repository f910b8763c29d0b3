"""FRUGAL: AdamW in a part of the gradient that changes every `update_gap` updates, signSGD in the rest of it.

For a projected matrix W with gradient G, down/up the projection onto the present part, u AdamW's direction:

    W <- (1 - lr wd) W - lr s up(u(down(G))) - lr s r sign(G - up(down(G)))

with s = proj_lr_scale and r = inactive_lr_scale. Moments exist for the part alone, and start anew, with their step
counter, when it changes. All other parameters are AdamW's. `inactive="none"` leaves the rest of the gradient out: with
`projection="galore"` that is GaLore, with "block" a form of BAdam.

FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training, arXiv 2411.07837. Beyond the
paper: a part has at least one column, row, entry, direction or tensor; beside a GaLore matrix, what is rounding of the
projection counts as zero, not as a sign. Moments and projections are float32 (float64 for float64).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import check_target_module_exists
from transformers.utils import logging

from ..registry import Method, Result
from . import _subspace
from ._ascent import check
from ._moments import (
    MomentOptimizer,
    adam_direction,
    adam_moments,
    check_types,
    move,
    refuse_sharded,
    trainer_groups,
    wide,
)

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class FRUGALConfig:
    """Options of [`FRUGAL`].

    Args:
        density: Share of the projected weights that has moments, in [0, 1].
        update_gap: Updates after which the part changes, >= 1.
        projection: `block`: whole tensors, for pre-training; `columns`, `rows` (of the stored weight) or `randk`
            (entries) of every tensor, for fine-tuning; `galore`: directions of its smaller side.
        order: Of the tensors for `block`: `random`, `ascending`, `descending`, or `mirror` (there and back).
        basis: Of `galore`: `svd` of the gradient at that moment, `random`, or `permutation` (unit vectors).
        inactive: What moves the rest: `sign_sgd`, `sgd` or `none`.
        inactive_lr_scale: Its learning rate over that of the part, >= 0; the paper fine-tunes with 0.1.
        proj_lr_scale: Learning rate of projected weights over that of the others, >= 0.
        reset_statistics: Start moments and step counter anew when the part becomes another. Without it they stay in
            their place, which has a meaning for `galore` and `block`.
        seed: Of everything that is drawn; the same on every process.
    """

    density: float = 0.25
    update_gap: int = 200
    projection: Literal["block", "columns", "rows", "randk", "galore"] = "block"
    order: Literal["random", "ascending", "descending", "mirror"] = "descending"
    basis: Literal["svd", "random", "permutation"] = "svd"
    inactive: Literal["sign_sgd", "sgd", "none"] = "sign_sgd"
    inactive_lr_scale: float = 1.0
    proj_lr_scale: float = 1.0
    reset_statistics: bool = True
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check(self, "density", 0 <= self.density <= 1, "in [0, 1]")
        check(self, "update_gap", self.update_gap >= 1, ">= 1")
        check(self, "inactive_lr_scale", self.inactive_lr_scale >= 0, ">= 0")
        check(self, "proj_lr_scale", self.proj_lr_scale >= 0, ">= 0")


def projected_parameters(model: nn.Module, target_modules: str | list[str] | None = None) -> list[nn.Parameter]:
    """Weights of the linear layers that FRUGAL projects: matrices called `weight`, of embeddings alone not.

    `None` and `all-linear` mean all but the output layer and weights that are tied to an embedding; otherwise names of
    modules, parts of names, or a regular expression, as `TrainingArguments(optim_target_modules=...)` reads them.
    """
    if target_modules is not None and not isinstance(target_modules, str | list):
        raise TypeError(f"optim_target_modules is a {type(target_modules).__name__} but must be a string or a list.")
    everything = target_modules is None or str(target_modules).replace("_", "-") == "all-linear"
    outputs = [m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel)]
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    excluded = {id(m.weight) for m in [*outputs, *embeddings] if m is not None} if everything else set()
    found: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        named, is_regex = (
            (True, True) if everything else check_target_module_exists(target_modules, name, return_is_regex=True)
        )
        if not named:
            continue
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding) or weight is None or weight.dim() != 2:
            if not is_regex:
                logger.warning(f"{name} is a {type(module).__name__}: FRUGAL projects linear layers alone.")
        elif id(weight) not in excluded and weight.requires_grad:
            found[id(weight)] = weight
    if not found:
        asked = "the model" if everything else f"optim_target_modules={target_modules!r}"
        raise ValueError(f"FRUGAL: {asked} has no trained linear layer to project. Name some, or use AdamW.")
    return list(found.values())


def split_groups(params: Iterable[Any], projected: Iterable[Tensor] | None = None) -> list[dict[str, Any]]:
    """Parameter groups of which each is `projected` or not; without a list of them, every matrix is."""
    known = None if projected is None else {id(p) for p in projected}
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    parts = []
    for group in groups:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if "projected" in group:
            parts.append({**group, "params": members})
            continue
        for use in (True, False):
            tensors = [p[1] if isinstance(p, tuple) else p for p in members]
            mine = [
                member
                for member, p in zip(members, tensors, strict=True)
                if (p.dim() == 2 if known is None else id(p) in known) == use
            ]
            if mine:
                parts.append({**group, "params": mine, "projected": use})
    return parts


class FRUGAL(MomentOptimizer):
    """FRUGAL over AdamW: `FRUGAL(model.parameters(), lr=1e-3, projected=projected_parameters(model))`.

    Args:
        params: Parameters or groups. A group with `projected` (bool) says so for all of its parameters.
        lr (`float`, *optional*, defaults to 1e-3): Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): Of the moments.
        eps (`float`, *optional*, defaults to 1e-8): Added to the root.
        weight_decay (`float`, *optional*, defaults to 0): Decoupled.
        projected (*optional*): The parameters to project, as from `projected_parameters(model)`. Without it, every
            matrix is projected, embeddings too.
        **options: Fields of [`FRUGALConfig`].
    """

    Config = FRUGALConfig
    state_options = ("density", "projection", "basis")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        projected: Iterable[Tensor] | None = None,
        **options: Any,
    ):
        groups = split_groups(params, projected)
        super().__init__(groups, FRUGALConfig(**options), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @classmethod
    def check_arguments(cls, args: TrainingArguments) -> None:
        refuse_sharded(args, "frugal", "columns and singular vectors are those of whole matrices.")

    @classmethod
    def trainer_kwargs(cls, context, config: FRUGALConfig) -> dict[str, Any]:
        kwargs = super().trainer_kwargs(context, config)
        if context.model is None:
            raise ValueError("optim='frugal' needs the model, to find its linear layers.")
        groups = trainer_groups(context.model, context.args.weight_decay)
        projected = projected_parameters(context.model, context.args.optim_target_modules)
        return {**kwargs, "params": split_groups(groups, projected)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; where the group does not say `projected`, its matrices are, in a group of their own."""
        for group in split_groups([param_group]):
            super().add_param_group(group)

    def update(self) -> None:
        c, refresh = self.config, self.updates // self.config.update_gap
        members = [p for group in self.param_groups if group["projected"] for p in group["params"]]
        place = {id(p): i for i, p in enumerate(members)}
        blocks = self._blocks(members, refresh) if c.projection == "block" else None
        for group, _, p in self.with_grad():
            grad = p.grad.to(wide(p.dtype))
            if not group["projected"]:
                change = self._adam(self.state[p], grad, group)
                move(p, change.mul_(-group["lr"]), group["lr"] * group["weight_decay"])
                continue
            matrix = grad.flatten(1) if grad.dim() > 1 else grad.reshape(1, -1)
            i = place[id(p)]
            kind, basis = self._part(p, i, matrix, refresh, None if blocks is None else i in blocks)
            change = self._change(p, matrix, kind, basis, group)
            move(p, change.reshape(p.shape).mul_(-group["lr"] * c.proj_lr_scale), group["lr"] * group["weight_decay"])

    def _blocks(self, members: list[Tensor], refresh: int) -> set[int]:
        """The tensors that have moments. Drops those of the others, and of all when others had them before."""
        c = self.config
        now, before = (
            _subspace.active_blocks(len(members), c.density, c.order, max(0, turn), c.seed)
            for turn in (refresh, refresh - 1)
        )
        for i, p in enumerate(members):
            begins = now != before and self.state.get(p, {}).get("refresh") != refresh
            if i not in now or (c.reset_statistics and begins):
                self.state.pop(p, None)
        return now

    def _part(
        self, p: Tensor, i: int, grad: Tensor, refresh: int, active: bool | None
    ) -> tuple[str | None, Tensor | None]:
        """The kind and basis of this tensor's part, drawn when a refresh is due; kind None when it has no part."""
        c = self.config
        if c.density == 0 or active is False:
            return None, None
        kind = "all" if active else _subspace.kind_of(c.projection, grad.shape, c.basis)
        state = self.state[p]
        if state.get("refresh") != refresh:
            if kind != "all":
                size = _subspace.size_of(kind, grad.shape, c.density)
                basis = _subspace.draw(kind, grad, size, c.basis, _subspace.generator(c.seed, i, refresh))
                if c.reset_statistics and not ("basis" in state and torch.equal(state["basis"], basis)):
                    state.clear()
                state["basis"] = basis
            state["refresh"] = refresh
        return kind, state.get("basis")

    def _change(self, p: Tensor, grad: Tensor, kind: str | None, basis: Tensor | None, group: dict) -> Tensor:
        """u + r rule(rest), the direction against which the weights move."""
        c = self.config
        if kind is None:
            change, rest = torch.zeros_like(grad), grad
        else:
            part = _subspace.down(grad, kind, basis)
            change = _subspace.up(self._adam(self.state[p], part, group), kind, basis, grad.shape)
            if kind == "all" or c.inactive == "none":
                return change
            rest = _subspace.complement(grad, part, kind, basis)
        if c.inactive == "none":
            return change
        return change.add_(rest.sign() if c.inactive == "sign_sgd" else rest, alpha=c.inactive_lr_scale)

    @staticmethod
    def _adam(state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        if "step" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad)}
        state["step"] += 1
        adam_moments(state["exp_avg"], state["exp_avg_sq"], grad, group["betas"])
        return adam_direction(state["exp_avg"], state["exp_avg_sq"], state["step"], group["betas"], group["eps"])


METHOD = Method(
    name="frugal",
    family="optim",
    title="FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
    authors="Zmushko et al.",
    arxiv="2411.07837",
    year=2024,
    repo="fzmushko/FRUGAL",
    status="faithful",
    target="hfext.optim.frugal:FRUGAL",
    config=FRUGALConfig,
    usage='TrainingArguments(optim="frugal", optim_args="density=0.25,update_gap=200")',
    summary="AdamW in a changing part of each gradient and signSGD in the rest: a fraction of AdamW's state.",
    claim="At density 0.25 FRUGAL comes close to AdamW's loss and below that of GaLore and BAdam of equal density.",
    headline=Result(
        metric="validation perplexity",
        setting="LLaMA 60M to 350M on C4, density 0.25",
        value="near AdamW, and below GaLore and BAdam (figures not re-checked)",
        baseline="AdamW",
    ),
    recipe="optim/frugal-llama-shakespeare.yaml",
    notes="8 * density bytes of moments a projected weight, 8 for each of the others (embeddings, norms, output). "
    "`randk` adds 4 * density bytes of indices, `galore` a float32 matrix [smaller side, rank].",
)
