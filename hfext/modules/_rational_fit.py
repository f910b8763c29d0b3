"""Coefficients of group-rational activations: published ones, and fits of any activation for either denominator.

A fit minimises the largest distance on a grid over an interval: least squares with weights that are multiplied by the
distance that is left (Lawson), in float64. What is asked for again is kept.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

DENOMINATORS = ("abs_terms", "abs_sum")
# Of the authors of KAT: the same set serves both denominators (1.2e-6 and 1.3e-4 from SiLU on [-3, 3]).
SWISH = (
    (3.0548797e-07, 0.50000079, 0.24999783, 0.053266283, 0.0058030346, 0.0002751961),
    (-4.111555e-06, 0.10652899, -1.2690007e-06, 0.00055023313),
)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "swish": F.silu,
    "tanh": torch.tanh,
}
NAMES = ("identity", *FUNCTIONS)

Coefficients = tuple[tuple[float, ...], tuple[float, ...]]


def coefficients(name: str, form: str = "abs_terms", m: int = 5, n: int = 4) -> Coefficients:
    """Numerator (m + 1) and denominator (n) of an activation: exact for the identity, published for swish, else fitted
    on [-3, 3], the interval of the published ones."""
    if name not in NAMES:
        raise ValueError(f"init is {name!r} but must be one of {', '.join(NAMES)}.")
    if name == "identity":
        return (0.0, 1.0) + (0.0,) * (m - 1), (0.0,) * n
    if name == "swish" and (m, n) == (5, 4):
        return SWISH
    return fit(name, form, m, n)


@lru_cache(maxsize=64)
def fit(name: str, form: str, m: int = 5, n: int = 4, bound: float = 3.0, rounds: int = 30) -> Coefficients:
    """The rational function of one of `FUNCTIONS` on [-bound, bound]."""
    import numpy as np
    from scipy.optimize import least_squares

    nodes = np.cos(np.pi * (np.arange(401) + 0.5) / 401) * bound
    x = torch.from_numpy(nodes)
    target = FUNCTIONS[name](x).numpy()
    up, down = nodes[:, None] ** np.arange(m + 1), nodes[:, None] ** np.arange(1, n + 1)
    down = np.abs(down) if form == "abs_terms" else down

    def parts(c):
        b = np.abs(c[m + 1 :]) if form == "abs_terms" else c[m + 1 :]
        s = down @ b
        return up @ c[: m + 1], 1 + np.abs(s), np.where(s < 0, -1.0, 1.0)

    def residual(c, w):
        p, q, _ = parts(c)
        return w * (p / q - target)

    def slopes(c, w):
        p, q, sign = parts(c)
        sign = np.where(c[m + 1 :] < 0, -1.0, 1.0)[None] if form == "abs_terms" else sign[:, None]
        return w[:, None] * np.concatenate([up / q[:, None], -sign * down * (p / q**2)[:, None]], 1)

    best, least = None, np.inf
    even = np.arange(1, n + 1) % 2 == 0
    for start, kept in ((0.05, True), (0.3, True), (0.3, even), (0.6, even)):
        c, w = np.concatenate([np.zeros(m + 1), kept * start ** np.arange(1, n + 1)]), np.ones(len(nodes))
        c[: m + 1] = np.linalg.lstsq(up / parts(c)[1][:, None], target, rcond=None)[0]
        for _ in range(rounds):
            c = least_squares(residual, c, slopes, args=(w,), method="lm", max_nfev=200).x
            left = np.abs(residual(c, 1.0))
            if left.max() < least:
                best, least = c, left.max()
            w = w * np.sqrt(left / left.max() + 1e-3)
            w /= np.sqrt((w**2).mean())
    return tuple(best[: m + 1].tolist()), tuple(best[m + 1 :].tolist())


def second_moment(values: Callable[[Tensor], Tensor]) -> float:
    """E[F(z)^2] for z ~ N(0, 1), by the trapezoidal rule on [-12, 12] in float64."""
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64, device="cpu")
    return torch.trapezoid(values(z) ** 2 * torch.exp(-(z**2) / 2), z).item() / (2 * torch.pi) ** 0.5
