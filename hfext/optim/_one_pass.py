"""What an optimizer with one gradient an update must have to be a name of `TrainingArguments(optim=...)`."""

from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_optimizer import OptimizerContext


class OnePass(torch.optim.Optimizer):
    """Abstract. A method has a frozen dataclass `Config`, whose fields are arguments of its constructor too.

    `step` changes nothing when a gradient is missing, and everything that the rule needs is in `state` and
    `param_groups`, so that a checkpoint of the Trainer resumes it.
    """

    hfext_one_pass = True
    Config: type

    @classmethod
    def check_arguments(cls, args: TrainingArguments) -> None:
        """Raise for settings of the Trainer that the method cannot serve; called when the arguments are made."""

    @classmethod
    def trainer_kwargs(cls, context: OptimizerContext, config: Any) -> dict[str, Any]:
        """Arguments of the constructor beyond `lr` and the config; `params` replaces the Trainer's groups."""
        return dict(context.adam_kwargs)
