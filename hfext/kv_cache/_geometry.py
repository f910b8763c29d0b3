"""What a cache must know of a model: its attention modules, heads and rotary embedding, found once and checked."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from ._calls import Given, given_by

COMPRESSIBLE = "full_attention"


@dataclass
class Rotary:
    """Rotary embedding of a model, applied and undone by the model's own functions.

    The inverse of a rotation by (cos, sin) is the rotation by (cos, -sin) / (cos^2 + sin^2): right for every pairing
    of channels, for embeddings of a part of the channels and for scaled ones (yarn). `apply` is the model's
    `apply_rotary_pos_emb`; `module` makes cos and sin, [batch, tokens, rotated], from positions.
    """

    module: nn.Module
    apply: Callable[..., tuple[Tensor, Tensor]]
    by_layer_type: bool
    halves: bool = False  # the usual pairing, for which there is a faster way
    part: bool = False  # the attention module cuts off the rotated channels, the first ones, by itself

    @property
    def kind(self) -> tuple[str, ...]:
        """What `module` takes beside positions."""
        return (COMPRESSIBLE,) if self.by_layer_type else ()

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin in float32 of `positions` [batch, tokens], rounded as a model in `dtype` rounds them."""
        like = torch.empty(0, dtype=dtype, device=positions.device)
        cos, sin = self.module.forward(like, positions, *self.kind)  # past the hook that notes positions
        return cos.float(), sin.float()

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, heads, tokens, head_dim] in float32, rotated."""
        if self.part and not self.halves:
            turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
            return torch.cat([self.apply(turned, turned[:, :0], cos, sin)[0], rest], dim=-1)
        if not self.halves:
            return self.apply(x, x[:, :0], cos, sin)[0]
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)
        first, second = x[..., :half], x[..., half : 2 * half]
        if x.requires_grad:
            return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], dim=-1)
        out = torch.empty_like(x)
        torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
        out[..., 2 * half :] = x[..., 2 * half :]
        return out

    def unrotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        square = cos * cos + sin * sin
        return self.rotate(x, cos / square, -sin / square)

    def __deepcopy__(self, memo):
        return self  # shared by every cache of a model


@dataclass
class Geometry:
    """Sizes and modules of a decoder. `layers` are the indices that can be compressed, `still` those of them whose
    keys are not rotated though others are."""

    layer_types: list[str]
    layer_kwargs: list[dict[str, Any]]
    layers: list[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    rotary: Rotary | None
    rotary_problem: str | None
    facts: dict[str, Any]
    still: frozenset[int] = frozenset()

    def rotary_of(self, layer_idx: int) -> Rotary | None:
        """The rotary embedding of a layer's keys, `None` for a layer that has none."""
        return None if layer_idx in self.still else self.rotary

    @property
    def width(self) -> int:
        """Channels of the keys of one token: `num_kv_heads * head_dim`."""
        return self.num_kv_heads * self.head_dim

    def needs_rotary(self, method: str) -> None:
        """Refuse a model whose rotary embedding cannot be undone. A model without one is fine: nothing to undo."""
        if self.rotary_problem is not None:
            raise ValueError(f"{method} works on keys before the rotary embedding: {self.rotary_problem}")

    def __deepcopy__(self, memo):
        return self


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model below PEFT's wrapper."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def decoder(model: nn.Module) -> nn.Module:
    """The module whose forward builds masks and positions: the decoder of a language model."""
    model = unwrapped(model)
    inner = model.get_decoder() if callable(getattr(model, "get_decoder", None)) else model.base_model
    inner = inner if inner is not None else model.base_model
    parts = [child for child in inner.children() if isinstance(child, PreTrainedModel)]
    return parts[0] if hasattr(inner, "lm_head") and len(parts) == 1 else inner  # where the head was found (Llama 4)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Self-attention modules of the decoder by layer index."""
    found: dict[int, nn.Module] = {}
    for name, module in decoder(model).named_modules():
        index = getattr(module, "layer_idx", None)
        is_attention = "attention" in type(module).__name__.lower() and not getattr(
            module, "is_cross_attention", False
        )
        if isinstance(index, int) and is_attention and "cross" not in name.lower() and "EncDec" not in name:
            found.setdefault(index, module)
    return found


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that hold the self-attention modules, by layer index."""
    stack = decoder(model)
    names = {id(module): name for name, module in stack.named_modules()}
    return {
        index: stack.get_submodule(names[id(module)].rpartition(".")[0])
        for index, module in attention_modules(model).items()
    }


def geometry(model: nn.Module) -> Geometry:
    """Look at a model. Raises `ValueError` for one that has no layer to compress."""
    model = unwrapped(model)
    config = model.config.get_text_config(decoder=True)
    types, kwargs = get_layer_types_and_kwargs(config)
    modules = attention_modules(model)
    layers = [index for index, kind in enumerate(types) if kind == COMPRESSIBLE and index in modules]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no full-attention layer whose cache could be compressed (its layers are "
            f"{', '.join(sorted(set(types)))})."
        )
    stack, heads = decoder(model), config.num_attention_heads
    turner = rotary_module(stack)
    kind = (COMPRESSIBLE,) if hasattr(turner, f"{COMPRESSIBLE}_inv_freq") else ()
    given, unseen = given_by({i: modules[i] for i in layers}, config.hidden_size, stack.dtype, turner, kind)
    kv_heads, head_dim = _head_sizes(type(model).__name__, config, given)
    rotary, problem = (
        (None, None) if getattr(config, "alibi", False) else _rotary(stack, modules[layers[0]], head_dim, given)
    )
    still: frozenset[int] = frozenset()
    if rotary is not None and unseen is not None:
        rotary, problem = None, unseen
    elif rotary is not None or problem is not None:
        rotary, problem, still = _checked_rotary(rotary, problem, given, config)
    facts = {
        "layers": len(types),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": config.hidden_size,
        "rotary": _rotary_facts(config) if rotary is not None else None,
    }
    sizes = (heads, kv_heads, head_dim, config.hidden_size)
    return Geometry(types, kwargs, layers, *sizes, rotary, problem, facts, still)


def _head_sizes(name: str, config: Any, given: dict[int, Given]) -> tuple[int, int]:
    """Heads of the keys and their channels: as the layers give them, else as the config says."""
    if not given:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
        return getattr(config, "num_key_value_heads", None) or heads, head_dim
    sizes = sorted({(x.kv_heads, x.head_dim, x.value_dim) for x in given.values()})
    heads, head_dim, value_dim = sizes[0]
    if head_dim != value_dim or any(x.turned_values for x in given.values()):
        raise ValueError(
            f"{name} caches no pairs of keys and values (what takes their places has {head_dim} and {value_dim} "
            "channels, as in multi-head latent attention), which no compressed cache here takes. Generate with the "
            "cache of transformers."
        )
    if len(sizes) > 1:
        raise ValueError(
            f"{name} caches other sizes in other full-attention layers ([kv heads, key channels, value channels]: "
            f"{', '.join(str(list(x)) for x in sizes)}), which no compressed cache here takes. Generate with the "
            "cache of transformers."
        )
    return heads, head_dim


def _checked_rotary(
    rotary: Rotary | None, problem: str | None, given: dict[int, Given], config: Any
) -> tuple[Rotary | None, str | None, frozenset[int]]:
    """The rotary embedding, or what is wrong with it, and the layers without one, by the keys that layers gave."""
    thetas = getattr(config, "layer_rope_theta", None)  # where a model passes no position to some layers
    still = frozenset(i for i, x in given.items() if not x.turned or (thetas and not thetas[i]))
    if given and len(still) == len(given):
        return None, None, frozenset()
    if rotary is None:
        return None, problem, still
    for index, x in given.items():
        if index not in still and not x.undone_by(rotary.unrotate):
            return None, f"the keys of layer {index} are not rotated as `apply_rotary_pos_emb` does.", still
    return rotary, None, still


def rotary_module(stack: nn.Module) -> nn.Module | None:
    """The module of a decoder that turns positions into cos and sin."""
    return next((child for name, child in stack.named_children() if "rotary" in name or name == "rotary_emb"), None)


def _rotary_facts(config: Any) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    if isinstance(parameters.get(COMPRESSIBLE), dict):
        parameters = parameters[COMPRESSIBLE]
    return {key: value for key, value in sorted(parameters.items()) if isinstance(value, str | int | float)}


def _takes_all(rotary: Rotary, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the model's function takes all channels of a head when fewer are rotated."""
    try:
        rotary.apply(x, x, cos, sin)
    except RuntimeError:
        return False
    return True


