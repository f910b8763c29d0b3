"""muP: a model of any width trains with the learning rate found on a narrow one.

A dimension that differs between the base model and this one is "infinite" and has a width ratio r (size over base
size). With r_in, r_out the ratios of a weight's fan-in and fan-out and W = a * V its value in the network, V the
stored parameter:

    kind (infinite dims)              init of W, against base   SGD lr            Adam lr         a
    scalar (0)                        1                         1                 1               1
    input-like, bias, gain (1)        1                         r_out             1               1
    matrix-like (2)                   r_in^-1/2                 r_out / r_in      1 / r_in        1
    output-like (1, the fan-in)       1 / r_in                  r_out/(r_in a^2)  1 / (r_in a)    1 / r_in

and attention logits are q.k * s_base * d_base / d in place of q.k / sqrt(d). At r = 1 nothing at all changes. An
optimizer that multiplies its decay by the learning rate (AdamW, and L2 in SGD) gets weight decay / lr factor, so that
lr * weight_decay is the same at every width.

After `apply`, a Trainer gives the optimizer of `TrainingArguments(optim=...)` these learning rates by itself, or says
why it cannot; a loop of one's own takes them from `param_groups`.

Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer, arXiv 2203.03466. The abc
parametrisation and its symmetry, on which the column of `a` rests, are from arXiv 2011.14522.
"""

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..compat import decayed_parameters, patch_method, replaced, was_loaded
from ..registry import Method, Result
from ._base_shapes import InfShape, infshapes, set_base_shapes, skeleton

logger = logging.get_logger(__name__)

_HEAD_SIZES = ("head_dim", "attention_head_size")
# Parts of the names of optimizers whose step does not grow with the gradient.
_SCALE_FREE = ("adam", "lion", "adafactor", "adagrad", "rmsprop")


def init_factor(shape: InfShape, init: Literal["fixed", "fan_in"]) -> float:
    """What to multiply the stored initial values by, when their scale is fixed or already falls as fan_in^-1/2."""
    wanted = shape.fan_in ** (-0.5 if shape.ninf == 2 else -1.0) / shape.multiplier
    return wanted * shape.fan_in**0.5 if init == "fan_in" else wanted


def lr_factor(shape: InfShape, optimizer_kind: Literal["adam", "sgd"]) -> float:
    """Learning rate of the stored parameter over that of the base model."""
    if optimizer_kind == "adam":
        return 1.0 / (shape.fan_in * shape.multiplier)
    return perturbation_factor(shape)


def perturbation_factor(shape: InfShape) -> float:
    """m_l / a_l^2: what turns a stored gradient into a change of spectral norm ~ sqrt(fan_out / fan_in) of W.

    Gradients of W have norm n^-1/2 (input-like), 1 (matrix-like) and n^1/2 (output-like), so W needs r_out / r_in;
    V = W / a has gradient a * dW and change dW / a, hence a^-2.
    """
    return shape.fan_out / (shape.fan_in * shape.multiplier**2)


@dataclass
class MuP:
    """What `apply` did to a model; `remove` undoes it.

    Attributes:
        shapes: The width ratios of every parameter, by name.
    """

    shapes: dict[str, InfShape]
    model: nn.Module = field(repr=False)
    hooks: list[Any] = field(default_factory=list, repr=False)
    scalings: dict[str, float] = field(default_factory=dict, repr=False)
    rescaled: dict[str, float] = field(default_factory=dict, repr=False)

    def remove(self) -> None:
        """Take away hooks, attention scaling, shapes and config entry; initial values are scaled back, to rounding."""
        for hook in self.hooks:
            hook.remove()
        for name, scaling in self.scalings.items():
            self.model.get_submodule(name).scaling = scaling
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, factor in self.rescaled.items():
                parameters[name].div_(factor)
        for p in parameters.values():
            vars(p).pop("hf_infshape", None)
        del self.model.hfext_mup, self.model.hfext_base_shapes
        if isinstance(self.model, PreTrainedModel):
            vars(self.model.config).pop("hfext_mup", None)


