"""AdaQuant: its gradients by finite differences, its guard, what it can and what it must not change."""

import copy

import pytest
import torch
from quantization_cases import data, llama
from torch import nn

from hfext.quantization import AdaQuantConfig, QuantLinear, RTNConfig, quantize, quantized_layers
from hfext.quantization._affine import Grid, round_to_nearest
from hfext.quantization.adaquant import adaquant, perturbed, surrogate


def problem(rows=24, columns=32, tokens=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    # Inputs of language models: correlated, and some far larger than the others.
    mixing = torch.randn(columns // 4, columns, generator=g) * torch.randn(columns, generator=g).mul(1.5).exp()
    mixing = torch.cat([mixing, 0.1 * torch.eye(columns)])
    return torch.randn(rows, columns, generator=g), torch.randn(tokens, len(mixing), generator=g) @ mixing


def held_surrogate(values, scales, zeros, at, bits):
    """W' with the distance to the next code, and what is clamped, as they are at `at`: what straight-through means."""

    def u_of(v, s, z):
        return (v.unflatten(1, (s.shape[1], -1)) - z[..., None]) / s[..., None]

    u0 = u_of(*at)
    near = (u0 + 0.5).floor()
    q = near.clamp(0, 2**bits - 1)
    u = u_of(values, scales, zeros)
    codes = torch.where(near == q, u + (q - u0), q)
    return (codes * scales[..., None] + zeros[..., None]).flatten(1)


@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_are_those_of_finite_differences(bits):
    g = torch.Generator().manual_seed(1)
    weight, x = (part.double() for part in problem(6, 16, 40))
    y = x @ weight.T
    _, scales, zeros = round_to_nearest(weight, bits, 8)
    scales, zeros = scales * 0.7, zeros * 0.6  # some weights are outside
    at = [weight, scales, zeros]
    rounded, slopes_of = surrogate(weight, Grid(scales, zeros), bits)
    torch.testing.assert_close(rounded, held_surrogate(*at, at, bits), atol=1e-12, rtol=0)
    codes = ((rounded - zeros.repeat_interleave(8, 1)) / scales.repeat_interleave(8, 1)).round()
    assert (codes == 0).any() and (codes == 2**bits - 1).any()
    slopes = slopes_of(2 * (x @ rounded.T - y).T @ x / y.numel())
    step = 1e-6
    for i, slope in enumerate(slopes):
        for _ in range(6):
            ways = torch.randn(slope.shape, generator=g, dtype=torch.double)
            losses = []
            for sign in (1, -1):
                moved = [t + sign * step * ways if j == i else t for j, t in enumerate(at)]
                losses.append((x @ held_surrogate(*moved, at, bits).T - y).square().mean())
            numeric = float(losses[0] - losses[1]) / (2 * step)
            assert float((slope * ways).sum()) == pytest.approx(numeric, rel=1e-6, abs=1e-9)


def test_the_perturbation_is_in_steps_of_its_group():
    weight, v, unit = torch.ones(2, 4), torch.ones(2, 4), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert perturbed(weight, v, unit).tolist() == [[2, 2, 3, 3], [4, 4, 5, 5]]


def test_no_iterations_are_rounding_to_nearest():
    weight, x = problem()
    tuned = adaquant(weight, x, 3, 16, iterations=0, clip_search=False)
    plain = round_to_nearest(weight, 3, 16)
    assert torch.equal(tuned.quantized.scales, plain.scales.half().float())
    assert (tuned.quantized.codes != plain.codes).float().mean() < 0.01
    assert tuned.before == tuned.after
    d = tuned.quantized.dequantize() - weight
    assert tuned.before == pytest.approx(float((x @ d.T).square().mean()), rel=1e-5)
    assert tuned.size == pytest.approx(float((x @ weight.T).square().mean()), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"clip_search": False}, {"lr_weight": 1.0, "lr_grid": 1.0}])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_layer_gets_worse(bits, options):
    for seed in range(3):
        tuned = adaquant(*problem(seed=seed), bits, 16, iterations=25, rows=64, **options)
        assert tuned.after <= tuned.before
        assert all(part.isfinite().all() for part in tuned.quantized[1:])


def test_the_error_falls_by_a_large_part_and_on_other_tokens_too():
    weight, x = problem(tokens=1200)
    tuned, start = (adaquant(weight, x[:800], 3, 16, iterations=n, rows=128) for n in (150, 0))

    def error(found):
        return float((x[800:] @ (found.quantized.dequantize() - weight).T).square().mean())

    assert tuned.after < 0.6 * tuned.before
    assert error(tuned) < 0.7 * error(start)


def test_eight_bits_leave_next_to_nothing():
    tuned = adaquant(*problem(), 8, 16, iterations=10)
    assert tuned.after / tuned.size < 1e-4


