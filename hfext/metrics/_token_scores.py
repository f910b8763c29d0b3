"""What the scored tokens of some rows say of a model, from one forward pass: the input of the metrics of unlearning.

Position i of the logits predicts label i + 1; a label of -100 is not scored, and the first one never is. All sums over
the vocabulary are in float64 (float32 on devices without it) and a few positions at a time.

    log_p = log p_y,  mean = sum_v p_v log p_v,  std^2 = sum_v p_v (log p_v - mean)^2
    H_a   = log(sum_v p_v^a) / (1 - a),   H_1 = -sum_v p_v log p_v,   H_inf = -log max_v p_v
    M_a   = -(1/b) ((1 - p_y) (p_y^b - 1) + sum_{v != y} p_v ((1 - p_v)^b - 1)),   b = |1 - a|
    M_1   = -(1 - p_y) log p_y - sum_{v != y} p_v log(1 - p_v)

In H and M every probability is first clamped to [clamp, 1 - clamp].
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ._shards import all_rows, own_rows

Row = Mapping[str, Any]
# Entries of a piece of [positions, V] that is worked on at once: 8 MiB in float64.
_ENTRIES = 2**20


@dataclass(frozen=True)
class TokenScores:
    """Ragged: every field holds one 1-D CPU tensor a row, with an entry for each scored token.

    Args:
        log_p: Log-probability of the label, float64.
        mean: Mean of the log-probability over the vocabulary, float64.
        std: Its standard deviation, float64.
        correct: Whether the label is the likeliest token, bool.
        renyi: Order to Renyi entropies, float64.
        modified: Order to modified Renyi entropies with the label as target, float64.
    """

    log_p: list[Tensor]
    mean: list[Tensor]
    std: list[Tensor]
    correct: list[Tensor]
    renyi: dict[float, list[Tensor]] = field(default_factory=dict)
    modified: dict[float, list[Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.log_p)


def check_orders(orders: Sequence[float], modified: Sequence[float], clamp: float) -> None:
    for name, values, bound in (("renyi", orders, True), ("modified", modified, False)):
        wrong = [a for a in values if not a > 0 or (math.isinf(a) and not bound)]
        if wrong:
            raise ValueError(
                f"{name} has the order {wrong[0]} but orders must be > 0{'' if bound else ' and finite'}."
            )
    if not 0 <= clamp < 0.5:
        raise ValueError(f"clamp is {clamp} but must be in [0, 0.5).")


def precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def log_softmax_pieces(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Where, and log-probabilities [some, V] in float64, of logits [N, V]."""
    size = max(1, _ENTRIES // logits.shape[-1])
    for start in range(0, len(logits), size):
        at = slice(start, start + size)
        yield at, torch.log_softmax(logits[at].to(precise(logits.device)), -1)


def renyi_entropy(log_p: Tensor, order: float, clamp: float = 1e-10) -> Tensor:
    """H_a [...] of log-probabilities [..., V]."""
    log_p = _clamped(log_p, clamp)
    if order == 1:
        return -(log_p.exp() * log_p).sum(-1)
    if math.isinf(order):
        return -log_p.amax(-1)
    return (order * log_p).logsumexp(-1) / (1 - order)


def modified_renyi(log_p: Tensor, target: Tensor, order: float, clamp: float = 1e-10) -> Tensor:
    """M_a [...] of log-probabilities [..., V] for targets [...]."""
    log_p = _clamped(log_p, clamp)
    p, at = log_p.exp(), target[..., None]
    log_rest = torch.log1p(-p)
    if not clamp:
        # 1 - p of the likeliest token is lost where p rounds to 1: it is what the others have together.
        top = log_p.argmax(-1, keepdim=True)
        log_rest = log_rest.scatter(-1, top, log_p.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True))
    log_rest = log_rest.clamp(min=torch.finfo(p.dtype).min)
    rest_y = log_rest.gather(-1, at)[..., 0].exp()
    if order == 1:
        terms = p * log_rest
        own = rest_y * log_p.gather(-1, at)[..., 0]
        return -own - (terms.sum(-1) - terms.gather(-1, at)[..., 0])
    b = abs(1 - order)
    terms = p * torch.expm1(b * log_rest)
    own = rest_y * torch.expm1(b * log_p.gather(-1, at)[..., 0])
    return -(own + terms.sum(-1) - terms.gather(-1, at)[..., 0]) / b


def _clamped(log_p: Tensor, clamp: float) -> Tensor:
    if not clamp:
        return log_p.clamp(min=torch.finfo(log_p.dtype).min)
    return log_p.clamp(math.log(clamp), math.log1p(-clamp))


def scored(labels: Tensor) -> Tensor:
    """[rows, T - 1]: which positions of the logits predict a scored label."""
    return labels[:, 1:] != -100


