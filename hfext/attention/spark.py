"""Spark attention: each query attends to about k keys, found without sorting, and a gate weighs what it finds.

    s_ij = <q1_i, k1_j> / sqrt(r);   theta_i = mean_j s_ij + std_j s_ij Q(1 - k / c_i)      over the c_i visible keys
    w_ij = softmax over the keys with s_ij >= theta_i of s_ij, times softplus(<q2_i, k2_j> / sqrt(D - r))
    o_i = sum_j w_ij v_j

q1 has r numbers of a head and predicts, q2 the other D - r; Q is the quantile of the normal distribution; rows with
c_i <= k keep all keys, and a row whose threshold nothing reaches its largest score. Moments and softmax in fp32.
`attn_implementation="hfext_spark"` is this. It is another function than softmax attention: train a model with it.
`attn_implementation="hfext_topk"` masks the ordinary scores of whole heads so, without a gate: for pretrained models.

Both read `config.spark_attention = {"r": 64, "k": 256}`: r (D // 2 when left out, with "halves" rounded down to an
even number), k (256), unbiased (True: the deviation divides by c - 1), pairs ("halves": q1 takes r / 2 numbers from
the beginning of each half of a head, so that what rotary embeddings turn together stays together, and both parts see
relative positions; "contiguous": the first r).
A layer whose `scaling` is not 1 / sqrt(D) scales both parts by scaling sqrt(D).

Spark Transformer: Reactivating Sparsity in FFN and Attention, arXiv 2506.06644. There is no official code: the bias of
the deviation, the gate without renormalisation, and r follow a public re-implementation; `pairs` is ours.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..registry import Method, Result
from ._mask import IntervalMask, interval_mask
from ._spark import attend


def spark_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: IntervalMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    `hfext_spark`, the attention function that models call; arguments as transformers' `sdpa_attention_forward`.

    Args:
        module (`nn.Module`): The layer; its `config.spark_attention` has the options.
        query (`Tensor` [batch, heads, q, head_dim]): In fp32, bf16 or fp16, as keys and values are.
        key, value (`Tensor` [batch, kv_heads, k, head_dim]): Values may have another head size.
        attention_mask (`IntervalMask`, `Tensor` or `None`): Of `interval_mask`, or a boolean one [batch or 1, heads or
            1, q, k].

    Returns:
        `(Tensor, None)`: [batch, q, heads, head_dim] in the dtype of `query`; weights are never made.

    Raises:
        ValueError: Options that are none, `output_attentions=True`, or a mask of another shape.
        NotImplementedError: Continuous batching, soft cap, sinks, position bias, or a mask that is added.
    """
    out = attend(
        True, module, query, key, value, attention_mask, dropout, scaling, is_causal, sliding_window, cache, kwargs
    )
    return out, None


def topk_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: IntervalMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`hfext_topk`: ordinary softmax attention over keys whose scores reach the statistical threshold; arguments as
    `spark_attention`, options `k` and `unbiased`. From k >= keys on it is softmax attention."""
    out = attend(
        False, module, query, key, value, attention_mask, dropout, scaling, is_causal, sliding_window, cache, kwargs
    )
    return out, None


for _name, _function in (("hfext_spark", spark_attention), ("hfext_topk", topk_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, interval_mask)  # without it every mask would be left out silently

METHOD = Method(
    name="spark",
    family="attention",
    title="Spark Transformer: Reactivating Sparsity in FFN and Attention",
    authors="You et al.",
    arxiv="2506.06644",
    year=2025,
    status="abstract-only",
    difference="No official code was found: the unbiased deviation, softplus without renormalisation, r and k follow "
    "the published summary and a public re-implementation; whether rotary embeddings turn both parts is not known "
    "(here they do, and `pairs` keeps what they turn together).",
    target="hfext.attention.spark:spark_attention",
    usage='AutoModelForCausalLM.from_config(config, attn_implementation="hfext_spark")',
    summary="Attention to about k keys of each query, found by mean and deviation of a cheap predictor, with a gate.",
    claim="A language model whose feed-forward layers use 8 % of their units, found by a statistical threshold, loses "
    "almost nothing against a dense one of as many parameters, and decodes faster.",
    headline=Result(
        metric="decoding speed, and FLOPs a token",
        setting="Gemma-2 2B recipe, 8 % of FFN units and at most 256 keys a token, CPU and GPU",
        value="1.79 and 1.40 times, 2.5 times fewer FLOPs",
        baseline="Gemma-2 2B",
    ),
    recipe="attention/spark-char-sparsity.yaml",
    notes="For training from scratch. `hfext_topk` is the same threshold on ordinary scores, for pretrained models. "
    "On the CPU all scores are made: no time is saved there. GPU numbers are not measured. The recipe measures the "
    "feed-forward part as well (`hfext.modules.spark_ffn`).",
)
