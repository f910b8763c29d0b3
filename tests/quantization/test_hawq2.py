"""HAWQ-V2: traces against explicit Hessians, the variance of the estimator, and what is made of them."""

import itertools
import logging

import numpy as np
import pytest
import torch
from torch.func import functional_call, hessian

from hfext.quantization._allocation import allocate
from hfext.quantization._modules import quantizable
from hfext.quantization._sensitivity import Layer, layers_of, measuring, quantizer
from hfext.quantization.hawq2 import (
    HAWQ2Config,
    Traces,
    activation_traces,
    hessian_traces,
    hutchinson,
    omega,
    sensitivities,
    stops_at,
)

IDS = torch.randint(3, 20, (3, 6), generator=torch.Generator().manual_seed(0))
SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}


def symmetric(n, seed=0):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a + a.T


def quadratic(s, w):
    return lambda: 0.5 * w @ s @ w


def test_the_mean_is_the_trace_and_the_variance_is_exact():
    s = symmetric(7)
    w = torch.randn(7, dtype=torch.float64, requires_grad=True)
    samples = hutchinson([quadratic(s, w)], [w], max_draws=3000, tolerance=0.0, at_once=3000)[:, 0]
    variance = 2 * (s.square().sum() - s.diagonal().square().sum())
    assert abs(samples.mean() - s.trace()) < 4 * (variance / 3000).sqrt()
    assert samples.var().item() == pytest.approx(variance.item(), rel=0.08)
    # All 2^7 signs: every draw is one of the values that v^T S v can have.
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=7)), dtype=torch.float64)
    values = ((signs @ s) * signs).sum(1)
    assert values.var(correction=0).item() == pytest.approx(variance.item())
    assert (samples[:50, None] - values).abs().min(1).values.max() < 1e-12


def test_a_diagonal_is_exact_in_one_draw_and_drawing_stops_at_once():
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    d = torch.arange(1.0, 6.0, dtype=torch.float64)
    samples = hutchinson([quadratic(torch.diag(d), w)], [w])
    assert torch.equal(samples, torch.full((10, 1), 15.0, dtype=torch.float64))


def test_blocks_of_a_joint_draw_have_the_traces_of_their_own():
    s = symmetric(9, seed=1)
    w = torch.randn(9, dtype=torch.float64)
    a, b = w[:4].clone().requires_grad_(), w[4:].clone().requires_grad_()

    def loss():
        return quadratic(s, torch.cat([a, b]))()

    joint = hutchinson([loss], [a, b], 800, tolerance=0.0, at_once=800)
    single = hutchinson([loss], [a, b], 800, tolerance=0.0, joint=False, at_once=800)
    for i, block in enumerate((s[:4, :4], s[4:, 4:])):
        for samples in (joint, single):
            assert abs(samples[:, i].mean() - block.trace()) < 4 * samples[:, i].std() / 800**0.5
        exact = 2 * (block.square().sum() - block.diagonal().square().sum())
        assert single[:, i].var().item() == pytest.approx(exact.item(), rel=0.25)
    assert (joint.var(0) > single.var(0)).all()


def test_parts_of_a_loss_add_up_under_the_same_draws():
    s, t = symmetric(5, 2), symmetric(5, 3)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    parts = hutchinson([quadratic(s, w), quadratic(t, w)], [w], 25, tolerance=0.0, at_once=7)
    whole = hutchinson([quadratic(s + t, w)], [w], 25, tolerance=0.0)
    torch.testing.assert_close(parts, whole)
    other = hutchinson([quadratic(s + t, w)], [w], 25, tolerance=0.0, seed=1)
    assert not torch.equal(whole, other)


def test_the_stop_rule_is_that_of_the_running_mean():
    torch.manual_seed(0)
    samples = 5 + torch.randn(200, 2, dtype=torch.float64)

    def slow(tolerance, least):
        for k in range(least, len(samples) + 1):
            now, before = samples[:k].mean(0), samples[: k - 1].mean(0)
            if ((now - before).abs() / (before.abs() + 1e-6) < tolerance).all():
                return k
        return None

    for tolerance, least in itertools.product((1e-2, 3e-3, 1e-3, 1e-6), (2, 10, 50)):
        assert stops_at(samples, tolerance, least) == slow(tolerance, least)
    assert stops_at(samples, 1e-2, 10) >= 10 and stops_at(samples, 1e-9, 10) is None


