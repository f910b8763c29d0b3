"""The integer program of bit allocation: one option per layer, least summed loss, summed cost within a budget.

    min sum_l sum_p x_lp loss_lp   s.t.   sum_p x_lp = 1,   sum_l sum_p x_lp cost_lp <= budget,   x binary

Solved exactly by dynamic programming over the cost when the costs have a common divisor that keeps the table small,
and by branch and bound (HiGHS) otherwise. `ordered` adds: the option of a layer is not above that of the layer before
it. Ties go to the lower cost.
"""

import math
from typing import NamedTuple

import numpy as np

LARGEST_TABLE = 10**8
TIE = 1e-12


class Choice(NamedTuple):
    """The option of each layer, what they lose together and what they cost."""

    options: list[int]
    loss: float
    cost: int


def choose(losses: np.ndarray, costs: np.ndarray, budget: int, ordered: bool = False, solver: str = "auto") -> Choice:
    """The best options.

    Args:
        losses (`np.ndarray`): [layers, options], float.
        costs (`np.ndarray`): [layers, options], int, rising along the options.
        budget (`int`): Most cost.
        ordered (`bool`): Options may not rise from one layer to the next.
        solver (`str`): "dp", "milp", or "auto": "dp" when the table is small.

    Raises:
        ValueError: Where no choice is within the budget.
    """
    losses, costs = _checked(losses, costs)
    least = int(costs.min(1).sum())
    if budget < least:
        raise ValueError(
            f"The budget is {budget} but must be at least {least}, the least cost of all layers together."
        )
    most = int(costs.max(1).sum())
    if _method(costs, min(budget, most), solver) == "dp":
        return _Table(losses, costs, min(budget, most), ordered).best()
    return _by_milp(losses, costs, budget, ordered)


def frontier(
    losses: np.ndarray, costs: np.ndarray, ordered: bool = False, points: int = 100, solver: str = "auto"
) -> list[tuple[int, float]]:
    """(cost, loss) of choices that no other choice beats in both: cost rises, loss falls strictly. At most `points` of
    them, evenly spaced among all (dynamic programming) or among the budgets (HiGHS)."""
    losses, costs = _checked(losses, costs)
    least, most = int(costs.min(1).sum()), int(costs.max(1).sum())
    if _method(costs, most, solver) == "dp":
        found = _Table(losses, costs, most, ordered).frontier()
    else:
        budgets = np.unique(np.linspace(least, most, points).astype(np.int64))
        found = falling((c.cost, c.loss) for c in (_by_milp(losses, costs, int(b), ordered) for b in budgets))
    keep = np.unique(np.linspace(0, len(found) - 1, min(points, len(found))).round().astype(int))
    return [found[i] for i in keep]


def falling(points) -> list[tuple]:
    """Those (cost, loss) pairs whose loss is below that of every cheaper one, by cost."""
    kept: list[tuple] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1] - TIE * abs(kept[-1][1]):
            kept.append(point)
    return kept


