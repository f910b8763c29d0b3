"""Logits processors and generation loops for `generate`.

How to choose:

| you want | take | cost | not when |
|---|---|---|---|
| variety at high temperature that stays readable | `top_h` | a top-k a token | you compare with papers that sampled otherwise |
| a cut that does not depend on the temperature | `top_n_sigma` | one pass over the logits | |
| text of a given mean surprise, at any length | `mirostat` | one pass over the logits | beams, short texts |
"""

from ..registry import collect
from ._generation_fields import active_fields, enable, install, make_samplers
from .mirostat import MirostatLogitsProcessor
from .top_h import TopHLogitsProcessor
from .top_n_sigma import TopNSigmaLogitsProcessor

METHODS = collect(__name__)
install()
