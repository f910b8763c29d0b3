"""Learning-rate schedules by name in stock `TrainingArguments(lr_scheduler_type=...)`, and what rate to begin with.

How to choose:

| you want | take | not when |
|---|---|---|
| one amplitude that holds for any batch size and length | `power` | the length is known and the peak is tuned |
| a peak rate and a batch size without any tuning | `step_law` | you fine-tune, or are far from 60M to 1B parameters |
"""

from ..registry import collect
from . import power
from ._install import install
from .power import PowerConfig, power_schedule
from .step_law import AppliedStepLaw, StepLaw, apply_step_law, step_law

__all__ = [
    "AppliedStepLaw",
    "PowerConfig",
    "StepLaw",
    "apply_step_law",
    "power_schedule",
    "step_law",
]
METHODS = collect(__name__)
install()
