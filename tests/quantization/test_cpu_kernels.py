"""The CPU's packed kernels: what they compute, when they run, and that a copy is never out of date."""

import copy
import io
import pickle
import threading

import pytest
import torch
from quantization_cases import llama
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hfext import compat
from hfext.quantization import QuantLinear, _cpu_kernels
from hfext.quantization._affine import Quantized, round_to_nearest
from hfext.quantization._cpu_kernels import FEW_TOKENS, set_kernel
from hfext.quantization._quantizer import quantize, quantized_layers
from hfext.quantization.rtn import RTNConfig

pytestmark = pytest.mark.skipif(not _cpu_kernels.works(), reason="this torch has no CPU kernels for packed weights")
U = 2.0**-8  # of bfloat16


def layer(bits=4, rows=48, columns=128, group=64, bias=False, kernel="auto", seed=0, symmetric=False):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    made = QuantLinear(columns, rows, bits, group, bias, dtype=torch.bfloat16)
    quantized = round_to_nearest(weight, bits, group, symmetric=symmetric)
    made.store(quantized, torch.linspace(-1, 1, rows) if bias else None)
    made.packed = _cpu_kernels.Packed(kernel)
    return made


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@torch.no_grad()
def exact_and_bound(made, x):
    """y in float64 from the stored numbers, and how far the kernel may be from it."""
    shape = (made.out_features, -1, made.group_size)
    q, s, z = made.codes.double().view(shape), made.scales.double()[..., None], made.zeros.double()[..., None]
    middle = 2.0 ** (made.bits - 1)
    y = F.linear(x.double(), (s * q + z).flatten(1))
    parts = ((s * (q - middle)).abs() + (z + middle * s).abs()).flatten(1)
    bound = U * F.linear(x.double().abs(), parts) + U * y.abs()
    if made.bias is not None:
        y = y + made.bias.double()
        bound = bound + U * y.abs() + U * U * made.bias.double().abs()
    return y, bound + 1e-5


def uses_kernel(made, x):
    made(x)
    return made.packed.made is not None


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(16, 32, 32), (48, 192, 64), (80, 256, 128), (112, 512, 256), (64, 64, -1)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel_is_within_its_bound(bits, rows, columns, group, bias):
    made = layer(bits, rows, columns, group, bias, kernel="int4")
    for shape in ((1, 1, columns), (3, columns), (2, 5, columns), (columns,), (FEW_TOKENS, columns)):
        x = inputs(*shape)
        with torch.no_grad():
            y = made(x)
        assert made.packed.made is not None and y.dtype == torch.bfloat16 and y.shape == (*shape[:-1], rows)
        want, bound = exact_and_bound(made, x)
        assert ((y.double() - want).abs() <= bound).all()
        made.packed.kernel = "dequantize"
        plain = made(x)
        made.packed.kernel = "int4"
        assert (y - plain).float().norm() <= 0.01 * plain.float().norm()


@pytest.mark.parametrize("rows", [5, 16, 33])
def test_eight_bits_on_a_symmetric_grid_a_row_have_a_kernel(rows):
    made = layer(8, rows, 96, -1, symmetric=True)
    x = inputs(3, 96)
    with torch.no_grad():
        y = made(x)
    assert made.packed.made is not None
    want, bound = exact_and_bound(made, x)
    assert ((y.double() - want).abs() <= bound).all()
    assert not uses_kernel(layer(8, rows, 96, -1), x)
    assert not uses_kernel(layer(8, rows, 96, 32, symmetric=True), x)


def test_what_the_kernel_cannot_take_is_dequantised_and_right():
    for made, x in (
        (layer(rows=24), inputs(2, 128)),
        (layer(group=16), inputs(2, 128)),
        (layer(bits=2), inputs(2, 128)),
        (layer(kernel="dequantize"), inputs(2, 128)),
        (layer(), inputs(FEW_TOKENS + 1, 128)),
        (layer(), inputs(2, 128).float()),
        (layer(), inputs(2, 128).half()),
        (layer(), inputs(0, 128)),
    ):
        assert not uses_kernel(made, x)
        y = made(x)
        torch.testing.assert_close(y, F.linear(x, made.dequantized(x.dtype)), atol=0.15, rtol=0.02)


