"""The metrics as `evaluate` knows them."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from ..registry import Method, suggest
from ._form import Form

if TYPE_CHECKING:
    import evaluate


def forms() -> dict[str, tuple[Form, Method]]:
    """Every form of the files of this family, with the record of its paper."""
    found = {}
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_"):
            module = vars(importlib.import_module(f"{__package__}.{info.name}"))
            found.update({name: (form, module["METHOD"]) for name, form in module.get("FORMS", {}).items()})
    return found


def load(name: str, **options) -> "evaluate.Metric":
    """A metric with `compute(predictions=..., ...)`, `add` and `add_batch`, and its description; offline.

    Args:
        name (`str`): `min_k`, `truth_ratio`, `forget_quality`, `privleak`, ...
        options: Of `evaluate.Metric`, as `experiment_id`. Options of the metric go to `compute`.

    Returns:
        `evaluate.Metric`; its `compute` equals the function `compute` of the metric's file.
    """
    known = forms()
    if name not in known:
        raise KeyError(f"No metric is called {name!r}. {suggest(name, known)}")
    try:
        import datasets
        import evaluate
    except ImportError:
        raise ImportError("hfext.metrics.load needs `evaluate`: pip install evaluate.") from None
    form, method = known[name]

    class Metric(evaluate.Metric):
        def _info(self):
            features = {
                key: datasets.Sequence(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
                for key, kind in form.features.items()
            }
            return evaluate.MetricInfo(
                description=f"{method.summary}\n\n{form.compute.__doc__ or ''}".strip(),
                citation=f"{method.title}, {method.authors}, {method.year}, arXiv {method.arxiv}",
                inputs_description=form.description,
                features=datasets.Features(features),
                reference_urls=[f"https://arxiv.org/abs/{method.arxiv}"],
            )

        def _compute(self, **arrays):
            return form.compute(**arrays)

    Metric.__name__ = name
    return Metric(keep_in_memory=True, **options)
