"""Recent research methods as drop-in parts for Hugging Face libraries. Importing this package registers them."""

__version__ = "0.1.0"

from . import attention, decoding, kv_cache, metrics, modules, optim, quantization, schedule, training, unlearning
from .compression import CompressionConfig
from .decoding import (
    ContextAwareLogitsProcessor,
    MirostatLogitsProcessor,
    SuperposedGenerationMixin,
    TopHLogitsProcessor,
    TopNSigmaLogitsProcessor,
    superposed_generate,
)
from .hub import model_card, push_to_hub
from .kv_cache import RotateKVConfig
from .quantization import DecoupleQConfig
from .unlearning import UnlearningConfig, UnlearningTrainer

__all__ = [
    "CompressionConfig",
    "ContextAwareLogitsProcessor",
    "DecoupleQConfig",
    "MirostatLogitsProcessor",
    "RotateKVConfig",
    "SuperposedGenerationMixin",
    "TopHLogitsProcessor",
    "TopNSigmaLogitsProcessor",
    "UnlearningConfig",
    "UnlearningTrainer",
    "attention",
    "decoding",
    "kv_cache",
    "metrics",
    "model_card",
    "modules",
    "optim",
    "push_to_hub",
    "quantization",
    "schedule",
    "superposed_generate",
    "training",
    "unlearning",
]
