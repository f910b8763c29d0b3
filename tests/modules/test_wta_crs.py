"""WTA-CRS: the estimator against its closed forms, what is kept, the norm cache, and the real Trainer."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from optim_training import flat, gpt2, language_data, run_training
from peft import LoraConfig, get_peft_model
from processes import run_two
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hfext.modules import WTACRSConfig, WTACRSLinear, WTACRSMixin, replace
from hfext.modules.wta_crs import MIXED, choose, kept_rows, probabilities, tails, winner_count


class WTACRSTrainer(WTACRSMixin, Trainer):
    pass


def rows(n=256, d=64, spread=1.5, seed=4, dtype=torch.float64):
    """Activations and gradients whose row norms are spread log-normally: the setting of the card."""
    g = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(n, d, generator=g, dtype=torch.float64)
        * torch.exp(spread * torch.randn(n, 1, generator=g, dtype=torch.float64))
        for _ in range(2)
    ]
    return [x.to(dtype) for x in made]


def ideal(x, g):
    return probabilities(x.norm(dim=1) * g.norm(dim=1))


def variance_of(x, g, p, k, c):
    """E ||dW_hat - dW||^2 with c winners, written out: k - c independent draws from the tail."""
    order = p.argsort(descending=True, stable=True)
    x, g, p = x[order][c:], g[order][c:], p[order]
    tail = 1 - p[:c].sum()
    second = (tail * (x.norm(dim=1) * g.norm(dim=1)) ** 2 / p[c:]).sum()
    return ((second - (g.T @ x).norm() ** 2) / (k - c)).item()


def layer(dense, **options):
    """A replaced layer alone, in training."""
    model = nn.Sequential(dense)
    replace(model, WTACRSLinear(**{"min_rows": 1, **options}))
    return model.train()


def gradients(model, x, g):
    """Of weight, bias and input for the output gradient g."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).backward(g)
    return [model[0].weight.grad.clone(), model[0].bias.grad, x.grad]


# the estimator


def test_p_is_proportional_and_never_0():
    p = probabilities(torch.tensor([3.0, 0.0, 1.0]))
    assert p.sum() == pytest.approx(1, abs=1e-15) and p[1] > 0 and p[0] / p[2] == pytest.approx(3, rel=1e-7)
    assert torch.equal(probabilities(torch.zeros(4)), torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.allclose(probabilities(1e-30 * torch.tensor([3.0, 1.0])), probabilities(torch.tensor([3.0, 1.0])))
    odd = probabilities(torch.tensor([1.0, math.inf, math.nan, 2.0]))
    assert odd.isfinite().all() and odd[1] == odd[2] == odd[3]


@pytest.mark.parametrize(
    "n, ratio, least, k", [(100, 0.3, 10, 30), (20, 0.3, 10, 10), (6, 0.3, 10, 6), (33, 0.1, 1, 3)]
)
def test_rows_that_are_kept(n, ratio, least, k):
    assert kept_rows(n, ratio, least) == k


@pytest.mark.parametrize("k", [5, 26, 77])
def test_the_papers_number_of_winners_by_brute_force(k):
    for seed in range(5):
        p = ideal(*rows(seed=seed)).sort(descending=True).values
        scores = [(1 - p[:c].sum().item()) / (k - c) for c in range(k)]
        assert winner_count(tails(p), k) == min(range(k), key=scores.__getitem__)


@pytest.mark.parametrize("k", [5, 26, 77])
@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5])
def test_the_other_rule_has_the_smallest_bound_of_all_and_the_papers_has_not(k, spread):
    """The bound is the variance without the term of the tail's mean: t^2 Z^2 / (k - c)."""
    for seed in range(5):
        x, g = rows(seed=seed, spread=spread)
        p = ideal(x, g)
        t = tails(p.sort(descending=True).values)
        order = p.argsort(descending=True, stable=True)
        a = (x.norm(dim=1) * g.norm(dim=1))[order]
        bound = [(t[c] * (a[c:] ** 2 / p[order][c:]).sum() / (k - c)).item() for c in range(k)]
        best = winner_count(t, k, "variance")
        assert bound[best] == pytest.approx(min(bound), rel=1e-6)
        assert bound[winner_count(t, k)] >= bound[best] * (1 - 1e-6)
        assert bound[winner_count(t, k)] <= bound[0] * (1 + 1e-6)  # and both beat plain sampling
        assert variance_of(x, g, p, k, best) <= variance_of(x, g, p, k, winner_count(t, k)) * (1 + 1e-6)


