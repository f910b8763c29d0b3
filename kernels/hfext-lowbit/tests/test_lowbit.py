"""Packed linear layers: kernels against float64, the layout against codes written by hand, gradients, and refusals."""

import pytest
import torch
from hfext_lowbit import _launch, _reference, dequantize, functional, quantized_linear
from hfext_lowbit.layers import QuantLinear


def pack(codes, bits):
    """The layout code by code, independent of the package: [out, in] -> uint8 [out, bytes]."""
    rows, n = codes.shape

    def plane(values, width):
        fields = 8 // width
        made = torch.zeros(rows, -(-values.shape[1] // fields), dtype=torch.int64)
        for k in range(values.shape[1]):
            made[:, k // fields] |= values[:, k] << (k % fields * width)
        return made.to(torch.uint8)

    if bits != 3:
        return plane(codes, bits)
    codes = torch.nn.functional.pad(codes, (0, -n % 8))
    return torch.cat((plane(codes & 3, 2), plane(codes >> 2, 1)), 1)


def case(bits, rows, inputs, group, tokens=1, dtype=torch.float32, scale_dtype=torch.float32, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, inputs), generator=g)
    groups = 1 if group == -1 else -(-inputs // group)
    scales = ((0.5 + torch.rand(rows, groups, generator=g)) / 2**bits).to(scale_dtype)
    zeros = (-0.5 * torch.rand(rows, groups, generator=g)).to(scale_dtype)
    x = torch.randn(tokens, inputs, generator=g).to(dtype)
    b = torch.randn(rows, generator=g).to(dtype) if bias else None
    return x, pack(codes, bits), scales, zeros, bits, group, b, codes


def exact(x, qweight, scales, zeros, bits, group, bias, codes):
    size = codes.shape[1] if group == -1 else group
    at = torch.arange(codes.shape[1]) // size
    weight = codes.double() * scales.double()[:, at] + zeros.double()[:, at]
    y = x.double() @ weight.mT
    return (y if bias is None else y + bias.double()), weight


def close(got, wanted, tolerance):
    got, wanted = got.double(), wanted.double()
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


SHAPES = [
    (2, 16, 128, 64, 1),
    (2, 37, 192, 64, 1),
    (2, 5, 96, 32, 3),
    (3, 24, 128, 64, 1),
    (3, 9, 72, 24, 2),
    (4, 16, 128, 32, 1),
    (4, 33, 100, 64, 4),  # the last group is shorter
    (8, 17, 64, -1, 1),
    (2, 7, 1100, -1, 1),  # one group, several cuts, the last one ragged
    (3, 7, 1104, -1, 1),
    (4, 8, 30, -1, 2),  # codes do not fill the last byte's group
    (2, 10, 50, 5, 1),  # groups begin inside bytes
    (2, 33, 128, 64, 5),
    (3, 17, 80, 16, 7),
    (4, 65, 96, 48, 16),
    (8, 20, 70, 10, 9),
    (4, 40, 130, 128, 33),
]


@pytest.mark.parametrize(("bits", "rows", "inputs", "group", "tokens"), SHAPES)
def test_outputs_and_gradients_equal_float64(bits, rows, inputs, group, tokens):
    *args, codes = case(bits, rows, inputs, group, tokens)
    wanted, weight = exact(*args, codes)
    x, bias = args[0].requires_grad_(), args[6].requires_grad_()
    _launch.launches.clear()
    y = quantized_linear(*args)
    assert _launch.launches["gemv_kernel"] + _launch.launches["gemm_kernel"] == 1
    unit = 8 if bits == 3 else 8 // bits
    aligned = group % unit == 0 or group == -1
    assert _launch.launches["gemv_kernel"] == (tokens <= functional.GEMV_TOKENS and aligned)
    close(y, wanted, 2e-6)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    assert _launch.launches["grad_kernel"] == 1
    close(x.grad, dy.double() @ weight, 5e-6)
    close(bias.grad, dy.double().sum(0), 5e-6)
    close(dequantize(*args[1:6], inputs), weight, 2e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(bits, tokens, dtype):
    *args, codes = case(bits, 20, 128, 64, tokens, dtype, scale_dtype=torch.float16)
    y = quantized_linear(*args)
    assert y.dtype == dtype
    close(y, exact(*args, codes)[0], 2 * torch.finfo(dtype).eps)
    x = args[0].requires_grad_()
    quantized_linear(x, *args[1:]).sum().backward()
    close(x.grad, exact(*args, codes)[1].sum(0).expand(tokens, -1), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("tokens", [2, 6])
def test_any_strides_and_leading_dimensions(tokens):
    *args, codes = case(4, 12, 64, 32, 2 * tokens)
    wanted = exact(*args, codes)[0]
    transposed = args[0].mT.contiguous().mT
    close(quantized_linear(transposed, *args[1:]), wanted, 2e-6)
    wide = torch.zeros(2 * tokens, 100)
    wide[:, 3:67] = args[0]
    close(quantized_linear(wide[:, 3:67][::2], *args[1:]), wanted[::2], 2e-6)
    folded = quantized_linear(args[0].view(2, tokens, 64), *args[1:])
    close(folded, wanted.view(2, tokens, 12), 2e-6)
    args[1] = torch.cat((args[1], args[1]), 1)[:, : args[1].shape[1]]
    close(quantized_linear(*args), wanted, 2e-6)


@pytest.mark.parametrize(("op", "tokens"), [("gemv", 1), ("gemm", 6)])
@pytest.mark.parametrize("bits", [2, 3])
def test_splits_of_the_inputs_add_up_and_repeat_bitwise(monkeypatch, op, tokens, bits):
    *args, codes = case(bits, 20, 520, 40, tokens)
    launch = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "CODES": 64, "SPLIT": 3, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(functional, "config", lambda name, x, **key: launch)
    _launch.launches.clear()
    first = quantized_linear(*args)
    assert _launch.launches == {f"{op}_kernel": 1, "sum_kernel": 1}
    close(first, exact(*args, codes)[0], 2e-6)
    assert torch.equal(first, quantized_linear(*args))
    launch["SPLIT"] = 1
    args[6] = None
    close(quantized_linear(*args), exact(*args, codes)[0], 2e-6)


def test_more_splits_than_tiles(monkeypatch):
    *args, codes = case(4, 6, 64, -1, 1)
    launch = {"BLOCK_N": 16, "CODES": 16, "SPLIT": 3, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(functional, "config", lambda name, x, **key: launch)
    close(quantized_linear(*args), exact(*args, codes)[0], 2e-6)
    launch["SPLIT"] = 100
    close(quantized_linear(*args), exact(*args, codes)[0], 2e-6)


def test_no_tokens_and_no_outputs():
    x, *rest, _ = case(4, 8, 32, 32, 0)
    assert quantized_linear(x, *rest).shape == (0, 8)
    assert quantized_linear(x.view(0, 3, 32), *rest).shape == (0, 3, 8)
    x, *rest, _ = case(4, 0, 32, 32, 2)
    x.requires_grad_()
    quantized_linear(x, *rest).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 32))


def test_double_backward_is_the_product_again():
    *args, codes = case(4, 6, 16, 8, 2)
    x = args[0].requires_grad_()
    dy = torch.randn(2, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(quantized_linear(*args), x, dy, create_graph=True)
    g = torch.randn(2, 16)
    (again,) = torch.autograd.grad(dx, dy, g)
    close(again, g.double() @ exact(*args, codes)[1].mT, 5e-6)


def test_float64_takes_the_plain_path_exactly():
    *args, codes = case(3, 6, 16, 8, 2, torch.float64, torch.float64)
    assert torch.allclose(quantized_linear(*args), exact(*args, codes)[0], rtol=1e-14, atol=1e-14)
    x = args[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: quantized_linear(x, *args[1:]), (x,))


def test_without_the_interpreter_the_plain_path_runs(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("on the CPU alone")
    monkeypatch.delenv("TRITON_INTERPRET")
    *args, codes = case(2, 6, 32, 16, 2)
    _launch.launches.clear()
    close(quantized_linear(*args), exact(*args, codes)[0], 2e-6)
    assert not _launch.launches


def test_opcheck():
    x, *args, bias, _ = case(4, 6, 32, 16, 2)
    x.requires_grad_()
    torch.library.opcheck(functional._linear, (x, *args[:3], bias, *args[3:]))
    dy = torch.randn(2, 6, requires_grad=True)
    torch.library.opcheck(functional._linear_grad, (dy, *args, 32))


def test_compiles_without_graph_breaks():
    *args, _ = case(2, 6, 32, 16, 2)
    x = args[0].requires_grad_()
    compiled = torch.compile(
        lambda x: quantized_linear(x, *args[1:]).square().sum(), fullgraph=True, backend="aot_eager"
    )
    y = compiled(x)
    y.backward()
    got, x.grad = x.grad, None
    quantized_linear(*args).square().sum().backward()
    close(got, x.grad, 1e-6)


def test_the_layer_of_the_hub_has_a_forward_alone():
    *args, codes = case(4, 6, 32, 16, 2)
    assert "__init__" not in vars(QuantLinear) and QuantLinear.has_backward and QuantLinear.can_torch_compile
    host = torch.nn.Module()
    for name, value in zip(("qweight", "scales", "zeros", "bits", "group_size", "bias"), args[1:], strict=True):
        setattr(host, name, value)
    close(QuantLinear.forward(host, args[0]), exact(*args, codes)[0], 2e-6)


def test_a_byte_read_by_hand():
    """0b11100100 holds 0, 1, 2, 3; with w = 2 q - 1 the weights are -1, 1, 3, 5."""
    q, s, z = torch.tensor([[0b11100100]], dtype=torch.uint8), torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    assert dequantize(q, s, z, 2, 4, 4).tolist() == [[-1, 1, 3, 5]]
    assert quantized_linear(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), q, s, z, 2, 4).item() == 30
    # 3 bits: low pairs of 1, 5, 7, 2 and four zeros, then their high bits.
    q = torch.tensor([[0b10110101, 0, 0b0110]], dtype=torch.uint8)
    assert _reference.unpack(q, 3, 8).tolist() == [[1, 5, 7, 2, 0, 0, 0, 0]]
    assert quantized_linear(torch.ones(1, 8), q, s, z, 3, 8).item() == 2 * 15 - 8


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bits": 5}, ValueError, "bits is 5"),
        ({"group_size": 0}, ValueError, "group_size is 0"),
        ({"x": torch.ones(2, 30)}, ValueError, "qweight has shape"),
        ({"x": torch.ones(2, 32, dtype=torch.int64)}, TypeError, "floating"),
        ({"qweight": torch.zeros(6, 16, dtype=torch.int8)}, TypeError, "uint8"),
        ({"scales": torch.ones(6, 3)}, ValueError, "scales and zeros have shapes"),
        ({"scales": torch.ones(6, 2, dtype=torch.int32)}, TypeError, "floating"),
        ({"scales": torch.ones(6, 2, requires_grad=True)}, NotImplementedError, "frozen"),
        ({"bias": torch.ones(5)}, ValueError, "bias has shape"),
        ({"x": torch.ones(2, 32, device="meta")}, ValueError, "device"),
    ],
)
def test_bad_input(change, error, words):
    x, *rest, _ = case(4, 6, 32, 16, 2)
    given = dict(zip(("x", "qweight", "scales", "zeros", "bits", "group_size", "bias"), (x, *rest), strict=True))
    with pytest.raises(error, match=words):
        quantized_linear(**{**given, **change})


def test_every_kernel_is_counted_by_its_name():
    from hfext_lowbit import _kernels  # the interpreter must be on when it is imported

    assert {"gemv_kernel", "gemm_kernel", "sum_kernel", "grad_kernel"} <= set(vars(_kernels))
