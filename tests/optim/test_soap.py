"""SOAP: its rule against one written from its formulas, its Adam limit, its invariance, its bases and checkpoints."""

import copy
import math

import one_pass_cases as cases
import pytest
import torch
from one_pass_cases import net, train
from optim_training import flat, gpt2, language_data, run_training
from torch import nn
from transformers import TrainingArguments

from hfext.optim import SOAP
from hfext.optim.soap import SOAPConfig, eigenbasis, factor, merged_shape, refreshed, rotate


def soap(model, **options):
    return SOAP(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.0, **options})


class AdamWithoutItsFirstCall:
    """Adam with eps inside the corrected root and the decay after the update, written plainly."""

    def __init__(self, params, lr, decay, betas=(0.95, 0.95), eps=1e-8):
        self.params, self.lr, self.decay, self.betas, self.eps, self.t = list(params), lr, decay, betas, eps, -1
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self):
        self.t += 1
        if self.t == 0:
            return
        b1, b2 = self.betas
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            m.copy_(b1 * m + (1 - b1) * p.grad)
            v.copy_(b2 * v + (1 - b2) * p.grad**2)
            size = self.lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
            p -= size * m / (v.sqrt() + self.eps)
            p -= self.lr * self.decay * p


def test_without_factors_it_is_adam_that_skips_its_first_call():
    theirs, ours = net(torch.float64), net(torch.float64)
    optimizer = soap(ours, max_precond_dim=0, lr=1e-3, weight_decay=0.1)
    plain = AdamWithoutItsFirstCall(theirs.parameters(), 1e-3, 0.1)
    assert (train(ours, optimizer, 13) - train(theirs, plain, 13)).abs().max() <= 1e-7
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in optimizer.state.values())


class Written:
    """SOAP of one matrix, from its formulas, every product spelt out; m is kept in the space of the weights."""

    def __init__(self, w, lr, beta, frequency):
        self.w, self.lr, self.b, self.f, self.t = w, lr, beta, frequency, -1

    def step(self, g, bases):
        self.t += 1
        b = self.b
        if self.t == 0:
            self.L, self.R = (1 - b) * g @ g.T, (1 - b) * g.T @ g
            self.QL, self.QR = bases
            for x, q in ((self.L, self.QL), (self.R, self.QR)):
                torch.testing.assert_close(q.T @ x @ q, torch.linalg.eigvalsh(x).flip(0).diag(), rtol=0, atol=1e-12)
            self.m, self.v = torch.zeros_like(g), torch.zeros_like(g)
            return
        self.m = b * self.m + (1 - b) * g
        self.v = b * self.v + (1 - b) * (self.QL.T @ g @ self.QR) ** 2
        n = (self.QL.T @ self.m @ self.QR) / (self.v.sqrt() + 1e-8)
        self.w = self.w - self.lr * math.sqrt(1 - b**self.t) / (1 - b**self.t) * self.QL @ n @ self.QR.T
        self.L, self.R = b * self.L + (1 - b) * g @ g.T, b * self.R + (1 - b) * g.T @ g
        if self.t % self.f == 0:
            left = torch.diag(self.QL.T @ self.L @ self.QL).argsort(descending=True)
            right = torch.diag(self.QR.T @ self.R @ self.QR).argsort(descending=True)
            self.v = self.v[left][:, right]
            self.QL = torch.linalg.qr(self.L @ self.QL[:, left])[0]
            self.QR = torch.linalg.qr(self.R @ self.QR[:, right])[0]


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("shape", [(4, 4), (3, 6)])
def test_the_rule_equals_its_formulas(shape, frequency):
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    written = Written(w.detach().clone(), 0.01, 0.9, frequency)
    optimizer = SOAP([w], lr=0.01, betas=(0.9, 0.9), weight_decay=0.0, precondition_frequency=frequency)
    for _ in range(10):
        w.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        # Eigenvectors of the value 0, and signs, are free: the first bases are checked and taken over.
        written.step(w.grad, [optimizer.state[w][f"basis_{dim}"] for dim in (0, 1)])
    torch.testing.assert_close(w.detach(), written.w, rtol=0, atol=1e-9)


def test_the_first_call_moves_nothing_and_the_second_does():
    model = net()
    optimizer = soap(model)
    assert torch.equal(train(model, optimizer, 1), flat(net()))
    assert not torch.equal(train(model, optimizer, 1, 1), flat(net()))


def test_with_diagonal_gradients_the_bases_are_permutations_and_it_is_adam():
    sizes = torch.tensor([0.3, 2.0, 1.0, 0.1, 0.7])
    theirs, ours = (nn.Parameter(torch.diag(torch.ones(5))) for _ in range(2))
    optimizer = SOAP([ours], lr=1e-2, weight_decay=0.0, precondition_frequency=1)
    plain = AdamWithoutItsFirstCall([theirs], 1e-2, 0.0)
    for i in range(8):
        ours.grad = torch.diag(sizes * (1 + 0.1 * i) * (-1) ** i)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        plain.step()
    for dim in (0, 1):
        q = optimizer.state[ours][f"basis_{dim}"].abs()
        torch.testing.assert_close(q, q.round(), rtol=0, atol=1e-6)
        assert q.argmax(0).tolist() == sizes.argsort(descending=True).tolist()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-6)


