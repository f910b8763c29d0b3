"""Attention steerings that are active on a model: `generate` tells them its prompt, second streams suspend them.

Only `generate` knows where a prompt ends: the first forward of assisted decoding holds drafted tokens too, that of a
chunked prefill a part of the prompt, and without a cache every forward begins at the first token.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import GenerationMixin

from .. import compat

ACTIVE: weakref.WeakSet = weakref.WeakSet()

# Attention that takes (heads, bias of the keys) from this attribute of its layer, `hfext.attention.hfext_pasta`.
BY_KEY = ("hfext_pasta", "hfext_triton")
STEERING = "hfext_steering"


def steerings_of(model: nn.Module) -> list[Any]:
    """Active handles whose attention modules belong to `model`."""
    modules = set(model.modules()) if ACTIVE else set()
    return [steering for steering in ACTIVE if modules & steering.modules]


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Inside, `model` runs unsteered: the spans belong to another prompt."""
    steerings = steerings_of(model)
    for steering in steerings:
        steering.suspensions += 1
    try:
        yield
    finally:
        for steering in steerings:
            steering.suspensions -= 1


def taken(module: nn.Module, args: tuple, output: Any) -> None:
    """Nothing may be left of a steering when its layer has run, and least of all unnoticed."""
    if STEERING not in vars(module):
        return
    delattr(module, STEERING)
    if output is not None:
        raise NotImplementedError(
            f"A {type(module).__name__} was to be steered but does not ask the attention that it was loaded with: "
            'load the model with attn_implementation="sdpa" or "eager".'
        )


def prompt_columns(inputs: Any = None, *_: Any, **kwargs: Any) -> int | None:
    """Columns of the prompt among the arguments of `generate`, which begins with one token when it gets none."""
    given = [x for x in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")) if x is not None]
    if not given:
        return 1
    shape = getattr(given[0], "shape", ())
    return int(shape[1]) if len(shape) > 1 else None


def announce_prompts() -> None:
    """From now on `generate` tells the steerings of its model how long the prompt is. Nobody else notices."""

    def wrapper(original):
        def generate(self, *args, **kwargs):
            with contextlib.ExitStack() as stack:
                for steering in steerings_of(self):
                    stack.enter_context(steering.generating(prompt_columns(*args, **kwargs)))
                return original(self, *args, **kwargs)

        return generate

    compat.patch_method(GenerationMixin, "generate", wrapper)