@pytest.mark.parametrize(
    "k, winners, golden_plain, golden, bar", [(26, 8, 0.247, 0.066, 0.35), (77, 37, 0.0825, 0.0043, 0.1)]
)
def test_variance_against_plain_column_row_sampling(k, winners, golden_plain, golden, bar):
    """The card's figures are of other draws of the same kind of rows: within 10 %."""
    x, g = rows()
    p = ideal(x, g)
    c = winner_count(tails(p.sort(descending=True).values), k)
    total = (g.T @ x).norm() ** 2
    plain, ours = (variance_of(x, g, p, k, m) / total for m in (0, c))
    assert c == winners and plain == pytest.approx(golden_plain, rel=0.1) and ours == pytest.approx(golden, rel=0.1)
    assert ours <= bar * plain


def drawn(x, g, p, k, count, rule="paper", seed=1):
    """Estimates of dW, [count, out, in]."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        index, scale = choose(p, torch.rand(k, generator=generator, dtype=torch.float64), rule)
        found.append((g[index] * scale[:, None]).T @ x[index])
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["ideal", "activations", "one row has nearly all"])
@pytest.mark.parametrize("rule", ["paper", "variance"])
def test_the_mean_of_draws_is_exact_and_their_variance_the_closed_form(kind, rule):
    """Also with p of the activations alone (an empty cache), and with p(C) so near 1 that the rest rounds to 0."""
    x, g = rows(n=64, d=6, spread=0.7, seed=2)
    if kind == "one row has nearly all":
        x[5] *= 1e9
    p = probabilities(x.norm(dim=1)) if kind == "activations" else ideal(x, g)
    k, exact = 12, g.T @ x
    c = winner_count(tails(p.sort(descending=True).values), k, rule)
    estimates = drawn(x, g, p, k, 4000, rule)
    if kind == "one row has nearly all":
        estimates, exact = estimates - torch.outer(g[5], x[5]), exact - torch.outer(g[5], x[5])
        variance = None
    else:
        variance = variance_of(x, g, p, k, c)
        assert ((estimates - exact) ** 2).sum((1, 2)).mean() == pytest.approx(variance, rel=0.1)
    error = estimates.mean(0) - exact
    deviation = estimates.std(0) / math.sqrt(len(estimates))
    scale = 0 if variance is not None else 1e-7 * x[5].norm() * g[5].norm()  # rounding beside 1e9
    assert (error.abs() <= 5 * deviation + scale).all()


def test_the_tail_is_right_where_1_less_the_winners_is_not():
    p = torch.tensor([1.0, 1e-18, 1e-19], dtype=torch.float64)
    assert 1 - p[:1].sum() == 0 and tails(p)[1].item() == pytest.approx(1.1e-18, rel=1e-12)
    index, scale = choose(p, torch.tensor([0.5, 0.99], dtype=torch.float64))
    assert index.tolist() == [0, 2] and scale[1].item() == pytest.approx(11, rel=1e-9)


def test_winners_come_once_and_draws_may_repeat():
    index, scale = choose(probabilities(torch.tensor([8.0, 4, 1, 1, 1])), torch.full((4,), 0.1, dtype=torch.float64))
    assert index.tolist() == [0, 1, 2, 2] and scale.tolist() == pytest.approx([1, 1, 1.5, 1.5])


# the layer


def dense_layer(kind="linear", dtype=torch.float32, n_in=16, n_out=8):
    torch.manual_seed(3)
    made = nn.Linear(n_in, n_out) if kind == "linear" else Conv1D(n_out, n_in)
    nn.init.normal_(made.bias)
    return made.to(dtype)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4)])
def test_all_rows_give_the_exact_gradients(kind, shape):
    x, g = torch.randn(*shape, 16), torch.randn(*shape, 8)
    expected = gradients(nn.Sequential(dense_layer(kind)), x, g)
    found = gradients(layer(dense_layer(kind), ratio=1.0), x, g)
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("kind, count", [("linear", 4000), ("conv1d", 1000)])
def test_output_and_gradients_of_input_and_bias_are_exact_and_that_of_the_weight_is_on_average(kind, count):
    x, g = torch.randn(4, 10, 16), torch.randn(4, 10, 8)
    dense = nn.Sequential(dense_layer(kind))
    sampled = layer(dense_layer(kind), ratio=0.3, norm_source="activation")
    assert torch.equal(dense(x), sampled(x))
    exact = gradients(dense, x, g)
    draws = []
    for _ in range(count):
        weight, bias, at_x = gradients(sampled, x, g)
        torch.testing.assert_close(at_x, exact[2])
        torch.testing.assert_close(bias, exact[1])
        draws.append(weight)
        sampled[0].sampler.recent.clear()  # as the optimizer's step does
    draws = torch.stack(draws)
    assert ((draws.mean(0) - exact[0]).abs() <= 5 * draws.std(0) / math.sqrt(len(draws))).all()
    assert (draws.mean(0) - exact[0]).norm() <= 2 / math.sqrt(count) * exact[0].norm()


def test_the_layer_uses_what_choose_returns():
    x, g = torch.randn(40, 16), torch.randn(40, 8)
    sampled = layer(dense_layer(), ratio=0.3, norm_source="activation")
    weight = gradients(sampled, x, g)[0]
    sampler = sampled[0].sampler
    sampler.calls = {}
    index, scale = choose(probabilities(x.norm(dim=1)), sampler.uniform("0", 12))
    torch.testing.assert_close(weight, (g[index] * scale[:, None].float()).T @ x[index])


@pytest.mark.parametrize("state", ["eval", "no_grad", "frozen", "few rows"])
def test_nothing_is_sampled_where_it_must_not_be(state):
    x, g = torch.randn(8 if state == "few rows" else 40, 16), torch.randn(8 if state == "few rows" else 40, 8)
    sampled = layer(dense_layer(), ratio=0.3, min_rows=10)
    if state == "eval":
        sampled.eval()
    if state == "frozen":
        sampled[0].weight.requires_grad = False
    with torch.set_grad_enabled(state != "no_grad"):
        y = sampled(x)
    assert "SampledLinear" not in str(y.grad_fn) and torch.equal(y, nn.Sequential(dense_layer())(x))
    if state in ("eval", "few rows"):
        assert torch.equal(gradients(sampled, x, g)[0], gradients(nn.Sequential(dense_layer()), x, g)[0])


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_low_precision(mode):
    x, g = rows(n=64, d=16, spread=0.3, seed=1, dtype=torch.float32)
    g = g[:, :8]
    if mode == "bf16":
        sampled, x, g = layer(dense_layer(dtype=torch.bfloat16), ratio=0.5), x.bfloat16(), g.bfloat16()
        weight = gradients(sampled, x, g)[0]
    else:
        sampled = layer(dense_layer(), ratio=0.5)
        with torch.autocast("cpu", torch.bfloat16):
            y = sampled(x)
            plain = nn.Sequential(dense_layer())(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, plain)
        y.backward(g.bfloat16())
        weight = sampled[0].weight.grad
    assert weight.dtype == (torch.bfloat16 if mode == "bf16" else torch.float32)
    sampler = sampled[0].sampler
    sampler.calls, sampler.norms = {}, {}
    low = x.bfloat16().float()
    index, scale = choose(probabilities(low.norm(dim=1)), sampler.uniform("0", 32))
    expected = (g.float()[index] * scale[:, None].float()).T @ low[index]
    assert (weight.float() - expected).norm() <= 0.01 * expected.norm()


# what is kept


def kept_bytes(model, run):
    """Bytes of all distinct tensors that the graph keeps, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr(), x.storage_offset(), x.shape] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = run()
    total = sum(x.nbytes for x in kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_less_than_two_fifths_of_its_input(dtype):
    x = torch.randn(8, 32, 64, dtype=dtype)
    dense, sampled = nn.Sequential(dense_layer(dtype=dtype, n_in=64)), layer(dense_layer(dtype=dtype, n_in=64))
    full, part = (kept_bytes(model, lambda model=model: model(x).float().sum()) for model in (dense, sampled))
    assert full == x.nbytes
    assert part <= 0.4 * full
    k = int(0.3 * 256)
    assert part == k * (64 * x.element_size() + 4 + 4)  # rows, indices, scales


@pytest.mark.parametrize("share", [True, False])
def test_layers_that_read_the_same_tensor_keep_it_once(share, tiny_llama):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x)

    model, x = Attention(), torch.randn(8, 32, 64)
    full = kept_bytes(model, lambda: model(x).sum())
    replace(model, WTACRSLinear(share_inputs=share))
    part = kept_bytes(model.train(), lambda: model(x).sum())
    assert full == x.nbytes and part <= (0.4 if share else 1.0) * full and (share or part > 0.9 * full)


