"""How a model comes to use a compressed cache: hooks on the instance, all removable, none of them on a class.

Before the decoder runs: make a cache if the caller wants one and gave none, and tell a compressed one what is coming.
On the modules around it: note the mask, of which some make others before the decoder sees it. On its rotary embedding:
note the positions. Before each attention module: hand the step to the cache layer and give it the layer's own mask
where it has one. `generate` asks the model for a cache, and gets ours. With a cache that is not
ours every hook returns at once.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from ..compat import attention_implementation, own_cache
from ..compression import abandon, adopt
from ._cache import CompressedCache, CompressedLayer
from ._calls import PAST, Reporter, argument, cache_name, parameters, with_argument
from ._geometry import Geometry, attention_modules, decoder, decoder_layers, geometry, rotary_module, unwrapped
from ._state import Step

MARK = "_hfext_kv_cache"


UNKNOWN = object()


def _nothing() -> None:
    """The weak reference to no cache."""


class UnderWay(threading.local):
    """The forward that runs in a thread: its cache, whether its positions are noted, and the mask that the modules
    around the decoder were given (`UNKNOWN` outside them, or when it does not say which tokens are padding)."""

    cache: Callable[[], CompressedCache | None] = staticmethod(_nothing)
    noted = False
    mask: Any = UNKNOWN


class Plug:
    """The hooks of one model and what they know: the config (`None`: only caches given by the caller), the facts of
    the model and the forward under way. Copying the model copies it along."""

    def __init__(self, model: nn.Module):
        self.config: Any = None
        self.geometry: Geometry | None = None
        self.facts = geometry(model).facts
        self.under_way = UnderWay()
        stack = decoder(model)
        self.handles = []
        for place, module in enumerate(around(stack, model)):
            hook = functools.partial(self.before_outer, place == 0)
            self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.after_outer, always_call=True))
        self.handles += [
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
        return {name: value for name, value in vars(self).items() if name != "under_way"}

    def __setstate__(self, state: dict[str, Any]):
        vars(self).update(state, under_way=UnderWay())

    def use(self, config: Any, shape: Geometry) -> None:
        """Make caches of `config` from now on."""
        self.config, self.geometry = config, shape

    def fresh(self, model_config: Any) -> Cache:
        """An empty cache, with a plain one for the encoder's keys where there is an encoder."""
        cache = CompressedCache(self.config, self.geometry)
        if model_config.is_encoder_decoder:
            return EncoderDecoderCache(cache, DynamicCache(config=model_config.get_text_config(decoder=True)))
        return cache

    def before_outer(self, outermost: bool, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        decoders = "decoder_attention_mask"
        mask = argument(module, args, kwargs, decoders if decoders in parameters(type(module)) else "attention_mask")
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            self.under_way.mask = mask
        elif outermost:
            self.under_way.mask = UNKNOWN

    def after_outer(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.under_way.mask = UNKNOWN

    def before_model(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        cache = argument(stack, args, kwargs, "past_key_values")
        changed = False
        if cache is None and self.config is not None and not stack.training and _wants_cache(stack, args, kwargs):
            cache, changed = self.fresh(stack.config), True
            args, kwargs = with_argument(stack, args, kwargs, "past_key_values", cache)
        cache = compressed(cache)
        self.under_way.cache, self.under_way.noted = _nothing, False
        if cache is None:
            return None
        self.check_cache(stack, cache)
        given = argument(stack, args, kwargs, "input_ids")
        given = argument(stack, args, kwargs, "inputs_embeds") if given is None else given
        if given is not None:
            cache.begin(given.shape[1], self.padding(stack, args, kwargs), attention_implementation(stack))
            self.under_way.cache = weakref.ref(cache)
        return (args, kwargs) if changed else None

    def check_cache(self, stack: nn.Module, cache: CompressedCache) -> None:
        """Refuse a cache that was made for another model."""
        facts = cache.shared.geometry.facts
        if facts is self.facts or facts == self.facts:
            return
        other = (
            f"{name} {value} and not {self.facts[name]}" for name, value in facts.items() if value != self.facts[name]
        )
        raise ValueError(
            f"The cache was made for another model than this {type(stack).__name__}: {'; '.join(other)}. Make it with "
            "`config.make_cache(model)`."
        )

    def padding(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """The two-dimensional mask of a call as bool [batch, all tokens], or None when nothing is padded."""
        mask = argument(stack, args, kwargs, "attention_mask")
        if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() != 2):
            mask = self.under_way.mask
        if mask is UNKNOWN:
            raise NotImplementedError(
                "A compressed cache needs the attention mask as [batch, tokens], 1 for real tokens; a mask of every "
                "query and key or one for each kind of layer does not say which tokens are padding."
            )
        if mask is None:
            return None
        real = mask != 0
        return None if bool(real.all()) else real

    def after_model(self, stack: nn.Module, args: tuple, output: Any) -> None:
        cache = self.under_way.cache()
        if cache is not None:
            cache.shared.end()
        self.under_way.cache = _nothing

    def before_rotary(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = self.under_way.cache()
        if cache is not None and not self.under_way.noted:  # once, where it is called for each kind of layer
            self.under_way.noted = True
            positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
            cache.shared.note_positions(positions)


def around(stack: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The modules of a model that hold its decoder, the outermost first."""
    names = {id(module): name for name, module in model.named_modules()}
    parts = names[id(stack)].split(".") if stack is not model else []
    held = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]
    return [module for module in held if not isinstance(module, nn.ModuleList | nn.ModuleDict)]


def _wants_cache(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    given = argument(stack, args, kwargs, "use_cache")
    return bool(stack.config.use_cache if given is None else given)


def compressed(cache: Any) -> CompressedCache | None:
    """The compressed cache in what a model calls `past_key_values`, if it is one."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache if isinstance(cache, CompressedCache) else None


def before_block(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Show a cache layer that asks for it what enters its decoder layer."""
    cache = compressed(argument(module, args, kwargs, *PAST))
    if cache is not None and getattr(cache.layers[index], "wants_block_input", False):
        cache.layers[index].block_input = kwargs.get("hidden_states", args[0] if args else None)


def step_of(module: nn.Module, args: tuple, kwargs: dict[str, Any], shape: Geometry) -> Step:
    """What an attention module is about to do."""
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    tables = argument(module, args, kwargs, "position_embeddings")
    cos, sin = tables if isinstance(tables, tuple | list) and len(tables) == 2 else (None, None)
    return Step(module, hidden, cos, sin, shape)


def before_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Tell the cache layer of an attention module what is coming, and use the layer's own mask where it has one."""
    cache = compressed(argument(module, args, kwargs, *PAST))
    if cache is None:
        return None
    layer = cache.layers[module.layer_idx]
    if not isinstance(layer, CompressedLayer):
        return None
    layer.step = step_of(module, args, kwargs, cache.shared.geometry)
    hidden = layer.step.hidden_states
    if cache.shared.keeps_positions and layer.step.cos is None and cache.shared.geometry.rotary_of(module.layer_idx):
        raise NotImplementedError(
            f"{type(module).__name__} of layer {module.layer_idx} was not given cos and sin of its tokens. Take a "
            "method that keeps keys as they are (kivi, turboquant, snapkv)."
        )
    own = layer.mask(hidden.shape[1], hidden.dtype)
    if own is None:
        return None
    bias = argument(module, args, kwargs, "alibi", "position_bias")
    if bias is not None or "attention_mask" not in parameters(type(module)):
        raise NotImplementedError(
            f"{type(module).__name__} adds positions to the scores of all tokens (ALiBi, relative positions), so that "
            "none can be left out. Take a method that attends to every token (rotatekv, kivi, turboquant)."
        )
    if cache.shared.attention == "eager":
        own = torch.zeros(own.shape, dtype=hidden.dtype, device=own.device).masked_fill(
            ~own, torch.finfo(hidden.dtype).min
        )
    return with_argument(module, args, kwargs, "attention_mask", own)


def apply(model: nn.Module, config: Any) -> nn.Module:
    """From now on `generate`, and a forward with `use_cache=True`, use a compressed cache when none is given.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Loaded in any way, quantised or not. Its weights are not touched.
        config (`KVCacheConfig`): The method. Applying the same again changes nothing.

    Returns the model. `remove(model)` undoes it. A cache or `cache_implementation` given to `generate` wins.

    Raises:
        ValueError: The model already has another cache, or this one does not fit it.
    """
    refuse_prefix(model)
    if not (isinstance(model, nn.Module) and hasattr(config, "make_layers")):
        raise TypeError(
            f"apply(model, config) takes a transformers model and a cache config such as RotateKVConfig, not "
            f"{type(model).__name__} and {type(config).__name__}."
        )
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
    refuse_prefix(model)
    inner = unwrapped(model)
    if plug(inner) is None:
        vars(inner)[MARK] = Plug(inner)
    return plug(inner)


def cache_for_generate(model: nn.Module, generation_config: Any, model_kwargs: dict[str, Any]) -> Cache | None:
    """What `generate` gets when it asks for a cache, `None` for its own. Tells a cache of ours the prompt's length."""
    found = plug(model)
    given = model_kwargs.get("past_key_values")
    made = None
    refuse_prefix(getattr(model.prepare_inputs_for_generation, "__self__", None))  # PEFT's wrapper during its call
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
def capture(
    model: nn.Module, shape: Geometry, visit: Callable[[Step, int, Tensor, Tensor], None]
) -> Iterator[set[int]]:
    """Inside, every compressible attention module reports its step and its keys and values, which it does not keep.

    Gives the set of the layers that have reported, which grows as they do.
    """
    reported: set[int] = set()

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        step = step_of(module, args, kwargs, shape)

        def told(index: int, keys: Tensor, values: Tensor) -> None:
            reported.add(index)
            visit(step, index, keys, values)

        return with_argument(module, args, kwargs, cache_name(module), Reporter(told))

    modules = attention_modules(model)
    handles = [modules[index].register_forward_pre_hook(hook, with_kwargs=True) for index in shape.layers]
    try:
        yield reported
    finally:
        for handle in handles:
            handle.remove()


def refuse_prefix(model: nn.Module | None) -> None:
    """Refuse a PEFT model that fills a plain cache by itself."""
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if kind in ("PREFIX_TUNING", "CARTRIDGE"):
        raise NotImplementedError(
            f"{kind.value} puts its learnt keys and values into a plain cache, which takes the place of a compressed "
            "one. Take prompt tuning or LoRA, or the model without this adapter."
        )
