"""What `custom_generate/generate.py` ends with: what `generate` calls, and what replaces it for a model."""

import inspect
from typing import Any

from transformers import GenerationMixin
from transformers.utils import logging

from .superposed import SuperposedGenerationMixin


def generate(*args: Any, superposed_temperature: float | None = None, **kwargs: Any) -> Any:
    """`model.generate` by superposed decoding: its arguments and those of `generate_superposed`.

    Args:
        superposed_temperature (`float`, *optional*, defaults to 0.06): tau. `temperature` belongs to sampling here:
            a pipeline passes 0.7 of its own accord to every model. It is not used.
        custom_generate (*optional*): Another way of generating; `None` is the one of transformers.

    The model is the keyword `model`, or comes first.
    """
    if "model" not in kwargs:
        kwargs["model"], args = args[0], args[1:]
    names = list(inspect.signature(GenerationMixin.generate).parameters)[1:-1]
    streamer = kwargs.get("streamer", dict(zip(names, args, strict=False)).get("streamer"))
    twice = sorted(kwargs.keys() & set(names[: len(args)]))
    if twice or len(args) > len(names):
        if streamer is not None:
            streamer.end()
        raise TypeError(f"generate got {', '.join(twice) or 'positional arguments'} more often than it takes them.")
    kwargs |= zip(names, args, strict=False)
    model = kwargs.pop("model")
    if "custom_generate" in kwargs:
        return type(model).generate(model, **kwargs)
    if kwargs.pop("temperature", None) is not None and not kwargs.get("do_sample"):
        logging.get_logger(__name__).warning_once(
            "`temperature` belongs to sampling and is not used by superposed decoding: its own is "
            "`superposed_temperature`."
        )
    if superposed_temperature is not None:
        kwargs["temperature"] = superposed_temperature
    return SuperposedGenerationMixin.generate_superposed(model, **kwargs)
