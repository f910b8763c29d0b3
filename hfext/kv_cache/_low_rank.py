"""Low-rank factors of matrices of tokens, when they pay, and the interpolation of directions: pure functions.

x [tokens, columns] = U S V^T;   token factor U_r S_r [tokens, rank],   basis V_r^T [rank, columns]

which is the best approximation of that rank, with a squared error of the sum of the squares of the other singular
values. Everything is computed in float64 (float32 where the device has no float64) and returned in float32. Rows of
zeros stay rows of zeros.
"""

import torch
from torch import Tensor

from .._packing import packed_length

SOLVERS = ("gram", "exact", "random")
OVERSAMPLE, POWER_ITERATIONS, BLOCK = 8, 2, 4096


def factorised(x: Tensor, rank: int, solver: str = "gram", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token factor [batch, tokens, rank] and basis [batch, rank, columns] of x [batch, tokens, columns].

    `solver`: "exact" is a singular value decomposition, "gram" the eigenvectors of the smaller of x^T x and x x^T,
    "random" a randomised decomposition with `seed`, 8 more columns than `rank` and 2 power iterations. `rank` is at
    most the smaller side of x.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    if solver == "exact":
        u, s, v = torch.linalg.svd(x.to(wide), full_matrices=False)
        token, basis = u[..., :rank] * s[..., None, :rank], v[..., :rank, :]
    elif solver == "random":
        token, basis = _random(x.to(wide), rank, seed)
    elif x.shape[-1] <= x.shape[-2]:
        columns = _leading(sum(part.mT @ part for part in (p.to(wide) for p in x.split(BLOCK, dim=-2))), rank)
        token, basis = torch.cat([p.to(wide) @ columns for p in x.split(BLOCK, dim=-2)], dim=-2), columns.mT
    else:
        rows = _leading(sum(part @ part.mT for part in (p.to(wide) for p in x.split(BLOCK, dim=-1))), rank)
        basis = rows.mT @ x.to(wide)
        size = basis.norm(dim=-1).clamp(min=torch.finfo(wide).tiny)
        token, basis = rows * size[..., None, :], basis / size[..., None]
    return token.float(), basis.float()


def _leading(symmetric: Tensor, count: int) -> Tensor:
    """The `count` eigenvectors of largest eigenvalue [.., n, count], descending."""
    return torch.linalg.eigh(symmetric).eigenvectors[..., -count:].flip(-1)


def _random(x: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    drawn = min(rank + OVERSAMPLE, *x.shape[-2:])
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(x.shape[-1], drawn, generator=generator, device="cpu", dtype=x.dtype).to(x.device)
    q = torch.linalg.qr(x @ start).Q
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(x @ torch.linalg.qr(x.mT @ q).Q).Q
    u, s, v = torch.linalg.svd(q.mT @ x, full_matrices=False)
    return (q @ u[..., :rank]) * s[..., None, :rank], v[..., :rank, :]


def factor_bytes(
    tokens: int, rank: int, layers: int, width: int, itemsize: int, bits: int = 16, group_size: int = 32
) -> int:
    """Bytes of one token factor [tokens, rank] and of `layers` bases [rank, width].

    The basis takes `itemsize` bytes a number, and so does the token factor with 16 bits; otherwise it is codes with a
    scale and a minimum for every `group_size` of them.
    """
    pair = 4 if bits < 8 else 8
    one = rank * itemsize if bits == 16 else packed_length(rank, bits) + rank // group_size * pair
    return tokens * one + layers * rank * width * itemsize


def pays(tokens: int, rank: int, layers: int, width: int, itemsize: int, bits: int = 16, group_size: int = 32) -> bool:
    """Whether factors take fewer bytes than the `tokens * layers * width` numbers that they stand for.

    With 16 bits that is tokens > rank layers width / (layers width - rank).
    """
    return factor_bytes(tokens, rank, layers, width, itemsize, bits, group_size) < tokens * layers * width * itemsize


def angles(x: Tensor, y: Tensor) -> Tensor:
    """Angles [...] in radians between vectors [..., n], float32; 0 where one is zero.

    From 2 atan2(|u - v|, |u + v|), which is exact where the cosine's inverse is not, at small and at flat angles.
    """
    u, v = directions(x), directions(y)
    found = 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))
    return found.masked_fill((u == 0).all(-1) | (v == 0).all(-1), 0.0)


def directions(x: Tensor) -> Tensor:
    """x [..., n] scaled to length 1, float32; zero where x is."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def slerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    """The direction [..., n] at the share `t` of the way on the sphere from that of x to that of y, float32.

    sin((1 - t) w) / sin w u + sin(t w) / sin w v of the unit vectors u and v with the angle w between them. Where
    they are the same, opposite or zero, which gives no way, it is their linear mixture scaled to length 1.
    """
    u, v, angle = directions(x), directions(y), angles(x, y)[..., None]
    sine = angle.sin()
    flat = sine < 1e-6
    safe = sine.masked_fill(flat, 1.0)
    first = torch.where(flat, 1 - t, ((1 - t) * angle).sin() / safe)
    return directions(first * u + torch.where(flat, t, (t * angle).sin() / safe) * v)
