"""Pattention, the layer of TokenFormer, and its growth."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.integrations import use_kernel_forward_from_hub

from .._fields import one_of
from ._rational_fit import second_moment
from ._replace import DropIn

INITS = ("zeros", "normal")


def tau_of(tokens: int, mode: str) -> float:
    """sqrt(tokens), which makes the norm of a row of S's argument that of as many numbers of variance 1; tokens for
    softmax."""
    return float(tokens) if mode == "softmax" else tokens**0.5


@use_kernel_forward_from_hub("Pattention")
class Pattention(DropIn):
    """Attention over learnable key and value tokens in place of a linear map.

    With sizes it is a layer, `Pattention(64, 64, tokens=128)`. Without, a template for
    `hfext.modules.replace(model, Pattention(tokens=128))`, which puts new layers of the sizes of linear ones in their
    place; what those have learnt is lost until `undo()`.

    `tau` is saved with the weights: a layer that has grown keeps the scale of its first size. It is float32 until the
    model is cast.

    Args:
        in_features, out_features (`int`, *optional*): Sizes.
        tokens (`int`, *optional*, defaults to 256): Pairs of key and value, >= 1.
        mode (`str`, *optional*, defaults to `"l2_norm_gelu"`): Or `gelu_l2_norm`, `softmax`.
        dropout (`float`, *optional*, defaults to 0.0): Of the scores' function, in [0, 1).
        key_std (`float`, *optional*, defaults to 0.02): Of the initial keys.
        value_std (`float`, *optional*): Of the initial values; when left out, what gives outputs of variance 1.
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        tokens: int = 256,
        mode: Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"] = "l2_norm_gelu",
        dropout: float = 0.0,
        key_std: float = 0.02,
        value_std: float | None = None,
    ):
        super().__init__()
        from hfext_pattention import MODES

        one_of("mode", mode, MODES)
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise ValueError(f"tokens is {tokens!r} but must be an integer >= 1.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout} but must be in [0, 1).")
        self.tokens, self.mode, self.dropout = tokens, mode, dropout
        self.key_std, self.value_std = key_std, value_std
        if in_features is not None:
            self.in_features, self.out_features = in_features, out_features or in_features
            self.keys = nn.Parameter(torch.empty(tokens, self.in_features))
            self.values = nn.Parameter(torch.empty(tokens, self.out_features))
            self.register_buffer("tau", torch.empty((), dtype=torch.float32))
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, missing_only: bool = False) -> None:
        """Keys and values anew and `tau` by their number; with `missing_only`, what is marked as loaded stays."""
        drawn = {"keys": self.key_std, "values": self._value_std()}
        for name, std in drawn.items():
            p = self._parameters[name]
            if not (missing_only and "_is_hf_initialized" in vars(p)):
                p.normal_(std=std)
        if not (missing_only and "_is_hf_initialized" in vars(self.tau)):
            self.tau.fill_(tau_of(len(self.keys), self.mode))
        for x in (self.keys, self.values, self.tau):
            if not x.is_meta:
                x._is_hf_initialized = True

    def _value_std(self) -> float:
        if self.value_std is not None:
            return self.value_std
        n = self.tokens
        size = {"l2_norm_gelu": n * second_moment(F.gelu), "gelu_l2_norm": n, "softmax": n}[self.mode]
        return size**-0.5

    def from_dense(self, dense: nn.Module, name: str = "") -> "Pattention":
        if type(dense) not in self.replaces:
            raise TypeError(f"{name or 'dense'} is a {type(dense).__name__} but must be a linear layer.")
        shape = tuple(dense.weight.shape)
        sizes = shape[::-1] if isinstance(dense, nn.Linear) else shape
        new = Pattention(*sizes, self.tokens, self.mode, self.dropout, self.key_std, self.value_std)
        return new.to(dense.weight.device, dense.weight.dtype).train(dense.training)

    def own(self) -> dict[str, Any]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        if "keys" not in self._parameters:
            raise RuntimeError(
                "Pattention has no tokens: give it sizes, or give it to hfext.modules.replace(model, ...)."
            )
        rate = self.dropout if self.training else 0.0
        from hfext_pattention import pattention  # its operations take a while to be registered

        return pattention(x, self.keys, self.values, self.tau, self.mode, dropout=rate)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, mode={self.mode!r}"


