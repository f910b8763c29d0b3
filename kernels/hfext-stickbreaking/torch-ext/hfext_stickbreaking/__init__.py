"""Stick-breaking attention, forward and backward, in Triton and in plain torch."""

from .stickbreaking import stickbreaking_attention

__all__ = ["stickbreaking_attention"]