# draws


def draws_of(model, x, times=3, step=None):
    found = []
    for _ in range(times):
        found.append(gradients(model, x, torch.ones(*x.shape[:-1], 8))[0])
        if step is not None:
            step.step()
    return found


def test_draws_leave_torchs_generator_alone_and_change_with_each_step():
    x = torch.randn(40, 16)
    model = layer(dense_layer(), ratio=0.3, norm_source="activation")
    before = torch.get_rng_state()
    a, b, c = draws_of(model, x, step=torch.optim.SGD(model.parameters(), lr=0.0))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(a, b) and not torch.equal(b, c)
    again = draws_of(layer(dense_layer(), ratio=0.3, norm_source="activation"), x, 1)[0]
    other = draws_of(layer(dense_layer(), ratio=0.3, norm_source="activation", seed=1), x, 1)[0]
    assert torch.equal(a, again) and not torch.equal(a, other)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_draw_anew_after_each_step_too(twin):
    x = torch.randn(40, 16)
    model = layer(dense_layer(), ratio=0.3, norm_source="activation")
    draws_of(model, x, 2)
    model = twin(model)
    first = draws_of(model, x, 2)
    found = draws_of(model, x, 4, torch.optim.SGD(model.parameters(), lr=0.0))
    assert torch.equal(*first) and torch.equal(first[0], found[0])
    assert len({weight.numpy().tobytes() for weight in found}) == 4