@pytest.mark.parametrize("joint", [True, False])
def test_softmax_regression_within_two_percent_of_the_explicit_hessian(joint):
    """180 parameters in two layers that multiply, 300 draws."""
    torch.manual_seed(0)
    x, labels = torch.randn(64, 12, dtype=torch.float64), torch.randint(0, 5, (64,))
    first = (0.3 * torch.randn(12, 10, dtype=torch.float64)).requires_grad_()
    second = (0.3 * torch.randn(10, 6, dtype=torch.float64)).requires_grad_()

    def loss(a, b):
        return torch.nn.functional.cross_entropy((x @ a) @ b, labels)

    blocks = hessian(loss, argnums=(0, 1))(first, second)
    exact = [blocks[i][i].reshape(w.numel(), w.numel()).trace().item() for i, w in enumerate((first, second))]
    samples = hutchinson([lambda: loss(first, second)], [first, second], 300, tolerance=0.0, joint=joint, at_once=300)
    error = samples.std(0) / 300**0.5
    for i in (0, 1):
        assert samples[:, i].mean().item() == pytest.approx(exact[i], rel=0.02)
        assert abs(samples[:, i].mean().item() - exact[i]) < 3 * error[i]


def explicit(model, *names):
    """The Hessian of the token loss by one weight of a language model, which stands under `names`."""
    weight = model.get_parameter(names[0])

    def loss(w):
        logits = functional_call(model, dict.fromkeys(names, w), (IDS,), {"use_cache": False}).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())

    with measuring(model):
        return hessian(loss)(weight.detach()).reshape(weight.numel(), weight.numel())


def spread(matrix, draws):
    """Standard deviation of the mean of v^T H v over so many draws."""
    return (2 * (matrix.square().sum() - matrix.diagonal().square().sum()) / draws).sqrt().item()


def test_the_layers_of_a_language_model_have_their_hessians_traces(tiny_llama):
    model = tiny_llama(**SMALL).double()
    every = layers_of(quantizable(model))
    layers = [every[i] for i in (0, 5, 10, 13)]
    traces = hessian_traces(model, layers, [IDS], HAWQ2Config(max_draws=150, tolerance=0.0))
    assert traces.draws == 150 and traces.size == {layer.name: layer.size for layer in layers}
    for layer in layers:
        exact = explicit(model, f"{layer.name}.weight")
        assert abs(traces.trace[layer.name] - exact.trace()) < 3.5 * traces.error[layer.name], layer.name
        assert traces.error[layer.name] > 0.8 * spread(exact, 150)
    own = hessian_traces(model, layers[3:], [IDS[:1], IDS[1:]], HAWQ2Config(max_draws=150, tolerance=0.0, joint=False))
    assert abs(own.trace[layer.name] - exact.trace()) < 3 * spread(exact, 150)
    assert own.error[layer.name] == pytest.approx(spread(exact, 150), rel=0.2)
    assert own.average[layer.name] == own.trace[layer.name] / layer.size


def test_batches_and_the_kind_of_attention_change_nothing(tiny_llama):
    config = HAWQ2Config(max_draws=3, tolerance=0.0)
    rows = []
    for attention, batches in (("sdpa", [IDS]), ("eager", list(IDS[:, None])), ("sdpa", [IDS[:2], IDS[2:]])):
        model = tiny_llama(**SMALL, attn_implementation=attention)
        rows.append(hessian_traces(model, layers_of(quantizable(model)), batches, config))
        assert model.config._attn_implementation == attention
    for other in rows[1:]:
        assert other.trace == pytest.approx(rows[0].trace, rel=1e-3, abs=1e-5)


def test_a_shared_weight_has_the_trace_of_both_its_uses(tiny_llama):
    model = tiny_llama(**SMALL).double()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    layers = [layer for layer in layers_of(quantizable(model)) if "up_proj" in layer.name]
    assert [layer.names for layer in layers] == [("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")]
    traces = hessian_traces(model, layers, [IDS], HAWQ2Config(max_draws=150, tolerance=0.0))
    exact = explicit(model, *(f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)))
    assert abs(traces.trace[layers[0].name] - exact.trace()) < 3 * spread(exact, 150)