def test_large_layers_in_pieces_equal_the_whole(monkeypatch):
    made = layer(bits=3, rows=40, columns=96, group=32, bias=True)
    x = inputs(2, 3, 96).float()
    want = made(x)
    monkeypatch.setattr(_cpu_kernels, "PIECE", 7 * 96)
    bias = made.bias.float()
    torch.testing.assert_close(_cpu_kernels.in_pieces(made, x, bias), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made(x), F.linear(x, made.dequantized(torch.float32), bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("native", [False, True])
def test_products_in_bfloat16_are_exact_up_to_rounding_with_and_without_support(native, monkeypatch):
    monkeypatch.setattr(_cpu_kernels, "cpu_multiplies_bf16", lambda: native)
    made, x = layer(bits=8, bias=True), inputs(40, 128)
    y = made(x)
    weight = made.dequantized(torch.float64)
    want = F.linear(x.double(), weight, made.bias.double())
    bound = U * F.linear(x.double().abs(), weight.abs()) + U * want.abs() + 1e-4
    assert y.dtype == torch.bfloat16 and ((y.double() - want).abs() <= (2 if native else 1) * bound).all()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert made(x.float()).dtype == torch.bfloat16


def test_a_changed_layer_is_packed_again():
    other = layer(seed=5)
    grid = Quantized(other.codes, other.scales.float(), other.zeros.float())
    x = inputs(2, 128)

    def store(made):
        made.store(grid)

    def load(made):
        made.load_state_dict(other.state_dict())

    def assign(made):
        made.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)

    def in_place(made):
        with torch.no_grad():
            for key in ("qweight", "scales", "zeros"):
                getattr(made, key).copy_(getattr(other, key))

    def swapped(made):
        made.qweight = other.qweight.clone()
        for key in ("scales", "zeros"):
            getattr(made, key).data = getattr(other, key).data.clone()

    with torch.no_grad():
        want = other(x)
        for change in (store, load, assign, in_place, swapped):
            made = layer()
            assert not torch.equal(made(x), want)
            change(made)
            assert torch.equal(made(x), want), change.__name__


@pytest.mark.parametrize("through_data", [False, True])
def test_training_of_grids_is_seen_by_the_next_evaluation(through_data):
    made, x = layer(), inputs(2, 128)
    with torch.no_grad():
        made(x)
    assert made.packed.made is not None
    made.scales.requires_grad_(True)
    for _ in range(3):
        made(x).float().sum().backward()
        assert made.packed.made is None
        with torch.no_grad():
            for grid in (made.scales, made.zeros):
                (grid.data if through_data else grid).mul_(1.5)
            fresh = copy.deepcopy(made)
            assert torch.equal(made(x), fresh(x)) and made.packed.made is not None
    assert made.scales.grad.abs().sum() > 0
    leaf = inputs(2, 128).requires_grad_()
    layer()(leaf).float().sum().backward()
    assert leaf.grad is not None


def test_the_copy_is_in_no_state_pickle_or_copy():
    made, x = layer(), inputs(2, 128)
    size = len(pickle.dumps(made))
    keys = list(made.state_dict())
    with torch.no_grad():
        want = made(x)
    assert made.packed.made is not None and list(made.state_dict()) == keys and len(pickle.dumps(made)) == size
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(file, weights_only=False)):
        assert again.packed.made is None and again.packed.kernel == "auto"
        with torch.no_grad():
            assert torch.equal(again(x), want)
    made.to(torch.float32)
    assert made.packed.made is None


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("second", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_copy_serves_every_mode(first, second):
    made, x = layer(bias=True), inputs(2, 128)
    with first():
        want = made(x)
    with second():
        assert torch.equal(made(x), want)
        made.scales.data.mul_(1)
    leaf = inputs(2, 128).requires_grad_()
    made(leaf).float().sum().backward()
    assert leaf.grad.isfinite().all()


def test_layers_made_in_inference_mode_are_never_out_of_date():
    x = inputs(2, 128)
    with torch.inference_mode():
        made = layer()
        before = made(x)
        made.scales.mul_(2)
        made.zeros.mul_(2)
        assert made.packed.made is None
        torch.testing.assert_close(made(x).float(), 2 * before.float())


def test_threads_agree():
    made, x = layer(rows=256, columns=512), inputs(2, 512)
    with torch.no_grad():
        want = layer(rows=256, columns=512)(x)
    found = []

    def work(i):
        mode = torch.inference_mode if i % 2 else torch.no_grad
        for _ in range(20):
            with mode():
                found.append(made(x).clone())
            if i == 3:
                made.packed.drop()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(torch.equal(y, want) for y in found)


def test_a_torch_without_the_kernels_dequantises_and_says_so_once(monkeypatch):
    def missing():
        raise AttributeError("no such operator")

    said = []
    monkeypatch.setattr(_cpu_kernels, "cpu_kernels", missing)
    monkeypatch.setattr(_cpu_kernels.logger, "warning", said.append)
    _cpu_kernels.works.cache_clear()
    try:
        made, x = layer(), inputs(2, 128)
        for _ in range(3):
            y = made(x)
        torch.testing.assert_close(y, F.linear(x, made.dequantized(x.dtype)), atol=0.15, rtol=0.02)
        assert made.packed.made is None and len(said) == 1 and "no such operator" in said[0]
    finally:
        _cpu_kernels.works.cache_clear()


def test_the_operators_are_looked_up_in_compat():
    assert all(callable(operator) for operator in compat.cpu_kernels())
    assert compat.cpu_multiplies_bf16() in (True, False)


def quantized_llama(bits=4, **options):
    model = llama(hidden_size=64, intermediate_size=128, dtype=torch.bfloat16)
    return quantize(model.to(torch.bfloat16), RTNConfig(bits=bits, group_size=32, **options))


def copies(model):
    return sum(made.packed.made is not None for made in quantized_layers(model).values())


@pytest.mark.parametrize("bits", [2, 4])
def test_generate_runs_on_the_kernel_and_twins_agree(bits, tmp_path):
    quantized_llama(bits).save_pretrained(tmp_path / "1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "1", dtype=torch.bfloat16)
    assert set_kernel(model, "int4") == len(quantized_layers(model))
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, output_logits=True)
    made = model.generate(ids, return_dict_in_generate=True, **settings)
    assert copies(model) == len(quantized_layers(model))
    model.save_pretrained(tmp_path / "2")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "2", dtype=torch.bfloat16)
    assert copies(twin) == 0
    set_kernel(twin, "int4")
    again = twin.generate(ids, return_dict_in_generate=True, **settings)
    assert torch.equal(again.sequences, made.sequences)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, made.logits, strict=True))
    with torch.no_grad():
        by_kernel = model(ids).logits
        assert set_kernel(model, "dequantize") == 0
        plain = model(ids).logits
    assert copies(model) == 0 and (by_kernel - plain).norm() <= 0.03 * plain.norm()


def test_two_bits_keep_their_size_unless_asked():
    model = quantized_llama(2)
    model(torch.tensor([[3, 4, 5]]))
    assert copies(model) == 0 and set_kernel(model) == 0


def test_bad_kernels_are_named(monkeypatch):
    model = quantized_llama()
    with pytest.raises(ValueError, match="kernel"):
        set_kernel(model, "fast")
    with pytest.raises(ValueError, match="no layers that hfext has quantised"):
        set_kernel(llama())
    odd = quantize(llama(), RTNConfig(group_size=16))
    with pytest.raises(ValueError, match="fits no layer"):
        set_kernel(odd, "int4")
    said = []
    monkeypatch.setattr(_cpu_kernels.logger, "warning", said.append)
    assert set_kernel(model.to(torch.float32), "int4") > 0 and "bfloat16" in said[0]
