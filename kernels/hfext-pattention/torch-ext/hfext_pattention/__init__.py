"""Pattention (TokenFormer): attention of inputs over learnable key and value tokens, in place of a linear map.

    A = X K'      S = gelu(A tau / ||A||_2)      O = S V        ("l2_norm_gelu"; norms over the tokens of a row)

Two passes that recompute the scores in tiles, so no [rows, tokens] matrix is kept; a deterministic backward pass.
Without a GPU and outside of Triton's interpreter the same functions run as plain torch.
"""

from . import layers
from ._reference import pattention_reference
from .pattention import MODES, pattention

__all__ = ["MODES", "layers", "pattention", "pattention_reference"]
