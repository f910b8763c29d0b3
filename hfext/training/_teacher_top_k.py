"""A teacher that was asked once: the top K of every position and the mass of the rest, as columns of a dataset."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"


@torch.no_grad()
def teacher_top_k(teacher: nn.Module, batch: Mapping[str, Any], k: int = 50) -> dict[str, list[Tensor]]:
    """The columns of a cached teacher: `dataset.map(lambda b: teacher_top_k(teacher, b, k=50), batched=True)`.

    Args:
        teacher (`nn.Module`): A causal language model, in eval mode.
        batch (`Mapping`): `input_ids`, a list of rows of any length, without padding.
        k (`int`, *optional*, defaults to 50): Tokens kept at each position.

    Returns:
        `teacher_ids` (rows [length, k]) and `teacher_log_probs` (rows [length, k + 1] in float32; the last is the log
        of the mass of all other tokens).
    """
    rows = [torch.as_tensor(row) for row in batch["input_ids"]]
    device = next(teacher.parameters()).device
    ids = pad_sequence(rows, batch_first=True).to(device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    log_p = torch.log_softmax(teacher(input_ids=ids, attention_mask=mask).logits.float(), -1)
    top = log_p.topk(min(k, log_p.shape[-1]), -1)
    rest = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    both = torch.cat([top.values, rest], -1).cpu()
    return {
        IDS: [x[: len(row)] for x, row in zip(top.indices.cpu(), rows, strict=True)],
        LOG_PROBS: [x[: len(row)] for x, row in zip(both, rows, strict=True)],
    }


class CacheCollator:
    """The user's collator, and the teacher's columns laid where the batch has its tokens."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, Any]:
        missing = [name for name in (IDS, LOG_PROBS) if name not in features[0]]
        if missing:
            raise ValueError(f"TopKLD without a teacher needs the column {missing[0]}: see teacher_top_k.")
        batch = self.collate([{k: v for k, v in x.items() if k not in (IDS, LOG_PROBS)} for x in features])
        mask = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
        for name, dtype in ((IDS, torch.long), (LOG_PROBS, torch.float32)):
            rows = [torch.as_tensor(x[name], dtype=dtype) for x in features]
            if [len(row) for row in rows] != mask.sum(-1).tolist():
                raise ValueError(
                    f"TopKLD: {name} has {[len(row) for row in rows]} positions but the batch {mask.sum(-1).tolist()} "
                    "tokens. Cache the teacher on the very rows that are trained on, not packed or cut afterwards."
                )
            batch[name] = torch.zeros(*mask.shape, rows[0].shape[-1], dtype=dtype)
            batch[name][mask.bool()] = torch.cat(rows)
        return batch


def cut(ids: Tensor, log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The cache [..., K] and [..., K + 1] of K >= k tokens as one of k, normalised; the last log-probability is the
    rest's."""
    if k > ids.shape[-1]:
        raise ValueError(f"TopKLDConfig: k is {k} but the cached teacher has only the top {ids.shape[-1]}.")
    log_p = log_p.float()
    rest = log_p[..., k:].logsumexp(-1, keepdim=True)
    return ids[..., :k], torch.log_softmax(torch.cat([log_p[..., :k], rest], -1), -1)
