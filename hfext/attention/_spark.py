"""What Spark attention reads from a model's config, and its arguments for the kernels."""

from typing import Any

from torch import Tensor, nn

from .._fields import one_of
from ._mask import IntervalMask
from .hfext_triton import under_autocast, visible

KEY = "spark_attention"
PAIRS = ("halves", "contiguous")


def options_of(config: Any, head_dim: int, gate: bool) -> dict[str, Any]:
    """`config.spark_attention`, with defaults, as arguments of `hfext_spark.spark_attention`."""
    given = None if config is None else vars(config).get(KEY)
    given = {} if given is None else given
    known = ("r", "k", "unbiased", "pairs") if gate else ("r", "k", "unbiased")
    if not isinstance(given, dict) or set(given) - set(known):
        raise ValueError(f"config.{KEY} is {given!r} but must be a dict with keys out of {', '.join(known)}.")
    k = given.get("k", 256)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"config.{KEY}['k'] is {k!r} but must be an integer >= 1.")
    unbiased = given.get("unbiased", True)
    if not isinstance(unbiased, bool):
        raise ValueError(f"config.{KEY}['unbiased'] is {unbiased!r} but must be true or false.")
    options = {"topk": k, "unbiased": unbiased, "gate": gate}
    if not gate:
        return options
    pairs = given.get("pairs", "halves")
    one_of(f"config.{KEY}['pairs']", pairs, PAIRS)
    half = head_dim // 4 * 2 if pairs == "halves" else head_dim // 2
    r = given.get("r", max(1, half))
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= head_dim - 1:
        raise ValueError(f"config.{KEY}['r'] is {r!r} but must be an integer in [1, {head_dim - 1}].")
    if pairs == "halves" and (r % 2 or head_dim % 2):
        raise ValueError(
            f"config.{KEY}['r'] is {r} and heads have {head_dim} numbers: both must be even, or 'pairs' 'contiguous'."
        )
    return {**options, "r": r, "halves": pairs == "halves"}


def attend(
    gate: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: IntervalMask | Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    sliding_window: int | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> Tensor:
    """[batch, q, heads, head_dim] for the arguments of an attention function of transformers."""
    from hfext_spark import spark_attention

    name = "hfext_spark" if gate else "hfext_topk"
    modifiers = {n: kwargs.pop(n, None) for n in ("softcap", "s_aux", "position_bias")}
    changing = [n for n, x in modifiers.items() if x is not None]
    if changing:
        raise NotImplementedError(
            f"The model passes {', '.join(changing)} to its attention, which {name} does not know and will not leave "
            "out: use attn_implementation='hfext_triton'."
        )
    seen = visible(
        module, query, key, attention_mask, is_causal=is_causal, sliding_window=sliding_window, cache=cache, **kwargs
    )
    if seen.pop("bias") is not None:
        raise NotImplementedError(
            f"{name} takes boolean masks, True where a pair takes part, and none that are added."
        )
    options = options_of(vars(module).get("config"), query.shape[-1], gate)
    query, key, value = under_autocast(query, key, value)
    n = seen.pop("length")
    if n < key.shape[2]:
        key, value = key[:, :, :n], value[:, :, :n]
        mask = seen["mask"]
        seen["mask"] = mask if mask is None or mask.shape[-1] == 1 else mask[..., :n]
    return spark_attention(query, key, value, scale=scaling, dropout_p=dropout, **options, **seen)
