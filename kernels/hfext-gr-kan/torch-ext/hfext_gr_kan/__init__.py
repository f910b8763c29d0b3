"""Group-rational activations (GR-KAN): a fused forward kernel and a deterministic fused backward kernel.

    y = P(x) / Q(x),  P = sum_{i=0..m} a_i x^i
    Q = 1 + sum_{j=1..n} |b_j| |x|^j  ("abs_terms")  or  1 + |sum_{j=1..n} b_j x^j|  ("abs_sum")

Channels are divided into groups of equal width, each with coefficients of its own. Without a GPU and outside of
Triton's interpreter the same functions run as plain torch, with the same analytic backward pass.
"""

from . import layers
from ._reference import rational_reference
from .rational import DENOMINATORS, MAX_DENOMINATOR, MAX_NUMERATOR, rational

__all__ = ["DENOMINATORS", "MAX_DENOMINATOR", "MAX_NUMERATOR", "layers", "rational", "rational_reference"]
