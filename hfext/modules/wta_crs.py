"""WTA-CRS: a linear layer that keeps a part of its input rows for the backward pass, with an unbiased weight gradient.

    dW = sum_i g_i x_i'  over n rows (tokens) is estimated from k = max(min_rows, floor(ratio n)) of them:
    p_i ~ ||x_i|| s_i;  C = the c rows of largest p;  k - c more are drawn with replacement by p_i / t, t = 1 - p(C)
    dW ~ sum_{i in C} g_i x_i' + 1 / (k - c) sum_{drawn j} t / p_j g_j x_j',    c = argmin_{0 <= c < k} t / (k - c)

s_i is the norm of row i of the gradient when this example was last seen. Where it was not seen yet s_i = 1, so p is
that of the activations. The estimate is unbiased for every p > 0, and the gradients of input and bias are exact. Where
norms are of an earlier visit, 1 % of p is that of the activations: a row whose gradient was 0 then (labels, dropout
and weights change) would else be drawn once in 1e8 passes, with a weight of 1e8, and seem to have no gradient until
then. So the weight of a drawn row stays below 100 sum_j ||x_j|| / ((k - c) ||x_i||). p has 1e-8 of its mean added, so
no row is out of reach; t is summed from the smallest p up and stays exact when p(C) is near 1. Norms in float32,
probabilities in float64, products in the layer's dtype with the scale on the gradient's rows.

With p ~ ||x_i|| ||g_i|| the variance is (t^2 Z^2 - ||tail||^2) / (k - c), Z constant and ||tail|| small, so the least
is at c = argmin t^2 / (k - c), not where the paper's rule looks: `winners="variance"`.

Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model, arXiv 2305.15265.
"""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .._fields import coerce, in_range, one_of
from ..compat import CheckpointMixin
from ..registry import Method, Result
from ._replace import DropIn
from ._selection import Sampler, Selection

logger = logging.get_logger(__name__)

FILE = "wta_crs_{rank}.safetensors"
FLOOR = 1e-8  # of the mean weight
MIXED = 0.01  # part of p that is the activations', where the rest comes from the cache


