"""What must be the same when an S3T ensemble is opened again, beside its rows: the frozen base and the training."""

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

SHARED = (
    "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps weight_decay "
    "warmup_steps lr_scheduler_type lr_scheduler_kwargs optim optim_args adam_beta1 adam_beta2 adam_epsilon "
    "label_smoothing_factor max_grad_norm bf16 fp16 seed"
).split()


def training_record(args: TrainingArguments) -> dict[str, Any]:
    """The fields that a stage's weights depend on."""
    values = args.to_dict()
    return {name: values[name] for name in SHARED}


def base_digest(model: nn.Module, trained: Collection[str]) -> str:
    """Of the names, types and bits of all parameters that stay, whichever of them have an adapter.

    What a trained head was before is left out: it may be drawn anew in every process, and is kept with the run.
    """
    found = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        if name not in trained and ".original_module." not in name:
            found.update(f"{name.replace('.base_layer.', '.')} {p.dtype} {list(p.shape)}\n".encode())
            found.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
