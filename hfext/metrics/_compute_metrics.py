"""Metrics of unlearning inside the stock Trainer, while it trains."""

import numpy as np
from transformers import EvalPrediction

from .min_k import min_k


def answer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`loss_per_row`, `probability` = mean exp(-loss of a row) and `min_k` of the scored tokens.

    `Trainer(..., compute_metrics=answer_metrics, preprocess_logits_for_metrics=label_log_probs)`; with
    `eval_dataset={"forget": ..., "retain": ...}` each set has its own, to choose the best checkpoint by.
    """
    log_probs, labels = prediction.predictions, prediction.label_ids
    if log_probs.shape != labels.shape:
        raise ValueError(
            f"predictions {list(log_probs.shape)} and labels {list(labels.shape)} differ: pass "
            "preprocess_logits_for_metrics=label_log_probs to the Trainer."
        )
    mask = labels[:, 1:] != -100
    rows = [row[where] for row, where in zip(log_probs[:, 1:], mask, strict=True) if where.any()]
    losses = np.array([-row.mean(dtype=np.float64) for row in rows])
    return {
        "loss_per_row": float(losses.mean()),
        "probability": float(np.exp(-losses).mean()),
        "min_k": min_k(rows).mean().item(),
    }
