"""SAMPa: the closed form of its iterates, its ends at lambda 0 and 1, and the look-ahead of every base."""

import copy

import pytest
import torch
import transformers
from optim_training import flat, run_training

from hfext.optim import SAMPa, sam_step
from hfext.optim.sampa import adam_step, sgd_step


def square(steps, lam, rho=0.05, lr=0.1, x0=1.0):
    """f(x) = x^2 with SGD from g_y = 0: x after each update, and every point at which a gradient was taken."""
    x, points, path = torch.nn.Parameter(torch.tensor(x0, dtype=torch.float64)), [], []
    optimizer = SAMPa(torch.optim.SGD([x], lr=lr), rho=rho, lam=lam, eps=0.0)

    def closure(batch):
        points.append(x.item())
        loss = x**2
        loss.backward()
        return loss

    for _ in range(steps):
        sam_step(optimizer, closure, batch=torch.zeros(1))
        path.append(x.item())
    return path, points


def by_hand(steps, lam, rho=0.05, lr=0.1, x=1.0):
    """The recursion of the paper; the first update, without g_y, is plain descent."""
    path, g_y = [], None
    for _ in range(steps):
        y = x if g_y is None else x - lr * g_y
        g_n = 2 * y
        g_x = g_n if g_y is None else 2 * (x + (rho if g_y > 0 else -rho))
        x, g_y = x - lr * ((1 - lam) * g_x + lam * g_n), g_n
        path.append(x)
    return path


@pytest.mark.parametrize("lam", [0.0, 0.2, 0.5, 1.0])
def test_iterates_follow_the_recursion(lam):
    assert square(30, lam)[0] == pytest.approx(by_hand(30, lam), abs=1e-14)


@pytest.mark.parametrize(
    "lam, expected",
    [(0.0, [0.8, 0.63, 0.494, 0.3852]), (0.2, [0.8, 0.64, 0.5088, 0.4032]), (1.0, [0.8, 0.68, 0.568, 0.4768])],
)
def test_golden_iterates(lam, expected):
    assert square(4, lam)[0] == pytest.approx(expected, abs=1e-12)


def test_points_of_evaluation():
    """Second update: y = x - lr g_y, then x~ = x + rho."""
    _, points = square(2, 0.2)
    assert points == pytest.approx([1.0, 0.8 - 0.1 * 2.0, 0.8 + 0.05])


def test_lambda_one_does_not_depend_on_rho():
    assert square(10, 1.0, rho=0.05)[0] == square(10, 1.0, rho=5.0)[0]


def test_no_radius_and_lambda_zero_is_gradient_descent_on_one_batch():
    assert square(10, 0.0, rho=0.0)[0] == pytest.approx([0.8 ** (i + 1) for i in range(10)])


def test_each_batch_is_used_twice_an_update_apart():
    used, x = [], torch.nn.Parameter(torch.ones(()))
    optimizer = SAMPa(torch.optim.SGD([x], lr=0.1), lam=0.2)

    def closure(batch):
        used.append(int(batch))
        loss = x * batch
        loss.backward()
        return loss

    for i in range(4):
        sam_step(optimizer, closure, batch=torch.tensor(float(i)))
    assert used == [0, 1, 0, 2, 1, 3, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("warm", [0, 3])
def test_lookahead_is_the_step_that_the_base_would_make(make, warm):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    base = make([p])
    for _ in range(warm):
        p.grad = torch.randn_like(p)
        base.step()
    g, start, state = torch.randn_like(p), p.detach().clone(), copy.deepcopy(base.state_dict())
    rule = sgd_step if isinstance(base, torch.optim.SGD) else adam_step
    expected = start - rule(p.detach(), g, base.state.get(p, {}), base.param_groups[0])
    assert str(state) == str(base.state_dict())  # nothing was committed
    p.grad = g
    base.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)


def test_other_bases_look_ahead_plainly(tmp_path, tiny_gpt2):
    rms = run_training(tiny_gpt2(), "sampa", "base=rmsprop", tmp_path, learning_rate=1e-3)
    plain = run_training(tiny_gpt2(), "sampa", "base=rmsprop,lookahead=plain", tmp_path, learning_rate=1e-3)
    assert torch.equal(flat(rms.model), flat(plain.model))
    sgd = [run_training(tiny_gpt2(), "sampa", f"base=sgd,lookahead={how}", tmp_path) for how in ("base", "plain")]
    assert torch.equal(flat(sgd[0].model), flat(sgd[1].model))  # without momentum and decay they are one


