"""What happens to an `UnlearningTrainer` at the ends of a training and before each step."""

from typing import Any

import torch
from transformers import TrainerCallback

from ..optim._wrapper import total_norm


class RunCallback(TrainerCallback):
    """What happens at the ends of a training, and before each step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._metrics, self.trainer._noted_until = {}, state.global_step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        scaler = self.trainer.accelerator.scaler
        if not args.abort_on_nonfinite or (scaler is not None and scaler.is_enabled()):
            return  # a scaler leaves out such steps by itself
        norm = total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            raise RuntimeError(
                f"The gradient is not finite in update {state.global_step + 1}, though the loss is. Take a smaller "
                "learning_rate, or set abort_on_nonfinite=False."
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.objective.finish(self.trainer)
