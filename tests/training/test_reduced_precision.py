"""E_xM_y: the card's examples, torch's own 8-bit types, a list of all values, properties, and training in it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hfext.training.reduced_precision import PrecisionEmulator, quantize_to_format, reduced_linear

FORMATS = [(8, 3, "rne"), (8, 5, "trunc"), (5, 2, "rne"), (4, 3, "trunc"), (6, 0, "rne")]
each_format = pytest.mark.parametrize("form", FORMATS, ids=str)


def all_bfloat16():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16)


def values_of(exp_bits, man_bits):
    """Every value >= 0 of the format, as float64."""
    bias = 2 ** (exp_bits - 1) - 1
    found = [0.0]
    for e in range(1 - bias, bias + 1):
        found += [(1 + f / 2**man_bits) * 2.0**e for f in range(2**man_bits)]
    return torch.tensor(found, dtype=torch.float64)


def test_the_examples_of_truncation():
    x = torch.tensor([1.7, 3.14159, -0.1, 0.001]).bfloat16()
    assert quantize_to_format(x, 8, 5, "trunc").tolist() == [1.6875, 3.125, -0.099609375, 0.0009765625]
    assert quantize_to_format(x, 8, 3, "trunc").tolist() == [1.625, 3.0, -0.09375, 0.0009765625]


@pytest.mark.parametrize("mode", ["rne", "trunc"])
def test_e8m7_changes_no_bfloat16(mode):
    x = all_bfloat16()
    assert torch.equal(quantize_to_format(x, 8, 7, mode).view(torch.int16), x.view(torch.int16))


def test_e8m7_of_float32_is_bfloat16():
    x = torch.randn(10000) * torch.exp(30 * torch.randn(10000))
    assert torch.equal(quantize_to_format(x, 8, 7), x.bfloat16().float())


@pytest.mark.parametrize(
    "exp_bits, man_bits, dtype, low, high",
    [(4, 3, torch.float8_e4m3fn, 2.0**-6, 240), (5, 2, torch.float8_e5m2, 2.0**-14, 57344)],
)
def test_where_torch_has_the_format_it_agrees(exp_bits, man_bits, dtype, low, high):
    """e4m3fn has an exponent more at the top (to 448), and both keep subnormals."""
    x = torch.cat([all_bfloat16().float(), torch.randn(20000) * 10, torch.randn(20000) / 10])
    x = x[(x.abs() >= low) & (x.abs() <= high)]
    assert torch.equal(quantize_to_format(x, exp_bits, man_bits), x.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exp_bits, man_bits", [(4, 3), (5, 2), (3, 0), (2, 4), (6, 7)])
def test_it_is_the_nearest_of_all_values(exp_bits, man_bits, dtype):
    """Brute force. Between 0 and the least value all but the upper half step of that value's own grid is flushed."""
    grid = values_of(exp_bits, man_bits)
    x = (torch.randn(3000) * torch.exp2(torch.empty(3000).uniform_(-12, 12))).to(dtype)
    found = quantize_to_format(x, exp_bits, man_bits).double()
    assert torch.isin(found.abs(), grid).all()
    wide = x.double().abs()
    distance = (wide[:, None] - grid).abs().amin(1)
    normal = wide >= grid[1]
    assert torch.equal((found.abs() - wide).abs()[normal], distance[normal])
    assert not found[wide < grid[1] * (1 - 2.0 ** -(man_bits + 2))].any()
    cut = quantize_to_format(x, exp_bits, man_bits, "trunc").double().abs()
    below = torch.searchsorted(grid, wide, right=True) - 1
    assert torch.equal(cut, grid[below])


def test_ties_go_to_the_even_mantissa():
    x = torch.tensor([1.0625, 1.1875, -1.0625, -1.1875])
    assert quantize_to_format(x, 8, 3).tolist() == [1.0, 1.25, -1.0, -1.25]


@each_format
def test_signs_infinities_and_nans_stay(form):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, -1e-40])
    y = quantize_to_format(x, *form)
    assert torch.equal(y.signbit(), x.signbit()) and y[:2].tolist() == [math.inf, -math.inf] and y[2].isnan()
    assert form[0] == 8 or y[3:].tolist() == [0] * 4


@each_format
def test_what_is_too_large_saturates(form):
    largest = (2 - 2.0 ** -form[1]) * 2.0 ** (2 ** (form[0] - 1) - 1)
    x = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
    assert quantize_to_format(x, *form).tolist() == [largest, -largest]


formats = st.tuples(st.integers(2, 8), st.integers(0, 7), st.sampled_from(["rne", "trunc"]))
numbers = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20)
lasting = settings(deadline=None, max_examples=60, derandomize=True)


