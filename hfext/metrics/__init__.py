"""Metrics."""

from ..registry import collect

METHODS = collect(__name__)
