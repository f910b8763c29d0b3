"""Pattention against the textbook in float64: values, gradients, repeatability, and what is refused."""

import hfext_pattention
import pytest
import torch
from hfext_pattention import MODES, _launch, _reference, pattention, pattention_reference
from torch import nn

KERNELS = {"pattention_statistics_kernel": 2, "pattention_rows_kernel": 2, "pattention_tokens_kernel": 2}


def make(rows=37, tokens=71, d_in=20, d_out=13, dtype=torch.float32):
    sizes = ((rows, d_in), (tokens, d_in), (tokens, d_out))
    return [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def exact(inputs, grad, **options):
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    out = pattention_reference(*inputs, **options)
    return out, *torch.autograd.grad(out, inputs, grad.double())


def near(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert ((ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item() <= tolerance


def test_golden_numbers():
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    values = torch.arange(8, dtype=torch.float64).view(4, 2)
    want = torch.tensor([[12.522525, 15.702250], [-1.246878, -1.380918]], dtype=torch.float64)
    torch.testing.assert_close(pattention(x, keys, values), want, rtol=0, atol=1e-6)
    # With sqrt(8) in place of sqrt(4), as when tokens are doubled by zeros and the scale follows.
    grown = pattention(x, torch.cat([keys, 0 * keys]), torch.cat([values, values]))
    torch.testing.assert_close(grown[0], torch.tensor([19.0914, 23.9591], dtype=torch.float64), rtol=0, atol=1e-4)


def test_one_token_by_hand():
    x, k, v = make(5, 1, 3, 2, torch.float64)
    sign = (x @ k.t()).sign()
    torch.testing.assert_close(pattention(x, k, v), nn.functional.gelu(sign) @ v)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_values_and_gradients(mode, masked, dropout):
    inputs = make()
    mask = torch.rand(37, 71) > 0.3 if masked else None
    if masked:
        mask[4] = False
    grad = torch.randn(37, 13)
    before = _launch.launches.copy()
    torch.manual_seed(1)
    out = pattention(*inputs, mode=mode, mask=mask, dropout=dropout)
    ours = torch.autograd.grad(out, inputs, grad)
    assert _launch.launches - before == KERNELS
    torch.manual_seed(1)
    seed = torch.randint(1 << 31, ())
    keep = _reference.keep_mask(seed, 0, 37, 71, dropout) if dropout else None
    kept = torch.arange(37) != 4 if masked and mode == "softmax" else slice(None)  # softmax over nothing: no gradient
    if masked and mode == "softmax":
        assert not out[4].any() and not ours[0][4].any()
        inputs = [inputs[0][kept], *inputs[1:]]
        mask, grad, keep = mask[kept], grad[kept], None if keep is None else keep[kept]
    want, *theirs = exact(inputs, grad, mode=mode, mask=mask, keep=keep, dropout=dropout)
    near(out[kept], want, 2e-6)
    for one, two in zip((ours[0][kept], *ours[1:]), theirs, strict=True):
        near(one, two, 5e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 33, 7, 70), (65, 5, 33, 64), (2, 64, 130, 3)])
def test_odd_sizes(sizes):
    inputs = make(*sizes)
    grad = torch.randn(sizes[0], sizes[3])
    out = pattention(*inputs)
    want, *theirs = exact(inputs, grad)
    near(out, want, 2e-6)
    for one, two in zip(torch.autograd.grad(out, inputs, grad), theirs, strict=True):
        near(one, two, 5e-6)


@pytest.mark.parametrize("mode", MODES)
def test_plain_torch_is_the_same(mode, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(_reference, "CHUNK", 71 * 10)  # four chunks, the last one short
    inputs = make()
    mask, grad = torch.rand(71) > 0.3, torch.randn(37, 13)
    before = _launch.launches.copy()
    torch.manual_seed(1)
    out = pattention(*inputs, tau=3.0, mode=mode, mask=mask, dropout=0.2)
    ours = torch.autograd.grad(out, inputs, grad)
    assert _launch.launches == before
    torch.manual_seed(1)
    keep = _reference.keep_mask(torch.randint(1 << 31, ()), 0, 37, 71, 0.2)
    want, *theirs = exact(inputs, grad, tau=3.0, mode=mode, mask=mask, keep=keep, dropout=0.2)
    near(out, want, 2e-6)
    for one, two in zip(ours, theirs, strict=True):
        near(one, two, 5e-6)


@pytest.mark.parametrize("mode", MODES)
def test_finite_differences(mode):
    inputs = make(4, 6, 3, 2, torch.float64)
    mask = torch.rand(4, 6) > 0.2
    assert torch.autograd.gradcheck(lambda *args: pattention(*args, mode=mode, mask=mask), inputs)


@pytest.mark.parametrize("kernel", [True, False])
def test_bf16(kernel, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if kernel else "0")
    inputs = make(dtype=torch.bfloat16)
    grad = torch.randn(37, 13).bfloat16()
    out = pattention(*inputs)
    want, *theirs = exact(inputs, grad)
    assert out.dtype == torch.bfloat16
    for one, two in zip((out, *torch.autograd.grad(out, inputs, grad)), (want, *theirs), strict=True):
        near(one, two, 2e-2)


def test_the_share_that_dropout_keeps_and_its_independence():
    for seed in (0, 1, 2**31 - 1):
        keep = _reference.keep_mask(torch.tensor(seed), 0, 512, 384, 0.25).float()
        assert keep.mean().item() == pytest.approx(0.75, abs=0.005)
        assert keep.mean(0).std().item() == pytest.approx((0.75 * 0.25 / 512) ** 0.5, rel=0.15)
        assert keep.mean(1).std().item() == pytest.approx((0.75 * 0.25 / 384) ** 0.5, rel=0.15)
        joint = (keep[1:] * keep[:-1]).mean() + (keep[:, 1:] * keep[:, :-1]).mean()
        assert joint.item() == pytest.approx(2 * 0.75**2, abs=0.01)
    other = _reference.keep_mask(torch.tensor(1), 0, 64, 64, 0.5) == _reference.keep_mask(
        torch.tensor(2), 0, 64, 64, 0.5
    )
    assert other.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_scale_of_inputs_and_order_of_tokens_do_not_matter():
    x, k, v = make(dtype=torch.float64)
    out = pattention(x, k, v)
    torch.testing.assert_close(pattention(7.5 * x, k, v), out)
    order = torch.randperm(71)
    torch.testing.assert_close(pattention(x, k[order], v[order]), out)


@pytest.mark.parametrize("mode", MODES[:2])
def test_zero_keys_change_nothing_while_tau_is_kept(mode):
    x, k, v = make(dtype=torch.float64)
    tau = 71**0.5
    grown = pattention(
        x, torch.cat([k, torch.zeros(40, 20).double()]), torch.cat([v, torch.randn(40, 13).double()]), tau, mode
    )
    torch.testing.assert_close(grown, pattention(x, k, v, mode=mode), rtol=1e-13, atol=1e-13)


def test_rows_of_zeros_give_zeros():
    for kernel in ("1", "0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", kernel)
            x, k, v = make()
            x.data[3] = 0
            out = pattention(x, k, v)
            grads = torch.autograd.grad(out.sum(), (x, k, v))
            assert not out[3].any() and not grads[0][3].any() and all(g.isfinite().all() for g in grads)


def test_the_same_bits_in_every_run_and_any_strides():
    x, k, v = make(66, 70)

    def once(x, k, v):
        out = pattention(x, k, v)
        return out, *torch.autograd.grad(out, (x, k, v), torch.ones(1, 1).expand(66, 13))

    assert all(torch.equal(a, b) for a, b in zip(once(x, k, v), once(x, k, v), strict=True))
    turned = x.t().contiguous().t()
    assert torch.equal(pattention(turned, k, v), pattention(x, k, v))
    assert torch.equal(pattention(x.view(2, 3, 11, 20), k, v).view(66, 13), pattention(x, k, v))


def test_custom_operation_and_compile():
    inputs = make(5, 9, 4, 3)
    mask = torch.rand(5, 9) > 0.3
    forward = hfext_pattention.pattention.__globals__["_forward"]
    torch.library.opcheck(forward, (*inputs, torch.tensor(3.0), mask, torch.tensor(5), MODES[0], 0.1))

    def step(x, k, v):
        return pattention(x, k, v, mask=mask, dropout=0.0).square().sum()

    want = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, two in zip(torch.autograd.grad(compiled(*inputs), inputs), want, strict=True):
        torch.testing.assert_close(one, two)
    dropped = torch.compile(lambda x, k, v: pattention(x, k, v, dropout=0.5), fullgraph=True, backend="aot_eager")
    assert dropped(*inputs).shape == (5, 3)


def test_autocast_and_no_rows():
    x, k, v = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert pattention(x, k, v).dtype == torch.bfloat16
    empty = torch.zeros(0, 20, requires_grad=True)
    out = pattention(empty, k, v)
    out.sum().backward()
    assert out.shape == (0, 13) and empty.grad.shape == (0, 20) and not k.grad.any()


def test_second_derivatives_are_refused():
    x, k, v = make(4, 6, 3, 2)
    (dx,) = torch.autograd.grad(pattention(x, k, v).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not require grad|autograd"):
        dx.square().sum().backward()


def test_the_hub_layer_computes_the_same():
    class Module(nn.Module):
        def __init__(self, keys, values):
            super().__init__()
            self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)
            self.register_buffer("tau", torch.tensor(2.0))
            self.mode, self.dropout = MODES[1], 0.0

    x, k, v = make()
    layer = hfext_pattention.layers.Pattention
    assert torch.equal(layer.forward(Module(k.detach(), v.detach()), x), pattention(x, k, v, 2.0, MODES[1]))
    assert layer.has_backward and layer.can_torch_compile and "__init__" not in vars(layer)


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(mode="relu"), ValueError, "mode is 'relu' but must be one of l2_norm_gelu"),
        (dict(dropout=1.0), ValueError, "dropout is 1.0"),
        (dict(x=torch.zeros(2, 3)), ValueError, "must be the 4 of the keys"),
        (dict(x=torch.zeros(2, 4).bfloat16()), TypeError, "must have one dtype"),
        (dict(keys=torch.zeros(0, 4), values=torch.zeros(0, 2)), ValueError, "at least one token"),
        (dict(values=torch.zeros(5, 2)), ValueError, r"\(6, 4\) and \(5, 2\)"),
        (dict(mask=torch.zeros(6)), TypeError, "mask is torch.float32"),
        (dict(mask=torch.zeros(5, dtype=torch.bool)), ValueError, r"mask has shape \(5,\)"),
    ],
)
def test_bad_input_is_named(change, error, match):
    arguments = dict(x=torch.zeros(2, 4), keys=torch.zeros(6, 4), values=torch.zeros(6, 2)) | change
    with pytest.raises(error, match=match):
        pattention(**arguments)
