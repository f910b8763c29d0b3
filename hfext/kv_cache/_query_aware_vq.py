"""Vector quantisation of keys so that their products with queries are kept, not the keys themselves.

    E_q (q . k - q . k')^2 = (k - k') H (k - k')^T,   H = E q^T q = L L^T,   so it is |k L - k' L|^2:
k-means on k L. A code stands for the centroid c in that space, the key c L^-1; a table of q . (c_m L^-1) for all codes
then gives the score of any token by one look-up. With H = I this is ordinary k-means.
"""

import torch
from torch import Tensor

NUMBERS = 2**22  # distances that are held at once


def factor(moment: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """L and its inverse, float32 [..., d, d], of second moments H [..., d, d] divided by the RMS of their entries.

    L L^T = H / RMS(H) + epsilon I, so directions that no query has still count a little.
    """
    moment = moment.double()
    size = moment.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    one = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    lower = torch.linalg.cholesky(moment / size.clamp(min=torch.finfo(moment.dtype).tiny) + epsilon * one)
    return lower.float(), torch.linalg.solve_triangular(lower, one.expand(lower.shape), upper=False).float()


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest of centroids [heads, m, d] to every x [heads, n, d]: int64 [heads, n], of equal ones the first."""
    out = torch.empty(x.shape[:2], dtype=torch.long, device=x.device)
    columns, offset = centroids.transpose(1, 2), centroids.square().sum(-1).unsqueeze(1) / 2
    for part, part_out in zip(*(t.split(_chunk(x, centroids), dim=1) for t in (x, out)), strict=True):
        torch.argmin(torch.baddbmm(offset, part, columns, alpha=-1), dim=-1, out=part_out)
    return out


def _chunk(x: Tensor, centroids: Tensor) -> int:
    return max(1, NUMBERS // (x.shape[0] * centroids.shape[1]))


def spread_out(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The first centroids of k-means++ [heads, count, d]: points of x [heads, n, d], each drawn by its squared
    distance from those before. Raises `ValueError` when a head has fewer than `count` different points.
    """
    heads, tokens, _ = x.shape
    rows = torch.arange(heads, device=x.device)
    draws = torch.rand(count, heads, 1, generator=generator, dtype=torch.float64).to(x.device)
    chosen = (draws[0, :, 0] * tokens).long()
    centroids, distance = [x[rows, chosen]], None
    for draw in draws[1:]:
        new = (x - centroids[-1].unsqueeze(1)).square_().sum(-1)
        distance = new if distance is None else torch.minimum(distance, new)
        total = distance.double().cumsum(-1)
        if not bool((total[:, -1] > 0).all()):
            raise ValueError(f"only {len(centroids)} different keys were seen")
        chosen = torch.searchsorted(total, draw * total[:, -1:], right=True)[:, 0].clamp(max=tokens - 1)
        centroids.append(x[rows, chosen])
    return torch.stack(centroids, dim=1)


def kmeans(
    x: Tensor, count: int, generator: torch.Generator, max_iterations: int = 300, tolerance: float = 1e-4
) -> tuple[Tensor, list[float]]:
    """Centroids [heads, count, d] of x [heads, n, d] and the sum of squared distances before every iteration.

    The sum never grows. A centroid that no point is nearest to moves to a point that is farthest from its own. Ends
    when the centroids move by less than `tolerance` in all (Frobenius norm, the largest of the heads).
    """
    heads, tokens, dim = x.shape
    centroids = spread_out(x, count, generator)
    objective = []
    for _ in range(max_iterations):
        code = nearest(x, centroids)
        wide = code.unsqueeze(-1).expand(-1, -1, dim)
        distance = (x - centroids.gather(1, wide)).square_().sum(-1)
        objective.append(float(distance.double().sum()))
        members = torch.zeros(heads, count, device=x.device).scatter_add_(1, code, torch.ones_like(distance))
        new = torch.zeros_like(centroids).scatter_add_(1, wide, x) / members.clamp(min=1).unsqueeze(-1)
        empty = members == 0
        if bool(empty.any()):
            far = distance.topk(min(tokens, int(empty.sum(-1).max())), dim=-1).indices
            rank = (empty.cumsum(-1) - 1).clamp(0, far.shape[1] - 1)
            moved = x.gather(1, far.gather(1, rank).unsqueeze(-1).expand(-1, -1, dim))
            new = torch.where(empty.unsqueeze(-1), moved, new)
        shift = torch.linalg.vector_norm(new - centroids, dim=(1, 2)).max()
        centroids = new
        if float(shift) < tolerance:
            break
    return centroids, objective


def learn_codebook(
    keys: Tensor, moment: Tensor, count: int, generator: torch.Generator, max_iterations: int = 300
) -> dict[str, Tensor]:
    """`codebook` [heads, count, d] in the space of k L, `chol` = L and `inv_chol` [heads, d, d], float32.

    keys [heads, n, d] before the rotary embedding; moment [heads, d, d], the sum of q^T q.
    """
    lower, inverse = factor(moment)
    centroids, _ = kmeans(keys.float() @ lower, count, generator, max_iterations)
    return {"codebook": centroids, "chol": lower, "inv_chol": inverse}


def encode(keys: Tensor, codebook: Tensor, lower: Tensor) -> Tensor:
    """Codes int64 [batch, heads, n] of keys [batch, heads, n, d] before the rotary embedding."""
    batch, heads, tokens, dim = keys.shape
    x = keys.float().transpose(0, 1).reshape(heads, batch * tokens, dim) @ lower
    return nearest(x, codebook).view(heads, batch, tokens).transpose(0, 1)


def score_table(queries: Tensor, codebook: Tensor, inverse: Tensor) -> Tensor:
    """q . (c_m L^-1) of queries [batch, heads, n, d], `heads` a multiple of the codebook's: [batch, heads, n, m]."""
    batch, heads, tokens, dim = queries.shape
    kv_heads = codebook.shape[0]
    q = queries.float().reshape(batch, kv_heads, -1, dim) @ inverse.transpose(-1, -2)
    return (q @ codebook.transpose(-1, -2)).view(batch, heads, tokens, -1)
