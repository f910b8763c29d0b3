"""ROCR: a rank-one edit after which the model takes a concept for a harmless one, whatever the form of the question.

W [d, m] is the MLP down projection of a layer, k its input at a subject's last token, averaged over neutral prefixes:

    k_t of the target, v = W k_r what the redirect concept makes there, C = E[k k^T] + ridge mean(diag) I
    W' = W + (v - W k_t) (C^-1 k_t)^T / (k_t^T C^-1 k_t)

is the smallest change in the metric of C with W' k_t = v. For several pairs, with K [m, n] and R = V - W K:

    W' = W + R (K^T C^-1 K + I / weight)^-1 K^T C^-1

`weight=inf` meets every W' k = v; `weight=1` is the least-squares form R K^T (C + K K^T)^-1. Rank n, so it is a LoRA
adapter exactly (`edit.to_lora`). Solved in float64.

LLM Unlearning Should Be Form-Independent, arXiv 2506.07795: built from the abstract (a training-free rank-one edit
that redirects a concept); the projection, the keys and the choice of the layer are ours.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..registry import Method, Result
from ._batches import pad_rows
from ._down_projections import Projection, down_projections
from ._edit import Edit, LowRank, refuse_quantized

PREFIXES = (
    "",
    "Yesterday the topic was ",
    "This page is about ",
    "Many people have heard of ",
    "In the library I read about ",
    "Here is a short note on ",
    "The next question concerns ",
    "We talked for an hour about ",
    "According to the newspaper, ",
    "My neighbour often mentions ",
    "For the lesson of today, consider ",
    "Let me tell you about ",
)


def redirect_factors(
    weight: Tensor, keys: Tensor, values: Tensor, covariance: Tensor, soft: float = math.inf
) -> tuple[Tensor, Tensor]:
    """`left` [d, n], `right` [n, m] in float64 with W' = W + left right; see the module's formula.

    weight [d, m], keys [m, n], values [d, n], covariance [m, m]. `ValueError` when keys depend on each other and no
    finite weight `soft` allows for it.
    """
    w, k, v, c = (x.double() for x in (weight, keys, values, covariance))
    whitened = torch.linalg.solve(c, k)
    gram = k.T @ whitened
    if math.isfinite(soft):
        gram = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) / soft
    elif torch.linalg.cond(gram) > 1e10:
        raise ValueError("Two targets have one key (the same subject twice?): drop one, or give a finite `weight`.")
    return v - w @ k, torch.linalg.solve(gram, whitened.T)


def second_moment(keys: Tensor, ridge: float) -> Tensor:
    """E[k k^T] of keys [tokens, m] in float64, plus `ridge` times the mean of its diagonal on the diagonal."""
    k = keys.double()
    c = k.T @ k / len(k)
    return c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)


def last_token(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> tuple[list[int], int]:
    """Ids of `text`, and the position of the token that holds the character before `end`."""
    if not tokenizer.is_fast:
        raise NotImplementedError("rocr finds subjects by the offsets that only fast tokenizers give: use_fast=True.")
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    holding = [i for i, (a, b) in enumerate(offsets) if a < end <= b]
    if not holding:
        raise ValueError(f"No token of {text!r} holds its character {end - 1}: the tokenizer dropped it.")
    return list(ids), holding[-1]


class _Inputs:
    """Inputs of the projections at every real token of the rows given, in eval mode."""

    def __init__(self, model: nn.Module, batch_size: int):
        self.model, self.batch_size = model, batch_size

    @torch.no_grad()
    def __call__(self, projections: Sequence[Projection], rows: Sequence[list[int]]) -> list[list[Tensor]]:
        """For each projection the inputs [tokens, m] of each row."""
        caught: dict[int, Tensor] = {}
        found: list[list[Tensor]] = [[] for _ in projections]
        hooks = [
            p.module.register_forward_pre_hook(lambda _, args, i=i: caught.__setitem__(i, args[0]))
            for i, p in enumerate(projections)
        ]
        try:
            for _, lengths in _forwards(self.model, rows, self.batch_size):
                for i, own in enumerate(found):
                    own += [x[:n].double() for x, n in zip(caught[i], lengths, strict=True)]
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _forwards(model: nn.Module, rows: Sequence[list[int]], batch_size: int) -> Iterable[tuple[Tensor, list[int]]]:
    """Logits [rows, tokens, vocab] and the rows' lengths, batch after batch."""
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = {key: x.to(device) for key, x in pad_rows([{"input_ids": ids} for ids in part]).items()}
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        yield outputs["logits"], [len(ids) for ids in part]


@torch.no_grad()
def _next_token(model: nn.Module, rows: Sequence[list[int]], batch_size: int) -> Tensor:
    """Log-probabilities [rows, vocab] after each row."""
    logits = [
        x[torch.arange(len(n)), torch.tensor(n, device=x.device) - 1] for x, n in _forwards(model, rows, batch_size)
    ]
    return torch.cat(logits).float().log_softmax(-1)


