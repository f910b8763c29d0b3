"""How a model comes to use a compressed cache: hooks on the instance, all removable, none of them on a class.

Before the decoder runs: make a cache if the caller wants one and gave none, and tell a compressed one what is coming.
On its rotary embedding: note the positions. Before each attention module: hand the step to the cache layer and give it
the layer's own mask where it has one. `generate` asks the model for a cache, and gets ours. With a cache that is not
ours every hook returns at once.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from ..compat import attention_implementation, own_cache
from ..compression import abandon, adopt
from ._cache import CompressedCache, CompressedLayer
from ._geometry import Geometry, attention_modules, decoder, decoder_layers, rotary_module, unwrapped
from ._state import Step

MARK = "_hfext_kv_cache"


class Plug:
    """The hooks of one model and what they know: the config (`None`: only caches given by the caller) and the cache in
    use, held weakly. Copying the model copies it along."""

    def __init__(self, model: nn.Module):
        self.config: Any = None
        self.geometry: Geometry | None = None
        self.running: Callable[[], CompressedCache | None] = _nothing
        stack = decoder(model)
        self.handles = [
            stack.register_forward_pre_hook(self.before_model, with_kwargs=True, prepend=True),
            stack.register_forward_hook(self.after_model, always_call=True),
        ]
        rotary = rotary_module(stack)
        if rotary is not None:
            self.handles.append(rotary.register_forward_pre_hook(self.before_rotary, with_kwargs=True))
        for module in attention_modules(model).values():
            self.handles.append(module.register_forward_pre_hook(before_attention, with_kwargs=True))
        for index, module in decoder_layers(model).items():
            hook = functools.partial(before_block, index)
            self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def __getstate__(self):
        return {**vars(self), "running": _nothing}

    def use(self, config: Any, shape: Geometry) -> None:
        """Make caches of `config` from now on."""
        self.config, self.geometry = config, shape

    def fresh(self, model_config: Any) -> Cache:
        """An empty cache, with a plain one for the encoder's keys where there is an encoder."""
        cache = CompressedCache(self.config, self.geometry)
        if model_config.is_encoder_decoder:
            return EncoderDecoderCache(cache, DynamicCache(config=model_config.get_text_config(decoder=True)))
        return cache

    def before_model(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        cache = kwargs.get("past_key_values")
        changed = False
        if cache is None and self.config is not None and not stack.training and _wants_cache(stack, kwargs):
            cache = self.fresh(stack.config)
            kwargs["past_key_values"], changed = cache, True
        cache = compressed(cache)
        if cache is None:
            self.running = _nothing
            return None
        self.running = weakref.ref(cache)
        ids = kwargs.get("input_ids", args[0] if args else None)
        new = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
        cache.begin(new, _padding(stack, kwargs), attention_implementation(stack))
        return (args, kwargs) if changed else None

    def after_model(self, stack: nn.Module, args: tuple, output: Any) -> None:
        cache = self.running()
        if cache is not None:
            cache.shared.end()
        self.running = _nothing

    def before_rotary(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = self.running()
        if cache is not None:
            positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
            cache.shared.note_positions(positions)


def _nothing() -> None:
    """The weak reference to no cache."""


def _wants_cache(stack: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("use_cache")
    return bool(stack.config.use_cache if given is None else given)


def _padding(stack: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """The two-dimensional mask of a call as bool [batch, all tokens], or None when nothing is padded."""
    mask = kwargs.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask != 0).all())):
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    raise NotImplementedError(
        "A compressed cache needs the attention mask as [batch, tokens], 1 for real tokens; a mask of every query and "
        "key or one for each kind of layer does not say which tokens are padding."
    )


def compressed(cache: Any) -> CompressedCache | None:
    """The compressed cache in what a model calls `past_key_values`, if it is one."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache if isinstance(cache, CompressedCache) else None


def before_block(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Show a cache layer that asks for it what enters its decoder layer."""
    cache = compressed(kwargs.get("past_key_values"))
    if cache is not None and getattr(cache.layers[index], "wants_block_input", False):
        cache.layers[index].block_input = kwargs.get("hidden_states", args[0] if args else None)


def before_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Tell the cache layer of an attention module what is coming, and use the layer's own mask where it has one."""
    cache = compressed(kwargs.get("past_key_values"))
    if cache is None:
        return None
    layer = cache.layers[module.layer_idx]
    if not isinstance(layer, CompressedLayer):
        return None
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    cos, sin = kwargs.get("position_embeddings") or (None, None)
    layer.step = Step(module, hidden, cos, sin, cache.shared.geometry)
    own = layer.mask(hidden.shape[1], hidden.dtype)
    if own is None:
        return None
    if cache.shared.attention == "eager":
        own = torch.zeros(own.shape, dtype=hidden.dtype, device=own.device).masked_fill(
            ~own, torch.finfo(hidden.dtype).min
        )
    return args, {**kwargs, "attention_mask": own}


def apply(model: nn.Module, config: Any) -> nn.Module:
    """From now on `generate`, and a forward with `use_cache=True`, use a compressed cache when none is given.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Loaded in any way, quantised or not. Its weights are not touched.
        config (`KVCacheConfig`): The method. Applying the same again changes nothing.

    Returns the model. `remove(model)` undoes it. A cache or `cache_implementation` given to `generate` wins.

    Raises:
        ValueError: The model already has another cache, or this one does not fit it.
    """
    inner = unwrapped(model)
    found = plug(inner)
    if found is not None and found.config is not None and found.config != config:
        raise ValueError(
            f"The model already uses {found.config!r}. Call `hfext.kv_cache.remove(model)` before applying {config!r}."
        )
    shape = config.checked(inner)
    observe(inner).use(config, shape)
    own_cache(inner, cache_for_generate)
    adopt(inner, config)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undo `apply`: the model is as before, hooks and config entry included."""
    inner = unwrapped(model)
    found = plug(inner)
    if found is not None:
        for handle in found.handles:
            handle.remove()
        own_cache(inner, None)
        abandon(inner)
        delattr(inner, MARK)
    return model


def plug(model: nn.Module) -> Plug | None:
    """The plug of a model, or None."""
    return vars(unwrapped(model)).get(MARK)


def observe(model: nn.Module) -> Plug:
    """The plug of a model, put on it if there is none."""
    inner = unwrapped(model)
    if plug(inner) is None:
        vars(inner)[MARK] = Plug(inner)
    return plug(inner)


def cache_for_generate(model: nn.Module, generation_config: Any, model_kwargs: dict[str, Any]) -> Cache | None:
    """What `generate` gets when it asks for a cache, `None` for its own. Tells a cache of ours the prompt's length."""
    found = plug(model)
    given = model_kwargs.get("past_key_values")
    made = None
    if given is None and found.config is not None:
        if generation_config.cache_implementation is None and generation_config.use_cache is not False:
            made = found.fresh(model.config)
            if generation_config.is_assistant:
                made.activate_past_recording()
    cache = compressed(made if given is None else given)
    if cache is None:
        return None
    mask = model_kwargs.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if bool((mask[:, -1] == 0).any()):
            raise ValueError(
                "The prompt is padded on the right: generation would continue behind the padding. Pad on the left "
                '(`tokenizer.padding_side = "left"`).'
            )
        cache.shared.prompt_length = mask.shape[1]
    return made


@contextlib.contextmanager
def capture(model: nn.Module, shape: Geometry, visit: Callable[[Step, int, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, every compressible attention module reports its step and its keys and values, which it does not keep."""

    class Reporter:
        """Looks like a cache to an attention module: reports what it is given and returns it."""

        def __init__(self):
            self.step: Step | None = None

        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
            visit(self.step, layer_idx, keys, values)
            return keys, values

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        reporter = Reporter()
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        cos, sin = kwargs.get("position_embeddings") or (None, None)
        reporter.step = Step(module, hidden, cos, sin, shape)
        return args, {**kwargs, "past_key_values": reporter}

    modules = attention_modules(model)
    handles = [modules[index].register_forward_pre_hook(hook, with_kwargs=True) for index in shape.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