def apply(
    model: nn.Module,
    base_config: PreTrainedConfig | nn.Module | None = None,
    delta_config: PreTrainedConfig | nn.Module | None = None,
    rescale: bool = True,
    *,
    init: Literal["auto", "fixed", "fan_in"] = "auto",
    roles: Mapping[str, str] | None = None,
) -> MuP:
    """Put a freshly initialised model into muP, in place. A Trainer finds its learning rates; others, `param_groups`.

    A saved model keeps its stored weights and `config.hfext_mup`. The multipliers are no part of the weights: after
    loading it, call `apply(model, rescale=False)` before use.

    Args:
        model: A transformers model or any `nn.Module`.
        base_config: Config or model of the base width; `None` takes what the model's config was saved with.
        delta_config: As in `set_base_shapes`.
        rescale: Rescale the initial values, once. False for weights that are in muP already.
        init: How the model's initial values depend on width: `fixed` (transformers' `initializer_range`) or `fan_in`
            (torch's own layers); `auto` takes `fixed` for models with an `initializer_range`.
        roles: As in `set_base_shapes`.
    """
    if "hfext_mup" in vars(model):
        raise ValueError("muP was applied to this model already; applying it again would rescale twice.")
    config = model.config if isinstance(model, PreTrainedModel) else None
    saved = vars(config).get("hfext_mup") if config is not None else None
    if rescale and was_loaded(model):
        raise ValueError(
            "The weights were loaded from a checkpoint, and muP rescales initial values. Pass rescale=False for "
            "weights that were trained in muP; others have no muP form."
        )
    if base_config is None:
        if saved is None:
            raise ValueError("base_config is missing, and the model's config holds no `hfext_mup` to take it from.")
        base_config = type(config).from_dict(saved["base_config"])
        if saved["delta_config"] is not None:
            delta_config = type(config).from_dict(saved["delta_config"])
        init, roles = saved["init"], saved["roles"]
    if init == "auto":
        init = _init_rule(model)
    if init not in ("fixed", "fan_in"):
        raise ValueError(f"init is {init!r} but must be one of auto, fixed, fan_in.")

    base = skeleton(model, base_config)
    scalings = dict(_attention_scalings(model, base))
    mup = MuP(set_base_shapes(model, base, delta_config, roles), model)
    for module, name, ratio, tied in list(_output_maps(model, mup.shapes)):
        mup.hooks.append(module.register_forward_pre_hook(functools.partial(_scale_input, 1 / ratio)))
        # A tied weight keeps a = 1 of the embedding: its factors are the same in both roles.
        if not tied:
            mup.shapes[name] = module.weight.hf_infshape = InfShape(1, ratio, 1.0, 1 / ratio)
    for name, scaling in scalings.items():
        mup.scalings[name], model.get_submodule(name).scaling = model.get_submodule(name).scaling, scaling
    if rescale:
        _rescale(model, mup, init)
    if config is not None:
        config.hfext_mup = {
            "base_config": _exported(base_config),
            "delta_config": None if delta_config is None else _exported(delta_config),
            "init": init,
            "roles": dict(roles or {}),
        }
    model.hfext_mup = mup
    patch_method(Trainer, "create_optimizer", _with_rates)
    return mup


def param_groups(
    model: nn.Module,
    optimizer_kind: Literal["adam", "sgd"] = "adam",
    *,
    lr: float,
    weight_decay: float = 0.0,
    no_decay: Collection[str] = (),
    independent_decay: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups with muP's learning rates, for `torch.optim.AdamW(groups)` or `torch.optim.SGD(groups)`.

    Args:
        model: A model after `apply` or `set_base_shapes`.
        optimizer_kind: `adam` for updates that do not scale with the gradient (Adam, Lion, Adafactor), else `sgd`.
        lr: Learning rate of the base model.
        weight_decay: Weight decay of the base model.
        no_decay: Names of parameters without weight decay.
        independent_decay: True when the optimizer does not multiply weight decay by the learning rate.
    """
    if optimizer_kind not in ("adam", "sgd"):
        raise ValueError(f"optimizer_kind is {optimizer_kind!r} but must be one of adam, sgd.")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for (name, p), shape in zip(trained, infshapes((p for _, p in trained), model), strict=True):
        groups.setdefault((name in no_decay, lr_factor(shape, optimizer_kind)), []).append(p)
    # Schedulers report the rate of the first group: let it be the one that the user gave, where there is one.
    order = sorted(groups, key=lambda key: (key[1] != 1.0, key))
    return [
        {
            "params": groups[bare, factor],
            "lr": lr * factor,
            "weight_decay": 0.0 if bare else weight_decay / (1.0 if independent_decay else factor),
        }
        for bare, factor in order
    ]


def trainer_groups(model: nn.Module, cls: type, kwargs: Mapping[str, Any], args: Any) -> list[dict[str, Any]] | None:
    """The groups for the optimizer `cls(groups, **kwargs)` that a Trainer is about to make; `None` for its own ones.

    `NotImplementedError` where the learning rates of muP are not known.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_name = vars(model).get("hfext_base_shapes", {})
    if not any("hf_infshape" in vars(p) or name in by_name for name, p in trained.items()):
        logger.warning_once(
            "The model is in muP, but what is trained was added to it later (adapters): its learning rate is taken as "
            "it is given, at any width."
        )
        return None
    shapes = infshapes(trained.values(), model)
    if all(shape.fan_in == shape.fan_out == shape.multiplier == 1 for shape in shapes):
        return None
    base = kwargs.get("hfext_base", cls)  # of an optimizer with two passes
    name = (base.__name__ if isinstance(base, type) else str(base)).lower()
    kind = "sgd" if "sgd" in name else "adam" if any(part in name for part in _SCALE_FREE) else None
    own = sorted({"params", "model", "optimizer_dict"} & set(kwargs))
    if kind is None or own:
        reason = f"it makes parameter groups of its own ({own[0]})" if own else "how its step scales is not known"
        raise NotImplementedError(
            f"The model is in muP, whose learning rates optim={args.optim.value!r} would not have: {reason}. Use "
            "adamw_torch or sgd, or Trainer(optimizers=(Optimizer(mup.param_groups(model, kind, lr=...)), None))."
        )
    bare = set(trained) - decayed_parameters(model)
    lr = kwargs.get("lr", args.learning_rate)
    return param_groups(model, kind, lr=lr, weight_decay=args.weight_decay, no_decay=bare)


def _with_rates(original):
    def create_optimizer(self, model=None):
        target = self.model if model is None else model
        if self.optimizer is not None or not any("hfext_mup" in vars(m) for m in target.modules()):
            return original(self, model)
        cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, target)
        groups = None if self.args.optim == "mup_sam" else trainer_groups(target, cls, kwargs, self.args)
        chosen = (cls, kwargs if groups is None else {**kwargs, "params": groups})
        with replaced(self, "optimizer_cls_and_kwargs", chosen):
            return original(self, model)

    return create_optimizer


