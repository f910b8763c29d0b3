"""RECE: erase concepts from linear projections in closed form, then erase what would still bring them back.

c are embeddings to erase, v what a projection W shall give for them, k embeddings to preserve, in columns C, V, K:

    UCE   W' = argmin  lam ||W' - W||^2 + e ||W' C - V||^2 + r ||W' K - W K||^2
             = W + e (V - W C) C^T (lam I + e C C^T + r K K^T)^-1
    RECE  c* = argmin  rho ||c*||^2 + sum_l ||W'_l c* - W_l c||^2
             = (rho I + sum_l W'_l^T W'_l)^-1 (sum_l W'_l^T W_l) c        over all projections; W_l before all edits

Each round finds the c* that makes the edited projections answer as the old ones did to c, and erases it by another UCE
step from the present W'. The first line's second form has the rank of C: the whole change is of low rank, and can be a
LoRA adapter while that is small. Everything is solved in float64.

Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models, arXiv 2407.12383; the closed form: Unified
Concept Editing in Diffusion Models, arXiv 2308.14761. There W are the keys and values of cross-attention and the
embeddings those of a prompt's 77 tokens; here any linear layers and embeddings given.
"""

import math
import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..registry import Method, Result
from ._down_projections import linear_layers, matrix_of
from ._edit import Dense, Edit, LowRank, low_rank_sum, refuse_quantized


def uce_factors(
    weight: Tensor, erase: Tensor, values: Tensor, preserve: Tensor | None, lam: float, e: float, r: float
) -> tuple[Tensor, Tensor]:
    """`left` [out, n], `right` [n, in], float64, of the UCE step; erase [n, in], values [n, out], preserve [p, in]."""
    w, c = weight.double(), erase.double()
    metric = lam * torch.eye(c.shape[1], dtype=c.dtype, device=c.device) + e * c.T @ c
    if preserve is not None:
        metric = metric + r * preserve.double().T @ preserve.double()
    return e * (values.double() - c @ w.T).T, torch.linalg.solve(metric, c.T).T


def adversarial_embeddings(erase: Tensor, old: Sequence[Tensor], new: Sequence[Tensor], rho: float) -> Tensor:
    """c* [n, in] of each row of erase [n, in], for projections [out_l, in] before (`old`) and now (`new`), float64."""
    c = erase.double()
    normal = rho * torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    cross = torch.zeros_like(normal)
    for before, after in zip(old, new, strict=True):
        normal = normal + after.double().T @ after.double()
        cross = cross + after.double().T @ before.double()
    return torch.linalg.solve(normal, cross @ c.T).T


def target_values(weight: Tensor, erase: Tensor, target: Tensor | None, how: str) -> Tensor:
    """v [concepts, tokens, out] for erase and target [concepts, tokens, in], float64; no target is 0."""
    w, c = weight.double(), erase.double()
    if target is None:
        return c.new_zeros(*c.shape[:-1], len(w))
    values = target.double() @ w.T
    if how == "replace":
        return values
    # The part of the target along the old output, both as [tokens, out] of one concept, is taken out.
    old = c @ w.T
    unit = old / old.flatten(1).norm(dim=1).clamp(min=torch.finfo(old.dtype).tiny)[:, None, None]
    return values - (unit * values).sum((1, 2), keepdim=True) * unit


def edit_matrices(
    weights: Sequence[Tensor],
    erase: Tensor,
    target: Tensor | None,
    preserve: Tensor | None,
    how: str,
    rounds: int,
    lam: float,
    e: float,
    r: float,
    rho: float,
) -> list[tuple[Tensor, Tensor]]:
    """The whole change of each weight [out, in] as factors, after UCE and `rounds` of RECE."""
    old = [w.double() for w in weights]
    now, factors = list(old), [([], []) for _ in old]
    for step in range(rounds + 1):
        erased = erase.double() if step == 0 else adversarial_embeddings(erase.flatten(0, 1), old, now, rho)
        erased = erased.reshape(erase.shape)
        for i, w in enumerate(now):
            values = target_values(w, erased, target, how)
            left, right = uce_factors(w, erased.flatten(0, 1), values.flatten(0, 1), preserve, lam, e, r)
            now[i] = w + left @ right
            factors[i][0].append(left)
            factors[i][1].append(right)
    return [(torch.cat(left, 1), torch.cat(right)) for left, right in factors]


