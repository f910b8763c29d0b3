"""Metrics through `evaluate`: every form equals its function, batch by batch too."""

import pytest

from hfext.metrics._load import forms, load

ROWS = [[-0.1, -2.5, -0.7], [-1.0], [-3.0, -0.25]]
ARRAYS = {
    "min_k": ({"predictions": ROWS}, {"members": [1, 0, 0], "k": 0.5}),
    "min_k_plus_plus": (
        {"predictions": ROWS, "mean": [[-1.0] * len(r) for r in ROWS], "std": [[0.5] * len(r) for r in ROWS]},
        {"k": 1.0},
    ),
    "renyi": ({"predictions": [[-x for x in row] for row in ROWS]}, {"smallest": True}),
    "truth_ratio": ({"predictions": [1.0, 2.0], "references": [[2.0, 3.0], [0.5]]}, {"wrong_agg": "geometric"}),
    "forget_quality": ({"predictions": [0.1, 0.2, 0.9], "references": [0.3, 0.8, 0.7]}, {}),
    "rouge_recall": ({"predictions": ["the red houses"], "references": ["a red house"]}, {}),
    "verbmem": ({"predictions": ["the red houses"], "references": ["a red house"]}, {}),
    "knowmem": ({"predictions": ["red\n\nQuestion"], "references": ["red house"]}, {}),
    "privleak": ({"predictions": [1.0, 2.0, 3.0], "references": [1, 0, 1]}, {"auc_gold": 0.4}),
    "extraction": ({"predictions": [[1, 2, 3], [4]], "references": [[1, 2, 4], [4]]}, {"include_eos": True}),
    "sarr": ({"predictions": ["Paris", "I do not know."]}, {}),
    "ort": (
        {"predictions": [0.1, 0.9], "references": [0.9, 0.9], "forms": ["question", "cloze"]},
        {"threshold": 0.6},
    ),
    "klom": ({"predictions": [[1.0, 2.0], [0.5, 0.1]], "references": [[1.5, 2.0, 1.0], [0.5, 0.2, 0.1]]}, {"bins": 3}),
}


def test_all_forms_are_tried():
    assert set(forms()) == set(ARRAYS)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_loaded_metric_equals_its_function(name):
    arrays, options = ARRAYS[name]
    form, record = forms()[name]
    expected = form.compute(**arrays, **options)
    metric = load(name)
    assert metric.compute(**arrays, **options) == expected
    # A second use, row by row.
    for i in range(len(arrays["predictions"])):
        metric.add_batch(**{key: column[i : i + 1] for key, column in arrays.items()})
    assert metric.compute(**options) == expected
    assert metric.name == name and record.arxiv in metric.citation
    assert record.summary in metric.description and metric.inputs_description == form.description


def test_bad_calls_are_named():
    with pytest.raises(KeyError, match="Did you mean 'min_k'"):
        load("mink")
    with pytest.raises(ValueError, match="k is 2"):
        load("min_k").compute(predictions=ROWS, k=2)
