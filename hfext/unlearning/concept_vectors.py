"""ConceptVectors: where a model keeps a concept, whether unlearning reached it, and its ablation.

A value vector v_j is column j of the MLP down projection W [d, m] of a layer; E v, with the unembedding E [V, d],
shows which tokens it promotes. Before and after unlearning:

    cosine(v, v'),   |v - v'|,   Jaccard of the top-k tokens of E v and E v', E being the one from before in both

Little change under good behavioural scores means that the knowledge is hidden and not gone. `concept_vectors` is the
needle that does reach it: N(0, std^2) is added to these columns alone; `needle_training` trains them alone. To find
columns, `find_concept_vectors` standardises the scores E v over the vocabulary and takes the mean over the tokens of a
concept, (mean_t E_t - mean E) v / sqrt(v^T Cov(E) v), from two statistics of E and without the V x m matrix. Sums are
float64.

Intrinsic Evaluation of Unlearning Using Parametric Knowledge Traces, arXiv 2406.11614.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ..registry import Method, Result
from ._down_projections import Projection, down_projections
from ._edit import Edit, Entries, LowRank, refuse_quantized

Vector = tuple[int, int]


def compare_vectors(before: Tensor, after: Tensor, unembedding: Tensor, top_k: int) -> dict[str, Tensor]:
    """`cosine`, `l2` and `jaccard` [n] of value vectors [n, d], with `unembedding` [V, d]."""
    if not 1 <= top_k <= len(unembedding):
        raise ValueError(f"top_k is {top_k} but must be in [1, {len(unembedding)}].")
    a, b, e = before.double(), after.double(), unembedding.double()
    top = [torch.zeros(len(x), len(e), device=e.device).bool() for x in (a, b)]
    for marks, x in zip(top, (a, b), strict=True):
        # Stable, so that equal vectors have equal sets where scores are tied.
        order = (x @ e.T).sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        marks.scatter_(1, order, True)
    jaccard = (top[0] & top[1]).sum(1) / (top[0] | top[1]).sum(1)
    return {"cosine": torch.cosine_similarity(a, b, dim=1), "l2": (a - b).norm(dim=1), "jaccard": jaccard}


def concept_scores(matrix: Tensor, unembedding: Tensor, token_ids: Sequence[int]) -> Tensor:
    """The score [m] of each column of `matrix` [d, m]; see the module's formula. Columns of zeros score 0."""
    e, w = unembedding.double(), matrix.double()
    mean = e.mean(0)
    covariance = torch.cov(e.T, correction=0)
    ids = torch.as_tensor(list(token_ids), device=e.device)
    spread = ((covariance @ w) * w).sum(0).clamp(min=0).sqrt()
    return torch.nan_to_num(((e[ids].mean(0) - mean) @ w) / spread, nan=0.0, posinf=0.0, neginf=0.0)


def read_vectors(model: nn.Module, vectors: Iterable[Vector], module: str | None = None) -> Tensor:
    """A copy of the value vectors [n, d] at the places (layer, dim)."""
    where = _locate(model, vectors, module)
    return torch.stack([part.matrix()[:, dim] for part, dim in where])


def concept_vector_report(
    before: nn.Module, after: nn.Module, vectors: Sequence[Vector], top_k: int = 200, module: str | None = None
) -> list[dict[str, Any]]:
    """What unlearning did to value vectors.

    Args:
        before, after (`nn.Module`): Two models of one architecture; the unembedding is that of `before`. (With one
            model and an [`Edit`], keep [`read_vectors`] and use [`compare_vectors`].)
        vectors (list of `(layer, dim)`): Which.
        top_k (`int`, *optional*, defaults to 200): Tokens of a set.
        module (`str`, *optional*): A regex for another layer of each block than the MLP's down projection.
    """
    read = [read_vectors(model, vectors, module) for model in (before, after)]
    unembedding = before.get_output_embeddings().weight.detach()
    found = compare_vectors(read[0], read[1].to(read[0].device), unembedding.to(read[0].device), top_k)
    return [
        {"layer": layer, "dim": dim, **{key: float(value[i]) for key, value in found.items()}}
        for i, (layer, dim) in enumerate(vectors)
    ]


def find_concept_vectors(
    model: nn.Module, token_ids: Sequence[int], top: int = 10, module: str | None = None
) -> list[dict[str, Any]]:
    """The `top` value vectors of all layers that most promote the tokens of a concept: `layer`, `dim`, `score`."""
    unembedding = model.get_output_embeddings().weight.detach()
    ids = [int(i) for i in token_ids]
    if not ids or not 0 <= min(ids) <= max(ids) < len(unembedding):
        raise ValueError(f"token_ids are {ids} but must be ids in [0, {len(unembedding)}), at least one.")
    rows = []
    for part in down_projections(model, module):
        refuse_quantized(part.module)
        scores = concept_scores(part.matrix().to(unembedding.device), unembedding, ids)
        values, dims = scores.topk(min(top, len(scores)))
        rows += [{"layer": part.layer, "dim": int(d), "score": float(v)} for v, d in zip(values, dims, strict=True)]
    return sorted(rows, key=lambda row: -row["score"])[:top]


