"""What a mask function of transformers stands for, read from the closures that `transformers.masking_utils` makes.

Checked for transformers 5.17 to 5.23. A function counts as recognised when its code is that of the factory we know;
what the code does is compared once with transformers' own dense mask by `hfext.attention`.
"""

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from transformers import MODEL_MAPPING, PretrainedConfig, masking_utils


@lru_cache(maxsize=1)
def _known() -> dict[Any, str]:
    """Kinds by code object."""
    one, ids = torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    plain = masking_utils.causal_mask_function
    made = {
        "and": masking_utils.and_masks(plain),
        "sliding": masking_utils.sliding_window_overlay(1),
        "chunked": masking_utils.chunked_overlay(1, one),
        "window": masking_utils.sliding_window_bidirectional_overlay(1),
        "packed": masking_utils.packed_sequence_mask_function(ids),
        "remapped": masking_utils.remap_positions_for_packed_sequence(plain, ids),
        "padding": masking_utils.padding_mask_function(ids),
        "causal": plain,
        "bidirectional": masking_utils.bidirectional_mask_function,
    }
    return {function.__code__: kind for kind, function in made.items()}


def mask_parts(function: Callable) -> list[tuple[str, dict[str, Any]]] | None:
    """The conditions that a mask function joins by "and", as kinds and the variables they close over; None when any of
    them is unknown.

    Kinds are "causal", "bidirectional", "sliding" (sliding_window), "chunked" (chunk_size, left_padding), "window"
    (sliding_window), "packed" (packed_sequence_mask), "padding" (padding_mask) and "remapped" (position_ids, and parts
    in place of mask_function).
    """
    code = getattr(function, "__code__", None)
    kind = _known().get(code)
    if kind is None:
        return None
    try:
        contents = [cell.cell_contents for cell in function.__closure__ or ()]
    except AttributeError:  # torch.compile keeps what a closure of its own holds to itself
        return None
    closed = dict(zip(code.co_freevars, contents, strict=True))
    if kind == "and":
        found = []
        for part in closed["mask_functions"]:
            parts = mask_parts(part)
            if parts is None:
                return None
            found += parts
        return found
    if kind == "remapped":
        parts = mask_parts(closed["mask_function"])
        if parts is None or any(name in ("packed", "padding", "remapped") for name, _ in parts):
            return None
        return [(kind, {"parts": parts, "position_ids": closed["position_ids"]})]
    return [(kind, closed)]


def is_causal(module: torch.nn.Module) -> bool:
    """Whether an attention layer is causal where neither its call nor a mask says so, as transformers takes it."""
    return getattr(module, "is_causal", True)


@cache
def computes_its_own_attention(config: type[PretrainedConfig]) -> str | None:
    """The name of the model class of a config when it never asks `AttentionInterface`, as Bloom and MPT; such a model
    reads masks in eager attention's form alone."""
    if config not in MODEL_MAPPING:
        return None
    found = MODEL_MAPPING[config]
    model = found[0] if isinstance(found, list | tuple) else found
    supports = (getattr(model, f"_supports_{name}", False) for name in ("sdpa", "flash_attn", "attention_backend"))
    if any(supports) or hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS"):
        return None
    return model.__name__
