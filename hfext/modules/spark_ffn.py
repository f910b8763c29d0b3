"""Spark FFN: a feed-forward layer of which each token uses about 8 % of the units, and decoding reads no others.

    y = V' (gelu(STopk(K1 x1, k)) * (K2 x2)),   x1 = x[:r], x2 = x[r:]
    STopk(a, k) = max(a - theta, 0),   theta = mean(a) + std(a) Q(1 - k / d_ff),  Q the normal quantile

K1 [d_ff, r] predicts which units are active, from r of the inputs; there is no gate matrix and no bias, so the layer
has 2 d_ff d_model parameters, as a plain MLP; a gated MLP of width w has as many as d_ff = 1.5 w. gelu(0) = 0, so
units below theta contribute exactly nothing, and rows of K2 and V that belong to them are not read where there are few
tokens and no gradient. theta costs linear time; gradients go through mean and deviation. Moments in fp32; k >= d_ff
leaves all units as they are.

Spark Transformer: Reactivating Sparsity in FFN and Attention, arXiv 2506.06644. There is no official code: the
unbiased deviation and 8 % follow a public re-implementation. Ours: r is half of the inputs (the paper takes 1024 of
2304), and the initial weights, N(0, 1 / r), N(0, 1 / (d_model - r)), and V so that outputs vary as much as inputs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations import use_kernel_forward_from_hub
from transformers.pytorch_utils import Conv1D

from .._fields import in_range
from ..registry import Method, Result
from ._replace import Replacement
from ._replace_mlp import is_mlp, linear_of, record, saved_tensors

KEY = "hfext_spark_ffn"  # in the config of a model
NAMES = ("predictor", "gate", "value")


@dataclass(frozen=True, kw_only=True)
class SparkFFNConfig:
    """Options of [`SparkFFN`].

    Args:
        density: Part of the units that a token uses, in (0, 1].
        r: Inputs that predict, in [1, d_model - 1]; half of them when left out.
        unbiased: Whether the deviation divides by d_ff - 1, else by d_ff.
    """

    density: float = 0.08
    r: int | None = None
    unbiased: bool = True

    def __post_init__(self):
        in_range("SparkFFNConfig: density", self.density, 0, 1, low_open=True)
        if self.r is not None and (not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1):
            raise ValueError(f"SparkFFNConfig: r is {self.r!r} but must be an integer in [1, d_model - 1].")


def active_moment(density: float) -> float:
    """E[gelu(max(z - theta, 0))^2] for normal z, where a part `density` of them reaches theta; theta = -inf for 1."""
    z = torch.linspace(-8, 8, 16001, dtype=torch.float64)
    weight = torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5 * (z[1] - z[0])
    kept = z
    if density < 1:
        kept = (z - torch.special.ndtri(torch.tensor(1 - density, dtype=torch.float64))).relu()
    return (F.gelu(kept).square() * weight).sum().item()


@use_kernel_forward_from_hub("SparkFFN")
class SparkFFN(nn.Module):
    """
    A sparse feed-forward layer in place of an MLP. `SparkFFN(2304, 13824)` is a new one; `SparkFFN()` with options
    alone is a template for [`replace_ffn`].

    Args:
        d_model (`int`, *optional*): Inputs and outputs.
        d_ff (`int`, *optional*): Units; 4 d_model when left out.
        **options: Fields of [`SparkFFNConfig`].
    """

    def __init__(
        self,
        d_model: int | None = None,
        d_ff: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        self.config = SparkFFNConfig(**options)
        self.unbiased = self.config.unbiased
        if d_model is None:
            return
        d_ff = 4 * d_model if d_ff is None else d_ff
        r = d_model // 2 if self.config.r is None else self.config.r
        if not 1 <= r <= d_model - 1:
            raise ValueError(f"r is {r} but must be in [1, {d_model - 1}], for {d_model} inputs.")
        self.k = max(1, round(self.config.density * d_ff)) if self.config.density < 1 else d_ff
        self.predictor = nn.Parameter(torch.empty(d_ff, r, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.empty(d_ff, d_model - r, device=device, dtype=dtype))
        self.value = nn.Parameter(torch.empty(d_ff, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Outputs that vary as much as inputs of variance 1."""
        self.predictor.normal_(std=self.predictor.shape[1] ** -0.5)
        self.gate.normal_(std=self.gate.shape[1] ** -0.5)
        self.value.normal_(std=(len(self.value) * active_moment(self.config.density)) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        if "predictor" not in self._parameters:
            raise RuntimeError("SparkFFN has no weights: give it sizes, or give it to replace_ffn(model, SparkFFN()).")
        from hfext_spark import spark_ffn  # its operations take a while to be registered

        return spark_ffn(x, self.predictor, self.gate, self.value, self.k, self.unbiased)

    @torch.no_grad()
    def active(self, x: Tensor) -> Tensor:
        """How many units each token uses, int64 [...]."""
        from hfext_spark import statistical_topk

        scores = F.linear(x[..., : self.predictor.shape[1]], self.predictor)
        return (statistical_topk(scores, self.k, self.unbiased) != 0).sum(-1)

    def from_dense(self, dense: nn.Module, name: str = "") -> "SparkFFN":
        """A new layer of these options with as many parameters as the MLP `dense`, without its biases."""
        linear = linear_of(dense)
        if not is_mlp(dense) or len(linear) < 2:
            raise TypeError(f"{name or 'dense'} is a {type(dense).__name__}, which is no MLP.")
        (d_model, first), (width, out) = _sizes(linear[0]), _sizes(linear[-1])
        if out != d_model:
            raise ValueError(f"{name or 'dense'} has {d_model} inputs and {out} outputs, which must be as many.")
        gated = len(linear) == 3 or first == 2 * width
        d_ff = round(1.5 * width) if gated else width
        weight = next(linear[0].parameters())
        options = dict(vars(self.config), device=weight.device, dtype=weight.dtype)
        return SparkFFN(d_model, d_ff, **options).train(dense.training)

    def extra_repr(self) -> str:
        sizes = f"{self.value.shape[1]}, {len(self.value)}, k={self.k}, " if "value" in self._parameters else ""
        return f"{sizes}{self.config}"


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, also below an adapter."""
    base = linear.get_base_layer() if "base_layer" in linear._modules else linear
    shape = base.weight.shape
    return (shape[0], shape[1]) if isinstance(base, Conv1D) else (base.in_features, base.out_features)


def replace_ffn(
    model: nn.Module,
    template: SparkFFN,
    target_modules: str | Sequence[str] = "all",
) -> Replacement:
    """Put new [`SparkFFN`] layers where a model has MLPs, in place; `undo()` of what is returned brings the MLPs back.

    The layers begin anew and must be trained. Experts of mixtures and MLPs that are no module of their own stay.

    Args:
        model (`nn.Module`): Any model.
        template (`SparkFFN`): Made with options alone, `SparkFFN(density=0.08)`.
        target_modules (`str` or sequence, *optional*, defaults to `"all"`): Or ends of names, `["layers.0.mlp"]`.
    """
    if not isinstance(template, SparkFFN) or "predictor" in template._parameters:
        raise TypeError(f"template is a {type(template).__name__} but must be SparkFFN with options alone.")
    mlps = {n: m for n, m in model.named_modules() if n and is_mlp(m) and len(linear_of(m)) > 1}
    if target_modules != "all":
        targets = [target_modules] if isinstance(target_modules, str) else target_modules
        chosen = {n: m for n, m in mlps.items() if any(f".{n}".endswith(f".{target}") for target in targets)}
    else:
        chosen = mlps
    if not chosen:
        before = sum(isinstance(m, SparkFFN) for m in model.modules())
        also = f" {before} MLPs are already replaced, by SparkFFN: call undo() first." if before else ""
        raise ValueError(
            f"target_modules is {target_modules!r} but no MLP matches. Found: {', '.join(mlps) or 'none'}.{also}"
        )
    done = Replacement({name: template.from_dense(dense, name) for name, dense in chosen.items()}, model)
    for name, module in done.modules.items():
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        done.places.append((parent, child, chosen[name]))
        setattr(parent, child, module)
    done.handles = record(model, done.modules, KEY, asdict(template.config))
    return done


def restore(model: nn.Module, folder: str | Path) -> Replacement:
    """Make a model that `from_pretrained(folder)` has loaded what was saved there, with its [`SparkFFN`] layers.

    `save_pretrained` of a replaced model writes their weights beside the others and their options into config.json;
    the stock classes report them as unexpected, and the MLPs as missing.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel) and KEY in vars(m.config)), None)
    if inner is None:
        raise ValueError(f"The config of this model has no {KEY}: it was not saved with SparkFFN layers.")
    kept = vars(inner.config)[KEY]
    wanted = [f"{module}.{name}" for module in kept["modules"] for name in NAMES]
    found = saved_tensors(inner, folder, wanted, "weights")
    done = replace_ffn(inner, SparkFFN(**kept["options"]), kept["modules"])
    with torch.no_grad():
        for module, layer in done.modules.items():
            for name in NAMES:
                layer.get_parameter(name).copy_(found[f"{module}.{name}"])
    return done


METHOD = Method(
    name="spark_ffn",
    family="modules",
    title="Spark Transformer: Reactivating Sparsity in FFN and Attention",
    authors="You et al.",
    arxiv="2506.06644",
    year=2025,
    status="abstract-only",
    difference="No official code was found: the unbiased deviation and 8 % follow the published summary and a public "
    "re-implementation; the initial weights and r = d_model / 2 are ours.",
    target="hfext.modules.spark_ffn:SparkFFN",
    config=SparkFFNConfig,
    usage="replace_ffn(model, SparkFFN(density=0.08))",
    summary="Feed-forward layers of which each token uses 8 % of the units, found in linear time.",
    headline=Result(
        metric="decoding speed, and FLOPs a token",
        setting="Gemma-2 2B recipe, 8 % of FFN units and at most 256 keys a token, CPU and GPU",
        value="1.79 and 1.40 times, 2.5 times fewer FLOPs",
        baseline="Gemma-2 2B",
    ),
    after_load="hfext.modules.spark_ffn.restore(model, folder)",
    notes="A new layer to be trained: it does not keep what a pretrained MLP computes. `hfext verify spark` "
    "trains and times it too. GPU numbers are not measured.",
)