class Two(nn.Module):
    """Two layers that read the same tensor; `change` is called in between."""

    def __init__(self, change=lambda x: None, **options):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.change = nn.Linear(16, 8), nn.Linear(16, 8), change
        self.train()
        self.sampler = replace(self, WTACRSLinear(**{"min_rows": 1, **options})).modules["a"].sampler

    def forward(self, x, attention_mask=None):
        first = self.a(x)
        self.change(x)
        return torch.stack([first, self.b(x)])


def test_each_layer_draws_for_itself():
    model = Two(ratio=0.3, norm_source="activation", share_inputs=False)
    model(torch.randn(40, 16)).backward(torch.randn(40, 8).expand(2, 40, 8))
    assert not torch.equal(model.a.weight.grad, model.b.weight.grad)


def test_an_input_that_was_changed_in_place_is_not_taken_for_the_same():
    """One row is left of it: a winner, so the gradient is exact."""
    x, g = torch.randn(40, 16), torch.randn(2, 40, 8)
    model = Two(lambda x: x[1:].zero_(), ratio=0.3)
    model(x).backward(g)
    torch.testing.assert_close(model.b.weight.grad, torch.outer(g[1, 0], x[0]))


def test_a_batch_that_is_repeated_before_the_step_draws_the_same_rows():
    x = torch.randn(40, 16)
    model = layer(dense_layer(), ratio=0.3, norm_source="activation")
    a, b, c = draws_of(model, x)
    assert torch.equal(a, b) and torch.equal(b, c)
    torch.rand(1)  # with other noise it is no repetition
    assert not torch.equal(a, draws_of(model, x, 1)[0])


