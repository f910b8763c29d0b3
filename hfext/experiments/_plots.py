"""Line plots of the experiments. matplotlib is imported inside, without a display and without touching its state."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = tuple[Sequence[float], Sequence[float], Any]


def lines(
    path: str | Path,
    series: Mapping[str, Line],
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    logx: bool = False,
    logy: bool = False,
) -> Path:
    """Draw one line per entry of `series` into a PNG.

    Args:
        path: Where the picture goes; missing folders are made.
        series: `{label: (x, y, band)}`. `band` is `None`, one half width per point (drawn as y - band to y + band), or
            a pair `(low, high)`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'hfext[demo]'.") from error

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for label, (x, y, band) in series.items():
        (drawn,) = axes.plot(x, y, label=label, marker="o" if len(x) <= 20 else None, markersize=3)
        if band is not None:
            low, high = (
                band
                if isinstance(band, tuple)
                else ([a - b for a, b in zip(y, band, strict=True)], [a + b for a, b in zip(y, band, strict=True)])
            )
            axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if logx:
        axes.set_xscale("log")
    if logy:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if series:
        axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
    return path
