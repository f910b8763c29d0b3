"""Binds the schedules to `TrainingArguments(lr_scheduler_type=...)` and lets the Trainer tell what they ask for."""

from transformers import Trainer

from ..compat import patch_method, register_scheduler, replaced
from . import power


def _with_auto(original):
    def create_scheduler(self, *args, **kwargs):
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != "power":
            return original(self, *args, **kwargs)
        with replaced(self.args, "lr_scheduler_kwargs", power.for_trainer(self)):
            return original(self, *args, **kwargs)

    return create_scheduler


def install() -> None:
    """Register the names and patch `Trainer.create_scheduler`; idempotent, and nothing for other schedules."""
    register_scheduler("power", power.power_schedule, power.check_arguments)
    patch_method(Trainer, "create_scheduler", _with_auto)
