"""Quantised weights through `from_pretrained`, all methods in one format: w = s q + z with packed integers q.

How to choose:

| you want | take | cost (135M parameters) | not when |
|---|---|---|---|
| 4 or 8 bits at once, no data | `hqq`, `rtn` | seconds, one weight in memory | below 4 bits |
| 3 bits | `gptq` with `clip_search`, `awq` | 3 to 6 CPU minutes | no text to calibrate on |
| 2 bits | `decoupleq` | 5 CPU minutes, 15 with its block stage | |
| a single layer as exact as can be | `adaquant` | gradient steps for each layer | large models on a CPU |
| other bits for each layer | `allocate`: `hawq2`, `loss`, `mixdq` | double backwards, or a pass a layer | |
| a correction beside the codes | `lorc` around any method | an SVD a layer, 0.2 bits | |
| to fine-tune the quantised model | `sketchtune`, `train_grids`, LoRA | training | |
| one model for many sizes | `ofa` | training, three copies | one size only |
| 8-bit activations | `bos_aware` around any method | a calibration | no int8 kernel is used yet |

`quantize(model, config)` for a loaded model, `dequantize(model)` back; `CompressionConfig(weights=, kv_cache=)` joins
weights with a cache.
"""

from ..registry import collect
from . import decoupleq, gptq, hqq, ofa, rtn, sketchtune
from ._allocation import Allocation, allocate
from ._calibration import Block
from ._config import CalibratedConfig, WeightConfig
from ._cpu_kernels import set_kernel
from ._data import token_rows
from ._export import export_compressed_tensors
from ._fine_tuning import train_grids
from ._linear import QuantLinear
from ._quantizer import check_folder, dequantize, quantize, quantized_layers
from ._statistics import Tuning, tune_biases, tune_statistics
from .adaquant import AdaQuantConfig
from .awq import AWQConfig
from .bos_aware import BOSAwareConfig
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
