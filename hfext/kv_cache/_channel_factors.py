"""Two thin matrices in place of a projection of the hidden states, and how good they are: what CSKV learns.

    W x ~ B A x,   W [C, D],  A [r, D],  B [C, r],  x the input of the attention module

svd        W = U S V^T:                    B = U_r S_r^1/2,  A = S_r^1/2 V_r^T
asvd       W diag(s) = U S V^T:            B = U_r S_r^1/2,  A = S_r^1/2 V_r^T diag(1/s),  s = (mean |x| + 1e-6)^alpha
whitened   W E[x x^T] W^T = P L P^T:       B = P_r,          A = P_r^T W

The last one has the least mean squared error of its rank, the sum of the other eigenvalues over C. All of it is done
in float64 and returned in float32.
"""

import torch
from torch import Tensor, nn

from ._geometry import Geometry

SIDES = ("k", "v")
INITS = ("svd", "asvd", "whitened")


def projections(module: nn.Module, geometry: Geometry) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight [channels, hidden] and bias [channels] of keys ("k") and values ("v") of an attention module, float32."""
    if hasattr(module, "k_proj") and hasattr(module, "v_proj"):
        return {side: _affine(getattr(module, f"{side}_proj"), geometry.hidden_size) for side in SIDES}
    if hasattr(module, "qkv_proj"):
        weight, bias = _affine(module.qkv_proj, geometry.hidden_size)
        sizes = (geometry.num_heads * geometry.head_dim, geometry.width, geometry.width)
        if len(weight) == sum(sizes):
            parts = zip(weight.split(sizes), bias.split(sizes), strict=True)
            return dict(zip(("q", *SIDES), parts, strict=True))
    raise NotImplementedError(
        f"{type(module).__name__} has neither `k_proj` and `v_proj` nor a `qkv_proj` of queries, keys and values, so "
        "its keys cannot be made from its input. Take a method that needs none (xkv, rotatekv, kivi)."
    )


def _affine(layer: nn.Module, inputs: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that is affine; asked on unit vectors when it is no plain one (quantised, LoRA)."""
    if type(layer) is nn.Linear:
        weight = layer.weight.detach().float()
        return weight, torch.zeros_like(weight[:, 0]) if layer.bias is None else layer.bias.detach().float()
    like = next((p for p in layer.parameters() if p.is_floating_point()), next(layer.parameters()))
    kind = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    with torch.no_grad():
        zero = torch.zeros(1, inputs, dtype=kind, device=like.device)
        bias = layer(zero)[0].float()
        return (layer(torch.eye(inputs, dtype=kind, device=like.device)).float() - bias).T.contiguous(), bias


def in_heads(flat: Tensor, geometry: Geometry) -> Tensor:
    """[batch, tokens, channels] as [batch, kv_heads, tokens, head_dim]."""
    return flat.unflatten(-1, (geometry.num_kv_heads, geometry.head_dim)).transpose(1, 2)


def key_norm(module: nn.Module) -> nn.Module | None:
    """What an attention module does to its keys before the rotary embedding, if anything."""
    return getattr(module, "k_norm", None) or getattr(module, "k_layernorm", None)


def normed_keys(norm: nn.Module | None, flat: Tensor, geometry: Geometry) -> Tensor:
    """Projected keys [batch, tokens, channels] after the key norm: [batch, kv_heads, tokens, head_dim]."""
    if norm is None:
        return in_heads(flat, geometry)
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape == (geometry.head_dim,) or weight.dim() > 1:
        by_token = flat.unflatten(-1, (geometry.num_kv_heads, geometry.head_dim))
        return norm(by_token).transpose(1, 2) if weight is not None else norm(by_token.transpose(1, 2))
    return in_heads(norm(flat), geometry)


def factors(
    weight: Tensor,
    rank: int,
    init: str,
    size: Tensor | None = None,
    moment: Tensor | None = None,
    alpha: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """A [rank, hidden] and B [channels, rank] of `weight` [channels, hidden], float32.

    `size` is mean |x| [hidden] for "asvd", `moment` E[x x^T] [hidden, hidden] for "whitened".
    """
    w = weight.double()
    if init == "whitened":
        m = w @ moment.double() @ w.T
        up = torch.linalg.eigh((m + m.T) / 2).eigenvectors.flip(-1)[:, :rank]
        down = up.T @ w
    else:
        s = torch.ones_like(w[0]) if init == "svd" else (size.double() + 1e-6) ** alpha
        u, sigma, v = torch.linalg.svd(w * s, full_matrices=False)
        root = sigma[:rank].sqrt()
        up, down = u[:, :rank] * root, root[:, None] * v[:rank] / s
    lack = rank - down.shape[0]  # more channels than inputs: the others are zero
    return nn.functional.pad(down, (0, 0, 0, lack)).float(), nn.functional.pad(up, (0, lack)).float()


def mean_error(weight: Tensor, down: Tensor, up: Tensor, moment: Tensor) -> float:
    """The mean over tokens and channels of (W x - B A x)^2, from E[x x^T]."""
    off = weight.double() - up.double() @ down.double()
    return float(((off @ moment.double()) * off).sum() / len(off))


def least_error(weight: Tensor, rank: int, moment: Tensor) -> float:
    """The least `mean_error` of any A and B of this rank."""
    w = weight.double()
    m = w @ moment.double() @ w.T
    left = torch.linalg.eigvalsh((m + m.T) / 2)[: max(0, len(w) - rank)]
    return float(left.clamp(min=0).sum() / len(w))
