"""Datamodel matching: margins by probabilities, the regression against ridge in closed form, oracles by retraining."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from unlearning_cases import FORGET, RETAIN, first_gradient, flat, gradient_of, llama, trainer

from hfext.unlearning.dmm import (
    DMM,
    draw_subsets,
    estimate_datamodel,
    fit_datamodel,
    matching_loss,
    predicted_oracle,
    row_margins,
    token_margins,
)


def test_margins_are_the_log_odds_of_the_label():
    logits, labels = torch.randn(4, 7, 11), torch.randint(0, 11, (4, 7))
    p = logits.softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(token_margins(logits, labels), p.log() - (1 - p).log(), rtol=1e-4, atol=1e-5)
    sure = torch.tensor([[60.0, 0.0, 0.0]])
    assert token_margins(sure, torch.tensor([0])).item() == pytest.approx(60 - math.log(2))
    assert token_margins(sure.bfloat16(), torch.tensor([0])).dtype == torch.float32
    torch.testing.assert_close(row_margins(logits[:, 0], labels[:, 0]), token_margins(logits[:, 0], labels[:, 0]))


def test_rows_are_means_over_scored_tokens_whatever_the_padding_holds():
    logits, labels = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    labels[0, 3:], labels[1, :2] = -100, -100
    each = token_margins(logits, labels)
    torch.testing.assert_close(row_margins(logits, labels), torch.stack([each[0, :3].mean(), each[1, 2:].mean()]))
    changed = logits.clone()
    changed[0, 3:] = 1e4
    torch.testing.assert_close(row_margins(changed, labels), row_margins(logits, labels))
    logits.requires_grad_()
    row_margins(logits, labels).sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[0, 3:] == 0).all()
    assert row_margins(logits, torch.full((2, 5), -100)).tolist() == [0, 0]


def test_the_fit_is_ridge_regression_with_a_free_intercept():
    rng = np.random.default_rng(0)
    for models, n in ((40, 6), (10, 25)):
        x = torch.tensor(rng.random((models, n)) < 0.6)
        y = torch.tensor(rng.normal(size=(models, 3)))
        found = fit_datamodel(x, y, 0.7)
        # The same by least squares of an enlarged problem: rows sqrt(ridge) I that leave the intercept alone.
        design = np.concatenate([np.ones((models, 1)), x.numpy()], 1)
        extra = np.concatenate([np.zeros((n, 1)), math.sqrt(0.7) * np.eye(n)], 1)
        expected = np.linalg.lstsq(np.concatenate([design, extra]), np.concatenate([y, np.zeros((n, 3))]), rcond=None)[
            0
        ]
        np.testing.assert_allclose(found.intercept, expected[0], atol=1e-9)
        np.testing.assert_allclose(found.beta, expected[1:], atol=1e-9)


def test_additive_models_are_recovered_and_their_oracles_exact():
    effects, base = torch.randn(12, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def train(rows):
        return base + effects[rows].sum(0)

    found = estimate_datamodel(train, 12, 40, 0.5, ridge=0.0, seed=1)
    torch.testing.assert_close(found.beta, effects, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.intercept, base, rtol=1e-8, atol=1e-8)
    keep = [0, 1, 3, 4, 6, 7, 8, 10, 11]
    torch.testing.assert_close(predicted_oracle(train(range(12)), found.beta, [2, 5, 9]), train(keep))
    torch.testing.assert_close(found.predict(keep), train(keep))


def test_coins_and_not_subsets_of_one_size():
    """With one size the sum over F is wrong by a constant for each of its rows, however many models there are."""
    drawn = draw_subsets(40, 2000, 0.3, seed=0)
    assert drawn.sum(1).double().var() == pytest.approx(40 * 0.3 * 0.7, rel=0.15)
    assert drawn.double().mean() == pytest.approx(0.3, abs=0.005) and draw_subsets(2, 200, 0.05, 0).any(1).all()
    effects = torch.rand(10, 1, dtype=torch.float64) + 1
    fixed = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(i)) < 5 for i in range(300)])
    wrong, right = (fit_datamodel(s, s.double() @ effects, 1e-6) for s in (fixed, draw_subsets(10, 300, 0.5, 0)))
    assert (right.beta - effects).abs().max() < 1e-4 < 1 < (wrong.beta - effects).abs().min()


class Ridge:
    """Regression of which every retrained model is known in closed form."""

    def __init__(self, n=80, d=5, seed=0, penalty=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, d, generator=generator, dtype=torch.float64)
        self.y = self.x @ torch.randn(d, generator=generator, dtype=torch.float64)
        self.y += 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
        self.penalty = penalty * torch.eye(d, dtype=torch.float64)
        self.points = torch.randn(20, d, generator=generator, dtype=torch.float64)

    def hessian(self, rows):
        return self.x[rows].T @ self.x[rows] + self.penalty

    def theta(self, rows):
        return torch.linalg.solve(self.hessian(rows), self.x[rows].T @ self.y[rows])

    def train(self, rows):
        return self.points @ self.theta(rows)


def test_the_datamodel_of_a_regression_predicts_its_retrained_models():
    problem = Ridge()
    everything = list(range(80))
    # The change by a Newton step with the Hessian of what stays is exact for a quadratic.
    f, theta = [3, 17, 40], problem.theta(everything)
    stay = [i for i in everything if i not in f]
    gradient = problem.x[f].T @ (problem.x[f] @ theta - problem.y[f])
    exact = theta + torch.linalg.solve(problem.hessian(stay), gradient)
    torch.testing.assert_close(exact, problem.theta(stay), rtol=1e-9, atol=1e-9)

    fits = {frac: estimate_datamodel(problem.train, 80, 1500, frac, ridge=1e-3) for frac in (0.5, 0.9)}
    rng, f0, slopes = np.random.default_rng(0), problem.train(everything), {}
    for frac, found in fits.items():
        true, predicted = [], []
        for _ in range(30):
            forget = rng.choice(80, 4, False).tolist()
            true.append(problem.train([i for i in everything if i not in forget]) - f0)
            predicted.append(predicted_oracle(f0, found.beta, forget) - f0)
        true, predicted = torch.cat(true), torch.cat(predicted)
        assert np.corrcoef(true, predicted)[0, 1] > 0.97
        slopes[frac] = float((true @ predicted) / (true @ true))
    assert 0.95 < slopes[0.9] < 1.25 and 1.6 < slopes[0.5] < 2.4, slopes


def matched(problem, theta, targets, points, steps=3000):
    """Gradient descent on the matching loss of a linear model."""
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        matching_loss(points @ theta, targets).backward()
        optimizer.step()
    return theta.detach()


def test_oracle_matching_ends_at_the_retrained_model_and_datamodel_matching_near_it():
    problem = Ridge()
    everything, forget = list(range(80)), [1, 2, 30, 31, 50, 70]
    stay = [i for i in everything if i not in forget]
    start, gold = problem.theta(everything), problem.theta(stay)
    found = matched(problem, start, problem.train(stay), problem.points)
    torch.testing.assert_close(found, gold, rtol=1e-5, atol=1e-6)
    beta = estimate_datamodel(problem.train, 80, 1500, 0.9, ridge=1e-3).beta
    target = predicted_oracle(problem.train(everything), beta, forget)
    near = matched(problem, start, target, problem.points)
    assert (near - gold).norm() < 0.3 * (start - gold).norm()


def test_without_effects_nothing_moves():
    problem = Ridge()
    theta = problem.theta(list(range(80)))
    target = predicted_oracle(problem.points @ theta, torch.zeros(80, 20, dtype=torch.float64), [1, 2])
    assert torch.equal(matched(problem, theta, target, problem.points, steps=5), theta)


def test_softmax_regression_moves_towards_its_retrained_self():
    """200 rows of three classes and 300 models: margins of forgotten rows after matching, against retraining."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    y = (x[:, :3] + 0.7 * torch.randn(200, 3, generator=generator)).argmax(1)

    def fit(rows, start=None, targets=None, points=None):
        model = nn.Linear(8, 3)
        with torch.no_grad():
            model.weight.zero_(), model.bias.zero_()
        if start is not None:
            model.load_state_dict(start)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            if targets is None:
                penalty = 0.01 * model.weight.square().sum()
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows]) + penalty
            else:
                loss = matching_loss(row_margins(model(x[points]), y[points]), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
        return model

    forget = list(range(8))
    points = [*forget, *range(100, 140)]

    def margins(model):
        return row_margins(model(x[points]), y[points]).detach()

    f0 = fit(list(range(200)))
    gold = margins(fit(list(range(8, 200))))
    beta = estimate_datamodel(lambda rows: margins(fit(rows)), 200, 300, 0.9, ridge=0.3).beta
    unlearned = margins(fit(None, f0.state_dict(), predicted_oracle(margins(f0), beta, forget), points))
    before, after = ((m - gold)[:8].square().mean() for m in (margins(f0), unlearned))
    assert after < 0.5 * before


def test_reductions_and_bad_input():
    a, b = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    each = matching_loss(a, b, "none")
    torch.testing.assert_close(each, (a - b) ** 2)
    torch.testing.assert_close(matching_loss(a, b, "sum"), each.sum())
    matching_loss(a, b).backward()
    assert b.grad is None
    torch.testing.assert_close(a.grad, 2 * (a - b).detach() / 5)
    assert matching_loss(a.bfloat16(), b).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="shape"):
        matching_loss(a, b[:3])
    beta = torch.zeros(4, 3)
    for f0, forget, text in (
        (torch.zeros(2), [0], r"f0 has the shape \[2\]"),
        (torch.zeros(3), [4], "forget is"),
        (torch.zeros(3), [1, 1], "forget is"),
    ):
        with pytest.raises(ValueError, match=text):
            predicted_oracle(f0, beta, forget)
    for options, text in (
        ({"n_models": 1}, "n_models is 1"),
        ({"subset_frac": 1.0}, "subset_frac is 1.0"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"ridge": 0.0, "n_models": 4}, "ridge is 0 but must be > 0"),
    ):
        with pytest.raises(ValueError, match=text):
            estimate_datamodel(lambda rows: torch.zeros(1), 4, **{"n_models": 10} | options)
    with pytest.raises(ValueError, match=r"returned \[\] for model 0"):
        estimate_datamodel(lambda rows: torch.zeros(()), 4, 10)
    with pytest.raises(ValueError, match="must return finite"):
        estimate_datamodel(lambda rows: torch.full((2,), math.nan), 4, 10)