@torch.no_grad()
def grow(
    model: nn.Module,
    tokens: int | Mapping[str, int],
    key_init: Literal["zeros", "normal"] = "zeros",
    keep_tau: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    value_init: Literal["normal", "zeros"] = "normal",
) -> dict[str, int]:
    """Append tokens to every Pattention of a model, or to one Pattention, in place; returns how many each has now.

    With the defaults the function stays what it was: scores of zero keys are 0, gelu(0) = 0, norms do not change and
    `tau` is kept. New keys learn through gelu'(0) = 1/2 and their values. The parameters stay the same objects, so an
    optimizer holds them already; its state gets zeros for the new rows.

    Args:
        model (`nn.Module`): A Pattention, or a model that has some; the config of a TokenFormer follows.
        tokens (`int` or mapping): How many to append, >= 0; or by regular expressions that are searched in names
            (`{"mlp": 128, "_proj": 64}`), where the first that is found counts and layers without one stay.
        key_init (`str`, *optional*, defaults to `"zeros"`): Or `normal`, as the layer's first keys. That changes the
            function at once; the authors' code does it.
        keep_tau (`bool`, *optional*, defaults to `True`): False sets `tau` to the square root of the new number,
            which changes the function at once too.
        optimizer (`torch.optim.Optimizer`, *optional*): Whose state is to follow.
        value_init (`str`, *optional*, defaults to `"normal"`): Or `zeros`, which needs normal keys.
    """
    one_of("key_init", key_init, INITS)
    one_of("value_init", value_init, INITS)
    if key_init == value_init == "zeros":
        raise ValueError("key_init and value_init are both zeros: neither would ever get a gradient.")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Pattention) and "keys" in m._parameters}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no Pattention layer, so nothing can grow: make a TokenFormer by "
            "AutoModelForCausalLM.from_config(TokenFormerConfig(...)), or call replace(model, Pattention(tokens=...))."
        )
    more = {name: _count(tokens, name) for name in layers}
    if not any(more.values()):
        raise ValueError(f"tokens is {tokens!r}, which adds none to the {len(layers)} Pattention layers of the model.")
    for name, layer in layers.items():
        if layer.mode == "softmax" and more[name] and key_init == "zeros":
            raise NotImplementedError(
                f"{name or 'the layer'} has mode softmax, in which keys of zeros take weight from the others: growth "
                'changes its function. Say key_init="normal" to grow all the same.'
            )
    written = _follow(model, {name: layer.tokens + more[name] for name, layer in layers.items()})
    states = {} if optimizer is None else optimizer.state
    for name, layer in layers.items():  # refuse before anything is changed
        for p in (layer.keys, layer.values):
            for key, kept in states.get(p, {}).items():
                if isinstance(kept, Tensor) and kept.dim() and kept.shape != p.shape:
                    raise NotImplementedError(
                        f"State {key!r} of {name} has shape {tuple(kept.shape)}, not that of its parameter: growth of "
                        f"{type(optimizer).__name__} is not known. Grow without optimizer= and begin its state anew."
                    )
    stds = {"keys": lambda layer: layer.key_std, "values": lambda layer: layer._value_std()}
    for name, layer in layers.items():
        m = more[name]
        if not m:
            continue
        for part, init in (("keys", key_init), ("values", value_init)):
            p = layer._parameters[part]
            rows = p.new_zeros(m, p.shape[1])
            if init == "normal":
                rows.normal_(std=stds[part](layer))
            for key, kept in states.get(p, {}).items():
                if isinstance(kept, Tensor) and kept.dim():
                    states[p][key] = torch.cat([kept, kept.new_zeros(m, p.shape[1])])
            p.data, p.grad = torch.cat([p.data, rows]), None
        layer.tokens += m
        if not keep_tau:
            layer.tau.fill_(tau_of(layer.tokens, layer.mode))
    for config, field, count in written:
        setattr(config, field, count)
    return {name: layer.tokens for name, layer in layers.items()}


class TauWarmup(TrainerCallback):
    """After a growth: moves `tau` of every Pattention to the value of its present size, evenly over optimizer steps.

    A resumed run goes on from the `tau` of its checkpoint.

    Args:
        steps (`int`): The step of the run at which all have arrived, >= 1.
    """

    def __init__(self, steps: int):
        if steps < 1:
            raise ValueError(f"steps is {steps} but must be >= 1.")
        self.steps = steps

    @torch.no_grad()
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        left = self.steps - state.global_step
        for layer in model.modules() if left > 0 else ():
            if isinstance(layer, Pattention) and "tau" in layer._buffers:
                layer.tau += (tau_of(layer.tokens, layer.mode) - layer.tau) / left


def _count(tokens: int | Mapping[str, int], name: str) -> int:
    if isinstance(tokens, Mapping):
        tokens = next((m for pattern, m in tokens.items() if re.search(pattern, name)), 0)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
        raise ValueError(f"tokens is {tokens!r} but must be an integer >= 0.")
    return tokens


def _follow(model: nn.Module, sizes: dict[str, int]) -> list[tuple[PreTrainedConfig, str, int]]:
    """What to write into the config, which must make layers of these sizes when the model is loaded."""
    inner = next(
        (m for m in model.modules() if isinstance(m, PreTrainedModel) and "num_ffn_tokens" in vars(m.config)), None
    )
    found = []
    for field, ends in (("qkv", ("q_proj", "k_proj", "v_proj")), ("proj", ("o_proj",)), ("ffn", ("mlp",))):
        counts = sorted({n for name, n in sizes.items() if name.endswith(ends)})
        if inner is not None and len(counts) > 1:
            raise ValueError(
                f"The layers {', '.join(ends)} would have {counts} tokens, which no config can say: grow all of them "
                "by the same number."
            )
        if inner is not None and counts:
            found.append((inner.config, f"num_{field}_tokens", counts[0]))
    return found
