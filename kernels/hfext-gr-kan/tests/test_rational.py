"""Group-rational activations against formulas in float64: values, gradients, repeatability, and what is refused."""

import math

import hfext_gr_kan
import pytest
import torch
from hfext_gr_kan import _launch, _reference, rational, rational_reference

SWISH = (
    [3.0548797e-07, 0.50000079, 0.24999783, 0.053266283, 0.0058030346, 0.0002751961],
    [-4.111555e-06, 0.10652899, -1.2690007e-06, 0.00055023313],
)
FORMS = hfext_gr_kan.DENOMINATORS


def make(shape=(7, 24), groups=8, m=5, n=4, dtype=torch.float32, shared=False):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    a = torch.randn(1 if shared else groups, m + 1, dtype=torch.float64) / 2
    b = torch.randn(groups, n, dtype=torch.float64) / 2
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return x.requires_grad_(), a.to(kind).requires_grad_(), b.to(kind).requires_grad_()


def by_hand(x, a, b, form):
    """One scalar in Python's float64."""
    p = sum(c * x**i for i, c in enumerate(a))
    if form == "abs_terms":
        return p / (1 + sum(abs(c) * abs(x) ** j for j, c in enumerate(b, 1)))
    return p / (1 + abs(sum(c * x**j for j, c in enumerate(b, 1))))


def exact(x, a, b, form, grad):
    """Value and gradients in float64 by torch's own derivatives of the textbook formula."""
    inputs = [t.detach().double().requires_grad_() for t in (x, a, b)]
    y = rational_reference(*inputs, form)
    found = torch.autograd.grad(y, inputs, grad.double(), allow_unused=True)
    return y, *(torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True))


