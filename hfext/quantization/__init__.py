"""Quantised weights through `from_pretrained`, all methods in one format.

How to choose: to be written.
"""

from ..registry import collect
from . import decoupleq, gptq, hqq, ofa, rtn, sketchtune
from ._allocation import Allocation, allocate
from ._calibration import Block
from ._config import CalibratedConfig, WeightConfig
from ._data import token_rows
from ._fine_tuning import train_grids
from ._linear import QuantLinear
from ._quantizer import check_folder, dequantize, quantize, quantized_layers
from .awq import AWQConfig
from .decoupleq import DecoupleQConfig
from .gptq import GPTQConfig
from .hawq2 import HAWQ2Config
from .hqq import HQQConfig
from .lorc import LoRCConfig, to_lora
from .mixdq import MixDQConfig
from .ofa import OFACallback, OFAConfig, export_subnet, search_subnet, set_subnet, train_subnets
from .rtn import RTNConfig
from .sketchtune import SketchTuneConfig, load_sketch_delta, save_sketch_delta

METHODS = collect(__name__)