@torch.no_grad()
def token_scores(
    logits: Tensor,
    labels: Tensor,
    *,
    renyi: Sequence[float] = (),
    modified: Sequence[float] = (),
    clamp: float = 1e-10,
) -> TokenScores:
    """The scores of logits [rows, T, V] for labels [rows, T].

    Args:
        renyi: Orders a > 0 of the Renyi entropies, `math.inf` among them.
        modified: Orders a > 0 of the modified ones.
        clamp: Bound of the probabilities in both, 1e-10 as published. In a vocabulary of 1e5 it adds up to 1 to the
            sum of order 1/2; 0 is exact.
    """
    check_orders(renyi, modified, clamp)
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} must be [rows, T, V] and [rows, T]."
        )
    labels = labels.to(logits.device)
    mask = scored(labels)
    rows, positions = mask.nonzero(as_tuple=True)
    targets = labels[rows, positions + 1]
    if len(targets) and not (0 <= int(targets.min()) and int(targets.max()) < logits.shape[-1]):
        raise ValueError(f"labels must be -100 or in [0, {logits.shape[-1]}), the size of the vocabulary.")
    names = ["log_p", "mean", "std", "correct", *(("renyi", a) for a in renyi), *(("modified", a) for a in modified)]
    found: dict[Any, list[Tensor]] = {name: [] for name in names}
    size = max(1, _ENTRIES // logits.shape[-1])
    for start in range(0, len(targets), size):
        at = slice(start, start + size)
        log_p = torch.log_softmax(logits[rows[at], positions[at]].to(precise(logits.device)), -1)
        target = targets[at]
        p = log_p.exp()
        finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)
        mean = (p * finite).sum(-1)
        gap = torch.where(p > 0, finite - mean[:, None], 0.0)
        found["log_p"].append(log_p.gather(-1, target[:, None])[:, 0])
        found["mean"].append(mean)
        found["std"].append((p * gap.square()).sum(-1).sqrt())
        found["correct"].append(log_p.argmax(-1) == target)
        for a in renyi:
            found["renyi", a].append(renyi_entropy(log_p, a, clamp))
        for a in modified:
            found["modified", a].append(modified_renyi(log_p, target, a, clamp))
    lengths = mask.sum(1).tolist()

    def ragged(name: Any) -> list[Tensor]:
        parts = found[name] or [torch.zeros(0, dtype=torch.bool if name == "correct" else torch.float64)]
        return list(torch.cat(parts).cpu().split(lengths))

    return TokenScores(
        *(ragged(name) for name in names[:4]),
        renyi={a: ragged(("renyi", a)) for a in renyi},
        modified={a: ragged(("modified", a)) for a in modified},
    )


def batch_of(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` from the lengths, and `labels`."""
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    return {name: x.to(device) for name, x in batch.items()}


def check_rows(rows: Sequence[Row]) -> None:
    for i, row in enumerate(rows):
        if "input_ids" not in row or "labels" not in row:
            raise ValueError(f"Row {i} has {', '.join(row)} but needs input_ids and labels: tokenise it first.")
        n = len(row["input_ids"])
        if n == 0 or len(row["labels"]) != n:
            raise ValueError(
                f"Row {i} has {n} input_ids and {len(row['labels'])} labels: both must be equal and >= 1."
            )
        if all(int(x) == -100 for x in row["labels"][1:]):
            raise ValueError(f"Row {i} has no scored token: all of labels[1:] are -100.")


def score_rows(model: nn.Module, rows: Sequence[Row], batch_size: int = 8, **options: Any) -> TokenScores:
    """[`token_scores`] of tokenised rows, the same for every batch size, order and number of processes.

    Args:
        model (`nn.Module`): A causal language model. It is run in eval mode, which is undone.
        rows (list of `{"input_ids", "labels"}`): Every row needs a scored token.
        batch_size (`int`, *optional*, defaults to 8): Rows of a forward; rows of similar length come together.
        options: `renyi`, `modified`, `clamp`.

    Returns:
        [`TokenScores`] in the order of the rows. With `torch.distributed` each process does its share and gets all.
    """
    rows = list(rows)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be >= 1.")
    check_rows(rows)
    check_orders(options.get("renyi", ()), options.get("modified", ()), options.get("clamp", 0.0))
    mine = own_rows(len(rows))
    order = sorted(range(len(mine)), key=lambda i: -len(rows[mine[i]]["input_ids"]))
    device = next(model.parameters()).device
    results: list[Any] = [None] * len(mine)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            batch = batch_of([rows[mine[i]] for i in some], device)
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch, use_cache=False).logits
            part = token_scores(logits, labels, **options)
            for i, row in zip(some, range(len(part)), strict=True):
                results[i] = _row(part, row)
    finally:
        for module, training in modes:
            module.training = training
    done = all_rows(results, len(rows))
    names = ("log_p", "mean", "std", "correct")
    return TokenScores(
        *([one[name] for one in done] for name in names),
        renyi={a: [one["renyi"][a] for one in done] for a in options.get("renyi", ())},
        modified={a: [one["modified"][a] for one in done] for a in options.get("modified", ())},
    )


def _row(scores: TokenScores, i: int) -> dict[str, Any]:
    # Copies: a view would carry its whole batch along when it is sent.
    row = {name: vars(scores)[name][i].clone() for name in ("log_p", "mean", "std", "correct")}
    for name in ("renyi", "modified"):
        row[name] = {a: x[i].clone() for a, x in vars(scores)[name].items()}
    return row


@torch.no_grad()
def label_log_probs(logits: Tensor | tuple, labels: Tensor) -> Tensor:
    """[rows, T]: log-probability of each label where the label stands, 0 where none is scored; float32.

    As `Trainer(preprocess_logits_for_metrics=label_log_probs)` the predictions that reach `compute_metrics` are these
    and never the logits of the whole vocabulary.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    mask = scored(labels)
    rows, positions = mask.nonzero(as_tuple=True)
    targets = labels[rows, positions + 1]
    out = torch.zeros(labels.shape, dtype=torch.float32, device=logits.device)
    size = max(1, _ENTRIES // logits.shape[-1])
    for start in range(0, len(targets), size):
        at = slice(start, start + size)
        log_p = torch.log_softmax(logits[rows[at], positions[at]].to(precise(logits.device)), -1)
        out[rows[at], positions[at] + 1] = log_p.gather(-1, targets[at, None])[:, 0].to(out.dtype)
    return out