def _rotary(
    stack: nn.Module, attention: nn.Module, head_dim: int, given: dict[int, Given]
) -> tuple[Rotary | None, str | None]:
    """The rotary embedding, or `None` with what is wrong with it (`None` when the model has none)."""
    module = rotary_module(stack)
    if module is None:
        if any("rotary" in name for name, _ in attention.named_modules()) or hasattr(attention, "rotary_dim"):
            return None, f"{type(attention).__name__} holds its own rotary embedding, which is not supported."
        return None, None
    facts = _rotary_facts(getattr(module, "config", None))
    if facts.get("rope_type") in ("dynamic", "longrope"):
        return None, f"rope_type {facts['rope_type']!r} changes with the length of the text, which cannot be undone."
    if any(torch.is_complex(x.tables) for x in given.values() if torch.is_tensor(x.tables)):
        return None, f"{type(module).__name__} turns by complex numbers, which is not supported."
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return None, f"{type(attention).__module__} has no `apply_rotary_pos_emb` to undo."
    rotary = Rotary(module, apply, by_layer_type=hasattr(module, f"{COMPRESSIBLE}_inv_freq"))
    device = next(module.buffers()).device
    x = torch.randn(1, 1, 3, head_dim, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        cos, sin = rotary.tables(torch.tensor([[1, 5, 11]], device=device), torch.float32)
        rotary.part = cos.shape[-1] < head_dim and not _takes_all(rotary, x, cos, sin)
        turned = rotary.rotate(x, cos, sin)
        back = rotary.unrotate(turned, cos, sin)
    except Exception as error:  # a signature or a shape of another kind of embedding
        return None, f"the rotary embedding of {type(attention).__name__} is not supported ({error})."
    if not torch.allclose(back, x, atol=1e-4):
        return None, f"the rotary embedding of {type(attention).__name__} cannot be undone."
    rotary.halves = True
    if cos.shape[-1] > head_dim or not torch.allclose(rotary.rotate(x, cos, sin), turned, atol=1e-6):
        rotary.halves = False
    return rotary, None
