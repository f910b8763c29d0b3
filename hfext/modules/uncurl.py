"""UNCURL: fewer experts in every layer of a mixture-of-experts model, chosen by what a task routes to them.

On the task's tokens, for each layer and expert e, with the gates by which the model multiplies expert outputs:

    f_e = times e is among the top k / tokens       g_e = sum of its gates / tokens
    c_ed = cosine over tokens of the router logits of e and d

The `keep` experts of the highest score (g_e; or f_e; or the mean of gate x norm of the output) stay. The others are
dropped, or each joins the kept expert d of the highest c_ed:

    W_d <- sum over the experts j that d stands for of f_j W_j / sum f_j

The router loses the rows of the experts that go, so its softmax is over those that stay. Sums in fp64, averages of
weights in fp32; of equal scores the lower index stays. All layers keep the same number, as a config holds one.

UNCURL: Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning, arXiv
2409.01483, of which only the abstract was at hand: an offline, task-aware reduction after pretraining. Scores, the
choice among pruning and merging, and all formulas above are ours. `prune_by_activation` is the pruning of ModuleFormer
(arXiv 2306.04640): experts that a task activates less often than a threshold go, at least the top k of a layer stay.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .._fields import in_range, one_of
from ..registry import Method, Result
from ._experts import Block, Routing, calibrate, cut, find_blocks

SCORES = ("gate_mass", "frequency", "gate_output_norm")


@dataclass(frozen=True, kw_only=True)
class UncurlConfig:
    """Options of [`uncurl`].

    Args:
        keep: Experts that stay in every layer, at least as many as are active for a token.
        method: `prune` drops the others, `merge` averages them into those that stay.
        score: What ranks experts: `gate_mass`, `frequency` or `gate_output_norm`.
        top_k: Experts active for a token afterwards; as before when left out.
    """

    keep: int = 4
    method: Literal["prune", "merge"] = "prune"
    score: Literal["gate_mass", "frequency", "gate_output_norm"] = "gate_mass"
    top_k: int | None = None

    def __post_init__(self):
        one_of("method", self.method, ("prune", "merge"))
        one_of("score", self.score, SCORES)
        for name, value in (("keep", self.keep), ("top_k", self.top_k)):
            if isinstance(value, bool) or not (isinstance(value, int) or (name, value) == ("top_k", None)):
                raise ValueError(f"{name} is {value!r} but must be a number of experts, an integer >= 1.")
        in_range("keep", self.keep, 1, float("inf"))
        if self.top_k is not None:
            in_range("top_k", self.top_k, 1, self.keep)


@dataclass(frozen=True)
class UncurlReport:
    """What was removed.

    Args:
        experts: Experts of a layer before and after.
        top_k: Active experts of a token before and after.
        tokens: Calibration tokens.
        kept: By layer, the experts that stayed, by their old index and in that order.
        merged: By layer, the experts that were averaged into another and that one, both by their old index.
        frequency, gate_mass: By layer, f_e and g_e of every old expert.
        parameters: Of the model before and after.
    """

    experts: tuple[int, int]
    top_k: tuple[int, int]
    tokens: int
    kept: dict[str, list[int]]
    merged: dict[str, dict[int, int]]
    frequency: dict[str, list[float]]
    gate_mass: dict[str, list[float]]
    parameters: tuple[int, int]

    def kept_mass(self) -> dict[str, float]:
        """By layer, the share of the gates that went to experts that stayed."""
        return {
            name: sum(self.gate_mass[name][e] for e in kept) / sum(self.gate_mass[name])
            for name, kept in self.kept.items()
        }

    def __str__(self) -> str:
        def change(pair: tuple[int, int]) -> str:
            return f"{pair[0]:,} -> {pair[1]:,}" if pair[0] != pair[1] else f"{pair[0]:,}"

        head = (
            f"{change(self.experts)} experts a layer, {change(self.top_k)} active for a token, "
            f"{change(self.parameters)} parameters, seen on {self.tokens:,} tokens"
        )
        rows = [("layer", "kept experts", "gate mass kept", "merged into")]
        for name, share in self.kept_mass().items():
            into = ", ".join(f"{e}->{d}" for e, d in self.merged[name].items())
            rows.append((name, " ".join(map(str, self.kept[name])), f"{share:.1%}", into))
        if not any(self.merged.values()):
            rows = [row[:3] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join([head, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)])


def highest(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` highest scores, ascending; of equal ones the lower index comes first."""
    return scores.sort(descending=True, stable=True).indices[:keep].sort().values