def trajectory(optimizer_of, left, right, steps=12):
    """A quadratic in left W right': its trajectory, turned back."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(steps, 5, 5, generator=generator, dtype=torch.float64)
    start = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    scale = torch.tensor([3.0, 1.0, 0.5, 2.0, 0.2], dtype=torch.float64)
    w = nn.Parameter(left.T @ start @ right)
    optimizer = optimizer_of(w)
    for target in targets:
        optimizer.zero_grad()
        (scale[:, None] * (left @ w @ right.T - target)).square().sum().backward()
        optimizer.step()
    return (left @ w @ right.T).detach()


def test_rotating_the_problem_rotates_the_trajectory():
    eye = torch.eye(5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    left, right = (torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0] for _ in range(2))

    def ours(w):
        return SOAP([w], lr=1e-2, weight_decay=0.0, precondition_frequency=1)

    def adam(w):
        return torch.optim.Adam([w], lr=1e-2)

    plain = trajectory(ours, eye, eye)
    torch.testing.assert_close(trajectory(ours, left, right), plain, rtol=0, atol=1e-7)
    assert (trajectory(adam, left, right) - trajectory(adam, eye, eye)).abs().max() > 1e-2


# pure functions


def test_rotation_of_any_number_of_dimensions():
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    bases = [torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0], None,
             torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0]]  # fmt: skip
    expected = torch.einsum("abc,ai,cj->ibj", x, bases[0], bases[2])
    torch.testing.assert_close(rotate(x, bases), expected)
    torch.testing.assert_close(rotate(rotate(x, bases), bases, back=True), x)


def test_factors_of_each_dimension():
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    for dim, pattern in enumerate(("abc,xbc->ax", "abc,axc->bx", "abc,abx->cx")):
        torch.testing.assert_close(factor(x, dim), torch.einsum(pattern, x, x))


def test_bases_converge_to_the_eigenvectors_in_order():
    values = torch.tensor([5.0, 3.0, 1.0, 0.1], dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    covariance = q @ torch.diag(values) @ q.T
    torch.testing.assert_close(
        (eigenbasis(covariance).T @ q).abs(), torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0
    )
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    for _ in range(200):
        _, basis = refreshed(covariance, basis)
    torch.testing.assert_close((basis.T @ q).abs(), torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    order, _ = refreshed(covariance, q[:, [2, 0, 3, 1]])
    assert order.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    "shape, limit, merged",
    [((8, 3, 5, 5), 80, (24, 25)), ((8, 3, 5, 5), 1000, (600,)), ((8, 3, 5, 5), 5, (8, 3, 5, 5)), ((7,), 3, (7,))],
)
def test_merged_dimensions(shape, limit, merged):
    assert merged_shape(shape, limit) == merged


# state


def test_bases_stay_orthonormal_over_many_refreshes():
    model = net()
    optimizer = soap(model, precondition_frequency=2)
    train(model, optimizer, 200)
    for state in optimizer.state.values():
        for key, q in state.items():
            if key.startswith("basis"):
                assert (q.T @ q - torch.eye(len(q))).abs().max() < 1e-5
    assert {len(s) for s in optimizer.state.values()} == {3, 7}


def test_sides_above_the_limit_and_vectors_are_not_rotated():
    model = nn.Sequential(nn.Linear(6, 8), nn.Conv1d(2, 3, 3))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for options, expected in (
        ({"max_precond_dim": 7}, [{1}, set(), {0, 1, 2}, set()]),
        ({"precondition_1d": True, "max_precond_dim": 7}, [{1}, set(), {0, 1, 2}, {0}]),
        ({"merge_dims": True, "max_precond_dim": 8}, [{0, 1}, set(), {0, 1}, set()]),
    ):
        optimizer = soap(model, **options)
        optimizer.step()
        found = [{int(k[-1]) for k in optimizer.state[p] if k.startswith("basis")} for p in model.parameters()]
        assert found == expected, options
    optimizer = soap(model)
    optimizer.step()
    state = optimizer.state[model[0].weight]
    numbers = sum(x.numel() for x in state.values() if torch.is_tensor(x))
    assert numbers == 2 * 6 * 8 + 2 * 6**2 + 2 * 8**2


def test_a_dimension_of_one_changes_nothing():
    wide, flat_ = nn.Parameter(torch.ones(3, 1, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = SOAP([wide, flat_], lr=1e-2)
    for i in range(5):
        flat_.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(i))
        wide.grad = flat_.grad[:, None].clone()
        optimizer.step()
    torch.testing.assert_close(wide[:, 0].detach(), flat_.detach())


def test_normalised_directions_have_unit_size():
    model = nn.Linear(6, 8, bias=False)
    optimizer = soap(model, normalize_grads=True, lr=1.0)
    for i in range(2):
        before = model.weight.detach().clone()
        model.weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
        optimizer.step()
    # After one counted step the correction is sqrt(1 - 0.95) / (1 - 0.95).
    size = (model.weight - before).square().mean().sqrt()
    assert size.item() == pytest.approx(0.05**-0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise_and_factors_stay_float32(dtype):
    cases.check_resume(lambda m: soap(m, precondition_frequency=3), dtype, 7, 6)
    model = net(dtype)
    optimizer = soap(model)
    train(model, optimizer, 3)
    state = optimizer.state[model[0].weight]
    assert all(state[k].dtype == torch.float32 for k in ("factor_0", "factor_1", "basis_0", "basis_1", "exp_avg"))


def test_resume_in_the_trainer_is_bitwise_for_bfloat16(tmp_path):
    straight = cases.check_trainer_resume("soap", "precondition_frequency=2", tmp_path, torch.bfloat16)
    kinds = {x.dtype for s in straight.optimizer.state.values() for x in s.values() if torch.is_tensor(x)}
    assert kinds == {torch.float32}


def test_gradient_that_is_not_finite_never_enters_a_factor(caplog):
    cases.check_not_finite(lambda m: soap(m, precondition_frequency=1), caplog)
    model = net()
    optimizer = soap(model)
    model(torch.full((1, 6), float("inf"))).sum().backward()
    optimizer.step()
    assert not optimizer.state and torch.equal(flat(model), flat(net()))


# in the library


@pytest.mark.parametrize(
    "given, optim_args, betas",
    [
        ({}, None, (0.95, 0.95)),
        ({"adam_beta1": 0.8}, None, (0.8, 0.95)),
        ({"adam_beta2": 0.99}, "beta1=0.7", (0.7, 0.99)),
        ({"adam_beta1": 0.8}, "beta1=0.9,beta2=0.999", (0.9, 0.999)),
    ],
)
def test_betas_are_the_papers_unless_asked_for(given, optim_args, betas, tmp_path):
    job = run_training(gpt2(), "soap", optim_args, tmp_path, max_steps=1, weight_decay=0.3, **given)
    assert [g["betas"] for g in job.optimizer.param_groups] == [betas] * 2
    assert [g["weight_decay"] for g in job.optimizer.param_groups] == [0.3, 0.0]


def test_the_factors_have_a_beta_of_their_own():
    model = net()
    optimizer = soap(model, shampoo_beta=0.5)
    train(model, optimizer, 1)
    g = model[0].weight.grad
    torch.testing.assert_close(optimizer.state[model[0].weight]["factor_0"], 0.5 * g @ g.T)


def test_accumulation_changes_nothing(tmp_path):
    """With more tokens than a rotated side is long: rounding decides on the basis of a factor's null space."""
    cases.check_accumulation(
        "soap", "precondition_frequency=1,max_precond_dim=64", tmp_path, max_steps=4, data=language_data(20, 32)
    )


