"""What of the settings of a run may be published: no token, no path of this machine, no password.

Of training arguments a white list is taken; of other settings names that speak of a secret are left out at any depth,
and a value that looks like a token is an error, since it may stand anywhere.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What of the arguments made the weights.
SETTINGS = (
    *("objective", "objective_args", "anchor", "optim", "optim_args", "learning_rate", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "label_smoothing_factor", "seed", "bf16", "fp16"),
)
_ARGUMENTS = {"output_dir", "per_device_train_batch_size"}  # who has both is the arguments of a Trainer
_SECRET = re.compile(
    r"(^|_)((hub|hf|huggingface|auth|access|api|bearer|secret|git|github|gitlab|wandb|refresh|session|id|login|user"
    r"|private|personal|bot|service|oauth|jwt|push_to_hub)_?)tokens?$|^tokens?$"
    r"|api_?key|access_?key|private_?key|secret|passw(or)?d|passphrase|credential|authorization|cookie"
)
_VALUE = re.compile(
    r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{8,}|(?<![A-Za-z0-9])(gh[pousr]_|github_pat_)\w{16,}|(?<![\w-])sk-[\w-]{20,}"
    r"|(?<=Bearer )\S{8,}"
)


def published(config: Any) -> Any:
    """Settings as a mapping, with what must not be published left out."""
    return _walk(config) or {}


def refuse_tokens(value: Any, where: str = "the record") -> None:
    """`ValueError` where a text holds what looks like a token; the message does not repeat it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_tokens(str(key), f"a name in {where}")
            refuse_tokens(item, f"{where}: {key}")
    elif isinstance(value, list | tuple | set):
        for item in value:
            refuse_tokens(item, where)
    elif isinstance(value, str) and _VALUE.search(value):
        raise ValueError(f"{where} holds what looks like a token: take it out, it would be published.")


def training_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of training arguments as a mapping: what made the weights."""
    return {name: _walk(given[name]) for name in SETTINGS if given.get(name) not in (None, "", {})}


def _walk(value: Any) -> Any:
    from transformers import TrainingArguments
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if isinstance(value, TrainingArguments):
        return training_settings(value.to_dict())
    # Ours leave out the data they were calibrated on.
    if isinstance(value, QuantizationConfigMixin):
        value = value.to_dict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if set(value) >= _ARGUMENTS:
            return training_settings(value)
        return {key: _walk(item) for key, item in value.items() if not _secret(key) and not _local(item)}
    if isinstance(value, list | tuple):
        return type(value)(_walk(x) for x in value if not _local(x)) if type(value) in (list, tuple) else value
    return value


def _secret(key: Any) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key)).lower()
    return _SECRET.search(re.sub(r"[^a-z0-9]+", "_", words).strip("_")) is not None


def _local(value: Any) -> bool:
    """Whether this is a path of this machine."""
    if isinstance(value, Path):
        return True
    if not isinstance(value, str) or "\0" in value or not os.path.isabs(os.path.expanduser(value)):
        return False
    here = os.path.expanduser(value)
    return here.startswith(str(Path.home()) + os.sep) or (len(here) < 4096 and here != "/" and os.path.exists(here))
