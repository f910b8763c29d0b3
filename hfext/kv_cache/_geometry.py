"""What a cache must know of a model: its attention modules, heads and rotary embedding, found once and checked."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import get_layer_types_and_kwargs

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

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin in float32 of `positions` [batch, tokens], rounded as a model in `dtype` rounds them."""
        like = torch.empty(0, dtype=dtype, device=positions.device)
        extra = (COMPRESSIBLE,) if self.by_layer_type else ()
        cos, sin = self.module.forward(like, positions, *extra)  # past the hook that notes positions
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
    """Sizes and modules of a decoder. `layers` are the indices that can be compressed."""

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
    return inner if inner is not None else model.base_model


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
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    rotary, problem = _rotary(decoder(model), modules[layers[0]], head_dim)
    facts = {
        "layers": len(types),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": config.hidden_size,
        "rotary": _rotary_facts(config) if rotary is not None else None,
    }
    return Geometry(types, kwargs, layers, heads, kv_heads, head_dim, config.hidden_size, rotary, problem, facts)


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


def _rotary(stack: nn.Module, attention: nn.Module, head_dim: int) -> tuple[Rotary | None, str | None]:
    """The rotary embedding, or `None` with what is wrong with it (`None` when the model has none)."""
    module = rotary_module(stack)
    if module is None:
        if any("rotary" in name for name, _ in attention.named_modules()) or hasattr(attention, "rotary_dim"):
            return None, f"{type(attention).__name__} holds its own rotary embedding, which is not supported."
        return None, None
    facts = _rotary_facts(getattr(module, "config", None))
    if facts.get("rope_type") in ("dynamic", "longrope"):
        return None, f"rope_type {facts['rope_type']!r} changes with the length of the text, which cannot be undone."
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