def _scale_input(multiplier: float, module: nn.Module, args: tuple) -> tuple:
    return (args[0] * multiplier, *args[1:])


def _output_maps(model: nn.Module, shapes: dict[str, InfShape]) -> Iterator[tuple[nn.Module, str, float, bool]]:
    """Linear maps from a grown dimension to a finite one: module, name of its weight, width ratio, whether tied."""
    names = {id(p): name for name, p in model.named_parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in names:
            name, tied = names[id(module.weight)], id(module.weight) in embeddings
            ratio = shapes[name].fan_out if tied else shapes[name].fan_in
            if shapes[name].ninf == 1 and ratio != 1:
                yield module, name, ratio, tied


def _attention_scalings(model: nn.Module, base: nn.Module) -> Iterator[tuple[str, float]]:
    """Name and new `scaling` of every attention module whose head size is not the base model's."""
    others = dict(base.named_modules())
    for name, module in model.named_modules():
        own, other = vars(module), vars(others[name]) if name in others else {}
        size = next((key for key in _HEAD_SIZES if isinstance(own.get(key), int) and key in other), None)
        if size is None or "Attention" not in type(module).__name__ or own[size] == other[size]:
            continue
        if not isinstance(own.get("scaling"), int | float):
            raise NotImplementedError(
                f"{name} ({type(module).__name__}) has no attribute `scaling` to set. Grow the number of heads "
                f"instead of their size, {other[size]} in the base model."
            )
        yield name, other["scaling"] * other[size] / own[size]


def _init_rule(model: nn.Module) -> str:
    if not isinstance(model, PreTrainedModel):
        return "fan_in"
    if "initializer_range" in vars(model.config):
        return "fixed"
    raise ValueError(
        f"{type(model).__name__} has no `initializer_range`: say with init='fixed' or init='fan_in' how its initial "
        "values depend on width."
    )


def _rescale(model: nn.Module, mup: MuP, init: Literal["fixed", "fan_in"]) -> None:
    factors = {name: init_factor(mup.shapes[name], init) for name, _ in model.named_parameters()}
    if init == "fan_in":
        # torch draws a bias in the range of its weight, which shrinks with the fan-in; a vector must not.
        for name in factors:
            weight = name.removesuffix("bias") + "weight"
            if name.endswith("bias") and weight in factors:
                factors[name] = mup.shapes[weight].fan_in ** 0.5
    with torch.no_grad():
        for name, p in model.named_parameters():
            if factors[name] != 1:
                p.mul_(factors[name])
                mup.rescaled[name] = factors[name]


def _exported(base: PreTrainedConfig | nn.Module) -> dict[str, Any]:
    return (base.config if isinstance(base, PreTrainedModel) else base).to_diff_dict()


METHOD = Method(
    name="mup",
    family="optim",
    title="Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
    authors="Yang et al.",
    arxiv="2203.03466",
    year=2022,
    repo="microsoft/mup",
    status="variant",
    difference="Found from configs instead of by rewriting the model: output-like linear maps get a hook that scales "
    "their input, attention modules a new `scaling`, and initial values of fixed scale are rescaled. Zero "
    "initialisation of readout and query, which the paper recommends, is left to the user.",
    target="hfext.optim.mup:apply",
    usage='mup.apply(model, base_config); Trainer(model, TrainingArguments(optim="adamw_torch", learning_rate=1e-3))',
    summary="Re-parametrises a model by width, so that the learning rate of a narrow one is right on a wide one.",
    claim="In muP a step changes every activation by an amount that does not depend on width.",
    headline=Result(
        metric="cost of tuning, % of the cost of pretraining",
        setting="GPT-3 6.7B with hyperparameters from a 40M model, better than the published 6.7B",
        value="7",
    ),
    after_load="hfext.optim.mup.apply(model, rescale=False)",
    recipe="optim/mup-llama-coordinates.yaml",
    notes="The abc view is from Feature Learning in Infinite-Width Neural Networks, arXiv 2011.14522. Code that uses "
    "`lm_head.weight` without calling `lm_head`, such as fused cross-entropy kernels, misses the multiplier. The "
    "Llamas of the coordinate check see one row of 6 tokens and begin with a readout of 0. With 4 rows of 32 tokens "
    "the slope of an untied `lm_head` is -0.18 (SGD) and -0.11 (AdamW), beyond the bar of 0.1.",
)
