"""Linear layers with weights of 8, 4, 3 or 2 bits: codes are read packed and become weights in registers."""

from . import layers
from .functional import dequantize, quantized_linear

__all__ = ["dequantize", "layers", "quantized_linear"]