def test_resume_without_the_previous_batch_starts_again(tmp_path, tiny_gpt2):
    first = run_training(
        tiny_gpt2(), "sampa", "base=sgd,save_prev_batch=false", tmp_path, save_strategy="steps", save_steps=2
    )
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert "previous" not in state["hfext"]
    resumed = run_training(
        tiny_gpt2(), "sampa", "base=sgd,save_prev_batch=false", tmp_path / "b", resume=str(tmp_path / "checkpoint-2")
    )
    assert resumed.state.global_step == 3 and torch.isfinite(flat(resumed.model)).all()
    assert not torch.equal(flat(first.model), flat(resumed.model))


def test_checkpoint_of_another_model_is_refused_before_anything_changes(tiny_gpt2):
    model, other = tiny_gpt2(), torch.nn.Linear(2, 2)
    ours, theirs = (
        SAMPa(torch.optim.SGD(model.parameters(), lr=0.1)),
        SAMPa(torch.optim.SGD(other.parameters(), lr=0.3)),
    )

    def closure(batch):
        loss = other(batch).sum()
        loss.backward()
        return loss

    sam_step(theirs, closure, batch=torch.ones(1, 2))
    with pytest.raises(ValueError, match="hfext.stale does not fit"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.1 and ours.is_first


def test_raw_loop_needs_the_batch():
    x = torch.nn.Parameter(torch.ones(()))

    def closure():
        (x**2).backward()
        return x.detach()

    with pytest.raises(ValueError, match="closure, batch"):
        sam_step(SAMPa(torch.optim.SGD([x], lr=0.1)), closure)


@pytest.mark.parametrize(
    "options, message",
    [({"lam": 1.1}, "lam is 1.1"), ({"lam": -0.1}, "lam"), ({"scope": "micro"}, "scope"), ({"every": 2}, "every")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SAMPa(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), **options)


def test_ragged_update_weighs_the_previous_batches_by_their_own_number(tmp_path):
    """Least squares, three updates of 2, 1 and 2 micro-batches, against the recursion written out."""
    from torch import nn

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, -0.3], dtype=torch.float64))

        def forward(self, x, labels=None):
            return {"loss": ((x @ self.w - labels) ** 2).mean()}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    x, y = torch.randn(12, 2, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    data = [{"x": a, "labels": b.item()} for a, b in zip(x, y, strict=True)]
    job = run_training(
        Linear(), "sampa", "lambda=0.3,rho=0.2,base=sgd", tmp_path, data=data, trainer=InOrder, max_grad_norm=0,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, lr_scheduler_type="constant",
        remove_unused_columns=False,
    )  # fmt: skip
    w, g_y, previous = Linear().w.detach(), None, None
    for rows in (slice(0, 8), slice(8, 12), slice(0, 8)):

        def slope(w, rows=rows):
            # labels reach the loss through a collator that makes them float32
            return 2 * x[rows].T @ (x[rows] @ w - y[rows].float().double()) / len(x[rows])

        g_n = slope(w if g_y is None else w - 0.1 * g_y)
        g_x = g_n if g_y is None else slope(w + 0.2 * g_y / g_y.norm(), previous)
        w, g_y, previous = w - 0.1 * (0.7 * g_x + 0.3 * g_n), g_n, rows
    torch.testing.assert_close(job.model.w.detach(), w)


def test_loss_scale_does_not_reach_the_stale_gradient():
    def run(scale):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = SAMPa(torch.optim.SGD([w], lr=0.1), lam=0.3, rho=0.2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, enabled=scale != 1)

        def closure(batch):
            loss = (w**2 * batch).sum()
            scaler.scale(loss).backward()
            return loss

        for i in range(4):
            sam_step(optimizer, closure, torch.tensor([1.0, 2.0 + i]), scaler=scaler)
        return w.detach()

    torch.testing.assert_close(run(1), run(1024.0))