def rece(
    projections: nn.Module | Sequence[nn.Module] | Sequence[Tensor],
    erase: Tensor,
    preserve: Tensor | None = None,
    target: Tensor | None = None,
    *,
    targets: str | None = None,
    how: Literal["replace", "tensor"] = "replace",
    rounds: int = 3,
    lam: float = 0.1,
    erase_scale: float = 1.0,
    preserve_scale: float = 0.1,
    rho: float = 0.1,
) -> Edit | list[Tensor]:
    """Erase embeddings from projections that take them as input.

    Args:
        projections: A model, of which `targets` chooses the linear layers; linear layers (`nn.Linear`, `Conv1D`); or
            matrices [out, in].
        erase (`torch.Tensor`): Embeddings [tokens, in] of one concept, or [concepts, tokens, in].
        preserve (`torch.Tensor`, *optional*): Embeddings [..., in] whose outputs shall stay.
        target (`torch.Tensor`, *optional*): Embeddings of the shape of `erase`, or that broadcast to it, whose outputs
            take the place of the erased ones; zeros by default.
        targets (`str`, *optional*): A regex, searched in the names of a model's layers, such as r"attn2\\.to_[kv]$".
        how (`str`, *optional*, defaults to `"replace"`): `"tensor"`: the target's output without its part along the
            output that is erased.
        rounds (`int`, *optional*, defaults to 3): Adversarial rounds; 0 is UCE.
        lam, erase_scale, preserve_scale, rho (`float`): lam, e, r and rho of the formulas; 0.1, 1, 0.1 and 0.1. lam
            and rho are > 0.

    Returns:
        [`Edit`] for a model or layers, which are changed in place; for matrices the new ones, in their type.
    """
    erase, target, preserve = _shaped(erase, target, preserve)
    for name, value in (("lam", lam), ("rho", rho)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value} but must be > 0 and finite, else there is no unique solution.")
    for name, value in (("erase_scale", erase_scale), ("preserve_scale", preserve_scale), ("rounds", rounds)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value} but must be >= 0 and finite.")
    if how not in ("replace", "tensor"):
        raise ValueError(f"how is {how!r} but must be one of replace, tensor.")
    settings = (how, rounds, lam, erase_scale, preserve_scale, rho)
    if not isinstance(projections, nn.Module) and len(projections) and all(isinstance(w, Tensor) for w in projections):
        _check_inputs({f"matrix {i}": w for i, w in enumerate(projections)}, erase.shape[-1])
        with torch.no_grad():
            made = edit_matrices(projections, *_beside(projections[0], erase, target, preserve), *settings)
            return [(w.double() + a @ b).to(w.dtype) for w, (a, b) in zip(projections, made, strict=True)]
    model, layers = _layers(projections, targets)
    for layer in layers.values():
        refuse_quantized(layer)
    matrices = {name: matrix_of(layer) for name, layer in layers.items()}
    _check_inputs(matrices, erase.shape[-1])
    weights = list(matrices.values())
    with torch.no_grad():
        made = edit_matrices(weights, *_beside(weights[0], erase, target, preserve), *settings)
    changes = {}
    for (name, layer), (left, right) in zip(layers.items(), made, strict=True):
        factors = (right.T, left.T) if isinstance(layer, Conv1D) else (left, right)
        small = 2 * left.shape[1] < min(matrices[name].shape)
        stored = layer.weight.detach()
        changes[f"{name}.weight"] = (
            LowRank(*factors) if small else Dense((stored.double() + low_rank_sum(*factors)).to(stored.dtype))
        )
    return Edit.make(model, changes, {"rounds": rounds, "layers": list(layers)})


def _layers(projections, targets: str | None) -> tuple[nn.Module, dict[str, nn.Module]]:
    if not isinstance(projections, nn.Module):
        wrong = next((m for m in projections if not isinstance(m, nn.Linear | Conv1D)), None)
        if wrong is not None or not len(projections):
            raise TypeError(f"projections hold a {type(wrong).__name__} but must be linear layers, or matrices alone.")
        model = nn.ModuleList(projections)
        return model, dict(model.named_children())
    if isinstance(projections, nn.Linear | Conv1D):
        return _layers([projections], targets)
    linears = linear_layers(projections)
    found = {name: m for name, m in linears.items() if targets is not None and re.search(targets, name)}
    if not found:
        raise ValueError(f"targets is {targets!r} and matches none of the linear layers {', '.join(linears)}.")
    return projections, found


def _shaped(erase: Tensor, target: Tensor | None, preserve: Tensor | None):
    if erase.ndim not in (2, 3) or not erase.numel():
        raise ValueError(f"erase has the shape {list(erase.shape)} but must be [(concepts,) tokens, in].")
    erase = erase.detach().double().view(-1, *erase.shape[-2:])
    if target is not None:
        try:
            target = target.detach().double().expand_as(erase)
        except RuntimeError as error:
            raise ValueError(f"target has the shape {list(target.shape)} but must fit {list(erase.shape)}.") from error
    if preserve is not None:
        if preserve.shape[-1] != erase.shape[-1]:
            raise ValueError(f"preserve has {preserve.shape[-1]} features but erase has {erase.shape[-1]}.")
        preserve = preserve.detach().double().reshape(-1, preserve.shape[-1])
    if not all(x is None or x.isfinite().all() for x in (erase, target, preserve)):
        raise ValueError("The embeddings hold NaN or infinity.")
    return erase, target, preserve


def _beside(weight: Tensor, *embeddings: Tensor | None) -> list[Tensor | None]:
    """On the weight's device."""
    return [x if x is None else x.to(weight.device) for x in embeddings]


def _check_inputs(matrices: dict[str, Tensor], features: int) -> None:
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape[1] != features:
            raise ValueError(f"{name} is {list(matrix.shape)} but must take {features} features, as erase has.")


METHOD = Method(
    name="rece",
    family="unlearning",
    title="Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models",
    authors="Gong et al.",
    arxiv="2407.12383",
    year=2024,
    repo="CharlesGong12/RECE",
    status="faithful",
    target="hfext.unlearning.rece:rece",
    usage='edit = hfext.unlearning.rece(unet, erase, preserve, target, targets=r"attn2\\.to_[kv]$")',
    summary="Erases concepts from linear projections in closed form, adversarial embeddings included.",
    claim="Adversarial embeddings no longer bring an erased concept back.",
    headline=Result(metric="erasure time", setting="Stable Diffusion 1.4, a GPU (paper)", value="about 3 seconds"),
    notes="No recipe: the claim needs a diffusion model. Of the paper's regularisers of the adversarial embedding it "
    "has that towards zero.",
)
