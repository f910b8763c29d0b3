"""Spark Transformer: sparse feed-forward layers and attention; what is largest is found by statistics, not sorting.

    theta(x, k) = mean(x) + std(x) Q(1 - k / d)

Without a GPU and outside of Triton's interpreter the same functions run as plain torch.
"""

from . import layers
from .attention import spark_attention
from .ffn import spark_ffn
from .topk import statistical_topk

__all__ = ["layers", "spark_attention", "spark_ffn", "statistical_topk"]
