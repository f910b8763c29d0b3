"""What `hfext doctor` looks at: each hook, the versions it was checked for, and a check that it is still there."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin, Trainer, TrainingArguments, optimization, trainer_optimizer
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ._torch import cpu_kernels

CHECKED_TRANSFORMERS = "5.17 to 5.23"
CHECKED_TORCH = "2.11 to 2.13"


def _has(owner: Any, *names: str) -> Callable[[], None]:
    def check():
        missing = [name for name in names if not hasattr(owner, name)]
        if missing:
            raise RuntimeError(f"{getattr(owner, '__name__', owner)} has no {', '.join(missing)}")

    return check


CHECKS: list[tuple[str, str, Callable[[], None]]] = [
    (
        "optimizer names",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(OptimizerNames, "_value2member_map_", "_member_map_"),
    ),
    (
        "optimizer handlers",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(trainer_optimizer, "_OPTIMIZER_HANDLERS", "OptimizerContext"),
    ),
    (
        "schedule names",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(SchedulerType, "_value2member_map_", "_member_map_"),
    ),
    (
        "schedule table",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(optimization, "TYPE_TO_SCHEDULER_FUNCTION", "get_scheduler"),
    ),
    (
        "Trainer hooks",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(
            Trainer,
            "training_step",
            "compute_loss",
            "create_scheduler",
            "get_total_train_batch_size",
            "_prepare_inputs",
            "log",
            "evaluate",
            "save_model",
            "push_to_hub",
            "_push_from_checkpoint",
            "_save_optimizer_and_scheduler",
            "_load_optimizer_and_scheduler",
            "_load_best_model",
            "_prepare_for_training",
            "_move_model_to_device",
            "_set_signature_columns_if_needed",
        ),
    ),
    (
        "TrainingArguments hooks",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(TrainingArguments, "__post_init__", "set_optimizer"),
    ),
    (
        "callables of generate",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(GenerationMixin, "_extract_generation_mode_kwargs"),
    ),
    (
        "processors of generate",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(GenerationMixin, "_get_logits_processor"),
    ),
    (
        "the cache of generate",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(GenerationMixin, "_prepare_cache_for_generation"),
    ),
    ("CPU kernels of packed weights", f"torch {CHECKED_TORCH}", cpu_kernels),
    ("optimizer hook tables", f"torch {CHECKED_TORCH}", _has(torch.optim.Optimizer, "register_step_pre_hook")),
    (
        "foreach kernels",
        f"torch {CHECKED_TORCH}",
        _has(torch, "_foreach_norm", "_foreach_add_", "_foreach_copy_", "_foreach_sub"),
    ),
]
