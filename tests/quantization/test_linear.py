"""The quantised layer: values, gradients, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfext.quantization import QuantLinear
from hfext.quantization._affine import round_to_nearest


def layer(bits=3, rows=12, columns=48, group=16, bias=True, dtype=torch.float32, scale_dtype=torch.float32, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    made = QuantLinear(columns, rows, bits, group, bias, dtype=dtype, scale_dtype=scale_dtype)
    made.store(round_to_nearest(weight, bits, group), torch.linspace(-1, 1, rows) if bias else None)
    return made


def by_formula(made):
    """s q + z entry by entry."""
    codes = made.codes
    rows = [
        [
            float(made.scales[r, c // made.group_size]) * int(codes[r, c]) + float(made.zeros[r, c // made.group_size])
            for c in range(made.in_features)
        ]
        for r in range(made.out_features)
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_is_the_formula_entry_by_entry(bits):
    made = layer(bits)
    torch.testing.assert_close(made.weight.data, by_formula(made), atol=1e-6, rtol=0)
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(made(x), F.linear(x, by_formula(made), made.bias), atol=1e-5, rtol=0)


def test_gradients_equal_those_of_the_formula_in_float64():
    made = layer(scale_dtype=torch.float64).double()
    made.requires_grad_(True)
    x = torch.randn(2, 5, 48, dtype=torch.float64, requires_grad=True)
    codes = made.codes.double().unflatten(-1, (3, 16))
    scales, zeros, bias, x2 = (t.detach().clone().requires_grad_() for t in (made.scales, made.zeros, made.bias, x))
    weight = (codes * scales[..., None] + zeros[..., None]).flatten(-2)
    (F.linear(x2, weight, bias) ** 2).sum().backward()
    (made(x) ** 2).sum().backward()
    for got, want in ((x, x2), (made.scales, scales), (made.zeros, zeros), (made.bias, bias)):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-4, rtol=1e-5)


def test_the_backward_keeps_no_weight_of_full_size():
    made = layer(bits=2, rows=64, columns=256, bias=False)
    kept = []
    x = torch.randn(1, 4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        made(x).sum()
    assert sum(kept) < 64 * 256 / 4


def test_only_what_is_asked_for_gets_a_gradient():
    made = layer()
    x = torch.randn(3, 48, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None and made.scales.grad is None and made.bias.grad is None
    made.zeros.requires_grad_(True)
    made(torch.randn(3, 48)).sum().backward()
    assert made.zeros.grad is not None and made.scales.grad is None


def test_autocast_runs_in_the_lower_type_and_trains():
    made = layer()
    made.scales.requires_grad_(True)
    x = torch.randn(3, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and made.scales.grad.dtype == made.scales.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_of_the_input_is_the_type_of_the_output(dtype):
    made = layer(scale_dtype=torch.float16)
    y = made(torch.randn(3, 48).to(dtype))
    assert y.dtype == dtype
    want = F.linear(torch.ones(1, 48), by_formula(made), made.bias)
    torch.testing.assert_close(made(torch.ones(1, 48).to(dtype)).float(), want, atol=0.2, rtol=0.02)


def test_a_change_of_the_models_type_keeps_the_stored_numbers():
    made = layer(scale_dtype=torch.float16)
    model = nn.Sequential(made)
    before = {key: x.clone() for key, x in made.state_dict().items()}
    model.to(torch.bfloat16)
    assert made.weight.dtype == torch.bfloat16 and made.bias.dtype == torch.bfloat16
    model.to(torch.float32)
    assert made.weight.dtype == torch.float32
    assert all(torch.equal(before[key], made.state_dict()[key]) for key in ("qweight", "scales", "zeros"))
    assert model.to("meta")[0].scales.dtype == torch.float16


def test_the_weight_cannot_be_written():
    made = layer()
    with pytest.raises(NotImplementedError, match="dequantize"):
        made.weight.data += 1
    with pytest.raises(NotImplementedError, match="dequantize"):
        made.weight.data = torch.zeros(12, 48)
    assert type(made.weight + 0) is torch.Tensor
    with pytest.raises(NotImplementedError, match="dequantize"):
        made.weight.data.view(-1).copy_(torch.zeros(12 * 48))
    with pytest.raises(NotImplementedError, match="dequantize"):
        made.weight = nn.Parameter(torch.zeros(12, 48))


def test_copies_and_pickles_are_equal_and_apart():
    made = layer()
    x = torch.randn(2, 48)
    want = made(x)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(again(x), want)
        again.scales.data.zero_()
    assert torch.equal(made(x), want)


def test_a_plain_layer_again():
    made = layer(bias=True)
    plain = made.to_linear()
    assert type(plain) is nn.Linear
    x = torch.randn(2, 48)
    torch.testing.assert_close(plain(x), made(x))
    plain.bias.data.zero_()
    assert made.bias.abs().sum() > 0


@pytest.mark.parametrize(
    ("columns", "bits", "group", "problem"),
    [
        (40, 4, 16, "group_size is 16 but must divide the 40 inputs"),
        (12, 3, -1, "12 inputs of 3 bits do not fill whole bytes"),
        (3, 2, -1, "3 inputs of 2 bits do not fill whole bytes"),
    ],
)
def test_sizes_that_do_not_fit_are_named(columns, bits, group, problem):
    with pytest.raises(ValueError, match=problem):
        QuantLinear(columns, 4, bits, group)


def test_scales_beyond_half_precision_are_refused():
    made = QuantLinear(16, 2, 4, 16, scale_dtype=torch.float16)
    with pytest.raises(ValueError, match='scale_dtype="bfloat16"'):
        made.store(round_to_nearest(1e7 * torch.randn(2, 16), 4, 16))


def test_a_whole_row_can_be_a_group():
    made = layer(group=-1)
    assert made.scales.shape == (12, 1) and made.group_size == 48
    torch.testing.assert_close(made.weight.data, by_formula(made), atol=1e-6, rtol=0)