def concept_vectors(
    model: nn.Module, vectors: Iterable[Vector], std: float = 0.1, *, seed: int = 0, module: str | None = None
) -> Edit:
    """The needle: add N(0, std^2) to value vectors, in place.

    Args:
        model (`nn.Module`): A decoder.
        vectors (list of `(layer, dim)`): Which columns.
        std (`float`, *optional*, defaults to 0.1): Of the noise, >= 0.
        seed (`int`, *optional*, defaults to 0): Of the noise, which is drawn on the CPU.
        module (`str`, *optional*): A regex for another layer of each block than the MLP's down projection.

    Returns:
        [`Edit`] of as many ranks as a layer has columns, so that `edit.to_lora` exports it.
    """
    if not (std >= 0 and math.isfinite(std)):
        raise ValueError(f"std is {std} but must be >= 0.")
    generator = torch.Generator().manual_seed(seed)
    noise: dict[str, tuple[Projection, list[int], list[Tensor]]] = {}
    for part, dim in _locate(model, vectors, module):
        _, dims, columns = noise.setdefault(part.name, (part, [], []))
        dims.append(dim)
        columns.append(std * torch.randn(part.matrix().shape[0], generator=generator, dtype=torch.float64))
    changes = {}
    for part, dims, columns in noise.values():
        left = torch.stack(columns, 1)
        right = torch.eye(part.matrix().shape[1], dtype=torch.float64)[dims]
        changes[part.weight] = LowRank(right.T, left.T) if isinstance(part.module, Conv1D) else LowRank(left, right)
    return Edit.make(model, changes, {"std": std, "seed": seed})


class _Columns(nn.Module):
    """A weight of which some columns are parameters and the rest is fixed."""

    def __init__(self, part: Projection, dims: list[int]):
        super().__init__()
        self.axis = 0 if isinstance(part.module, Conv1D) else 1
        self.register_buffer("dims", torch.tensor(dims, device=part.module.weight.device), persistent=False)
        self.columns = nn.Parameter(part.module.weight.detach().index_select(self.axis, self.dims))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_copy(self.axis, self.dims, self.columns)


class needle_training:  # noqa: N801
    """Inside, nothing but these value vectors is trained: `with needle_training(model, [(3, 17)]) as needle: ...`.

    Give `needle.parameters` to the optimizer, or the model to a Trainer. The vectors are parameters of their own, so
    neither weight decay nor momentum can move another column. At the exit they are written into the model, and
    `needle.edit` is the [`Edit`] that undoes it; after an exception the model is as it was.
    """

    def __init__(self, model: nn.Module, vectors: Iterable[Vector], module: str | None = None):
        self.model, self.edit, self.parameters = model, None, []
        self._places: dict[str, tuple[Projection, list[int]]] = {}
        for part, dim in _locate(model, vectors, module):
            self._places.setdefault(part.name, (part, []))[1].append(dim)

    def __enter__(self) -> "needle_training":
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in self._trained:
            p.requires_grad_(False)
        self.parameters = []
        for part, dims in self._places.values():
            columns = _Columns(part, dims)
            parametrize.register_parametrization(part.module, "weight", columns)
            self.parameters.append(columns.columns)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        changes = {}
        for (part, dims), columns in zip(self._places.values(), self.parameters, strict=True):
            parametrize.remove_parametrizations(part.module, "weight", leave_parametrized=False)
            weight = part.module.weight
            axis = 0 if isinstance(part.module, Conv1D) else 1
            places = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
            index = places.index_select(axis, torch.tensor(dims, device=weight.device)).reshape(-1)
            changes[part.weight] = Entries(index, columns.detach().reshape(-1))
        for p in self._trained:
            p.requires_grad_(True)
        if kind is None:
            self.edit = Edit.make(self.model, changes)


def _locate(model: nn.Module, vectors: Iterable[Vector], module: str | None) -> list[tuple[Projection, int]]:
    projections, found = down_projections(model, module), []
    vectors = [(int(layer), int(dim)) for layer, dim in vectors]
    for layer, dim in vectors:
        if not 0 <= layer < len(projections):
            raise ValueError(f"({layer}, {dim}): layer must be in [0, {len(projections)}).")
        refuse_quantized(projections[layer].module)
        width = projections[layer].matrix().shape[1]
        if not 0 <= dim < width:
            raise ValueError(f"({layer}, {dim}): dim must be in [0, {width}).")
        found.append((projections[layer], dim))
    if not vectors or len(set(vectors)) < len(vectors):
        raise ValueError(f"vectors are {vectors} but must be pairs (layer, dim), at least one and none twice.")
    return found


METHOD = Method(
    name="concept_vectors",
    family="unlearning",
    title="Intrinsic Evaluation of Unlearning Using Parametric Knowledge Traces",
    authors="Hong et al.",
    arxiv="2406.11614",
    year=2024,
    repo="yihuaihong/ConceptVectors",
    status="variant",
    difference="Columns are found by a standardised score of given tokens; the paper has an LLM judge the top tokens "
    "of candidates.",
    target="hfext.unlearning.concept_vectors:concept_vectors",
    usage="edit = hfext.unlearning.concept_vectors(model, [(layer, dim)], std=0.1)",
    summary="Ablates the MLP value vectors that hold a concept, and measures whether other unlearning reached them.",
    claim="Unlearning by fine-tuning barely changes the vectors that hold a concept; ablating them does.",
    headline=Result(
        metric="change of concept vectors",
        setting="Llama-2-7B-chat and OLMo-7B, 285 concepts (abstract)",
        value="minor under existing methods; ablation removes the knowledge",
    ),
    notes="No recipe: the benchmark's vectors are of two models of 7B parameters.",
)
