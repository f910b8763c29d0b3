"""GR-KAN: an MLP whose activations are rational functions that are learned, shared by groups of channels.

    y = F2(F1(x) W1 + b1) W2 + b2                       each activation comes ahead of a linear map
    F(x) = P(x) / Q(x),  P = sum_{i=0..m} a_i x^i,  Q = 1 + sum_{j=1..n} |b_j| |x|^j   ("abs_terms")
                                                 or Q = 1 + |sum_{j=1..n} b_j x^j|     ("abs_sum")

F1 begins as the identity and F2 as SiLU, or as the activation of the MLP that is replaced. a is shared by all groups,
each group of channels has its own b. The backward pass keeps x alone, recomputes P and Q, and adds coefficient
gradients in a fixed order (kernel package `hfext_gr_kan`; plain torch without a GPU), in float32 with float64 sums.

Variance-preserving weights: Var(w) = 1 / (fan_in E[F(z)^2]), z ~ N(0, 1), F the rational that comes before.

Kolmogorov-Arnold Transformer, arXiv 2409.10594; FlashKAT: Understanding and Addressing Performance Bottlenecks in the
Kolmogorov-Arnold Transformer, arXiv 2505.13813. From these: the sums of the gradients are deterministic and use no
atomic additions; the initialisation of the paper is not overwritten, as the authors' code does (`init="reference"`
is what they train with).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import use_kernel_forward_from_hub
from transformers.pytorch_utils import Conv1D

from .._fields import in_range, one_of
from ..registry import Method, Result
from ._rational_fit import DENOMINATORS, FUNCTIONS, NAMES, coefficients, second_moment
from ._replace import DropIn, Replacement
from ._replace_mlp import activation_of, is_mlp, linear_of, record, replace_mlp, saved_tensors

KEY = "hfext_gr_kan"  # in the config of a model
ENDS = ("numerator_bias", "denominator_bias")


@dataclass(frozen=True, kw_only=True)
class GRKANConfig:
    """Options of [`GRKAN`].

    Args:
        groups: Of channels, >= 1; must divide the channels.
        activation: What the second rational begins as, one of `hfext.modules._rational_fit.NAMES`; when left out, the
            activation of the MLP that is replaced, and swish in a new module.
        denominator: `abs_terms` (all published kernels) or `abs_sum` (the formula of the paper).
        orders: (m, n) of numerator and denominator, 1 <= m <= 8 and 0 <= n <= 6.
        share_numerator: One numerator for all groups.
        dropout: Behind both activations, in [0, 1).
        init: Of the linear layers of a new module: `variance_preserving`, or `reference` (standard deviation
            0.02).
    """

    groups: int = 8
    activation: str | None = None
    denominator: Literal["abs_terms", "abs_sum"] = "abs_terms"
    orders: tuple[int, int] = (5, 4)
    share_numerator: bool = True
    dropout: float = 0.0
    init: Literal["variance_preserving", "reference"] = "variance_preserving"

    def __post_init__(self):
        if not isinstance(self.groups, int) or isinstance(self.groups, bool) or self.groups < 1:
            raise ValueError(f"GRKANConfig: groups is {self.groups!r} but must be an integer >= 1.")
        if self.activation is not None:
            one_of("GRKANConfig: activation", self.activation, NAMES)
        one_of("GRKANConfig: denominator", self.denominator, DENOMINATORS)
        one_of("GRKANConfig: init", self.init, ("variance_preserving", "reference"))
        object.__setattr__(self, "orders", tuple(self.orders))
        if len(self.orders) != 2:
            raise ValueError(f"GRKANConfig: orders is {self.orders!r} but must be (m, n).")
        from hfext_gr_kan import MAX_DENOMINATOR, MAX_NUMERATOR

        in_range("GRKANConfig: orders[0]", self.orders[0], 1, MAX_NUMERATOR)
        in_range("GRKANConfig: orders[1]", self.orders[1], 0, MAX_DENOMINATOR)
        in_range("GRKANConfig: dropout", self.dropout, 0, 1)
        if self.dropout == 1:
            raise ValueError("GRKANConfig: dropout is 1 but must be in [0, 1).")


def _is_marked(p: nn.Parameter) -> bool:
    return "_is_hf_initialized" in vars(p)


def _mark(p: nn.Parameter) -> None:
    """For transformers: do not initialise this one again. Without values, on the meta device, it must be."""
    if not p.is_meta:
        p._is_hf_initialized = True


class ScaledLinear(nn.Linear):
    """A linear layer of [`GRKAN`] that knows the standard deviation of its initial weights."""

    def __init__(self, in_features: int, out_features: int, std: float):
        self.std = std
        super().__init__(in_features, out_features)

    @torch.no_grad()
    def reset_parameters(self, missing_only: bool = False) -> None:
        """Normal weights and no bias; with `missing_only`, what is marked as loaded or made already stays."""
        if not (missing_only and _is_marked(self.weight)):
            self.weight.normal_(std=self.std)
            _mark(self.weight)
        if not (missing_only and _is_marked(self.bias)):
            self.bias.zero_()
            _mark(self.bias)


@use_kernel_forward_from_hub("GroupRational")
class GroupRational(nn.Module):
    """A rational activation with coefficients for each group of channels.

    The coefficients are called biases so that what goes by names treats them as such: Trainer gives them no weight
    decay, and PEFT trains them with `bias="all"`. They are float32 (float64 for float64 inputs) until the model is
    cast; the computation always is.

    Args:
        channels (`int`): Of the last dimension.
        groups (`int`, *optional*, defaults to 8): Must divide `channels`.
        init (`str`, *optional*, defaults to `"swish"`): The function it begins as: identity, swish, gelu, gelu_tanh,
            quick_gelu, relu, tanh or sigmoid.
        denominator (`str`, *optional*, defaults to `"abs_terms"`): Or `abs_sum`.
        orders (`tuple`, *optional*, defaults to `(5, 4)`): Of numerator and denominator.
        share_numerator (`bool`, *optional*, defaults to `True`): One numerator for all groups.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 8,
        init: str = "swish",
        denominator: str = "abs_terms",
        orders: tuple[int, int] = (5, 4),
        share_numerator: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if groups < 1 or channels < 1 or channels % groups:
            raise ValueError(f"channels is {channels}, which groups={groups} does not divide.")
        one_of("init", init, NAMES)
        one_of("denominator", denominator, DENOMINATORS)
        self.init, self.denominator, self.orders, self.groups = init, denominator, tuple(orders), groups
        m, n = self.orders
        rows = 1 if share_numerator else groups
        self.numerator_bias = nn.Parameter(torch.empty(rows, m + 1, device=device, dtype=dtype))
        self.denominator_bias = nn.Parameter(torch.empty(groups, n, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, missing_only: bool = False) -> None:
        """Begin anew as `init`; with `missing_only`, what is marked as loaded or made already stays."""
        begun = zip((self.numerator_bias, self.denominator_bias), self._begun(), strict=True)
        for p, values in begun:
            if not (missing_only and _is_marked(p)):
                p.copy_(values.expand(p.shape).to(p.dtype))
                _mark(p)

    def _begun(self) -> list[Tensor]:
        found = coefficients(self.init, self.denominator, *self.orders)
        # On the CPU even where a model is being made on the meta device.
        return [torch.tensor([values], dtype=torch.float64, device="cpu") for values in found]

    def gain(self) -> float:
        """1 / E[F(z)^2], z ~ N(0, 1), of the function it begins as."""
        a, b = self._begun()
        from hfext_gr_kan import rational

        return 1 / second_moment(lambda z: rational(z[:, None], a, b, self.denominator)[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        from hfext_gr_kan import rational  # its operations take a while to be registered

        return rational(x, self.numerator_bias, self.denominator_bias, self.denominator)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, init={self.init!r}, denominator={self.denominator!r}, orders={self.orders}"


class GRKAN(DropIn):
    """An MLP with rational activations.

    A new one is made with its sizes, `GRKAN(768, 3072)`. Without sizes it is a template for
    `replace_mlp(model, GRKAN())`: the linear layers of the model's MLPs stay, under their names, and two rationals
    come in: `act1`, the identity at first, ahead of the MLP, and one in place of the activation, which begins as that.

    Weights and coefficients are marked as made, so that `post_init` of a model around leaves them alone. A model class
    with such layers of its own lets `_init_weights(module)` call `module.reset_parameters(missing_only=True)` for
    [`GroupRational`] and [`ScaledLinear`], which serves `from_pretrained` where a checkpoint lacks them.

    Args:
        in_features, hidden_features, out_features (`int`, *optional*): Sizes; hidden is four times the input and out
            the input when left out.
        **options: Fields of [`GRKANConfig`].
    """

    replaces = ()

    def __init__(
        self,
        in_features: int | None = None,
        hidden_features: int | None = None,
        out_features: int | None = None,
        **options: Any,
    ):
        super().__init__()
        self.config, self.dense_type, self.kept = GRKANConfig(**options), None, False
        if in_features is not None:
            hidden = hidden_features or 4 * in_features
            self.act1 = self._rational(in_features, "identity")
            self.fc1 = self._linear(self.act1, in_features, hidden)
            self.act2 = self._rational(hidden, self.config.activation or "swish")
            self.fc2 = self._linear(self.act2, hidden, out_features or in_features)

    def _rational(self, channels: int, init: str, device: Any = None, dtype: Any = torch.float32) -> nn.Module:
        c = self.config
        options = dict(denominator=c.denominator, orders=c.orders, share_numerator=c.share_numerator)
        module = GroupRational(channels, c.groups, init, device=device, dtype=dtype, **options)
        return nn.Sequential(module, nn.Dropout(c.dropout)) if c.dropout else module

    def _linear(self, act: nn.Module, width: int, out: int) -> ScaledLinear:
        act = act[0] if isinstance(act, nn.Sequential) else act
        return ScaledLinear(width, out, (act.gain() / width) ** 0.5 if self.config.init != "reference" else 0.02)

    def own(self) -> dict[str, Any]:
        return {"config": self.config, "kept": True}

    def from_dense(self, dense: nn.Module, name: str = "") -> "GRKAN":
        """A module that runs `dense`, an MLP, with its layers and two rationals."""
        if not is_mlp(dense, "intermediate"):
            raise TypeError(f"{name or 'dense'} is a {type(dense).__name__}, which is no MLP with one activation.")
        template = GRKAN(**vars(self.config))
        template.replaces = (type(dense),)
        new = super(GRKAN, template).from_dense(dense, name)
        slot, linear = activation_of(dense), linear_of(dense)
        weight = next(linear[0].parameters())
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        first, hidden = _sizes(linear[0])
        init = self.config.activation or name_of(dense._modules[slot])
        try:
            act1 = self._rational(first, "identity", weight.device, dtype)
            act2 = self._rational(hidden, init, weight.device, dtype)
        except ValueError as error:
            raise ValueError(f"{name or 'dense'}: {error}") from error
        new.dense_type = type(dense)
        new._modules = {**{k: act2 if k == slot else m for k, m in dense._modules.items()}, "act1": act1}
        return new

    def begin(self, model: nn.Module, modules: dict[str, DropIn]) -> list[Any]:
        return record(model, modules, KEY, asdict(self.config))

    def forward(self, x: Tensor) -> Tensor:
        if self.kept:
            return self.dense_type.forward(self, self.act1(x))
        if "fc1" not in self._modules:
            raise RuntimeError("GRKAN has no weights: give it sizes, or give it to replace_mlp(model, GRKAN()).")
        return self.fc2(self.act2(self.fc1(self.act1(x))))

    def extra_repr(self) -> str:
        return f"{self.dense_type.__name__}, {self.config}" if self.kept else ""


def _sizes(linear: nn.Module) -> tuple[int, int]:
    base = linear.get_base_layer() if "base_layer" in linear._modules else linear
    shape = base.weight.shape
    return (shape[0], shape[1]) if isinstance(base, Conv1D) else (base.in_features, base.out_features)


def name_of(activation: nn.Module) -> str:
    """Which of `NAMES` an activation module is, by what it computes: exact to the last bits of float64, or refused."""
    z = torch.linspace(-6, 6, 121, dtype=torch.float64, device="cpu")
    y = activation(z)
    for name, function in FUNCTIONS.items():
        if torch.allclose(y, function(z), rtol=0, atol=1e-9):
            return name
    raise ValueError(
        f"{type(activation).__name__} has no rational of its own: give activation=, one of {', '.join(NAMES)}."
    )


def restore(model: nn.Module, folder: str | Path) -> Replacement:
    """Make a model that `from_pretrained(folder)` has loaded what was saved there: rationals and their coefficients.

    `save_pretrained` of a replaced model writes plain weights under plain names, the coefficients beside them and the
    options into config.json, so the stock classes load the linear layers and report the coefficients as unexpected.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel) and KEY in vars(m.config)), None)
    if inner is None:
        raise ValueError(f"The config of this model has no {KEY}: it was not saved with GRKAN modules.")
    kept = vars(inner.config)[KEY]
    done = replace_mlp(inner, GRKAN(**kept["options"]), target_modules=kept["modules"])
    own = {name: p for name, p in inner.named_parameters() if name.endswith(ENDS)}
    try:
        found = saved_tensors(inner, folder, list(own), "coefficients")
    except FileNotFoundError:
        done.undo()
        vars(inner.config)[KEY] = kept
        raise
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(found[name])
    return done


METHOD = Method(
    name="flashkat",
    family="modules",
    title="FlashKAT: Understanding and Addressing Performance Bottlenecks in the Kolmogorov-Arnold Transformer",
    authors="Raffel and Chen",
    arxiv="2505.13813",
    year=2025,
    repo="OSU-STARLAB/FlashKAT",
    status="faithful",
    target="hfext.modules.flashkat:GRKAN",
    config=GRKANConfig,
    usage="replace_mlp(model, GRKAN(groups=8))",
    summary="MLPs with learned rational activations by groups of channels, their backward pass fused and repeatable.",
    claim="The fused backward pass of a group-rational activation is faster and keeps less than the one that "
    "automatic differentiation makes of its formula, and a GR-KAN fits at least as well as a GELU MLP of equal width.",
    headline=Result(
        metric="training speed over KAT with its first kernel",
        setting="ImageNet-1k, KAT transformers, H200",
        value="86.5 times",
    ),
    recipe="modules/flashkat-small.yaml",
    after_load="hfext.modules.flashkat.restore(model, folder)",
    notes="The module is that of Kolmogorov-Arnold Transformer (arXiv 2409.10594). The two denominators in "
    "circulation are different functions: the authors' current coefficients for GELU fit `abs_sum` alone and "
    "err by 1.46 in `abs_terms`; all but swish are fitted here, closer than the published sets. Outside [-3, 3] the "
    "rationals leave their models: the GELU of `abs_terms` gives 10.8 at 10, that of `abs_sum` even -6, so keep "
    "`abs_terms` where pretrained weights make large inputs. A saved model needs `restore` behind `from_pretrained`. "
    "The recipe sees 3.2 times the speed of automatic differentiation on a CPU and a thirteenth of what it keeps "
    "(GELU is five times as fast again), a fifth of GELU's error on sin(5x), and no gain on two moons (0.0058 against "
    "0.0047, lower in 4 seeds of 10), so the claim as a whole is not reproduced. GPU numbers are not measured.",
)
