"""Samplers as fields of `GenerationConfig`: accepted by `generate`, saved and loaded with `generation_config.json`.

| field | sampler |
|---|---|
| `top_n_sigma` | [`TopNSigmaLogitsProcessor`], n |
| `top_h_alpha` | [`TopHLogitsProcessor`], alpha |
| `mirostat_tau`, `mirostat_eta` | [`MirostatLogitsProcessor`], version 2 |
| `sampler_order` | the order of all samplers, stock ones too |

They act with `do_sample=True`, after the temperature and before the stock truncations, or as `sampler_order` says. An
active field acts wherever hfext is imported; a process without hfext ignores it silently: `hfext doctor FOLDER` tells.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)
from transformers.utils import logging

from .. import compat
from ..registry import suggest
from .mirostat import MirostatLogitsProcessor
from .top_h import TopHLogitsProcessor
from .top_n_sigma import TopNSigmaLogitsProcessor

logger = logging.get_logger(__name__)

FIELDS = ("top_n_sigma", "top_h_alpha", "mirostat_tau", "mirostat_eta", "sampler_order")
# By the field that switches it on; the default order.
SAMPLERS: dict[str, type[LogitsProcessor]] = {
    "temperature": TemperatureLogitsWarper,
    "top_n_sigma": TopNSigmaLogitsProcessor,
    "top_h_alpha": TopHLogitsProcessor,
    "mirostat_tau": MirostatLogitsProcessor,
    "top_h": TopHLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
NAMES = {kind: name for name, kind in SAMPLERS.items()}
LAST = (WatermarkLogitsProcessor, SynthIDTextWatermarkLogitsProcessor, LogitNormalization)


def enable(model: torch.nn.Module) -> torch.nn.Module:
    """Let `model.generate` take `top_h_alpha`, `mirostat_tau`, `mirostat_eta`, `top_n_sigma` and `sampler_order`.

    Args:
        model: A generating model of transformers, or one wrapped by PEFT. Its generation config gets the fields, with
            `None` where it has none yet, so that they are saved and loaded with it.

    Returns the model. Setting `model.generation_config` to a new object takes the fields away: call it again then. The
    folder of a PEFT adapter holds no generation config: save it with `model.generation_config.save_pretrained`.

    ```python
    >>> hfext.decoding.enable(model)
    >>> model.generate(**inputs, do_sample=True, temperature=1.5, top_k=0, top_h_alpha=0.4)
    ```
    """
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    config = getattr(base, "generation_config", None)
    if not isinstance(config, GenerationConfig):
        raise TypeError(
            f"enable needs a model that generates, with a generation_config; {type(model).__name__} has none."
        )
    for field in FIELDS:
        if not hasattr(config, field):
            setattr(config, field, None)
    compat.keep_unknown_fields(config)
    return model


def active_fields(config: GenerationConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The fields of hfext that are set in a generation config, or in the dict of its JSON file."""
    values = config if isinstance(config, Mapping) else vars(config)
    return {name: values[name] for name in FIELDS if values.get(name) is not None}


def make_samplers(
    config: GenerationConfig | Mapping[str, Any], rows_per_input: int = 1, fewest: int = 1
) -> list[LogitsProcessor]:
    """The samplers that the active fields ask for; `ValueError` for values out of range, with the field's name."""
    fields = active_fields(config)
    if "mirostat_eta" in fields and "mirostat_tau" not in fields:
        raise ValueError(f"mirostat_eta is {fields['mirostat_eta']} but mirostat_tau is not set: give the target too.")
    check_order(fields.get("sampler_order"))
    eta = fields.get("mirostat_eta", 1.0)
    options = {"mirostat_tau": {"eta": eta, "rows_per_input": rows_per_input}}
    made = []
    for field in ("top_n_sigma", "top_h_alpha", "mirostat_tau"):
        if field in fields:
            try:
                made.append(SAMPLERS[field](fields[field], min_tokens_to_keep=fewest, **options.get(field, {})))
            except (ValueError, TypeError) as error:
                raise type(error)(f"{field}={fields[field]!r} in the generation config: {error}") from error
    return made


def check_order(order: Any) -> None:
    if order is None:
        return
    if isinstance(order, str) or not isinstance(order, list | tuple):
        raise TypeError(f"sampler_order is {order!r} but must be a list of names: {', '.join(SAMPLERS)}.")
    for name in order:
        if name not in SAMPLERS:
            raise ValueError(f"sampler_order has {name!r}, which is no sampler. {suggest(str(name), SAMPLERS)}")
    if len(set(order)) < len(order):
        raise ValueError(f"sampler_order is {list(order)} but must name each sampler once.")


def unnamed_samplers(order: list[str] | None, samplers: list[LogitsProcessor]) -> list[str]:
    """Names of the samplers that are active and not in the order, if there is one."""
    return [] if order is None else [NAMES[type(p)] for p in samplers if NAMES[type(p)] not in order]


