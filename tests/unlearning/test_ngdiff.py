"""NGDiff: its direction, what it does not depend on, and the automatic learning rate, alone and in the Trainer."""

import copy

import pytest
import torch
from torch import nn
from unlearning_cases import first_gradient, flat, gradient_of, llama, nll_sums, part, run, trainer

from hfext.unlearning._auto_lr import AutoLRConfig, look, minimum, next_rate
from hfext.unlearning.ngdiff import NGDiff, NGDiffConfig, normalized_difference
from hfext.unlearning.npo import NPO

OFF = {"auto_lr": False}


def test_golden_values():
    """The worked example of two variables: its direction, and the step to the minimum of its quadratic."""
    hessian = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    theta, b = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    retain, forget = hessian @ theta - b, torch.tensor([2.0, 0.5], dtype=torch.float64)
    g = retain.clone()
    noted = normalized_difference([g], [forget])
    torch.testing.assert_close(g, torch.tensor([-0.5229289, -1.1369628], dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(g.norm()) == pytest.approx(1.2514548, abs=1e-6)
    assert float(retain @ g) == pytest.approx(2.6264951, abs=1e-6)
    assert float(forget @ g) == pytest.approx(-1.6143392, abs=1e-6)
    assert float(g @ g) == pytest.approx(2 - 2 * float(noted["cosine"]), abs=1e-7)

    def loss(x):
        return float(x @ hessian @ x / 2 - b @ x)

    for probe in (1e-2, 1.0, 30.0):
        s = minimum(loss(theta + probe * g), loss(theta), loss(theta - probe * g))
        assert s * probe == pytest.approx(0.5716191, abs=1e-6)
        assert s * probe == pytest.approx(float(retain @ g / (g @ hessian @ g)), rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_identities_of_the_direction(seed):
    torch.manual_seed(seed)
    retain = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    forget = [torch.randn_like(x) * 1e4 for x in retain]
    g = [x.clone() for x in retain]
    noted = normalized_difference(g, forget)
    r, f, d = (torch.cat([x.flatten() for x in part]) for part in (retain, forget, g))
    cosine = float(r @ f / (r.norm() * f.norm()))
    assert float(noted["cosine"]) == pytest.approx(cosine, abs=1e-6)
    assert float(d @ d) == pytest.approx(2 - 2 * cosine, abs=1e-6)
    assert float(r @ d) == pytest.approx(float(r.norm()) * (1 - cosine), rel=1e-5) and float(f @ d) <= 0
    same = [x.clone() for x in retain]
    normalized_difference(same, [x.clone() for x in retain])
    assert max(x.abs().max() for x in same) < 1e-7, "equal gradients leave nothing"


def test_the_gradient_is_that_of_the_formula(tmp_path):
    model = llama()
    found, pairs = first_gradient("ngdiff", tmp_path, model, OFF)
    (f, n_f), (r, n_r) = (nll_sums(model, part(pairs, name)) for name in ("forget", "retain"))
    g_f, g_r = gradient_of(f.sum() / n_f.sum(), model), gradient_of(r.sum() / n_r.sum(), model)
    torch.testing.assert_close(found, g_r / g_r.norm() - g_f / g_f.norm(), rtol=0, atol=1e-7)
    cosine = float(g_r @ g_f / (g_r.norm() * g_f.norm()))
    assert float(found @ found) == pytest.approx(2 - 2 * cosine, abs=1e-5)


@pytest.mark.parametrize("part_name", ["forget", "retain"])
def test_the_size_of_a_loss_does_not_matter(part_name, tmp_path):
    class Scaled(NGDiff):
        def terms(self, now, reference):
            found = super().terms(now, reference)
            if part_name in found:
                found[part_name].weight = 1000.0
            return found

    plain, _ = first_gradient("ngdiff", tmp_path, options=OFF)
    scaled, _ = first_gradient("ngdiff", tmp_path, options=OFF, objective=Scaled(auto_lr=False))
    torch.testing.assert_close(plain, scaled, rtol=0, atol=1e-7)


def test_it_is_gradient_difference_with_the_weights_of_the_moment(tmp_path):
    model = llama()
    found, pairs = first_gradient("ngdiff", tmp_path, model, OFF)
    (f, n_f), (r, n_r) = (nll_sums(model, part(pairs, name)) for name in ("forget", "retain"))
    weights = {
        "gamma": float(1 / gradient_of(f.sum() / n_f.sum(), model).norm()),
        "alpha": float(1 / gradient_of(r.sum() / n_r.sum(), model).norm()),
    }
    other, _ = first_gradient("grad_diff", tmp_path, model, weights)
    torch.testing.assert_close(found, other, rtol=0, atol=1e-6)


def test_the_same_rows_in_both_sets_change_nothing(tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 4
    model = llama()
    before = flat(model)
    trainer("ngdiff", tmp_path, model=model, forget=rows, retain=rows, objective_args=OFF).train()
    assert (flat(model) - before).abs().max() < 1e-6


def test_options_that_are_not_the_papers(tmp_path):
    tensor, _ = first_gradient("ngdiff", tmp_path, options={**OFF, "scope": "tensor"})
    model = llama()
    for chunk in tensor.split([p.numel() for p in model.parameters()]):
        assert float(chunk.norm()) <= 2 + 1e-6
    capped, _ = first_gradient("ngdiff", tmp_path, options={**OFF, "forget_loss_cap": 0.1})
    assert float(capped.norm()) == pytest.approx(1, abs=1e-6), "the retain gradient alone"
    free, _ = first_gradient("ngdiff", tmp_path, options={**OFF, "forget_loss_cap": 100.0})
    assert torch.equal(free, first_gradient("ngdiff", tmp_path, options=OFF)[0])


def test_the_default_clips_nothing(tmp_path):
    """Clipping at 1 would shorten the gradient, whose length is the root of 2 - 2 cos."""
    made = trainer("ngdiff", tmp_path, objective_args=OFF, max_steps=1, learning_rate=1.0)
    before = flat(made.model)
    made.train()
    assert float((flat(made.model) - before).norm()) > 1.2


# ---- the automatic learning rate ---------------------------------------------------------------------------------


def test_a_parabola_without_a_minimum_is_left_alone():
    assert minimum(1.0, 1.0, 1.0) is None and minimum(1.0, 2.0, 1.5) is None  # flat; curved down
    assert minimum(1.0, 1.5, 3.0) is None  # rises along the step
    assert minimum(float("nan"), 1.0, 1.0) is None
    assert minimum(4.0, 1.0, 0.0) == pytest.approx(1.0)


def test_bounds_of_the_rate():
    c = AutoLRConfig
    assert next_rate(1.0, 1.0, 100.0, c()) == 2.0 and next_rate(1.0, 1.0, 0.01, c()) == 0.5
    assert next_rate(1.0, 1.0, 100.0, c(lr_clip_factor=None)) == 100.0
    assert next_rate(1.0, 1.0, 1.5, c(lr_smoothing=0.9)) == pytest.approx(1.05)
    assert next_rate(1.0, 1.0, 1.9, c(lr_max=1.2)) == 1.2 and next_rate(1.0, 1.0, 0.6, c(lr_min=0.7)) == 0.7
    # A schedule that lets half the rate be used: s was measured at that half.
    assert next_rate(1.0, 0.5, 2.0, c()) == 1.0


@pytest.mark.parametrize("optim", ["sgd", "momentum", "adamw"])
def test_a_look_finds_the_minimum_and_leaves_no_trace(optim):
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    hessian, goal = root @ root.T + torch.eye(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    p = nn.Parameter(torch.randn(6, dtype=torch.float64))
    made = {
        "sgd": lambda: torch.optim.SGD([p], lr=0.3),
        "momentum": lambda: torch.optim.SGD([p], lr=0.3, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW([p], lr=0.3, weight_decay=0.1),
    }[optim]()

    def loss():
        x = p.detach() - goal
        return float(x @ hessian @ x / 2)

    for _ in range(2):  # without state, and with it
        p.grad = hessian @ (p.detach() - goal)
        before, state = p.detach().clone(), copy.deepcopy(made.state_dict())
        rng = torch.get_rng_state()
        tensors = {key: value for key, value in made.state.get(p, {}).items()}
        s = minimum(*look(made, loss))
        assert torch.equal(p, before) and torch.equal(torch.get_rng_state(), rng)
        assert str(made.state_dict()) == str(state)
        assert all(made.state[p][key] is value for key, value in tensors.items())
        probe = copy.deepcopy(p.detach())
        clone = nn.Parameter(probe)
        twin = type(made)(
            [clone], **{k: v for k, v in made.defaults.items() if k in ("lr", "momentum", "weight_decay")}
        )
        twin.load_state_dict(copy.deepcopy(made.state_dict()))
        clone.grad = p.grad.clone()
        twin.step()
        d = before - clone.detach()
        wanted = float((hessian @ (before - goal)) @ d / (d @ hessian @ d))
        assert s == pytest.approx(wanted, rel=1e-5)
        made.step()


def test_an_exception_in_a_look_leaves_no_trace():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    made = torch.optim.AdamW([p], lr=0.1)
    calls = []

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("stop")
        return 1.0

    with pytest.raises(KeyError):
        look(made, loss)
    assert torch.equal(p.detach(), torch.ones(2)) and not made.state


def test_the_rate_that_is_logged_is_applied_and_survives(tmp_path):
    """SGD without momentum: the length of an update is the rate times that of the gradient, which is logged."""
    lengths, rates = [], []
    made = trainer("ngdiff", tmp_path, objective_args={"lr_interval": 2}, num_train_epochs=4, learning_rate=1e-3)
    before = [flat(made.model)]
    original = made.optimizer

    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            lengths.append(float((flat(made.model) - before[0]).norm()))
            before[0] = flat(made.model)

    made.add_callback(Watch())
    made.train()
    entries = [h for h in made.state.log_history if "loss" in h]
    rates = [h["learning_rate"] for h in entries]
    assert original is None and len(set(rates)) > 2 and rates[0] == rates[1] == 1e-3 and rates[2] != rates[1]
    for length, entry in zip(lengths, entries, strict=True):
        assert length == pytest.approx(entry["learning_rate"] * entry["grad_norm"], rel=2e-3)
    assert all("unlearn/auto_lr" in h for h in entries[2::2]) and "unlearn/auto_lr" not in entries[1]
    assert [h["unlearn/auto_lr"] for h in entries[2::2]] == pytest.approx(rates[2::2], rel=1e-6)


def test_far_starts_come_near(tmp_path):
    """First rates that differ thirtyfold end within a factor of three."""
    ends = []
    for first in (3e-4, 9e-3):
        made = trainer("ngdiff", tmp_path, objective_args={"lr_interval": 1}, num_train_epochs=8, learning_rate=first)
        made.train()
        ends.append([h["learning_rate"] for h in made.state.log_history if "learning_rate" in h][-1])
    assert max(ends) / min(ends) < 3


def test_a_schedule_multiplies_the_rate(tmp_path):
    made = trainer("ngdiff", tmp_path, objective_args={"lr_interval": 1}, lr_scheduler_type="linear",
                   num_train_epochs=4)  # fmt: skip
    made.train()
    entries = [h for h in made.state.log_history if "loss" in h]
    for k, entry in enumerate(entries):
        if "unlearn/auto_lr" in entry:
            assert entry["learning_rate"] == pytest.approx(entry["unlearn/auto_lr"] * (1 - k / len(entries)), rel=1e-5)


def test_schedules_that_own_the_rate_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sets the rate by itself"):
        trainer("ngdiff", tmp_path, objective_args={"lr_interval": 1}, lr_scheduler_type="reduce_lr_on_plateau",
                lr_scheduler_kwargs={}, eval_strategy="epoch", eval_dataset=[{"input_ids": [3, 4], "labels": [3, 4]}],
                metric_for_best_model="eval_loss").train()  # fmt: skip


@pytest.mark.parametrize("optim, args", [("sam", "rho=0.05,base=adamw"), ("adamw_torch", None), ("adafactor", None)])
def test_other_optimizers(optim, args, tmp_path):
    options = {"objective_args": {"lr_interval": 1}, "optim": optim, "optim_args": args, "learning_rate": 1e-3}
    once, twice = (run("ngdiff", tmp_path, **options) for _ in range(2))
    assert torch.equal(once, twice) and torch.isfinite(once).all()


def test_bad_options_are_named():
    cases = {
        "eps is -1.0": {"eps": -1.0},
        "scope is 'layer'": {"scope": "layer"},
        "forget_loss_cap is 0": {"forget_loss_cap": 0},
        "lr_smoothing is 1.0": {"lr_smoothing": 1.0},
        "lr_min is 0.0": {"lr_min": 0.0},
        "lr_max is 1.0": {"lr_min": 2.0, "lr_max": 1.0},
    }
    for problem, options in cases.items():
        with pytest.raises(ValueError, match=problem):
            NGDiffConfig(**options)
    with pytest.raises(TypeError, match="no option 'lr_intervall'. Did you mean 'lr_interval'"):
        NGDiff(lr_intervall=3)
    assert NPO().config.beta == 0.1


def test_fp16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use bf16|fp16"):
        trainer("ngdiff", tmp_path, fp16=True)