def test_lora(tmp_path):
    cases.check_lora("soap", None, tmp_path)


def test_bfloat16_weights():
    cases.check_bfloat16(lambda m: soap(m, precondition_frequency=2))


def test_it_is_a_base_of_sam(tmp_path):
    cases.check_base_of_sam("soap", {"precondition_frequency": 2}, tmp_path)


def test_groups_of_mup_keep_their_rates():
    cases.check_width_groups(
        lambda groups, model: SOAP([{**g, "weight_decay": 0.0} for g in groups], max_precond_dim=64),
        exact=lambda optimizer: False,  # two calls: the first moves nothing
    )


def test_a_copy_of_the_optimizer_goes_on():
    model = net()
    optimizer = soap(model)
    train(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    assert torch.equal(train(model, optimizer, 12, 3), train(twin, other, 12, 3))


def test_bad_options_are_named(tmp_path):
    cases.check_refusals(
        "soap",
        tmp_path,
        [
            ("precondition_frequency=0", "precondition_frequency is 0"),
            ("max_precond_dim=-1", "max_precond_dim is -1"),
            ("beta1=1.0", "beta1 is 1.0 but must be in \\[0, 1\\)"),
            ("precond_frequency=3", "Did you mean 'precondition_frequency'"),
            ("weight_decay=0.1", "Use weight_decay="),
        ],
    )
    with pytest.raises(ValueError, match="shampoo_beta is -1"):
        SOAPConfig(shampoo_beta=-1)
    with pytest.raises(ValueError, match="precondition_frequency is 1.5 but must be int"):
        SOAPConfig(precondition_frequency=1.5)
    for betas in ((0.9,), (0.9, 0.9, 0.9), 0.9, ("x", 0.9), (0.9, 1.0)):
        with pytest.raises(ValueError, match="SOAP: betas is .* but must be two numbers in"):
            soap(net(), betas=betas)
    state = soap(net(), max_precond_dim=7).state_dict()
    with pytest.raises(ValueError, match="saved with max_precond_dim=7"):
        soap(net()).load_state_dict(state)
    assert TrainingArguments(output_dir=str(tmp_path), optim="soap").optim == "soap"
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = SOAP(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse=False"):
        optimizer.step()
