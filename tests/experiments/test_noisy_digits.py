"""The noisy-digits experiment: its data, its eigenvalue against a full Hessian, its flips against brute force."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfext import recipe
from hfext.experiments import noisy_digits
from hfext.experiments._digits import MLP, Digits, accuracy, corrupt, load_digits, make_mlp, top_eigenvalue
from hfext.experiments.noisy_digits import Config, flips, parse_entry

RECIPES = ["sam", "asam", "sam_on", "bisam"]


# data and measurements


def test_the_splits_are_fixed_and_disjoint():
    (train, test), (inner, validation) = load_digits("test"), load_digits("validation")
    assert [len(x) for x in (train, test, inner, validation)] == [1437, 360, 1077, 360]
    rows = [{tuple(x.tolist()) for x in part.pixel_values} for part in (test, inner, validation)]
    assert not any(a & b for i, a in enumerate(rows) for b in rows[i + 1 :])
    assert torch.equal(load_digits("test")[1].labels, test.labels)
    assert 0 <= float(train.pixel_values.min()) and float(train.pixel_values.max()) == 1.0


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
def test_noise_is_exact_and_symmetric(noise):
    labels = torch.arange(20000) % 10
    noisy = corrupt(labels, noise, seed=3)
    wrong = noisy != labels
    assert wrong.sum() == round(noise * 20000)
    assert torch.equal(noisy, corrupt(labels, noise, seed=3))
    if noise:
        assert not torch.equal(noisy, corrupt(labels, noise, seed=4))
        shift = torch.bincount((noisy - labels)[wrong] % 10, minlength=10)[1:].double()
        assert float((shift / shift.mean() - 1).abs().max()) < 0.2


def test_items_read_singly_and_in_batches_agree():
    data = load_digits()[0]
    for item, i in zip(data.__getitems__([5, 2]), [5, 2], strict=True):
        assert all(torch.equal(item[k], data[i][k]) for k in item)


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_the_mlp_depends_on_its_seed_alone_and_returns_loss_and_logits(norm):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = make_mlp(3, 8, norm)
    assert torch.equal(state, torch.get_rng_state())
    b = make_mlp(3, 8, norm)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any("norm" in name for name, _ in a.named_parameters()) == (norm != "none")
    x, y = torch.rand(4, 64), torch.tensor([0, 1, 2, 3])
    outputs = a(x, labels=y)
    torch.testing.assert_close(outputs["loss"], F.cross_entropy(outputs["logits"], y))
    assert set(a(x)) == {"logits"}


def test_top_eigenvalue_equals_that_of_the_whole_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(20, 3).double(), torch.randint(0, 3, (20,))
    params = list(model.parameters())

    def at(flat):
        parts = flat.split([p.numel() for p in params])
        named = {n: v.view_as(p) for (n, p), v in zip(model.named_parameters(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, named, x), y)

    hessian = torch.autograd.functional.hessian(at, torch.cat([p.detach().flatten() for p in params]))
    values = torch.linalg.eigvalsh(hessian)
    expected = float(values[values.abs().argmax()])
    found = top_eigenvalue(lambda: F.cross_entropy(model(x), y), params, iterations=2000, tolerance=1e-9)
    assert found == pytest.approx(expected, rel=1e-3)


def test_accuracy_keeps_the_mode():
    model, data = MLP(8, "batch"), load_digits()[1]
    model.train()
    expected = model.eval()(data.pixel_values)["logits"].argmax(-1).eq(data.labels).float().mean()
    model.train()
    assert accuracy(model, data) == pytest.approx(float(expected)) and model.training


def test_flips_equal_brute_force_and_leave_the_weights():
    model, data = make_mlp(0, 16), load_digits()[0]
    data = Digits(data.pixel_values[:64], data.labels[:64])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        model(data.pixel_values, data.labels)["loss"].backward()
        optimizer.step()
    kept = [p.detach().clone() for p in model.parameters()]
    found = {row["objective"]: row for row in flips(model, data, 0.5, 32)}
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))

    lost, rise = 0, 0.0
    for x, y in zip(data.pixel_values.split(32), data.labels.split(32), strict=True):
        model.zero_grad()
        z = model(x)["logits"]
        F.cross_entropy(z, y).backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        moved = {n: p.detach() + 0.5 * p.grad / norm for n, p in model.named_parameters()}
        after = torch.func.functional_call(model, moved, x)["logits"]
        lost += int(((z.argmax(-1) == y) & (after.argmax(-1) != y)).sum())
        rise += float(
            F.cross_entropy(after, y, reduction="sum").detach() - F.cross_entropy(z, y, reduction="sum").detach()
        )
    assert found["sam"]["flipped"] == pytest.approx(lost / 64)
    assert found["sam"]["loss_rise"] == pytest.approx(rise / 64, rel=1e-4)
    assert set(found) == {"sam", "bisam_tanh", "bisam_log"}
    # To first order nothing raises the loss more than its own gradient.
    assert found["sam"]["loss_rise"] >= found["bisam_tanh"]["loss_rise"]


# entries and config


def test_entries_are_read():
    assert parse_entry("sgd") == ("sgd", {})
    assert parse_entry(" bisam_tanh( rho = 0.1 , mu=10 )") == ("bisam_tanh", {"rho": 0.1, "mu": 10})


@pytest.mark.parametrize(
    "entry, message", [("smm", "Did you mean 'sam'"), ("sam(rho)", "option=value"), ("sam(rho=1", "not of the form")]
)
def test_bad_entries_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        Config(methods=["sgd", "sam", entry])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(method="asam"), "method is 'asam'"),
        (dict(noise=1.0), "noise is 1.0"),
        (dict(tolerance=0.0), "tolerance is 0.0"),
        (dict(seeds=0), "seeds is 0"),
        (dict(flip_epochs=[31]), "flip_epochs"),
        (dict(metric="flipped", method="bisam_tanh", baseline="sam"), "flip_epochs or flip_rhos is empty"),
        (dict(methods=["sam", "sam"]), "twice"),
    ],
)
def test_bad_config_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


# the whole


QUICK = dict(epochs=2, hidden=16, batch_size=256)


def test_run_returns_evidence_tables_and_plot(tmp_path):
    entries = [
        "sgd",
        "adamw(lr=0.001)",
        "sam(rho=0.05)",
        "bisam_log(rho=0.05)",
        "saf(start=-1,delay=1)",
        "mesa(start=-1)",
    ]
    found = noisy_digits.run(
        Config(methods=entries, flip_epochs=[1, 2], flip_rhos=[0.05, 0.2], seeds=2, **QUICK), tmp_path
    )
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    rows, flip_rows = found["tables"].values()
    assert [row["method"] for row in rows] == entries and len(flip_rows) == 12
    one = [r for r in found["runs"] if r["entry"] == "sam(rho=0.05)"]
    mean, sd = 100 * np.mean([r["last"] for r in one]), 100 * np.std([r["last"] for r in one], ddof=1)
    assert rows[2]["last %"] == pytest.approx(mean, abs=0.01) and rows[2]["sd"] == pytest.approx(sd, abs=0.01)
    evidence = found["evidence"]
    assert (
        evidence["ours"] == pytest.approx(mean, rel=1e-4) and evidence["n"] == 2 and evidence["baseline_name"] == "sgd"
    )
    curves = json.loads((tmp_path / "accuracy.json").read_text())["accuracy"]
    assert np.mean([curve[-1] for curve in curves["sam(rho=0.05)"]]) == pytest.approx(mean / 100, rel=1e-4)
    assert all(len(curve) == 2 for entry in entries for curve in curves[entry])
    assert all(r["hessian"] > 0 for r in found["runs"])


def test_entries_share_weights_labels_and_batches(tmp_path):
    """At radius 0, and with a term that is never on, every rival is the base run, bit for bit."""
    entries = [
        "sgd",
        "sam(rho=0.0)",
        "asam(rho=0.0)",
        "bisam_tanh(rho=0.0)",
        "saf(coefficient=0)",
        "mesa(coefficient=0)",
    ]
    found = noisy_digits.run(Config(methods=entries, seeds=1, **QUICK), tmp_path)
    first, *rest = ({k: r[k] for k in ("last", "best", "train", "hessian")} for r in found["runs"])
    assert all(r == first for r in rest)


def test_flips_can_be_the_evidence(tmp_path):
    settings = dict(metric="flipped", method="bisam_tanh", baseline="sam", flip_epochs=[2], seeds=1)
    config = Config(methods=["sgd"], **settings, **QUICK)
    found = noisy_digits.run(config, tmp_path)
    ours = 100 * np.mean([r["flipped"] for r in found["flips"] if r["objective"] == "bisam_tanh"])
    assert found["evidence"]["ours"] == pytest.approx(ours, rel=1e-4)


def test_time_can_be_the_evidence(tmp_path):
    config = Config(
        methods=["sgd", "mesa(start=-1)"],
        method="mesa",
        metric="speed",
        max_time=1e9,
        turns=1,
        turn_hidden=8,
        seeds=1,
        **QUICK,
    )
    evidence = noisy_digits.run(config, tmp_path)["evidence"]
    assert evidence["ours"] > 0 and evidence["baseline"] == 1.0 and "accuracy" in evidence["note"]


@pytest.mark.parametrize("tolerance, holds", [(None, False), (0.1, False), (1.0, True)])
def test_at_least_as_good_is_a_bound_on_the_difference(tolerance, holds):
    """Differences of mean 0 and standard error 0.5 / sqrt(5): the bound is 2.132 times that, 0.477, below 0."""
    base = [0.90, 0.91, 0.92, 0.93, 0.90]
    ours = [b + d / 100 for b, d in zip(base, [0.5, -0.5, 0.5, -0.5, 0.0], strict=True)]
    runs = {"sgd": [{"last": x} for x in base], "sam": [{"last": x} for x in ours]}
    config = Config(methods=["sgd", "sam"], seeds=5, tolerance=tolerance)
    assert noisy_digits._evidence(config, runs, [], {})["reproduced"] is holds


@pytest.mark.parametrize("name", [*(f"optim/{n}" for n in RECIPES), "training/saf", "training/mesa", "bench"])
def test_the_recipes_load(name):
    path = "bench/noisy_digits" if name == "bench" else f"{name}-mlp-digits"
    module, config = recipe.load(path)
    assert module is noisy_digits and config.seeds >= 5 and config.split == "test"
