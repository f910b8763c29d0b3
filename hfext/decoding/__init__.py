"""Logits processors and generation loops for `generate`.

How to choose:

| you want | take | cost | not when |
|---|---|---|---|
| variety at high temperature that stays readable | `top_h` | a top-k a token | T <= 1: it is nearly greedy there |
| a cut that does not depend on the temperature | `top_n_sigma` | one pass over the logits | |
| text of a given mean surprise, at any length | `mirostat` | one pass over the logits | beams, short texts |
| several short drafts of one prompt | `superposed` | one stream, whatever k | beyond some 20 tokens |
| answers that follow the context, not memory | `cad` | two forwards a token | there is no context |
| a part of the prompt to weigh more | `pasta` | an attention mask | flash attention |
| that part found by the model itself | `autopasta` | one more answer | the context is one sentence |
| how many samples an imperfect verifier is worth | `resampling` | a formula | the verifier is perfect |

`enable(model)` makes the samplers fields of `generate`; `conformance` checks any processor.
"""

from ..registry import collect
from . import autopasta, cad, conformance, mirostat, pasta, resampling, superposed, top_h, top_n_sigma
from ._generation_fields import active_fields, enable, install, make_samplers, unnamed_samplers
from ._superposed_hub import export_superposed
from .autopasta import AutoPastaOutput, autopasta_generate, mean_pooling_encoder
from .cad import ContextAwareLogitsProcessor, generate_cad
from .mirostat import MirostatLogitsProcessor
from .ngram_store import NGramStore
from .pasta import AttentionSteering, load_heads, profile_heads, save_heads, span_to_tokens, steer_attention
from .resampling import ResampleUntilAccepted, calibrate, optimal_num_samples, resampling_curve
from .superposed import SuperposedConfig, SuperposedGenerationMixin, SuperposedOutput, superposed_generate
from .top_h import TopHLogitsProcessor
from .top_n_sigma import TopNSigmaLogitsProcessor

METHODS = collect(__name__)
install()