def arrange(
    processors: LogitsProcessorList, given: list[LogitsProcessor], config: GenerationConfig
) -> LogitsProcessorList:
    """The list that `generate` has built, with our samplers in their places. `given` are the user's and stay put."""
    order = getattr(config, "sampler_order", None)
    own = make_samplers(config, *_rows(config)) if active_fields(config) else []
    for twice in [p for p in own if any(type(p) is type(g) for g in given)]:
        # A draft model is handed the list and the config of the model that it drafts for.
        if not getattr(config, "is_assistant", False):
            name = NAMES[type(twice)]
            logger.warning_once(f"{type(twice).__name__} was passed to generate; the field {name} is not used.")
        own.remove(twice)
    mine = {id(p) for p in given}
    samplers = [p for p in processors if type(p) in NAMES and id(p) not in mine]
    warn_of_others([*given, *own, *samplers])
    if not own and order is None:
        check_temperature(processors, given)
        return processors
    places = [i for i, p in enumerate(processors) if p in samplers]
    first = (
        places[0] if places else len(processors) - sum(isinstance(p, LAST) for p in processors if id(p) not in mine)
    )
    rest = [p for p in processors if p not in samplers]
    samplers += own
    if order is not None:
        missing = unnamed_samplers(order, samplers)
        if missing:
            raise ValueError(
                f"sampler_order is {list(order)} but {', '.join(missing)} is active too: name it, or switch it off "
                "(top_k=0, top_p=1.0, temperature=1.0, None for the others). generate sets top_k=50 by itself."
            )
    places_in = list(order or SAMPLERS)
    samplers.sort(key=lambda p: places_in.index(NAMES[type(p)]))
    arranged = LogitsProcessorList([*rest[:first], *samplers, *rest[first:]])
    check_temperature(arranged, given)
    return arranged


def check_temperature(processors: LogitsProcessorList, given: list[LogitsProcessor]) -> None:
    """A processor that decides by a temperature of its own must be told the one that follows."""
    for processor in given:
        if isinstance(processor, TopHLogitsProcessor | MirostatLogitsProcessor) and processor in processors:
            own = processor.temperature
            later = processors[processors.index(processor) + 1 :]
            actual = math.prod(p.temperature for p in later if isinstance(p, TemperatureLogitsWarper))
            if own is None and actual != 1:
                logger.warning_once(
                    f"{type(processor).__name__} decides before generate applies temperature={actual}: give it the "
                    "same temperature, or use the field of the generation config."
                )
            if own is not None and not math.isclose(own, actual):
                raise ValueError(
                    f"{type(processor).__name__}(temperature={own}) decides for another temperature "
                    f"than the {actual} that generate applies after it: give both the same."
                )


def warn_of_others(samplers: list[LogitsProcessor]) -> None:
    """Mirostat controls what it measures only when nothing else truncates, and top_k=50 is the default."""
    names = [NAMES.get(type(p), "") for p in samplers]
    others = [name for name in names if name not in ("", "temperature", "mirostat_tau")]
    if "mirostat_tau" in names and others:
        logger.warning_once(
            f"Mirostat is active beside {', '.join(others)}, which truncate too: the surprise may stay below its "
            "target. Switch them off; generate sets top_k=50 unless top_k=0 is given."
        )
    elif {"top_h_alpha", "top_n_sigma"} & set(names) and any(
        isinstance(p, TopKLogitsWarper) and p.top_k == 50 for p in samplers
    ):
        logger.warning_once("generate truncates to top_k=50 as well, its default: give top_k=0 to switch that off.")


def _rows(config: GenerationConfig) -> tuple[int, int]:
    """Beams of one input, and how many tokens a beam needs, as `generate` counts them for its own samplers."""
    beams = config.num_beams or 1
    ends = getattr(config, "_eos_token_tensor", None)
    return beams, 1 if beams == 1 else 2 if ends is None else len(ends) + 1


def install() -> None:
    """Make `generate` look at the fields. Without one and without our processors its list is returned as it is."""

    def wrapper(original: Callable) -> Callable:
        def _get_logits_processor(self, generation_config, *args, **kwargs):
            processors = original(self, generation_config, *args, **kwargs)
            given = compat.given_processors(args, kwargs)
            if generation_config.do_sample:
                return arrange(processors, given, generation_config)
            fields = active_fields(generation_config)
            make_samplers(generation_config)
            given = [type(p).__name__ for p in given if type(p) in NAMES and (generation_config.num_beams or 1) == 1]
            if unused := [*fields, *given]:
                logger.warning_once(f"do_sample is not True: {', '.join(unused)} do nothing.")
            return processors

        return _get_logits_processor

    compat.on_logits_processors(wrapper)
