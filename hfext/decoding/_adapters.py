"""Adapters that a method cannot work with."""

from typing import Any


def refuse_prompt_learning(model: Any, method: str) -> None:
    """`NotImplementedError` for prompt tuning, prefix tuning and p-tuning: their virtual tokens shift positions."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise NotImplementedError(
            f"{method} does not work with {config.peft_type.value} adapters, whose virtual tokens stand before the "
            "prompt: use LoRA or another adapter of the weights, or a model without adapters."
        )