# ---- the objective --------------------------------------------------------------------------------------------------


def margins_of(model, rows):
    """Mean margin of the scored tokens of each row, by the definition, one row at a time."""
    found = []
    for row in rows:
        p = model(torch.tensor([row["input_ids"]])).logits[0].softmax(-1)
        each = [
            (p[t - 1, label] / (1 - p[t - 1, label])).log()
            for t, label in enumerate(row["labels"])
            if t and label != -100
        ]
        found.append(torch.stack(each).mean())
    return torch.stack(found)


def targets_of(model):
    return {"forget": margins_of(model, FORGET).detach(), "retain": margins_of(model, RETAIN).detach()}


def test_the_gradient_is_that_of_the_formula(tmp_path):
    model, oracle = llama().double(), llama(seed=4).double()
    targets = targets_of(oracle)
    made = DMM(targets=targets, gamma=0.7, alpha=1.3)
    found, pairs = first_gradient("npo", tmp_path, model, objective=made)
    loss = 0
    for part, weight in (("forget", 0.7), ("retain", 1.3)):
        mine = [pair[part] for pair in pairs]
        wanted = targets[part].float().double()[[row["index"] for row in mine]]
        loss = loss + weight * (margins_of(model, mine) - wanted).square().mean()
    # Targets are held in float32.
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=1e-4, atol=1e-6)


