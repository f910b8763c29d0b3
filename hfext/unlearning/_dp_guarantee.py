"""What DP-SGD spends, counted by dp-accounting, and the file beside a model that says so."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

FILE = "dp.json"
# Whole orders have a finite sum each; the series of others may fail to converge. Any set of orders gives a true bound.
ORDERS = [*range(2, 129), 160, 192, 256, 384, 512, 1024]


def _dp_accounting() -> Any:
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as missing:
        raise ImportError("DPTrainer counts with dp-accounting: pip install dp-accounting") from missing


def _event(noise_multiplier: float, sampling_rate: float, steps: int) -> Any:
    dp = _dp_accounting()
    step = dp.GaussianDpEvent(noise_multiplier)
    if sampling_rate < 1:
        step = dp.PoissonSampledDpEvent(sampling_rate, step)
    return dp.SelfComposedDpEvent(step, steps)


def _accountant(name: str) -> Any:
    _dp_accounting()
    module = importlib.import_module(f"dp_accounting.{name}")
    return module.RdpAccountant(ORDERS) if name == "rdp" else module.PLDAccountant()


def privacy_spent(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: str = "rdp"
) -> float:
    """epsilon of `steps` steps with Poisson sampling; infinite without noise, 0 without steps."""
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    return float(_accountant(accountant).compose(_event(noise_multiplier, sampling_rate, steps)).get_epsilon(delta))


def noise_for(epsilon: float, sampling_rate: float, steps: int, delta: float, accountant: str = "rdp") -> float:
    """The least noise multiplier whose guarantee is at most `epsilon`, up to 1e-4 of itself."""
    low, high = 0.0, 1.0
    while privacy_spent(high, sampling_rate, steps, delta, accountant) > epsilon:
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"epsilon is {epsilon} but cannot be reached in {steps} steps with delta {delta}.")
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        if privacy_spent(middle, sampling_rate, steps, delta, accountant) > epsilon:
            low = middle
        else:
            high = middle
    return high


def group_guarantee(epsilon: float, delta: float, rows: int) -> tuple[float, float]:
    """(epsilon, delta) for `rows` rows at once: (k eps, delta (1 + e^eps + .. + e^((k-1) eps)))."""
    if rows * epsilon > 700:
        return rows * epsilon, 1.0
    return rows * epsilon, min(1.0, delta * math.fsum(math.exp(i * epsilon) for i in range(rows)))


def read_guarantee(folder: str | Path) -> dict[str, Any]:
    """What `dp.json` of a saved base says; `ValueError` for a model without one, or one that was fine-tuned since."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE}: it was not trained by DPTrainer, so nothing bounds what it knows.")
    known = json.loads(path.read_text(encoding="utf-8"))
    if not known.get("base", True):
        raise ValueError(
            f"{folder} was fine-tuned without noise after DPTrainer: it is no base. Use the one it is from."
        )
    return known