def near(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    if not ours.numel():
        return
    scale = theirs.abs().max().clamp(min=1)
    assert ((ours.double() - theirs).abs().max() / scale).item() <= tolerance


def test_the_formula_by_hand():
    x, a, b = make((3, 6), groups=3, dtype=torch.float64)
    for form in FORMS:
        y = rational(x, a, b, form)
        for r in range(3):
            for c in range(6):
                want = by_hand(x[r, c].item(), a[c // 2].tolist(), b[c // 2].tolist(), form)
                assert y[r, c].item() == pytest.approx(want, rel=1e-12)


def test_golden_numbers_of_swish():
    a, b = (torch.tensor(c, dtype=torch.float64)[None] for c in SWISH)
    y = rational(torch.tensor([[5.0, 10.0, -1.0]], dtype=torch.float64), a, b)
    assert y[0].tolist() == pytest.approx([4.964720, 9.839748, -0.26894159], abs=5e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shape": (65, 24), "shared": True},
        {"shape": (2, 3, 5, 24), "groups": 1},
        {"shape": (33, 2 * 67), "groups": 2},
        {"shape": (3, 1100), "groups": 1},
        {"shape": (9, 7), "groups": 7, "m": 1, "n": 0},
        {"shape": (9, 12), "groups": 4, "m": 8, "n": 6},
        {"shape": (9, 12), "groups": 4, "m": 2, "n": 1},
        {"shape": (9, 12), "groups": 4, "m": 3, "n": 2},
        {"shape": (9, 12), "groups": 4, "m": 4, "n": 3},
        {"shape": (9, 12), "groups": 4, "m": 6, "n": 5},
        {"shape": (9, 12), "groups": 4, "m": 7, "n": 6},
    ],
    ids=str,
)
def test_values_and_gradients(form, options):
    x, a, b = make(**options)
    grad = torch.randn(x.shape)
    before = _launch.launches.copy()
    y = rational(x, a, b, form)
    y.backward(grad)
    ran = _launch.launches - before
    assert ran == {"rational_forward_kernel": 1, "rational_backward_kernel": 1, "rational_reduce_kernel": 1}
    want, dx, da, db = exact(x, a, b, form, grad)
    near(y, want, 2e-6)
    for ours, theirs in ((x.grad, dx), (a.grad, da), (b.grad, db)):
        near(ours, theirs, 5e-6)


@pytest.mark.parametrize("form", FORMS)
def test_kernel_in_float64_by_finite_differences(form):
    x, a, b = make((3, 4), groups=2, m=3, n=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: rational(*args, form), (x, a, b))


@pytest.mark.parametrize("form", FORMS)
def test_plain_torch_is_the_same(form, monkeypatch):
    x, a, b = make((130, 24))
    grad = torch.randn(x.shape)
    want, *grads = exact(x, a, b, form, grad)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(_reference, "CHUNK", 24 * 50)  # three chunks, the last one short
    before = _launch.launches.copy()
    y = rational(x, a, b, form)
    y.backward(grad)
    assert _launch.launches == before
    near(y, want, 2e-6)
    for ours, theirs in zip((x.grad, a.grad, b.grad), grads, strict=True):
        near(ours, theirs, 5e-6)
    x64, a64, b64 = make((3, 4), groups=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: rational(*args, form), (x64, a64, b64))


@pytest.mark.parametrize("kernel", [True, False])
def test_bf16_and_fp16_are_computed_in_float32(kernel, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if kernel else "0")
    for dtype, ulp in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        x, a, b = make((17, 24), dtype=dtype)
        x.data[0, 0] = 20.0  # its fifth power is no float16
        grad = torch.randn(x.shape).to(dtype)
        y = rational(x, a, b)
        y.backward(grad)
        assert y.dtype == x.grad.dtype == dtype and a.grad.dtype == b.grad.dtype == torch.float32
        want, dx, da, db = exact(x, a, b, "abs_terms", grad)
        torch.testing.assert_close(y.double(), want, rtol=ulp, atol=1e-6)
        torch.testing.assert_close(x.grad.double(), dx, rtol=ulp, atol=1e-6)
        near(a.grad, da, 5e-6)
        near(b.grad, db, 5e-6)


def test_strides_of_input_and_gradient():
    x, a, b = make((24, 9))
    view = x.t()
    grad = torch.randn(9, 1).expand(9, 24)
    y = rational(view, a, b)
    y.backward(grad)
    want, dx, da, _ = exact(view, a, b, "abs_terms", grad)
    near(y, want, 2e-6)
    near(x.grad.t(), dx, 5e-6)
    near(a.grad, da, 5e-6)
    sliced, *_ = make((5, 48))
    near(rational(sliced[:, 3:27], a, b), rational_reference(sliced[:, 3:27].double(), a, b), 2e-6)


def test_no_rows():
    _, a, b = make()
    x = torch.zeros(0, 24, requires_grad=True)
    rational(x, a, b).sum().backward()
    assert x.grad.shape == (0, 24) and not a.grad.any() and not b.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_in_every_run(form):
    x, a, b = make((150, 48))
    grad = torch.randn(x.shape)

    def once():
        y = rational(x, a, b, form)
        return y, *torch.autograd.grad(y, (x, a, b), grad)

    assert all(torch.equal(one, two) for one, two in zip(once(), once(), strict=True))


def test_identity_is_exact_and_its_denominator_learns():
    x = torch.randn(6, 8)
    a = torch.tensor([[0.0, 1, 0, 0, 0, 0]])
    for form in FORMS:
        b = torch.zeros(4, 4, requires_grad=True)
        y = rational(x, a, b, form)
        assert torch.equal(y, x)
        y.sum().backward()
        power = x.abs() if form == "abs_terms" else x
        first = -(x * power).view(6, 4, 2).sum((0, 2))
        torch.testing.assert_close(b.grad[:, 0], first)


def test_sign_conventions_at_zero():
    """|x| has slope 0 at 0, |b| slope 1 at b = 0, and -0 counts as 0."""
    a = torch.tensor([[2.0, 3.0]], requires_grad=True)
    b = torch.tensor([[5.0]], requires_grad=True)
    x = torch.tensor([[0.0, -0.0]], requires_grad=True)
    rational(x, a, b).sum().backward()
    assert x.grad.tolist() == [[3.0, 3.0]] and b.grad.tolist() == [[0.0]]


def test_groups_are_blocks_of_channels():
    x, a, b = make((5, 24), groups=4)
    order = torch.tensor([2, 0, 3, 1])
    y = rational(x, a, b)
    moved = rational(x.view(5, 4, 6)[:, order].reshape(5, 24), a[order], b[order])
    assert torch.equal(moved.view(5, 4, 6), y.view(5, 4, 6)[:, order])
    parts = [rational(part, a[i : i + 1], b[i : i + 1]) for i, part in enumerate(x.split(6, -1))]
    assert torch.equal(torch.cat(parts, -1), y)


def test_denominator_is_at_least_one():
    x = torch.linspace(-50, 50, 64).view(8, 8).double()
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for form in FORMS:
        y = rational(x, one, torch.randn(8, 6, dtype=torch.float64), form)
        assert (y <= 1).all() and (y > 0).all()


@pytest.mark.slow
def test_a_million_elements_within_1e_5(monkeypatch):
    """Sums of 1e6 terms: partial sums in float32 and the rest in float64 keep five digits."""
    for kernel in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", kernel)
        x, a, b = make((4096, 256), groups=2)
        grad = torch.rand(x.shape)
        rational(x, a, b).backward(grad)
        _, _, da, db = exact(x, a, b, "abs_terms", grad)
        assert ((a.grad - da).norm() / da.norm()).item() < 1e-5
        assert ((b.grad - db).norm() / db.norm()).item() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_custom_operation_and_compile(form):
    x, a, b = make((5, 24))
    torch.library.opcheck(hfext_gr_kan.rational.__globals__["_forward"], (x, a, b, form))

    def step(x, a, b):
        return rational(x * 2, a, b, form).square().sum()

    want = torch.autograd.grad(step(x, a, b), (x, a, b))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, a, b), (x, a, b))
    for one, two in zip(found, want, strict=True):
        torch.testing.assert_close(one, two)


