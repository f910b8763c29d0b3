"""Recent research methods as drop-in parts for Hugging Face libraries. Importing this package registers them."""

__version__ = "0.1.0"

from . import decoding, metrics, optim, training
from .decoding import (
    ContextAwareLogitsProcessor,
    MirostatLogitsProcessor,
    SuperposedGenerationMixin,
    TopHLogitsProcessor,
    TopNSigmaLogitsProcessor,
    superposed_generate,
)

__all__ = [
    "ContextAwareLogitsProcessor",
    "MirostatLogitsProcessor",
    "SuperposedGenerationMixin",
    "TopHLogitsProcessor",
    "TopNSigmaLogitsProcessor",
    "decoding",
    "metrics",
    "optim",
    "superposed_generate",
    "training",
]