def test_the_second_pass_of_sam_draws_the_same_rows(tmp_path):
    """Through the Trainer, with dropout: two passes of each update, the same rows in each layer and micro-batch."""
    model = gpt2(dropout=0.1)
    done = replace(model, WTACRSLinear(ratio=0.4, norm_source="activation"))
    seen = []
    sampler = next(iter(done.modules.values())).sampler
    uniform = sampler.uniform
    sampler.uniform = lambda name, count: seen.append((name, uniform(name, count))) or seen[-1][1]
    run_training(
        model,
        "sam",
        "rho=0.05,base=sgd,same_rng=true",
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    layers = len({name for name, _ in seen})
    passes = [seen[i : i + layers] for i in range(0, len(seen), layers)]
    assert len(passes) == 2 * 2 * 2
    for update in (passes[:4], passes[4:]):
        for first, second in ((update[0], update[2]), (update[1], update[3])):
            assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
        assert not torch.equal(update[0][0][1], update[1][0][1])
    assert not torch.equal(passes[0][0][1], passes[4][0][1])


def test_dropout_is_that_of_the_dense_model(tmp_path):
    """With all rows kept, training with dropout is the dense model's bit for bit."""
    plain, sampled = gpt2(dropout=0.1), gpt2(dropout=0.1)
    replace(sampled, WTACRSLinear(ratio=1.0))
    first = run_training(plain, "adamw_torch", None, tmp_path)
    second = run_training(sampled, "adamw_torch", None, tmp_path)
    assert torch.equal(flat(first.model), flat(second.model))


# the cache


def test_the_cache_holds_the_norms_of_each_examples_rows_and_is_used(tiny_gpt2):
    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    done = replace(model, WTACRSLinear(ratio=0.4), target_modules=[r"h.1.mlp.c_proj"])
    (name, module), sampler = next(iter(done.modules.items())), next(iter(done.modules.values())).sampler
    ids = torch.randint(3, 128, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, 9:] = 0, 0
    seen = []
    hook = module.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].detach()))
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    hook.remove()
    cache = sampler.norms[name]
    assert len(cache) == 3 and sorted(map(len, cache.values())) == [9, 10, 13] and sampler.nbytes() == 2 * 32
    for i, key in enumerate(sampler.examples):
        expected = seen[0][i][mask[i].bool()].norm(dim=1)
        torch.testing.assert_close(cache[key][:-1].float(), expected, rtol=0.01, atol=1e-9)
    # The same examples in another order, with padding on the other side and wider.
    wide = torch.zeros(2, 15, dtype=torch.long)
    keep = torch.zeros(2, 15, dtype=torch.long)
    wide[0, 3:11], keep[0, 3:11] = ids[1, 4:], 1
    wide[1, :9], keep[1, :9] = ids[2, :9], 1
    sampler.begin(model, (), {"input_ids": wide, "attention_mask": keep})
    norms = sampler.known_norms(name, torch.Size((2, 15, 8))).view(2, 15)
    torch.testing.assert_close(norms[0, 3:11], seen[0][1, 4:].norm(dim=1), rtol=0.01, atol=1e-9)
    torch.testing.assert_close(norms[1, :9], seen[0][2, :9].norm(dim=1), rtol=0.01, atol=1e-9)
    # A new example beside a known one gets the mean, and alone nothing is known.
    both = torch.stack([ids[0], ids[0] + 1]).clamp(max=127)
    sampler.begin(model, (), {"input_ids": both})
    norms = sampler.known_norms(name, torch.Size((2, 12, 8))).view(2, 12)
    torch.testing.assert_close(norms[1], norms[0].mean().expand(12))
    sampler.begin(model, (), {"input_ids": both[1:]})
    assert sampler.known_norms(name, torch.Size((1, 12, 8))) is None
    sampler.begin(model, (), {"input_ids": both})
    assert sampler.known_norms(name, torch.Size((24, 8))) is None  # rows that belong to no example


