"""What a Trainer's batch and outputs mean: which logits are scored against which labels, and how a mean is taken."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat import loss_is_scaled, loss_shifts_labels


@dataclass(frozen=True)
class Prediction:
    """Logits and their targets. Items whose label is negative do not count.

    classification: logits [rows, classes], labels [rows]; multilabel: both [batch, labels];
    regression: logits (the predictions) and labels of one shape.
    """

    kind: Literal["classification", "multilabel", "regression"]
    logits: Tensor
    labels: Tensor


def mean_over_update(trainer: Any, values: Tensor, mask: Tensor, num_items: Any) -> Tensor:
    """Mean of `values` where `mask`, scaled so that the sum over micro-batches and the average over processes give
    the mean over the whole update, by the rule by which the Trainer scales its own loss."""
    total = torch.where(mask, values, 0.0).sum()
    if loss_is_scaled(trainer, num_items) and num_items is not None:
        processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
        return total * processes / num_items
    mean = total / mask.sum().clamp(min=1)
    # Otherwise `training_step` divides by the number of micro-batches, unless it believes that the loss was.
    return mean / trainer.current_gradient_accumulation_steps if loss_is_scaled(trainer, num_items) else mean


def predictions(trainer: Any, model: Any, inputs: Any, outputs: Any, who: str) -> list[Prediction]:
    """The scored predictions of one micro-batch; a question-answering model has two (start and end)."""
    if "start_positions" in inputs and "start_logits" in outputs:
        return [_span(outputs[f"{k}_logits"], inputs[f"{k}_positions"]) for k in ("start", "end")]
    if isinstance(outputs, tuple):
        raise ValueError(f"{who}: the model returns a tuple, whose parts have no names. Set return_dict=True.")
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if labels is None:
        raise ValueError(
            f"{who}: the batch has no `labels` ({', '.join(inputs)}), so its loss is not one of labelled predictions. "
            f"Use optim='sam', or give {who} its own objective (hfext.optim.BiSAM(rows=...)) as Trainer(optimizers=)."
        )
    logits = outputs.get("logits") if hasattr(outputs, "get") else None
    if logits is None:
        raise ValueError(
            f"{who}: the outputs have no `logits`: a fused linear-cross-entropy loss keeps them to itself. Turn it "
            "off (use_liger_kernel=False; in TRL a `loss_type` that returns logits), or use optim='sam'."
        )
    config = getattr(trainer.accelerator.unwrap_model(model), "config", None)
    problem = getattr(config, "problem_type", None)
    if (
        problem == "regression"
        or logits.shape[-1] == 1
        or (labels.is_floating_point() and labels.shape != logits.shape)
    ):
        return [Prediction("regression", logits.squeeze(-1), labels.reshape(logits.squeeze(-1).shape))]
    if labels.is_floating_point() or problem == "multi_label_classification":
        return [Prediction("multilabel", logits, labels)]
    if labels.dim() > 1 and "shift_labels" not in inputs and loss_shifts_labels(trainer):
        # Moving the labels, not the logits, leaves the logits whole: no copy of [tokens, vocabulary].
        labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    if labels.shape != logits.shape[:-1] and labels.numel() == logits.shape[:-1].numel():
        labels = labels.reshape(logits.shape[:-1])  # [batch, 1], as the models take it
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{who}: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not match, so the loss is not a "
            f"plain classification of `labels`. Use optim='sam', or give {who} its own objective."
        )
    return [Prediction("classification", logits.flatten(0, -2), labels.flatten().to(logits.device))]


def _span(logits: Tensor, positions: Tensor) -> Prediction:
    # The models clamp positions to [0, length] and ignore those at length: they lie outside the text.
    length = logits.shape[1]
    positions = (positions.squeeze(-1) if positions.dim() > 1 else positions).clamp(0, length)
    return Prediction("classification", logits, positions.masked_fill(positions == length, -100))