def test_a_model_that_meets_its_targets_stays_and_others_come_nearer(tmp_path):
    model, oracle = llama(), llama(seed=4)
    before = flat(model)
    trainer("npo", tmp_path, model=model, objective=DMM(targets=targets_of(llama()))).train()
    assert (flat(model) - before).abs().max() < 1e-5
    targets = targets_of(oracle)
    options = dict(optim="adamw_torch", learning_rate=1e-2, num_train_epochs=20)
    trainer("npo", tmp_path, model=model, objective=DMM(targets=targets), **options).train()
    left = (margins_of(model, FORGET) - targets["forget"]).square().mean()
    assert left < 0.1 * (margins_of(llama(), FORGET) - targets["forget"]).square().mean()


def test_targets_from_a_file_and_bad_ones(tmp_path):
    from safetensors.torch import save_file

    targets = targets_of(llama())
    save_file(targets, tmp_path / "targets.safetensors")
    assert torch.equal(DMM(targets=str(tmp_path / "targets.safetensors")).targets["forget"], targets["forget"])
    with pytest.raises(ValueError, match="must have forget and retain"):
        DMM(targets={"forget": [0.0]})
    with pytest.raises(ValueError, match="one finite number for each row"):
        DMM(targets={"forget": [float("nan")], "retain": [0.0]})
    with pytest.raises(ValueError, match=r"targets\['forget'\] has 1 numbers for 8 rows"):
        trainer("npo", tmp_path, objective=DMM(targets={"forget": [0.0], "retain": [0.0]}))