def test_the_bias_takes_what_is_missing():
    """A target that differs by a constant of each output is met by the bias alone."""
    weight, x = torch.randn(24, 32), torch.randn(300, 32)
    bias, offset = torch.randn(24), torch.linspace(0.5, 1, 24)
    rates = dict(iterations=200, lr_bias=0.01, lr_weight=0.0, lr_grid=0.0)
    tuned = adaquant(weight, x, 8, 16, bias=bias, missing=offset.expand(300, 24), **rates)
    torch.testing.assert_close(tuned.bias, bias + offset, atol=0.01, rtol=0)
    assert tuned.after < 0.01 * tuned.before


def test_what_is_missing_is_made_up_for_by_the_weights():
    weight, x = problem()
    twice = adaquant(weight, x, 8, 16, missing=0.05 * (x @ weight.T), iterations=200, lr_weight=0.5, lr_grid=0.05)
    assert twice.after < 0.2 * twice.before


def test_dead_inputs_and_flat_groups_stay_as_they_are():
    weight, x = problem()
    weight[:, :16] = 0.5
    x[:, 20] = 0
    tuned = adaquant(weight, x, 3, 16, iterations=20)
    assert tuned.quantized.dequantize().isfinite().all()
    assert (tuned.quantized.dequantize()[:, :16] - 0.5).abs().max() < 0.01


def test_the_seed_decides_and_the_global_generator_is_not_touched():
    weight, x = problem()
    state = torch.get_rng_state()
    runs = [adaquant(weight, x, 3, 16, iterations=60, rows=64, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].quantized, runs[1].quantized, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(runs[0].quantized, runs[2].quantized, strict=True))


@torch.no_grad()
def layer_inputs(model, ids):
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            note = lambda m, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(note))
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("inputs", ["parallel", "sequential"])
def test_layers_see_the_inputs_that_the_option_names(inputs):
    """Each layer of the model is what the pure function gives for inputs and targets taken from whole models."""
    settings = dict(iterations=8, rows=32, lr_weight=0.02)
    plain, model = llama(attention_bias=True, seed=3), llama(attention_bias=True, seed=3)
    ids = data()
    config = AdaQuantConfig(
        bits=3, group_size=16, dataset=ids, sequence_length=40, batch_size=6, inputs=inputs, **settings
    )
    quantize(model, config)
    wanted, given = layer_inputs(plain, ids), layer_inputs(model, ids)
    for name, layer in quantized_layers(model).items():
        linear = plain.get_submodule(name)
        bias = None if linear.bias is None else linear.bias.detach()
        missing = (wanted[name] - given[name]) @ linear.weight.detach().T if inputs == "sequential" else None
        x = wanted[name] if inputs == "parallel" else given[name]
        tuned = adaquant(linear.weight.detach(), x, 3, 16, bias=bias, missing=missing,
                         **settings)  # fmt: skip
        assert (layer.codes == tuned.quantized.codes).float().mean() > 0.995
        torch.testing.assert_close(layer.weight.data, tuned.quantized.dequantize(), atol=0.05, rtol=0.05)
        if bias is not None:
            torch.testing.assert_close(layer.bias.data, tuned.bias, atol=1e-4, rtol=1e-3)


def test_a_whole_model_is_nearer_to_the_plain_one_than_by_rounding():
    ids, other = data(rows=24), data(rows=4, seed=9)
    with torch.no_grad():
        want = llama(attention_bias=True)(other).logits
        far = {}
        for config in (
            RTNConfig(bits=3, group_size=16),
            AdaQuantConfig(bits=3, group_size=16, dataset=ids, iterations=60, batch_size=24),
        ):
            model = quantize(llama(attention_bias=True), config)
            far[config.method] = float((model(other).logits - want).square().mean())
    assert far["adaquant"] < 0.7 * far["rtn"]


def test_half_precision_keeps_the_type_of_biases():
    model = quantize(
        llama(attention_bias=True).to(torch.bfloat16),
        AdaQuantConfig(bits=4, group_size=16, dataset=data(), iterations=4),
    )
    layers = quantized_layers(model).values()
    assert all(isinstance(layer, QuantLinear) for layer in layers)
    assert {layer.bias.dtype for layer in layers if layer.bias is not None} == {torch.bfloat16}


def test_a_failing_run_leaves_plain_layers(monkeypatch):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("hfext.quantization.adaquant.adaquant", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(model, AdaQuantConfig(group_size=16, dataset=data()))
    assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [("iterations", -1), ("rows", 0), ("lr_weight", -0.1), ("lr_grid", 2.0), ("lr_bias", -1.0), ("inputs", "both")],
)
def test_bad_options_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .* but must be"):
        AdaQuantConfig(**{field: value})