@dataclass(frozen=True, kw_only=True)
class WTACRSConfig:
    """Options of [`WTACRSLinear`].

    Args:
        ratio: Part of the rows that is kept, in (0, 1]. At 1 the layer is exact.
        min_rows: Rows that are kept at least, >= 1. An input with no more rows is kept whole.
        norm_source: `cache` weighs rows by the gradient norms of the example's last visit (2 bytes for each token of
            the data and layer, on the CPU), `activation` by the activations alone, for data that is seen once.
        winners: `paper` takes c = argmin t / (k - c), `variance` c = argmin t^2 / (k - c).
        share_inputs: Layers that read the very same tensor (query, key and value; gate and up) keep the same rows,
            once. False draws for each, as the paper does, and then three layers at 0.3 keep nearly a whole input.
        seed: Of the draws, >= 0. Torch's generators are not touched.
    """

    ratio: float = 0.3
    min_rows: int = 10
    norm_source: Literal["cache", "activation"] = "cache"
    winners: Literal["paper", "variance"] = "paper"
    share_inputs: bool = True
    seed: int = 0

    def __post_init__(self):
        in_range("WTACRSConfig: ratio", coerce("WTACRSConfig: ratio", float, self.ratio), 0, 1, low_open=True)
        for name, least in (("min_rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"WTACRSConfig: {name} is {value!r} but must be an integer >= {least}.")
        one_of("WTACRSConfig: norm_source", self.norm_source, ("cache", "activation"))
        one_of("WTACRSConfig: winners", self.winners, ("paper", "variance"))
        one_of("WTACRSConfig: share_inputs", self.share_inputs, (True, False))


def kept_rows(n: int, ratio: float, min_rows: int) -> int:
    """k, at most n."""
    return min(n, max(min_rows, int(ratio * n)))


def probabilities(weights: Tensor) -> Tensor:
    """p from weights >= 0 [n], float64; uniform where all weights are 0. A weight that is not finite counts as the
    largest that is."""
    w = weights.double()
    finite = w.isfinite()
    if not finite.all():
        w = torch.where(finite, w, w[finite].amax() if finite.any() else 1.0)
    mean = w.mean()
    w = w / mean + FLOOR if mean > 0 else torch.ones_like(w)
    return w / w.sum()


def tails(p_sorted: Tensor) -> Tensor:
    """t of every c: what is left of p, in falling order, behind its c largest."""
    return p_sorted.flip(0).cumsum(0).flip(0)


def winner_count(tail: Tensor, k: int, rule: Literal["paper", "variance"] = "paper") -> int:
    """c, the rows that are kept for certain, from the tails of p."""
    left = tail[:k] if rule == "paper" else tail[:k] ** 2
    return int((left / (k - torch.arange(len(left), device=tail.device))).argmin())


def choose(p: Tensor, uniform: Tensor, rule: Literal["paper", "variance"] = "paper") -> tuple[Tensor, Tensor]:
    """Kept rows and their scales, from p [n] and k numbers in [0, 1): the winners, then what is drawn."""
    k = len(uniform)
    p_sorted, order = p.sort(descending=True, stable=True)
    tail = tails(p_sorted)
    c = winner_count(tail, k, rule)
    cumulative = p_sorted[c:].cumsum(0)
    drawn = torch.searchsorted(cumulative, uniform[c:] * cumulative[-1], right=True).clamp_(max=len(cumulative) - 1)
    scale = torch.ones_like(p[:k])
    scale[c:] = tail[c] / ((k - c) * p_sorted[c:][drawn])
    return torch.cat([order[:c], order[c:][drawn]]), scale


class _SampledLinear(torch.autograd.Function):
    """y = x w' + b with w [out, in], or x w + b with `transposed`; x [n, in]."""

    @staticmethod
    def forward(ctx, x, weight, bias, transposed, rows, selection, sampler, shape):
        ctx.save_for_backward(weight, rows, selection.index, selection.scale)
        ctx.transposed, ctx.selection, ctx.sampler, ctx.shape = transposed, selection, sampler, shape
        return _affine(x, weight, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, rows, index, scale = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if ctx.sampler.keep_norms:
            squares = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32) ** 2
            ctx.sampler.note(ctx.selection, squares, ctx.shape)
        grad_x = grad @ (weight.t() if ctx.transposed else weight) if need_x else None
        grad_weight = None
        if need_weight:
            kept = (grad.index_select(0, index).float() * scale[:, None].float()).to(grad.dtype)
            grad_weight = rows.t() @ kept if ctx.transposed else kept.t() @ rows
        return grad_x, grad_weight, grad.sum(0) if need_bias else None, None, None, None, None, None


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


class WTACRSLinear(DropIn):
    """A linear layer that saves a part of its input: `hfext.modules.replace(model, WTACRSLinear(ratio=0.3))`.

    Exact, and as fast as before, in eval mode, without gradients and where the weight is not trained; so with LoRA
    only the adapters' layers are sampled, and theirs are the inputs that are kept. Under gradient checkpointing there
    is nothing to save.

    Args:
        **options: Fields of [`WTACRSConfig`].
    """

    def __init__(self, **options: Any):
        super().__init__()
        self.config = WTACRSConfig(**options)
        self.sampler = Sampler(self.config.seed, self.config.norm_source == "cache")
        self.layer, self.transposed = "", False

    def own(self) -> dict[str, Any]:
        return {"config": self.config, "sampler": self.sampler, "layer": self.layer, "transposed": False}

    def from_dense(self, dense: nn.Module, name: str = "") -> "WTACRSLinear":
        new = super().from_dense(dense, name)
        new.layer, new.transposed = name, isinstance(dense, Conv1D)
        return new

    def begin(self, model: nn.Module, modules: dict[str, DropIn]) -> list[Any]:
        # Each `replace` has draws and a cache of its own, also where a template is used twice.
        sampler = Sampler(self.config.seed, self.config.norm_source == "cache")
        for module in modules.values():
            module.sampler = sampler
        return [*sampler.watch(model), model.register_forward_pre_hook(_warn_of_checkpointing)]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is None:
            raise RuntimeError("WTACRSLinear has no weights: give it to hfext.modules.replace(model, ...).")
        n = x.shape[:-1].numel()
        k = kept_rows(n, self.config.ratio, self.config.min_rows)
        if k == n or not (self.training and torch.is_grad_enabled() and weight.requires_grad):
            return _affine(x, weight, bias, self.transposed)
        given = x
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        flat = x.reshape(n, x.shape[-1])
        selection = self._select(given, flat, k)
        rows = selection.rows() if selection.rows is not None else None
        if rows is None or rows.dtype != flat.dtype:
            rows = flat.detach().index_select(0, selection.index)
            selection.rows = weakref.ref(rows)
        y = _SampledLinear.apply(flat, weight, bias, self.transposed, rows, selection, self.sampler, x.shape)
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def _select(self, given: Tensor, flat: Tensor, k: int) -> Selection:
        """The rows to keep: those of the layer before, if it read the same tensor."""
        sampler = self.sampler
        if self.config.share_inputs and sampler.last is not None:
            x, version, last = sampler.last[0](), sampler.last[1], sampler.last[2]()
            if x is given and version == given._version and last is not None and len(last.index) == k:
                return last
        weights = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32)
        norms = sampler.known_norms(self.layer, given.shape) if sampler.keep_norms else None
        p = probabilities(weights)
        if norms is not None:
            p = (1 - MIXED) * probabilities(weights * norms.to(weights.device)) + MIXED * p
        uniform = sampler.uniform(self.layer, k).to(weights.device)
        index, scale = choose(p, uniform, self.config.winners)
        selection = Selection(index.int(), scale.float(), self.layer, sampler.examples, sampler.mask)
        sampler.last = weakref.ref(given), given._version, weakref.ref(selection)
        return selection

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.config).items())


