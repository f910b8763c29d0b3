"""Private parts of `generate`."""

import contextvars
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from ._trainer import patch_method


def let_callables_refuse(given_streamer: contextvars.ContextVar) -> None:
    """Ask a `custom_generate` callable before `generate` prepares anything.

    `generate` keeps `streamer`, `assistant_model` and `tokenizer` from a callable and puts the prompt into the
    streamer, whose reader then waits for ever. A callable with an attribute `hfext_before_generate` is called there
    with `streamer`, `assistant_model` and the other arguments, and may raise. Nobody else notices. Inside any callable
    `given_streamer` holds the streamer, for one that hides behind another function.
    """

    def wrapper(original):
        signature = inspect.signature(original)

        def extract(self, *args, **kwargs):
            given = signature.bind(self, *args, **kwargs).arguments
            callable_ = given.get("custom_generate")
            if callable(callable_):
                given_streamer.set(given.get("streamer"))
            while isinstance(callable_, functools.partial):
                callable_ = callable_.func
            ask = getattr(callable_, "hfext_before_generate", None)
            if ask is not None:
                ask(given.get("streamer"), given.get("assistant_model"), **given.get("kwargs", {}))
            return original(self, *args, **kwargs)

        return extract

    patch_method(GenerationMixin, "_extract_generation_mode_kwargs", wrapper)


def on_logits_processors(wrapper: Callable[[Callable], Callable]) -> None:
    """Replace the method by which `generate` builds its list of processors by `wrapper(method)`, once."""
    patch_method(GenerationMixin, "_get_logits_processor", wrapper)


def given_processors(args: tuple, kwargs: dict[str, Any]) -> list:
    """The user's processors among the arguments of that method, which come behind the generation config."""
    names = list(inspect.signature(GenerationMixin._get_logits_processor).parameters)[2:]
    return list({**dict(zip(names, args, strict=False)), **kwargs}.get("logits_processor") or [])


def attention_implementation(model: torch.nn.Module) -> str:
    """Name of the attention that a model runs with."""
    return model.config.get_text_config()._attn_implementation or "eager"


def keep_unknown_fields(config: GenerationConfig) -> None:
    """A generation config made from a model's config is marked so, and drops unknown fields when it is loaded."""
    config._from_model_config = None


class _OwnCache:
    """Stands for `_prepare_cache_for_generation` on one model; copied and pickled with it."""

    def __init__(self, model: torch.nn.Module, make: Callable[[Any, Any, dict], Any]):
        self.model, self.make = model, make

    def __call__(self, generation_config, model_kwargs, *args, **kwargs):
        cache = self.make(self.model, generation_config, model_kwargs)
        if cache is not None:
            model_kwargs["past_key_values"] = cache
            return None
        stock = type(self.model)._prepare_cache_for_generation
        return stock(self.model, generation_config, model_kwargs, *args, **kwargs)


def own_cache(model: torch.nn.Module, make: Callable[[Any, Any, dict], Any] | None) -> None:
    """Let `make(model, generation_config, model_kwargs)` give `generate` its cache; `None` from it: the stock one.

    Set on the instance alone; `make=None` takes it off again.
    """
    name = "_prepare_cache_for_generation"
    if isinstance(vars(model).get(name), _OwnCache):
        del vars(model)[name]
    if make is not None:
        vars(model)[name] = _OwnCache(model, make)