def test_autocast_keeps_float32_and_the_dtype_of_the_input():
    x, a, b = make((5, 24))
    with torch.autocast("cpu", torch.bfloat16):
        y = rational(x, a, b)
        low = rational(x.bfloat16(), a, b)
    assert y.dtype == torch.float32 and low.dtype == torch.bfloat16
    assert torch.equal(y, rational(x, a, b))


def test_the_hub_layer_computes_the_same():
    class Module(torch.nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.numerator_bias, self.denominator_bias = torch.nn.Parameter(a), torch.nn.Parameter(b)
            self.denominator = "abs_sum"

    x, a, b = make()
    layer = hfext_gr_kan.layers.GroupRational
    y = layer.forward(Module(a.detach(), b.detach()), x)
    assert torch.equal(y, rational(x, a, b, "abs_sum"))
    assert layer.has_backward and layer.can_torch_compile and "__init__" not in vars(layer)


def test_second_derivatives_are_refused():
    x, a, b = make()
    (dx,) = torch.autograd.grad(rational(x, a, b).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not require grad|autograd"):
        dx.square().sum().backward()


def test_large_values_stay_finite():
    x = torch.tensor([[1e7, -1e7, 1e4, -3e4]], requires_grad=True)
    a, b = (torch.tensor(c)[None] for c in SWISH)
    y = rational(x, a, b)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    want, dx, *_ = exact(x, a, b, "abs_terms", torch.ones(1, 4))
    assert math.isclose(y[0, 0].item(), want[0, 0].item(), rel_tol=1e-5)
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(form="signed"), ValueError, "form is 'signed' but must be one of abs_terms, abs_sum"),
        (dict(x=torch.zeros(24)), ValueError, "1 dimensions"),
        (dict(x=torch.zeros(2, 20)), ValueError, "20 channels, which 8 groups do not divide"),
        (dict(x=torch.zeros(2, 24, dtype=torch.int32)), TypeError, "x is torch.int32"),
        (dict(numerator=torch.zeros(8, 1)), ValueError, "numerator has shape"),
        (dict(numerator=torch.zeros(8, 10)), ValueError, "2 to 9 coefficients"),
        (dict(denominator=torch.zeros(8, 7)), ValueError, "0 to 6 coefficients"),
        (dict(denominator=torch.zeros(4, 3)), ValueError, "must be equal, or 1"),
    ],
)
def test_bad_input_is_named(change, error, match):
    arguments = dict(x=torch.zeros(2, 24), numerator=torch.zeros(8, 6), denominator=torch.zeros(8, 4)) | change
    with pytest.raises(error, match=match):
        rational(**arguments)
