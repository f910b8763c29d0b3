"""Metrics: functions of tensors, and `compute(...) -> dict` as in `evaluate`.

| you want | take | not when |
|---|---|---|
| whether several answers to a question agree in meaning | `eigenscore` | the model is consistently wrong |
| the same where a decomposition does not fit | `efficient_eigenscore` | below some thousand: the exact one is faster |
"""

from ..registry import collect
from . import efficient_eigenscore, eigenscore
from .eigenscore import answer_embeddings

METHODS = collect(__name__)