def _checked(losses: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    losses, costs = np.asarray(losses, np.float64), np.asarray(costs, np.int64)
    if losses.ndim != 2 or losses.shape != costs.shape or not losses.size:
        raise ValueError(f"losses {losses.shape} and costs {costs.shape} must both be [layers, options], not empty.")
    if not np.isfinite(losses).all():
        raise ValueError(f"The loss of layer {int(np.argwhere(~np.isfinite(losses))[0, 0])} is not finite.")
    return losses, costs


def _divisor(costs: np.ndarray) -> int:
    return math.gcd(*(int(c) for c in np.unique(costs - costs.min(1, keepdims=True)))) or 1


def _method(costs: np.ndarray, budget: int, solver: str) -> str:
    if solver not in ("auto", "dp", "milp"):
        raise ValueError(f"solver is {solver!r} but must be one of auto, dp, milp.")
    cells = costs.size * ((budget - int(costs.min(1).sum())) // _divisor(costs) + 1)
    if solver == "dp" and cells > LARGEST_TABLE:
        raise ValueError(
            f"solver is 'dp' but its table would have {cells} cells, more than {LARGEST_TABLE}: use milp."
        )
    if solver != "auto":
        return solver
    return "dp" if cells <= LARGEST_TABLE else "milp"


class _Table:
    """Least loss of the first i layers that cost exactly c (in units of the divisor, above the cheapest options) and
    whose last has option p; behind each cell the option of the layer before."""

    def __init__(self, losses: np.ndarray, costs: np.ndarray, budget: int, ordered: bool):
        self.losses, self.costs, self.unit, self.floor = losses, costs, _divisor(costs), int(costs.min(1).sum())
        self.steps = (costs - costs.min(1, keepdims=True)) // self.unit
        layers, options = losses.shape
        width = (budget - self.floor) // self.unit + 1
        self.before = np.zeros((layers, options, width), np.uint8)
        least = np.full((options, width), np.inf)
        least[:, 0] = 0.0
        for i in range(layers):
            source, parent = _reachable(least, ordered)
            least = np.full((options, width), np.inf)
            for p in range(options):
                step = int(self.steps[i, p])
                if step < width:
                    least[p, step:] = source[p, : width - step] + losses[i, p]
                    self.before[i, p, step:] = parent[p, : width - step]
        self.least = least

    def best(self) -> Choice:
        by_cost = self.least.min(0)
        at = int(np.argmax(by_cost <= by_cost.min() + TIE * abs(by_cost.min())))
        option, options = int(self.least[:, at].argmin()), []
        for i in reversed(range(len(self.losses))):
            options.append(option)
            option, at = int(self.before[i, option, at]), at - int(self.steps[i, option])
        return _priced(self.losses, self.costs, options[::-1])

    def frontier(self) -> list[tuple[int, float]]:
        by_cost = self.least.min(0)
        reached = np.flatnonzero(np.isfinite(by_cost))
        return falling((self.floor + int(c) * self.unit, float(by_cost[c])) for c in reached)


def _reachable(least: np.ndarray, ordered: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each option p: the least loss over the options that the layer before may have, and which one it is."""
    options, width = least.shape
    if not ordered:
        parent = least.argmin(0)
        return np.broadcast_to(least.min(0), least.shape), np.broadcast_to(parent.astype(np.uint8), least.shape)
    source, parent = least.copy(), np.repeat(np.arange(options, dtype=np.uint8)[:, None], width, 1)
    for p in reversed(range(options - 1)):
        above = source[p + 1] < source[p]
        source[p], parent[p] = np.where(above, source[p + 1], source[p]), np.where(above, parent[p + 1], parent[p])
    return source, parent


def _priced(losses: np.ndarray, costs: np.ndarray, options: list[int]) -> Choice:
    rows = range(len(options))
    return Choice(options, math.fsum(losses[rows, options]), int(costs[rows, options].sum()))


def _by_milp(losses: np.ndarray, costs: np.ndarray, budget: int, ordered: bool) -> Choice:
    from scipy.optimize import LinearConstraint

    layers, options = losses.shape
    # Scaled so that the solver's absolute tolerances are small beside the numbers.
    span = np.ptp(losses, axis=1).sum() or 1.0
    worth = ((losses - losses.min(1, keepdims=True)) * (1e4 / span)).ravel()
    unit = _divisor(costs)
    price = ((costs - costs.min(1, keepdims=True)) // unit).ravel().astype(np.float64)
    room = (budget - int(costs.min(1).sum())) // unit
    limits = []
    if ordered:
        rank = np.tile(np.arange(options, dtype=np.float64), layers)
        falls = np.zeros((layers - 1, losses.size))
        for i in range(layers - 1):
            falls[i, i * options : (i + 1) * options] = rank[:options]
            falls[i, (i + 1) * options : (i + 2) * options] = -rank[:options]
        limits = [LinearConstraint(falls, lb=0)] if layers > 1 else []
    best, over = None, 0
    # The solver may pass a limit by a relative 1e-6, which is many units where costs are large.
    while best is None or best.cost > budget:
        over += 0 if best is None else -(-(best.cost - budget) // unit)
        picked = one_of_each(worth.reshape(losses.shape), [*limits, LinearConstraint(price[None], ub=room - over)])
        if picked is None:
            raise ValueError(f"The integer program has no solution within the budget {budget}.")
        best = _priced(losses, costs, picked)
    picked = best.options
    loss = float(worth.reshape(losses.shape)[range(layers), picked].sum())
    cheaper = one_of_each(price.reshape(losses.shape), [*limits, LinearConstraint(worth[None], ub=loss)])
    if cheaper is not None:
        other = _priced(losses, costs, cheaper)
        if other.cost < best.cost and other.loss <= best.loss + TIE * abs(best.loss):
            return other
    return best


def one_of_each(worth: np.ndarray, limits: list) -> list[int] | None:
    """The option of each layer with the least sum of `worth` [layers, options] under linear `limits` on the flattened
    binaries; `None` where there is none."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, options = worth.shape
    one = LinearConstraint(np.kron(np.eye(layers), np.ones((1, options))), 1, 1)
    result = milp(
        worth.ravel(),
        integrality=np.ones(worth.size),
        bounds=Bounds(0, 1),
        constraints=[one, *limits],
        options={"mip_rel_gap": 0.0},
    )
    return None if result.x is None else result.x.reshape(worth.shape).argmax(1).tolist()