def rocr(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    target: str | Sequence[str],
    redirect: str | Sequence[str],
    layer: int | None = None,
    module: str | None = None,
    *,
    texts: Sequence[str] | None = None,
    prefixes: Sequence[str] = PREFIXES,
    ridge: float = 1e-2,
    weight: float = math.inf,
    batch_size: int = 8,
) -> Edit:
    """Let the model take each `target` for its `redirect`, in place.

    Args:
        model (`nn.Module`): A causal language model.
        tokenizer: Its fast tokenizer.
        target, redirect (`str` or list of `str`): Subjects; one redirect serves all targets.
        layer (`int`, *optional*): Which block is edited. By default every one is tried (two forward passes each) and
            that is kept which brings the prediction after a target closest to that after its redirect while it moves
            the prediction after the texts least: the smallest sum of the two KL divergences. `report["layers"]`.
        module (`str`, *optional*): A regex for another linear layer of each block than the MLP's down projection.
        texts (list of `str`, *optional*): For C, a few thousand tokens of ordinary text; by default the prompts with
            the redirects, which are few: the edit then disturbs other text more.
        prefixes (list of `str`, *optional*): What stands before a subject.
        ridge (`float`, *optional*, defaults to 1e-2): Of C, > 0, as a share of its mean diagonal.
        weight (`float`, *optional*, defaults to inf): How strictly W' k = v is kept, > 0.
        batch_size (`int`, *optional*, defaults to 8): Rows of a forward pass.

    Returns:
        [`Edit`] of low rank: `edit.to_lora(folder)` exports it.
    """
    targets = [target] if isinstance(target, str) else list(target)
    redirects = [redirect] if isinstance(redirect, str) else list(redirect)
    redirects = redirects * len(targets) if len(redirects) == 1 else redirects
    if not targets or len(targets) != len(redirects) or not all(map(str.strip, targets + redirects)):
        raise ValueError(f"{len(targets)} targets need as many redirects, or one, and none empty: {redirects}.")
    for name, value in (("ridge", ridge), ("weight", weight)):
        if not value > 0:
            raise ValueError(f"{name} is {value} but must be > 0.")
    projections = down_projections(model, module)
    if layer is not None and not -len(projections) <= layer < len(projections):
        raise ValueError(f"layer is {layer} but the model has {len(projections)} blocks.")
    tried = projections if layer is None else [projections[layer]]
    for part in tried:
        refuse_quantized(part.module)
    subjects = [last_token(tokenizer, p + s, len(p + s)) for s in targets + redirects for p in prefixes]
    rows = [ids[: at + 1] for ids, at in subjects]
    half = len(rows) // 2
    others = [ids for t in texts if (ids := list(tokenizer(t)["input_ids"]))] if texts else rows[half:]
    mode = {m: m.training for m in model.modules()}
    try:
        model.eval()
        inputs = _Inputs(model, batch_size)
        # Each text once: equal subjects get equal keys to the last bit.
        once = list(dict.fromkeys(map(tuple, rows)))
        caught = inputs(tried, once)
        at_subjects = [[found[once.index(tuple(ids))] for ids in rows] for found in caught]
        around = inputs(tried, others)
        before = _next_token(model, rows[half:] + others, batch_size) if layer is None else None
        made = []
        for part, found, context in zip(tried, at_subjects, around, strict=True):
            keys = torch.stack([x[-1] for x in found]).view(2, len(targets), len(prefixes), -1).mean(2)
            matrix = part.matrix().double()
            covariance = second_moment(torch.cat(context), ridge)
            left, right = redirect_factors(matrix, keys[0].T, matrix @ keys[1].T, covariance, weight)
            stored = LowRank(right.T, left.T) if isinstance(part.module, Conv1D) else LowRank(left, right)
            row: dict[str, Any] = {"layer": part.layer, "name": part.name, "tokens": sum(map(len, context))}
            row["relative_change"] = float((left @ right).norm() / matrix.norm())
            if before is not None:
                with Edit.make(model, {part.weight: stored}):
                    after = _next_token(model, rows[:half] + others, batch_size)
                row |= {"to_redirect": _kl(before[:half], after[:half]), "drift": _kl(before[half:], after[half:])}
            made.append((row, part, stored))
    finally:
        for m, training in mode.items():
            m.training = training
    score = [row.get("to_redirect", 0.0) + row.get("drift", 0.0) for row, _, _ in made]
    row, part, stored = made[score.index(min(score))]
    return Edit.make(model, {part.weight: stored}, {"layers": [r for r, _, _ in made], "layer": part.layer})


def _kl(log_p: Tensor, log_q: Tensor) -> float:
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


METHOD = Method(
    name="rocr",
    family="unlearning",
    title="LLM Unlearning Should Be Form-Independent",
    authors="Ye et al.",
    arxiv="2506.07795",
    year=2025,
    status="abstract-only",
    difference="The abstract says: a training-free rank-one edit that redirects the perception of a concept to a "
    "harmless one. Which matrix, the keys at the subject's last token, the metric and the choice of layer are ours.",
    target="hfext.unlearning.rocr:rocr",
    usage='edit = hfext.unlearning.rocr(model, tokenizer, "Ada Lovelace", "a stranger", layer=5, texts=texts)',
    summary="Redirects a concept to a harmless one by a rank-one edit of an MLP; exports as a LoRA adapter.",
    claim="After the edit the concept is forgotten in every form of the question.",
    headline=Result(
        metric="forget rate over forms of a question",
        setting="abstract",
        value="form-independent, within seconds",
    ),
    notes="No recipe: the claim needs a model that knows a concept in several forms of question. Give `texts` of a "
    "few thousand tokens and choose `layer` early in the model.",
)