@lasting
@given(numbers, formats, st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_idempotent_monotone_and_odd(x, form, dtype):
    x = torch.tensor(x).to(dtype).sort().values
    y = quantize_to_format(x, *form)
    assert torch.equal(quantize_to_format(y, *form), y)
    assert (y[1:] >= y[:-1]).all()
    assert torch.equal(quantize_to_format(-x, *form), -y)


@lasting
@given(numbers, formats)
def test_the_error_is_bounded(x, form):
    exp_bits, man_bits, mode = form
    bias = 2 ** (exp_bits - 1) - 1
    x = torch.tensor(x, dtype=torch.float64)
    inside = (x.abs() >= 2.0 ** (1 - bias)) & (x.abs() <= (2 - 2.0**-man_bits) * 2.0**bias)
    x = x[inside]
    error = (quantize_to_format(x.float(), *form).double() - x).abs()
    assert (error <= x.abs() * 2.0 ** -(man_bits + (mode == "rne"))).all()


def test_strides_are_respected():
    x = torch.randn(6, 8)
    y = quantize_to_format(x, 5, 2)
    assert torch.equal(quantize_to_format(x.T, 5, 2), y.T)
    assert torch.equal(quantize_to_format(x[:, ::2], 5, 2), y[:, ::2])
    assert torch.equal(quantize_to_format(x[:, :1].expand(6, 3), 5, 2), y[:, :1].expand(6, 3))


# the products


@each_format
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_the_three_products_have_rounded_operands(form, shape):
    """Each by hand, with matrices; sums and bias in full."""
    x, w, b = torch.randn(shape, requires_grad=True), torch.randn(4, 5, requires_grad=True), torch.randn(4)
    b.requires_grad_()
    y = reduced_linear(x, w, b, form)
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, w, b), g)
    xq, wq, gq = (quantize_to_format(t, *form).double() for t in (x, w, g))
    torch.testing.assert_close(y.double(), xq @ wq.T + b)
    torch.testing.assert_close(grads[0].double(), gq @ wq)
    torch.testing.assert_close(grads[1].double(), gq.reshape(-1, 4).T @ xq.reshape(-1, 5))
    torch.testing.assert_close(grads[2], g.reshape(-1, 4).sum(0))


def backward(model, ids):
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_e8m23_is_the_model_itself(family, request):
    model = request.getfixturevalue(family)()
    ids = torch.randint(3, 120, (2, 7))
    logits, grads = backward(model, ids)
    with PrecisionEmulator(model, 8, 23):
        found, its = backward(model, ids)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-6)
    for a, b in zip(its, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_leaving_undoes_everything(family, request):
    model = request.getfixturevalue(family)()
    ids = torch.randint(3, 120, (2, 7))
    kinds, keys, before = [type(m) for m in model.modules()], list(model.state_dict()), model(ids).logits
    with PrecisionEmulator(model, 8, 2) as emulator:
        assert list(model.state_dict()) == keys and len(emulator.layers) == len(set(emulator.layers))
        assert (model(ids).logits - before).abs().max() > 1e-4
    emulator.remove()
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(ids).logits, before)
    assert not any("_hfext_format" in vars(m) for m in model.modules())
    with pytest.raises(RuntimeError, match="stop"), PrecisionEmulator(model, 8, 2):
        raise RuntimeError("stop")
    assert [type(m) for m in model.modules()] == kinds


def test_the_head_stays_unless_asked(tiny_llama):
    model = tiny_llama()
    with PrecisionEmulator(model, 8, 3) as emulator:
        assert len(emulator.layers) == 14 and type(model.lm_head) is nn.Linear
    with PrecisionEmulator(model, 8, 3, include_head=True, exclude=["down_proj"]) as emulator:
        assert "lm_head" in emulator.layers and len(emulator.layers) == 13


def test_a_layer_is_the_rounded_layer(tiny_llama):
    """Through a model's own module, in bfloat16, and under autocast."""
    layer, x = tiny_llama().model.layers[0].mlp.up_proj, torch.randn(3, 32)
    holder = nn.Sequential(layer)
    with PrecisionEmulator(holder, 8, 3):
        expected = F.linear(quantize_to_format(x, 8, 3), quantize_to_format(layer.weight, 8, 3))
        assert torch.equal(holder(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            y = holder(x.requires_grad_())
        low = [quantize_to_format(t.bfloat16(), 8, 3) for t in (x, layer.weight)]
        assert torch.equal(y, F.linear(*low)) and y.dtype == torch.bfloat16
        y.sum().backward()
        assert layer.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_training_with_the_trainer_keeps_full_weights(tiny_llama, tmp_path):
    """`with PrecisionEmulator(...): trainer.train()`, its checkpoint, and PEFT inside."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    rows = torch.randint(3, 120, (8, 6))
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        learning_rate=0.01,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    trainer = Trainer(model, args, train_dataset=[{"input_ids": x, "labels": x} for x in rows])
    with PrecisionEmulator(model, 8, 3) as emulator:
        assert sum("lora" in name for name in emulator.layers) == 4 and not any(
            "lm_head" in n for n in emulator.layers
        )
        trainer.train()
    trained = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert not torch.equal(trained, quantize_to_format(trained, 8, 7))


# bad input


@pytest.mark.parametrize(
    "field, value", [("exp_bits", 1), ("exp_bits", 9), ("man_bits", -1), ("man_bits", 24), ("mode", "up")]
)
def test_a_format_out_of_range_is_named(field, value):
    form = {"exp_bits": 8, "man_bits": 3, "mode": "rne", field: value}
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        quantize_to_format(torch.ones(1), **form)


def test_what_cannot_be_emulated_is_refused(tiny_llama):
    with pytest.raises(TypeError, match="float16"):
        quantize_to_format(torch.ones(1, dtype=torch.float16), 5, 2)
    with pytest.raises(ValueError, match="has no nn.Linear"):
        PrecisionEmulator(nn.Embedding(3, 4), 8, 3)
    model = tiny_llama()
    with pytest.raises(ValueError, match="'nothing', which no linear layer"):
        PrecisionEmulator(model, 8, 3, exclude=["nothing"])
    with PrecisionEmulator(model, 8, 3), pytest.raises(ValueError, match="emulated already"):
        PrecisionEmulator(model, 8, 2)
