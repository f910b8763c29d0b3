"""The statistical top-k and the feed-forward kernels against fp64, closed forms and published numbers."""

import pytest
import torch
from hfext_spark import _reference, spark_ffn, statistical_topk
from hfext_spark._launch import launches
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_hand(x, k, unbiased, soft, visible):
    """Row by row, by torch's own mean and std."""
    out = []
    for row, seen in zip(x, visible, strict=True):
        values = row[seen]
        if len(values) > k:
            level = torch.tensor(1 - k / len(values), dtype=torch.float64)
            theta = values.mean() + values.std(unbiased=unbiased) * torch.special.ndtri(level).item()
            values = (values - theta).clamp(min=0) if soft else values.masked_fill(values < theta, -torch.inf)
        empty = torch.full_like(row, 0.0 if soft else -torch.inf)
        out.append(empty.masked_scatter(seen, values))
    return torch.stack(out)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("width, k", [(37, 4), (700, 56), (5, 9), (300, 7.5)])
def test_values_and_gradients(width, k, mode, masked, unbiased):
    x = torch.randn(4, width, device=DEVICE).add_(3.0).requires_grad_()
    visible = torch.rand(4, width, device=DEVICE) > 0.3 if masked else torch.ones(4, width, device=DEVICE).bool()
    if masked:
        visible[1] = False
    before = launches.copy()
    y = statistical_topk(x, k, unbiased, mode, visible if masked else None)
    exact = x.detach().double().requires_grad_()
    wanted = by_hand(exact, k, unbiased, mode == "soft", visible)
    shown = wanted > -torch.inf
    assert torch.equal(y > -torch.inf, shown) and (y - wanted)[shown].abs().max() <= 2e-6
    g = torch.randn_like(x)
    (got,) = torch.autograd.grad(y.masked_fill(~shown, 0.0), x, g)
    (grad,) = torch.autograd.grad(wanted.masked_fill(~shown, 0.0), exact, g.double())
    assert (got - grad).abs().max() <= 5e-6
    assert (launches - before)["topk_forward"] == (launches - before)["topk_backward"] == 1


def test_the_numbers_of_the_formula():
    x = torch.arange(8.0, device=DEVICE)
    for unbiased, last in ((True, 0.84784428), (False, 0.95454983)):
        wanted = torch.tensor([0.0] * 6 + [last, last + 1], device=DEVICE)
        assert (statistical_topk(x, 2, unbiased) - wanted).abs().max() <= 1e-6
    q = [_reference.quantile(k, torch.tensor(d)).item() for k, d in ((8, 100), (5, 100), (256, 4096))]
    assert q == pytest.approx([1.405072, 1.644854, 1.534121], abs=1e-6)


def test_large_offsets_do_not_hurt():
    """Moments by blocks and not from the sum of squares: 1000 + noise of size 1 loses nothing but its own digits."""
    x = torch.randn(2, 3000, device=DEVICE)
    shifted = statistical_topk((x.double() + 1000).float(), 240)
    exact = _reference.statistical_topk((x.double() + 1000).float().double(), 240, True, True, None)
    assert (shifted - exact).abs().max() <= 2e-4


def test_scale_and_shift():
    x = torch.randn(3, 500, device=DEVICE)
    y = statistical_topk(x, 40)
    assert (statistical_topk(4 * x + 2, 40) - 4 * y).abs().max() <= 1e-5


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("unit, offset", [(1.0, 0.0), (1e-6, 0.0), (1.0, 3e5)])
def test_hard_keeps_what_reaches_the_threshold_at_any_scale_and_offset(unit, offset, kernel, monkeypatch):
    if not kernel:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.manual_seed(3)
    x = torch.randn(6, 700).mul(16).round() / 16
    x[3] = x[3].tanh().mul(16).round() / 16  # nothing lies 2.9 deviations above the mean
    x[4] = torch.arange(700).mul(377).remainder(700) / 16  # nor here, where the largest is alone
    x[5] = torch.linspace(0, 1, 700).round()
    for k, visible in ((1, None), (40, None), (40, torch.rand(6, 700) > 0.4)):
        shown = torch.ones_like(x, dtype=torch.bool) if visible is None else visible
        wanted = by_hand(x.double(), k, True, False, shown) > -torch.inf
        top = x.masked_fill(~shown, -torch.inf).amax(-1, keepdim=True)
        wanted = torch.where(wanted.any(-1, keepdim=True), wanted, shown & (x == top))
        given = (x * unit + offset).to(DEVICE).requires_grad_()
        y = statistical_topk(given, k, mode="hard", visible=None if visible is None else visible.to(DEVICE))
        assert torch.equal((y > -torch.inf).cpu(), wanted)
        assert torch.equal(y[wanted], given[wanted])
        (g,) = torch.autograd.grad(y.masked_fill(~wanted.to(DEVICE), 0.0).sum(), given)
        assert torch.equal(g.cpu(), wanted.float())