def _warn_of_checkpointing(model: nn.Module, args: tuple) -> None:
    if model.training and any(vars(module).get("gradient_checkpointing") for module in model.modules()):
        logger.warning_once(
            "WTA-CRS under gradient checkpointing saves nothing: activations are made again in the backward pass, and "
            "the weight gradients are sampled all the same. Switch one of the two off."
        )


class WTACRSMixin(CheckpointMixin):
    """For any Trainer of a model with [`WTACRSLinear`] layers: `class T(WTACRSMixin, Trainer)`.

    Checkpoints hold the draws' counter and the norm cache, so that a resumed run goes on bit for bit. Without it
    training is the same, and after a resume the draws and the cache begin anew.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._samplers()  # refuses before the first update what no checkpoint could hold

    def save_more(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)  # other processes may come before the one that makes it
        for sampler in self._samplers():
            sampler.save(str(Path(folder) / FILE.format(rank=self.args.process_index)))
        super().save_more(folder)

    def load_more(self, folder: str) -> None:
        for sampler in self._samplers():
            path = Path(folder) / FILE.format(rank=self.args.process_index)
            if path.is_file():
                sampler.load(str(path))
            else:
                logger.warning(f"{folder} has no {path.name}: draws and norms of WTA-CRS begin anew.")
        super().load_more(folder)

    def _samplers(self) -> list[Sampler]:
        found = {id(m.sampler): m.sampler for m in self.model.modules() if isinstance(m, WTACRSLinear)}
        if len(found) > 1:
            raise NotImplementedError(
                "The model was given to `replace` more than once: replace all layers in one call."
            )
        return list(found.values())


METHOD = Method(
    name="wta_crs",
    family="modules",
    title="Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model",
    authors="Liu et al.",
    arxiv="2305.15265",
    year=2023,
    repo="zirui-ray-liu/WTACRS",
    status="variant",
    difference="Unbiased on the first visit of an example too, where rows are weighed by their activations (the "
    "authors' code keeps all rows then, or scales drawn ones wrongly); 1 % of p always goes by activations, for rows "
    "whose cached norm says nothing of their gradient now; the drawn part is never dropped; examples are known by "
    "their contents, not by an index; layers that read the same tensor keep the same rows (`share_inputs`). Linear "
    "layers only: attention products are not sampled.",
    target="hfext.modules.wta_crs:WTACRSLinear",
    config=WTACRSConfig,
    usage="hfext.modules.replace(model, WTACRSLinear(ratio=0.3))",
    summary="Linear layers that keep 30 % of their input rows for backward, with an unbiased weight gradient.",
    claim="At 30 % of the rows WTA-CRS trains as well as exact gradients while the layers keep a third of the memory.",
    headline=Result(
        metric="peak memory of fine-tuning, exact over sampled",
        setting="T5 and BERT on GLUE, little loss of accuracy, batches up to 6.4 times as large",
        value="up to 2.7",
    ),
    recipe="modules/wta_crs-bert-banking77.yaml",
    notes="Expect the memory, not the accuracy, where training is short and from random weights: the recipe's small "
    "BERT ends at 38 % (40 and 36) on BANKING77 where exact gradients end at 59 % (68 % in three times the "
    "epochs). In single runs `activation` gave 43 % (at ratio 0.9 as well), the other rule for the winners 34 "
    "%, an exact head and pooler 25 %. The gradients are unbiased, at ratio 1 they are those of the dense "
    "layers, and their variance is half of the gradient's square in this model: noise is what remains as the "
    "cause, which is not proven. Adapting a small language model costs a quarter of its gain. Winners lower "
    "the variance only where few rows dominate: to 0.69 and 0.75 of plain column-row sampling in the BERT, to "
    "0.90 and 0.995 in the language model. Linear layers keep 0.3 of their bytes but whole models 0.75 and "
    "0.95, as attention, norms and activation functions keep theirs. So not for training from random weights, "
    "for few epochs, where memory goes elsewhere, or with gradient checkpointing; the paper fine-tunes "
    "pretrained models, which is not measured here. Its rule for the number of winners does not give the "
    "smallest variance; `winners='variance'` does.",
)