def nearest_kept(gram: Tensor, kept: Tensor) -> Tensor:
    """[experts]: the kept expert whose router logits are most alike; a kept one stands for itself.

    `gram` holds the products of the logits [experts, experts]; logits that are all 0 are like none.
    """
    norm = gram.diagonal().clamp(min=0).sqrt()
    cosine = gram / (norm[:, None] * norm).clamp(min=torch.finfo(gram.dtype).tiny)
    owner = kept[cosine[:, kept].argmax(-1)]
    owner[kept] = kept
    return owner


def averaged(weights: Tensor, kept: Tensor, owner: Tensor, frequency: Tensor) -> Tensor:
    """Rows [kept, ...]: averages of the experts that share an owner, weighted by frequency, or alike if all are 0."""
    rows = []
    for d in kept.tolist():
        group = (owner == d).nonzero().flatten()
        share = frequency[group]
        share = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / len(group))
        base = weights[d].float()
        # Differences to the kept expert, so that equal experts give exactly themselves.
        row = base.clone()
        for j, p in zip(group.tolist(), share.tolist(), strict=True):
            if j != d:
                row += p * (weights[j].float() - base)
        rows.append(row.to(weights.dtype))
    return torch.stack(rows)


@torch.no_grad()
def reduced(block: Block, routing: Routing, kept: Tensor, method: str) -> tuple[list, dict[int, int]]:
    """New rows of a block, and which experts were merged into which."""
    owner = nearest_kept(routing.gram, kept)
    merged = {e: d for e, d in enumerate(owner.tolist()) if e != d} if method == "merge" else {}
    rows = []
    for module, name, old in block.rows():
        if merged and module is block.experts:
            new = averaged(old.detach(), kept, owner, routing.score("frequency"))
        else:
            new = old.detach()[kept.to(old.device)].clone()
        rows.append((module, name, new))
    return rows, merged


def uncurl(
    model: nn.Module,
    calibration_batches: Iterable[Mapping | Tensor],
    keep: int = 4,
    method: Literal["prune", "merge"] = "prune",
    score: Literal["gate_mass", "frequency", "gate_output_norm"] = "gate_mass",
    top_k: int | None = None,
) -> UncurlReport:
    """
    Reduce the experts of every layer to `keep`, in place and for good; an exception leaves the model as it was.

    Args:
        model: A mixtral, qwen2_moe, qwen3_moe, olmoe, granitemoe, gpt_oss or deepseek_v3 (one group) model. Shared
            experts and dense layers are left alone. The result saves, loads and runs without hfext.
        calibration_batches: Of the task: dicts for the model's forward, or ids [batch, tokens]. Where attention_mask
            is 0, tokens do not count; labels are not used.
        keep, method, score, top_k: See [`UncurlConfig`].

    Returns:
        `UncurlReport`. Parameters are new tensors: an optimizer made before no longer holds them.

    Raises:
        ValueError: `keep` below the active experts or above those there are, a model without experts, no tokens.
        NotImplementedError: Experts in another layout, PEFT adapters, quantised or offloaded weights.
    """
    config = UncurlConfig(keep=keep, method=method, score=score, top_k=top_k)
    blocks = find_blocks(model)
    check_counts(blocks, config.keep, config.top_k or model.config.num_experts_per_tok, model.config.model_type)
    routings = calibrate(model, blocks, calibration_batches, norms=config.score == "gate_output_norm")
    kept = {b.name: highest(routings[b.name].score(config.score), config.keep) for b in blocks}
    return reduce_to(model, blocks, routings, kept, config)


