"""`UnlearningConfig`: `TrainingArguments` with what unlearning adds."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .._fields import one_of
from ._data import TEMPLATE
from ._objective import TwoGradientObjective, objective, objective_class
from ._reference import MODES


@dataclass
class UnlearningConfig(TrainingArguments):
    """
    Args of [`~transformers.TrainingArguments`], and these:

    Args:
        objective (`str`, *optional*, defaults to "ngdiff"): Name of the method; `hfext list --family unlearning`.
        objective_args (`dict`, *optional*): Its options, for example `{"beta": 0.1}`; a JSON text on a command line.
        anchor (`str`, *optional*): An epoch sees every row of this part, "forget" or "retain", once, each with a row
            of the other part; by default "forget", and "retain" where forget rows are not looked at.
        reference (`str`, *optional*, defaults to "auto"): Where a frozen reference comes from, for objectives that
            need one: "disable", "adapter", "precompute" or "copy".
        loss_normalization (`str`, *optional*, defaults to "window"): "window" divides by the tokens or rows of the
            whole update, so that batch size and accumulation can be traded; "micro" by those of each micro-batch, as
            other tools do.
        log_gradients (`bool`, *optional*, defaults to `False`): With one-gradient objectives, log the norms of the
            gradients of their terms and their cosine too, from the last micro-batch of an update that is logged. Costs
            two more backward passes there; objectives with two gradients log those of the whole update at no cost.
        abort_on_nonfinite (`bool`, *optional*, defaults to `True`): A loss or gradient that is NaN or infinite ends
            the training before the step; unlearning losses have no lower bound.
        max_length (`int`, *optional*, defaults to 1024): Longer rows of text are cut.
        template (`str`, *optional*): How rows with `question` and `answer` become text.
        refusals (`list[str]`, *optional*): Answers for objectives that teach a refusal; a list of our own by default.
        max_grad_norm (`float`, *optional*): 1.0 by default, and 0 (off) with objectives whose gradients have a length
            of their own.
        remove_unused_columns (`bool`): Always off: a batch is not the model's own.
    """

    objective: str = "ngdiff"
    objective_args: dict | str | None = None
    anchor: str | None = None
    reference: str = "auto"
    loss_normalization: str = "window"
    log_gradients: bool = False
    abort_on_nonfinite: bool = True
    max_length: int | None = 1024
    template: str = TEMPLATE
    refusals: list[str] | None = None
    max_grad_norm: float | None = field(default=None)  # type: ignore[assignment]
    remove_unused_columns: bool = False

    def __post_init__(self):
        if isinstance(self.objective_args, str):
            self.objective_args = json.loads(self.objective_args)
        objective(self.objective, self.objective_args)  # names and values are checked before anything is loaded
        one_of("anchor", self.anchor, (None, "forget", "retain"))
        one_of("reference", self.reference, MODES)
        one_of("loss_normalization", self.loss_normalization, ("window", "micro"))
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length} but must be None or >= 2.")
        if "{question}" not in self.template:
            raise ValueError(f"template is {self.template!r} but must contain {{question}}.")
        if self.refusals is not None and not all(isinstance(x, str) and x.strip() for x in self.refusals or [""]):
            raise ValueError("refusals must be a list of at least one text.")
        self.default_clipping = self.max_grad_norm is None
        self.adapt(objective_class(self.objective))
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns is True but must be False: a batch holds several parts.")
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor is {self.label_smoothing_factor} but must be 0: losses are own.")
        super().__post_init__()

    def adapt(self, kind: type) -> None:
        """Clipping where it was left to us, and what does not go with an objective of this class."""
        two = issubclass(kind, TwoGradientObjective)
        if self.default_clipping:
            self.max_grad_norm = 0.0 if two else 1.0
        if two and self.fp16:
            raise ValueError(
                f"fp16 is True, but {kind.__name__} combines two gradients, whose loss scale would be lost: use bf16."
            )

    def objective_kwargs(self) -> dict[str, Any]:
        """The options of the objective."""
        return dict(self.objective_args or {})
