"""Recent research methods as drop-in parts for Hugging Face libraries. Importing this package registers them."""

__version__ = "0.1.0"

from . import decoding, metrics, optim, training

__all__ = ["decoding", "metrics", "optim", "training"]