def prune_by_activation(
    model: nn.Module, calibration_batches: Iterable[Mapping | Tensor], threshold: float = 0.01
) -> UncurlReport:
    """
    ModuleFormer's pruning, in place: drop experts whose activation frequency on the task is below `threshold`.

    A layer needs the experts at or above it, and at least as many as are active for a token. As all layers of a model
    have one count, every layer keeps the largest number that any layer needs, the most frequent first. The default
    threshold is ours: the paper's is not known to us. Arguments and errors are those of [`uncurl`].
    """
    in_range("threshold", threshold, 0, 1)
    blocks = find_blocks(model)
    active = model.config.num_experts_per_tok
    check_counts(blocks, blocks[0].count, active, model.config.model_type)
    routings = calibrate(model, blocks, calibration_batches)
    keep = max(active, *(int((r.score("frequency") >= threshold).sum()) for r in routings.values()))
    kept = {b.name: highest(routings[b.name].score("frequency"), keep) for b in blocks}
    return reduce_to(model, blocks, routings, kept, UncurlConfig(keep=keep, score="frequency"))


def check_counts(blocks: list[Block], keep: int, top_k: int, kind: str) -> None:
    counts = {block.count for block in blocks}
    if len(counts) > 1:
        raise NotImplementedError(f"Layers have {sorted(counts)} experts; all must have the same number.")
    count = counts.pop()
    if keep > count:
        raise ValueError(f"keep is {keep} but a layer has {count} experts.")
    if keep < top_k:
        raise ValueError(f"keep is {keep} but {top_k} experts are active for a token; set top_k to at most keep too.")
    if kind == "deepseek_v3" and keep < 2:
        raise ValueError(f"keep is {keep} but this router compares two experts: at least 2.")


def reduce_to(
    model: nn.Module, blocks: list[Block], routings: dict[str, Routing], kept: dict[str, Tensor], config: UncurlConfig
) -> UncurlReport:
    """Cut every block to the experts in `kept`, all or nothing."""
    before, count, active = (sum(p.numel() for p in model.parameters()), blocks[0].count, top_k_of(model))
    made = [reduced(block, routings[block.name], kept[block.name], config.method) for block in blocks]
    cut(model, blocks, [rows for rows, _ in made], config.keep, config.top_k or active)
    return UncurlReport(
        experts=(count, config.keep),
        top_k=(active, top_k_of(model)),
        tokens=routings[blocks[0].name].tokens,
        kept={name: chosen.tolist() for name, chosen in kept.items()},
        merged={block.name: merged for block, (_, merged) in zip(blocks, made, strict=True)},
        frequency={name: routing.score("frequency").tolist() for name, routing in routings.items()},
        gate_mass={name: routing.score("gate_mass").tolist() for name, routing in routings.items()},
        parameters=(before, sum(p.numel() for p in model.parameters())),
    )


def top_k_of(model: nn.Module) -> int:
    return model.config.num_experts_per_tok


METHOD = Method(
    name="uncurl",
    family="modules",
    title="Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning",
    authors="Sarkar et al.",
    arxiv="2409.01483",
    year=2024,
    status="abstract-only",
    difference="The abstract says that experts are reduced offline for a task after pretraining, and that quality "
    "drops beyond a reduction that depends on the number of experts. Scores, pruning against merging, and their "
    "formulas are ours; layers keep one number of experts.",
    target="hfext.modules.uncurl:uncurl",
    config=UncurlConfig,
    usage='hfext.modules.uncurl(model, batches, keep=4, method="prune")',
    summary="Removes or merges the experts that a task does not use; the model then runs in plain transformers.",
    claim="Experts pruned for a task keep its loss better than random and than task-agnostic ones at the same "
    "reduction, and beyond some reduction quality drops.",
    headline=Result(
        metric="task quality against the number of experts",
        setting="SMoE language models with several numbers of experts, fine-tuned after pruning",
        value="a threshold of the reduction that depends on the experts in pretraining (abstract; figures not known)",
    ),
    recipe="modules/uncurl-mixtral-two-texts.yaml",
    notes="`prune_by_activation` is ModuleFormer's pruning by activation frequency (arXiv 2306.04640). Gates that "
    "are not renormalised over the top k (qwen2_moe, olmoe by default) grow when experts go, as their softmax is over "
    "those that stay; then even experts that were never used change the outputs. In our runs, without training "
    "afterwards, merging lost more than pruning.",
)