@pytest.mark.parametrize("k", [5, 30])
def test_a_deviation_at_its_floor_has_no_gradient(k, monkeypatch):
    x = torch.randn(3, 40, device=DEVICE).mul_(3e-7).requires_grad_()
    g = torch.randn(3, 40, device=DEVICE)
    ours = torch.autograd.grad(statistical_topk(x, k), x, g)[0]
    active = statistical_topk(x, k).detach() > 0
    assert active.any() == (k == 30)  # below the middle the floor lets all pass
    assert (ours - (g * active - (g * active).sum(-1, keepdim=True) / 40)).abs().max() <= 2e-6


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_rows_without_spread(mode):
    x = torch.full((2, 9), 2.5, device=DEVICE, requires_grad=True)
    y = statistical_topk(x, 2, mode=mode)
    assert torch.equal(y, torch.zeros_like(y) if mode == "soft" else x)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, torch.zeros_like(g) if mode == "soft" else torch.ones_like(g))


@pytest.mark.parametrize(
    "d, k, mean, spread", [(13824, 1106, 1106.0, 21), (1024, 82, 81.9, 5.4), (4096, 256, 256.3, 10)]
)
def test_how_many_are_left_of_normal_rows(d, k, mean, spread, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    counts = (statistical_topk(torch.randn(200, d), k) > 0).sum(-1).float()
    assert abs(counts.mean() - mean) < 4 * spread / 200**0.5 and counts.std() == pytest.approx(spread, rel=0.2)


def test_strides_dtypes_and_shapes():
    wide = torch.randn(3, 40, 2, device=DEVICE)
    assert torch.equal(statistical_topk(wide[..., 0], 5), statistical_topk(wide[..., 0].contiguous(), 5))
    assert torch.equal(statistical_topk(wide.transpose(1, 2), 5)[:, 1], statistical_topk(wide[..., 1], 5))
    visible = torch.rand(40, device=DEVICE) > 0.5
    both = statistical_topk(wide[..., 0], 5, visible=visible)
    assert torch.equal(both, statistical_topk(wide[..., 0], 5, visible=visible.expand(3, 40).contiguous()))
    low = wide[..., 0].bfloat16()
    exact = _reference.statistical_topk(low.double(), 5, True, True, None)
    assert (statistical_topk(low, 5).double() - exact).abs().max() <= 2**-7 * exact.max()
    assert statistical_topk(torch.zeros(0, 4, device=DEVICE), 2).shape == (0, 4)
    assert statistical_topk(torch.zeros(2, 0, device=DEVICE), 2).shape == (2, 0)


def test_the_operations_are_clean():
    x = torch.randn(3, 20, device=DEVICE, requires_grad=True)
    mask = torch.ones(3, 20, dtype=torch.uint8, device=DEVICE)
    torch.library.opcheck(torch.ops.hfext_spark.topk_forward, (x, mask, 4.0, True, True))
    given = [torch.randn(s, device=DEVICE) for s in ((2, 12), (20, 4), (20, 8), (20, 12))]
    torch.library.opcheck(torch.ops.hfext_spark.ffn_decode, (*given, 3, True))


def test_no_second_derivative_but_of_the_plain_path(monkeypatch):
    x = torch.randn(2, 9, device=DEVICE, requires_grad=True)
    (g,) = torch.autograd.grad(statistical_topk(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(g.sum(), x)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    visible = torch.rand(2, 9) > 0.2
    for shown in (None, visible):
        assert torch.autograd.gradcheck(lambda x: statistical_topk(x, 3, visible=shown), x)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: statistical_topk(x, 3, visible=shown), x)  # noqa: B023


def layer(d=40, r=16, units=300, out=24, dtype=torch.float32):
    shapes = ((units, r), (units, d - r), (units, out))
    return [torch.randn(s, device=DEVICE, dtype=dtype) / s[1] ** 0.5 for s in shapes]


def dense(x, k1, k2, v, k, unbiased=True):
    """Straight from the formula."""
    r = k1.shape[1]
    a = x[:, :r] @ k1.T
    if k < len(k1):
        level = torch.tensor(1 - k / len(k1), dtype=torch.float64)
        a = (
            a
            - a.mean(-1, True)
            - a.std(-1, correction=int(unbiased), keepdim=True) * torch.special.ndtri(level).item()
        ).relu()
    return (F.gelu(a) * (x[:, r:] @ k2.T)) @ v


@pytest.mark.parametrize("rows, k", [(1, 24), (3, 24), (2, 1), (2, 299), (2, 300), (9, 24)])
def test_the_sparse_path_equals_the_dense_one(rows, k):
    weights, x = layer(), torch.randn(rows, 40, device=DEVICE)
    before = launches.copy()
    y = spark_ffn(x, *weights, k)
    ran = launches - before
    sparse = rows <= 8 and k < 300
    assert all(ran[n] == sparse for n in ("ffn_predict", "ffn_compact", "ffn_gate", "ffn_output"))
    exact = dense(x.double(), *(w.double() for w in weights), k)
    assert (y - exact).abs().max() <= 2e-6 * max(1.0, exact.abs().max().item())
    learnt = spark_ffn(x.requires_grad_(), *weights, k)
    assert (learnt - exact).abs().max() <= 2e-6 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_plain_sparse_path_equals_the_dense_one(rows, unbiased, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weights, x = layer(dtype=torch.float64), torch.randn(rows, 40, dtype=torch.float64)
    before = launches.copy()
    assert (spark_ffn(x, *weights, 24, unbiased) - dense(x, *weights, 24, unbiased)).abs().max() <= 1e-12
    assert launches == before


def test_the_sparse_path_divides_by_the_count_where_it_is_told_so():
    weights, x = layer(units=30), torch.randn(2, 40, device=DEVICE)
    exact = dense(x.double(), *(w.double() for w in weights), 4, False)
    assert (spark_ffn(x, *weights, 4, False) - exact).abs().max() <= 2e-6 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_which_no_unit_is_active_give_zeros(dtype, kernel, monkeypatch):
    if not kernel:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weights, x = layer(units=60, dtype=dtype), torch.randn(4, 40, device=DEVICE, dtype=dtype)
    x[0] = x[2] = 0
    for rows in (x, x[:1], x[[0, 2]]):
        y = spark_ffn(rows, *weights, 5)
        assert y.dtype == dtype and y.shape == (len(rows), 24)
        exact = _reference.spark_ffn(rows.double(), *(w.double() for w in weights), 5, True)
        empty = (rows == 0).all(-1)
        assert torch.equal(y[empty], torch.zeros_like(y[empty]))
        assert (y - exact).abs().max() <= (2e-6 if dtype == torch.float32 else 0.1) * max(
            1.0, exact.abs().max().item()
        )
    assert y.abs().max() == 0 and spark_ffn(x, *weights, 5)[1].abs().max() > 0


def test_gradients_of_the_layer():
    given = [torch.randn(5, 40, device=DEVICE), *layer()]
    leaves = [t.requires_grad_() for t in given]
    exact = [t.detach().double().requires_grad_() for t in given]
    y, wanted = spark_ffn(*leaves, 24), dense(*exact, 24)
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(wanted, exact, g.double()), strict=True):
        assert (a - b).abs().max() <= 5e-6 * max(1.0, b.abs().max().item())


def test_layer_and_compilation():
    torch._dynamo.reset()
    from hfext_spark import layers

    weights, x = layer(), torch.randn(2, 3, 40, device=DEVICE)
    module = layers.SparkFFN()
    module.predictor, module.gate, module.value = (torch.nn.Parameter(w) for w in weights)
    module.k, module.unbiased = 24, True
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert (compiled(x) - module(x)).abs().max() <= 1e-6
    a, b = (torch.autograd.grad(f(x).sum(), module.predictor)[0] for f in (compiled, module))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda x: statistical_topk(x, 0.5), ValueError, "k is 0.5 but must be >= 1"),
        (lambda x: statistical_topk(x, "2"), TypeError, "k is '2'"),
        (lambda x: statistical_topk(x.long(), 2), TypeError, "x is torch.int64"),
        (lambda x: statistical_topk(x, 2, mode="firm"), ValueError, "'firm'"),
        (lambda x: statistical_topk(x, 2, visible=x), TypeError, "visible is torch.float32"),
        (lambda x: statistical_topk(x, 2, visible=x[:, :3] > 0), ValueError, "must broadcast"),
        (lambda x: spark_ffn(x, x[:, :4], x, x, 2), ValueError, "4 and 8 numbers"),
        (lambda x: spark_ffn(x, x, x[:, :0], x, 2), ValueError, "8 and 0 numbers"),
        (lambda x: spark_ffn(x, x[:, :4].double(), x[:, 4:], x, 2), TypeError, "must share one of"),
        (lambda x: spark_ffn(x, x[:1, :4], x[:, 4:], x, 2), ValueError, r"must be \[d_ff, r\]"),
        (lambda x: spark_ffn(x, x[:, :4], x[:, 4:], x, 0), ValueError, "k is 0"),
        (lambda x: spark_ffn(x, x[:, :4], x[:, 4:], x, 1.5), TypeError, "k is 1.5 but must be an integer >= 1"),
        (lambda x: spark_ffn(x.expand(9, 2, 8), x[:, :4], x[:, 4:], x, 1.5), TypeError, "k is 1.5"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.randn(2, 8))
