"""Quantised weights through `from_pretrained`, all methods in one format.

How to choose: to be written.
"""

from ..registry import collect
from . import hqq, rtn
from ._calibration import Block
from ._config import CalibratedConfig, WeightConfig
from ._linear import QuantLinear
from ._quantizer import dequantize, quantize
from .hqq import HQQConfig
from .rtn import RTNConfig

METHODS = collect(__name__)