def test_padding_has_the_mean_norm_of_its_own_gradient():
    x, g = torch.randn(2, 6, 16), torch.randn(2, 2, 6, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    g[:, mask == 0] *= 10
    model = Two(ratio=0.5)
    model(x, attention_mask=mask).backward(g)
    norms = g.square().sum((0, -1)).sqrt()
    expected = norms.clone()
    for row, keep in zip(expected, mask.bool(), strict=True):
        row[~keep] = row[~keep].mean()
    found = model.sampler.known_norms("a", x.shape)
    torch.testing.assert_close(found, expected.flatten(), rtol=0.01, atol=0)


def test_rows_that_had_no_gradient_when_seen_last_are_drawn_with_bounded_weights():
    """An example is known by its contents, not by its label: its old norms may say nothing of its new gradient."""
    x, g = torch.randn(40, 16), torch.randn(40, 8)
    model = layer(dense_layer(), ratio=0.3)
    batch, output = x.view(2, 20, 16), g.view(2, 20, 8)
    gradients(model, batch, output * torch.tensor([1.0, 0.0])[:, None, None])
    sampler = model[0].sampler
    cached = dict(sampler.norms["0"])
    draws, scales = [], []
    for _ in range(1500):
        sampler.norms["0"] = dict(cached)
        sampler.recent.clear()
        model.zero_grad()
        y = model(batch)
        scales.append(y.grad_fn.next_functions[0][0].saved_tensors[3].max().item())
        y.backward(output)
        draws.append(model[0].weight.grad.clone())
    draws, exact = torch.stack(draws), g.T @ x
    error, deviation = draws.mean(0) - exact, draws.std(0) / math.sqrt(len(draws))
    assert (error.abs() <= 5 * deviation).all() and error.norm() <= 1.5 * deviation.norm()
    assert deviation.norm() <= 0.4 * exact.norm()
    norms = x.norm(dim=1)
    assert 100 < max(scales) <= norms.sum() / norms.min() / MIXED


def test_known_norms_lower_the_variance():
    """The same batch again and again at fixed weights: with the cache, draws are from the ideal p."""
    x, g = rows(n=64, d=16, spread=1.0, seed=0, dtype=torch.float32)
    g = g[:, :8]
    exact = g.T @ x
    spread = {}
    for source in ("activation", "cache"):
        model = layer(dense_layer(), ratio=0.25, norm_source=source)
        found = []
        for _ in range(300):
            found.append(gradients(model, x[:, None], g[:, None])[0])
            model[0].sampler.recent.clear()
        spread[source] = ((torch.stack(found[1:]) - exact) ** 2).sum((1, 2)).mean().item()
    p = {"activation": probabilities(x.norm(dim=1)), "cache": ideal(x, g)}
    for source, probability in p.items():
        c = winner_count(tails(probability.sort(descending=True).values), 16)
        closed = variance_of(x.double(), g.double(), probability, 16, c)
        assert spread[source] == pytest.approx(closed, rel=0.2)
    assert spread["cache"] < 0.7 * spread["activation"]


def test_shared_layers_cache_the_norm_of_their_joint_gradient():
    model, x, g = Two(ratio=0.5), torch.randn(20, 2, 16), torch.randn(2, 20, 2, 8)
    model(x).backward(g)
    norms = model.sampler.norms
    assert list(norms) == ["a"]
    found = torch.stack([norms["a"][key][:-1] for key in model.sampler.examples]).float()
    torch.testing.assert_close(found, g.square().sum((0, -1)).sqrt(), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny_bert_classifier", "tiny_t5"])
def test_other_models_train_with_exact_outputs_and_cached_norms(kind, request):
    """A pooled row for each example, and a decoder with another length than the input."""
    model = request.getfixturevalue(kind)(**({"dropout_rate": 0.0} if kind == "tiny_t5" else {}))
    torch.manual_seed(0)
    ids = torch.randint(3, 128, (6, 12))
    mask = (torch.arange(12) < torch.tensor([12, 5, 12, 7, 12, 9])[:, None]).long()
    labels = torch.arange(6) % 4 if kind == "tiny_bert_classifier" else torch.randint(3, 128, (6, 8))
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    exact = model(**batch).loss
    exact.backward()
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    done = replace(model, WTACRSLinear(ratio=0.5))
    sampler = next(iter(done.modules.values())).sampler
    for _ in range(2):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        sampler.recent.clear()
    assert torch.equal(loss, exact)
    found = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == norms.keys() and all(found[name] < 3 * norms[name] + 1e-6 for name in norms)
    lengths = {len(x) for cache in sampler.norms.values() for x in cache.values()}
    # Tokens of the input or rows of the decoder, and one more for the padding; a pooled row is kept whole.
    assert lengths == ({6, 8, 10, 13} if kind == "tiny_bert_classifier" else {6, 8, 9, 10, 13})


@pytest.mark.parametrize("source", ["cache", "activation"])
def test_gradients_of_a_classifier_are_unbiased(source, tiny_bert_classifier):
    """Padding, a pooler and a head with few rows, gradients of 0 beside the first token of the last layer."""
    model = tiny_bert_classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    torch.manual_seed(0)
    lengths = torch.tensor([12, 5, 12, 7, 12, 9, 3, 12])
    batch = {"input_ids": torch.randint(3, 128, (8, 12)), "labels": torch.arange(8) % 4}
    batch["attention_mask"] = (torch.arange(12) < lengths[:, None]).long()

    def gradient():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    exact = gradient()
    with replace(model, WTACRSLinear(ratio=0.4, min_rows=1, norm_source=source)) as done:
        sampler = next(iter(done.modules.values())).sampler
        gradient()
        draws = []
        for _ in range(120):
            sampler.recent.clear()
            draws.append(gradient())
        sampled = {f"{name}.weight" for name in done.modules}
    for name, expected in exact.items():
        found = torch.stack([draw[name] for draw in draws])
        if name in sampled:
            error, deviation = (found.mean(0) - expected).norm(), (found.std(0) / math.sqrt(len(found))).norm()
            assert error <= 1.8 * deviation + 1e-7, name
        else:
            torch.testing.assert_close(found[-1], expected)


# the Trainer


def trained(folder, model=None, trainer=WTACRSTrainer, resume=None, options=None, optim="adamw_torch", **settings):
    model = model or gpt2(dropout=0.1)
    replace(model, WTACRSLinear(**{"ratio": 0.4, **(options or {})}))
    settings = {"max_steps": 6, "learning_rate": 1e-2, **settings}
    return run_training(model, optim, None, folder, trainer=trainer, resume=resume, **settings)


def test_resume_is_bitwise(tmp_path):
    """In the second epoch, with dropout: draws go on and the norms of the first epoch are there."""
    settings = dict(save_strategy="steps", save_steps=3, per_device_train_batch_size=8)
    straight = trained(tmp_path / "a", **settings)
    resumed = trained(tmp_path / "b", resume=str(tmp_path / "a/checkpoint-3"), **settings)
    assert torch.equal(flat(straight.model), flat(resumed.model))
    one, two = (job._samplers()[0] for job in (straight, resumed))
    assert one.counter == two.counter == 6 and one.nbytes() == two.nbytes() > 0
    for name, cache in one.norms.items():
        assert all(torch.equal(x, two.norms[name][key]) for key, x in cache.items())


def test_accumulation_with_all_rows_is_exact(tmp_path):
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    exact = trained(tmp_path, gpt2(), options={"ratio": 1.0}, **settings)
    plain = run_training(gpt2(), "adamw_torch", None, tmp_path, max_steps=6, learning_rate=1e-2, **settings)
    assert torch.equal(flat(exact.model), flat(plain.model))
    sampled = trained(tmp_path, gpt2(), options={"ratio": 0.4, "min_rows": 1}, **settings)
    assert sampled._samplers()[0].counter == 12  # draws of its own for each micro-batch


def test_accumulated_gradients_are_unbiased():
    """A model with all its layers sampled, two micro-batches, norms from the passes before."""
    batches = torch.stack([row["input_ids"] for row in language_data(8)]).split(4)
    weights = [f"transformer.h.{i}.{name}.weight" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_proj")]

    def gradient(model):
        model.zero_grad()
        for ids in batches:
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        return torch.cat([model.get_parameter(name).grad.flatten() for name in weights])

    exact = gradient(gpt2().train())
    model = gpt2().train()
    sampler = next(iter(replace(model, WTACRSLinear(ratio=0.3, min_rows=1)).modules.values())).sampler
    draws = []
    for _ in range(100):
        draws.append(gradient(model))
        sampler.recent.clear()
    draws = torch.stack(draws)
    error, deviation = draws.mean(0) - exact, draws.std(0) / math.sqrt(len(draws))
    assert error.norm().item() == pytest.approx(deviation.norm().item(), rel=0.15)
    assert deviation.norm() < 0.2 * exact.norm()


def test_evaluation_is_exact_and_counts_nothing(tmp_path):
    job = trained(tmp_path)
    counter = job._samplers()[0].counter
    dense = gpt2(dropout=0.1)
    dense.load_state_dict(job.model.state_dict())
    other = run_training(dense, "adamw_torch", None, tmp_path, max_steps=1, learning_rate=0.0)
    assert job.evaluate(language_data(8))["eval_loss"] == other.evaluate(language_data(8))["eval_loss"]
    assert job._samplers()[0].counter == counter


def lora(tiny_llama):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(), config)


def test_lora_trains_and_its_base_is_never_sampled(tmp_path, tiny_llama):
    exact, plain, sampled = (
        run_training(prepare(lora(tiny_llama)), "adamw_torch", None, tmp_path, learning_rate=1e-2)
        for prepare in (
            lambda m: replace(m, WTACRSLinear(ratio=1.0)).model,
            lambda m: m,
            lambda m: replace(m, WTACRSLinear(ratio=0.4)).model,
        )
    )
    assert torch.equal(flat(exact.model), flat(plain.model))
    assert not torch.equal(flat(sampled.model), flat(plain.model))
    sampler = next(m.sampler for m in sampled.model.modules() if isinstance(m, WTACRSLinear))
    assert sampler.norms and all("lora_" in name for name in sampler.norms)


def test_bf16_training_keeps_dtypes(tmp_path):
    job = trained(tmp_path, gpt2(dtype=torch.bfloat16))
    assert {p.dtype for p in job.model.parameters()} == {torch.bfloat16} and flat(job.model).isfinite().all()


TWO_PROCESSES = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_wta_crs import *
settings = dict(ddp_backend="gloo", data=language_data(32), per_device_train_batch_size=4)
exact = trained({folder!r} + "/exact", gpt2(), options={{"ratio": 1.0}}, optim="sgd", **settings)
kwargs = dict(save_strategy="steps", save_steps=5, **settings)
one = trained({folder!r} + "/one", **kwargs)
two = trained({folder!r} + "/two", resume={folder!r} + "/one/checkpoint-5", **kwargs)
gathered = [torch.empty_like(flat(one.model)) for _ in range(2)]
torch.distributed.all_gather(gathered, flat(one.model))
assert torch.equal(*gathered) and torch.equal(flat(one.model), flat(two.model))
draws = [torch.empty(4, dtype=torch.float64) for _ in range(2)]
torch.distributed.all_gather(draws, one._samplers()[0].uniform("x", 4))
assert not torch.equal(*draws)
if exact.is_world_process_zero():
    torch.save(flat(exact.model), {folder!r} + "/exact.pt")
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes(tmp_path):
    """Exact with all rows; sampled, both end alike, resume bit for bit, and draw other rows for other examples."""
    run_two(TWO_PROCESSES.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    options = dict(data=language_data(32), per_device_train_batch_size=8)
    one = trained(tmp_path, gpt2(), options={"ratio": 1.0}, optim="sgd", **options)
    torch.testing.assert_close(torch.load(tmp_path / "exact.pt"), flat(one.model), rtol=0, atol=1e-6)


def test_gradient_checkpointing_is_warned_about(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("hfext.modules.wta_crs.logger.warning_once", seen.append)
    trained(tmp_path, max_steps=1)
    assert not seen
    trained(tmp_path, max_steps=1, gradient_checkpointing=True)
    assert seen and "saves nothing" in seen[0]


# bad input


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("ratio", 0.0, r"ratio is 0.0 but must be in \(0, 1\]"),
        ("ratio", 1.5, "ratio is 1.5"),
        ("ratio", "a", "ratio is 'a' but must be float"),
        ("min_rows", "a", "min_rows is 'a' but must be an integer"),
        ("min_rows", 0, "min_rows is 0 but must be an integer >= 1"),
        ("seed", -1, "seed is -1 but must be an integer >= 0"),
        ("norm_source", "index", "norm_source is 'index' but must be one of cache, activation"),
        ("winners", "all", "winners is 'all' but must be one of paper, variance"),
    ],
)
def test_bad_options_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        WTACRSLinear(**{field: value})
    assert (WTACRSConfig().ratio, WTACRSConfig().min_rows) == (0.3, 10)


def test_a_damaged_cache_is_refused(tmp_path):
    sampler = WTACRSLinear().sampler
    save_file({"norms": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="was not saved by a sampler"):
        sampler.load(str(tmp_path / "a.safetensors"))
    tensors = {
        "norms": torch.zeros(3),
        "lengths": torch.tensor([2]),
        "layers": torch.zeros(1),
        "keys": torch.zeros(1, 8),
    }
    save_file(tensors, tmp_path / "b.safetensors", metadata={"sampler": '{"seed": 0, "counter": 1, "layers": ["x"]}'})
    with pytest.raises(ValueError, match="its parts have different lengths"):
        sampler.load(str(tmp_path / "b.safetensors"))


def test_two_replacements_of_one_model_are_refused_before_training(tmp_path):
    model = gpt2()
    for targets in (["c_fc"], ["c_attn"]):
        replace(model, WTACRSLinear(), target_modules=targets)
    with pytest.raises(NotImplementedError, match="replace all layers in one call"):
        WTACRSTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True))


def test_a_resume_without_the_file_says_so(tmp_path, monkeypatch):
    seen = []
    settings = dict(save_strategy="steps", save_steps=2, max_steps=3)
    trained(tmp_path / "a", trainer=Trainer, **settings)
    monkeypatch.setattr("hfext.modules.wta_crs.logger.warning", seen.append)
    trained(tmp_path / "b", resume=str(tmp_path / "a/checkpoint-2"), **settings)
    assert len(seen) == 1 and "begin anew" in seen[0]