def test_activation_traces_are_those_of_a_rows_inputs(tiny_llama):
    model = tiny_llama(**SMALL).double()
    layers = [layer for layer in layers_of(quantizable(model)) if "layers.0.mlp.up" in layer.name]
    layers += [layer for layer in layers_of(quantizable(model)) if "layers.1.self_attn.o" in layer.name]
    traces = activation_traces(
        model, layers, list(IDS[:2, None]), HAWQ2Config(max_draws=100, tolerance=0.0, joint=False)
    )
    assert list(traces.size.values()) == [6 * 8, 6 * 8]
    exact = {}
    for layer in layers:
        found = []
        for row in IDS[:2, None]:
            entered = []
            handle = layer.module.register_forward_pre_hook(lambda m, args, kept=entered: kept.append(args[0]))
            model(row)
            handle.remove()

            def loss(x, row=row, layer=layer):
                handle = layer.module.register_forward_pre_hook(lambda m, args: (x,))
                try:
                    logits = model(row, use_cache=False).logits[0, :-1]
                finally:
                    handle.remove()
                return torch.nn.functional.cross_entropy(logits, row[0, 1:])

            with measuring(model):
                found.append(hessian(loss)(entered[0].detach()).reshape(48, 48))
        exact[layer.name] = (found[0] + found[1]) / 2
    for name, matrix in exact.items():
        # The rows see the same v, so that the mean is that of the mean matrix.
        assert abs(traces.trace[name] - matrix.trace()) < 3 * spread(matrix, 100)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_omega_is_the_exact_rise_of_an_isotropic_quadratic():
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    part = torch.nn.Linear(16, 4, bias=False)
    part.weight.data = weight
    layer, of = Layer(("w",), part, 64), quantizer(None, 8)
    change = of(layer, 3) - weight
    rise = 0.5 * 7.0 * change.square().sum().item()
    assert omega(7.0 * 64, 64, change.square().sum().item()) == pytest.approx(rise)
    assert torch.equal(of(layer, 16), weight)


def test_negative_traces_count_as_zero_and_are_reported(caplog):
    traces = Traces({"a": -2.0, "b": 3.0}, {"a": 0.1, "b": 0.1}, {"a": 4, "b": 6}, 10)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        found = sensitivities(traces, {"a": {2: 8.0, 4: 1.0}, "b": {2: 8.0, 4: 1.0}})
    finally:
        logger.removeHandler(caplog.handler)
    assert found == {"a": {2: 0.0, 4: 0.0}, "b": {2: 2.0, 4: 0.25}}
    assert "'a'" in caplog.text and "'b'" not in caplog.text


def test_monotone_bits_follow_the_average_trace_and_are_the_best_that_do(tiny_llama):
    model, options = tiny_llama(), {"group_size": 16, "max_draws": 3, "bits": (2, 4)}
    data = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(1))
    free = allocate(model, data, "hawq2", 2.8, **options)
    found = allocate(model, data, "hawq2", 2.8, monotone=True, **options)
    traces = hessian_traces(model, layers_of(quantizable(model)), list(data[:, None]), HAWQ2Config(max_draws=3))
    order = sorted(found, key=lambda name: -traces.average[name])
    assert all(found[a] >= found[b] for a, b in itertools.pairwise(order))
    assert found.objective >= free.objective and found.sensitivities == free.sensitivities
    losses = np.array([[found.sensitivities[n][b] for b in (2, 4)] for n in order])
    sizes = np.array([found.sizes[n] for n in order])
    best = np.inf
    for more in range(len(order) + 1):
        bits = np.array([4] * more + [2] * (len(order) - more))
        if (bits * sizes).sum() <= 2.8 * sizes.sum():
            best = min(best, losses[:more, 1].sum() + losses[more:, 0].sum())
    assert found.objective == pytest.approx(best)


def test_without_weights_that_can_require_grad_there_is_an_error(tiny_llama):
    model = tiny_llama(**SMALL)
    with pytest.raises(ValueError, match="no layer to measure"):
        hessian_traces(model, [], [IDS])
    with torch.inference_mode():
        frozen = tiny_llama(**SMALL)
    with pytest.raises(ValueError, match="inference_mode"):
        hessian_traces(frozen, layers_of(quantizable(frozen)), [IDS])
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.inference_mode():
        traces = hessian_traces(model, layers_of(quantizable(model)), [IDS.clone()], HAWQ2Config(max_draws=2))
    assert any(traces.trace.values()) and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("field", "value"), [("max_draws", 0), ("min_draws", 1), ("tolerance", -1e-3), ("tolerance", 1.0), ("seed", -1)]
)
def test_bad_options_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        HAWQ2Config(**{field: value})
