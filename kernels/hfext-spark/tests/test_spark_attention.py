"""The attention kernels against an fp64 loop over queries, option by option."""

import math

import pytest
import torch
from hfext_spark import _reference, spark_attention
from hfext_spark._launch import launches
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT, GRAD = 2e-6, 5e-6
TRAINED = ("spark_forward", "spark_delta", "spark_query_gradient", "spark_key_gradient")
DECODED = ("spark_moments", "spark_decode", "spark_combine")


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def one_query(q, k, v, seen, topk, r, gate, halves, unbiased, factor, kept):
    """o of one query of one head, straight from the formula; k [N, D], seen [N]."""
    D = len(q)
    r = r or D
    places = [*range(r)] if not halves else [*range(r // 2), *range(D // 2, D // 2 + r // 2)]
    if not gate:
        places = [*range(D)]
    others = [c for c in range(D) if c not in places]
    visible = torch.nonzero(seen)[:, 0]
    if not len(visible):
        return 0 * (q.sum() + k.sum()) + 0 * v.sum(0)
    s = k[visible][:, places] @ q[places] / math.sqrt(len(places)) * factor
    if len(visible) > topk:
        x = s.detach()
        level = torch.tensor(1 - topk / len(x), dtype=torch.float64)
        theta = x.mean() + x.std(unbiased=unbiased) * torch.special.ndtri(level).item()
        chosen = x >= theta if bool((x >= theta).any()) else x == x.max()
        visible, s = visible[chosen], s[chosen]
    w = torch.softmax(s, 0)
    if gate:
        w = w * F.softplus(k[visible][:, others] @ q[others] / math.sqrt(len(others)) * factor)
    return (w * kept[visible]) @ v[visible]


def expected(q, k, v, topk=256, r=None, gate=True, halves=False, unbiased=True, **kw):
    B, H, M, D = q.shape
    HK, N = k.shape[1:3]
    seen = torch.ones(B, H, M, N, dtype=torch.bool, device=DEVICE)
    if kw.get("causal"):
        seen &= torch.arange(N, device=DEVICE) <= torch.arange(M, device=DEVICE)[:, None] + N - M
    if "lo" in kw:
        j = torch.arange(N, device=DEVICE)
        seen &= ((j >= kw["lo"][..., None]) & (j < kw["hi"][..., None]))[:, None]
    if "keys" in kw:
        seen &= kw["keys"][:, None, None]
    if "mask" in kw:
        seen &= kw["mask"]
    kept = torch.ones(B, H, M, N, dtype=q.dtype, device=DEVICE)
    if kw.get("dropout_p"):
        kept = _reference.dropped(kw["seed"], B * H, M, N, kw["dropout_p"]).view(B, H, M, N).to(q.dtype)
    factor = kw.get("scale", D**-0.5) * D**0.5
    rows = [
        one_query(q[b, h, i], k[b, h * HK // H], v[b, h * HK // H], seen[b, h, i], topk, r, gate, halves, unbiased,
                  factor, kept[b, h, i])
        for b in range(B) for i in range(M) for h in range(H)
    ]  # fmt: skip
    return torch.stack(rows).view(B, M, H, -1)


def compare(B=1, H=1, HK=1, M=19, N=35, D=12, DV=None, learns=True, parts=0, dtype=None, pieces=1, **kw):
    kw = {name: make() if callable(make) else make for name, make in kw.items()}
    kw.setdefault("topk", 6)
    if kw.get("gate", True):
        kw.setdefault("r", D // 2)
    sizes = ((M, H, D), (N, HK, D), (N, HK, DV or D))
    q, k, v = (draw(B, n, h, d).transpose(1, 2) for n, h, d in sizes)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    leaves = [x.requires_grad_(learns) for x in (q, k, v)]
    before = launches.copy()
    o = spark_attention(*leaves, **kw, parts=parts)
    assert o.shape == (B, M, H, DV or D) and o.is_contiguous() and o.dtype == q.dtype
    exact = [x.detach().double().requires_grad_(learns) for x in leaves]
    wanted = [expected(*exact, **kw)]
    found = [o]
    if learns:
        do = torch.randn_like(o)
        found += torch.autograd.grad(o, leaves, do)
        wanted += torch.autograd.grad(wanted[0], exact, do.double())
    ran = launches - before
    assert all(ran[n] == (pieces if n == TRAINED[-1] else 1) for n in (TRAINED if learns else DECODED))
    for x, y, limit in zip(found, wanted, (OUT, GRAD, GRAD, GRAD), strict=False):
        if dtype is not None:  # one rounding, twice that where the interpreter cuts off instead of rounding
            limit = 2.0 ** (-8 if dtype == torch.bfloat16 else -11) * 3 * max(1.0, y.abs().max().item())
        assert (x - y).abs().max() <= limit
    return found


OPTIONS = {
    "plain": {},
    "no gate": dict(gate=False),
    "halves": dict(halves=True, r=4),
    "population": dict(unbiased=False, gate=False),
    "all are kept": dict(topk=35),
    "some rows keep all": dict(topk=25, causal=True),
    "the largest alone": dict(topk=1),
    "causal": dict(causal=True),
    "scale": dict(scale=0.4, causal=True),
    "keys": dict(keys=lambda: torch.rand(1, 35, device=DEVICE) > 0.4),
    "nothing seen": dict(keys=lambda: torch.zeros(1, 35, dtype=torch.bool, device=DEVICE)),
    "mask": dict(H=2, HK=2, mask=lambda: torch.rand(1, 2, 19, 35, device=DEVICE) > 0.4, halves=True),
    "mask of all heads": dict(mask=lambda: torch.rand(1, 1, 19, 35, device=DEVICE) > 0.4, gate=False),
    "intervals": dict(
        B=2,
        lo=lambda: torch.randint(0, 20, (2, 19), device=DEVICE, dtype=torch.int32),
        hi=lambda: torch.randint(10, 36, (2, 19), device=DEVICE, dtype=torch.int32),
    ),
    "dropout": dict(dropout_p=0.3, seed=lambda: torch.tensor([(3 << 40) + 17], device=DEVICE)),
    "grouped heads": dict(H=4, HK=2, M=9, N=20),
    "odd sizes": dict(D=21, r=5, DV=9, M=7, N=40),
    "wide": dict(D=72, r=40, halves=True, M=5, N=40),
}
OPTIONS["in pieces"] = dict(D=140, r=100, M=3, N=20, pieces=3)
OPTIONS["in pieces without gate"] = dict(D=140, gate=False, M=3, N=20, pieces=3)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(name):
    compare(**OPTIONS[name])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", ["plain", "no gate", "halves", "causal", "keys", "nothing seen", "population"])
def test_decoding(name, parts):
    compare(learns=False, M=2, H=2, parts=parts, **OPTIONS[name])


def test_decoding_with_masks_of_every_head():
    compare(learns=False, B=2, H=4, HK=2, M=1, N=70, mask=lambda: torch.rand(2, 4, 1, 70, device=DEVICE) > 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    compare(dtype=dtype, halves=True, causal=True, r=4)
    compare(dtype=dtype, learns=False, M=1, gate=False)


def test_any_split_of_the_keys_gives_the_same():
    q, k, v = draw(1, 2, 1, 16), draw(1, 1, 140, 16), draw(1, 1, 140, 16)
    whole = spark_attention(q, k, v, 20, r=8, parts=1)
    for parts in (2, 140):
        assert (spark_attention(q, k, v, 20, r=8, parts=parts) - whole).abs().max() <= 1e-6


def test_all_keys_kept_is_softmax_times_softplus():
    q, k, v = draw(1, 2, 9, 16).requires_grad_(), draw(1, 2, 20, 16), draw(1, 2, 20, 16)
    w = torch.softmax(q[..., :6] @ k[..., :6].mT / 6**0.5, -1) * F.softplus(q[..., 6:] @ k[..., 6:].mT / 10**0.5)
    assert (spark_attention(q, k, v, 20, r=6).transpose(1, 2) - w @ v).abs().max() <= 2e-6
    plain = F.scaled_dot_product_attention(q, k, v)
    assert (spark_attention(q, k, v, 99, gate=False).transpose(1, 2) - plain).abs().max() <= 2e-6


def test_equal_keys_are_all_kept():
    q, v = draw(1, 1, 5, 8), draw(1, 1, 12, 8)
    k = draw(1, 1, 1, 8).expand(1, 1, 12, 8)
    for learns in (False, True):
        o = spark_attention(q.clone().requires_grad_(learns), k, v, 2, gate=False)
        assert (o - v.mean(2, keepdim=True)).abs().max() <= 1e-6


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("gate", [True, False])
def test_small_scores_are_as_good_as_large_ones(gate, learns, monkeypatch):
    q, k, v = draw(1, 2, 7, 8) * 1e-3, draw(1, 2, 40, 8) * 1e-3, draw(1, 2, 40, 8)
    kw = dict(gate=gate, r=4 if gate else None)
    exact = expected(q.double(), k.double(), v.double(), 3, **kw)
    for _ in range(2):
        o = spark_attention(q.clone().requires_grad_(learns), k, v, 3, **kw)
        assert (o - exact).abs().max() <= OUT
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("topk", [1, 7])
@pytest.mark.parametrize("unit, offset", [(1.0, 0.0), (1e-6, 0.0), (1.0, 3e5)])
def test_forward_backward_and_decoding_keep_the_same_keys_at_any_scale_and_offset(unit, offset, topk, monkeypatch):
    """Scores are whole numbers, times a unit, with an offset; values tell which keys are kept."""
    torch.manual_seed(4)
    N, D = 60, 4
    q, k = torch.randint(-3, 4, (1, 5, 1, D)).float(), torch.randint(-3, 4, (1, 5, N, D)).float()
    q[0, 3], k[0, 3] = torch.tensor([1.0, 0, 0, 0]), torch.arange(N).remainder(2).float()[:, None].expand(N, D)
    q[0, 4], k[0, 4, :, 0] = torch.tensor([1.0, 0, 0, 0]), torch.arange(N).mul(17).remainder(N).float()
    s = (q @ k.mT)[0, :, 0].double()
    level = torch.special.ndtri(torch.tensor(1 - topk / N, dtype=torch.float64))
    theta = s.mean(-1, keepdim=True) + s.std(-1, keepdim=True) * level
    assert ((theta - theta.round()).abs() > 0.04).all()  # that fp32 can tell on which side a score lies at 3e5
    kept = torch.where((s >= theta).any(-1, keepdim=True), s >= theta, s == s.amax(-1, keepdim=True))
    assert topk > 1 or (kept[3].sum() == N // 2 and kept[4].sum() == 1)  # nothing reaches theta
    weights = torch.softmax((s * unit).masked_fill(~kept, -torch.inf), -1)
    q = torch.cat([q * unit, torch.full((1, 5, 1, 1), offset)], -1).to(DEVICE) * 16
    k = torch.cat([k, torch.ones(1, 5, N, 1)], -1).to(DEVICE)
    v = torch.eye(N, device=DEVICE).expand(1, 5, N, N).contiguous().requires_grad_()
    for _ in range(2):
        kw = dict(gate=False, scale=2.0**-4)
        trained = spark_attention(q, k, v, topk, **kw)
        (dv,) = torch.autograd.grad(trained.sum(), v)
        decoded = [spark_attention(q, k, v.detach(), topk, **kw, parts=parts) for parts in (1, 3)]
        for w in (trained.detach(), dv[None, :, :, :, 0], *decoded):
            w = w[0, 0].cpu()
            assert (w[~kept] == 0).all() and (w[kept & (weights > 1e-6)] > 0).all()
            assert (w - weights).abs().max() <= (0.05 if offset else 2e-6)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_whose_threshold_nothing_reaches_has_a_gradient(dtype):
    """Ninety keys of two kinds, and one wanted: the scores of the better kind are made again by each kernel."""
    kinds = draw(1, 1, 2, 32)
    k, q, v = kinds[:, :, torch.arange(90) % 2], draw(1, 1, 4, 32), draw(1, 1, 90, 32)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    o = spark_attention(q, k, v, 1, gate=False)
    better = (q @ kinds.to(dtype).mT)[0, 0].argmax(-1)
    wanted = torch.stack([v[0, 0, b::2].float().mean(0) for b in better.tolist()])
    assert (o[0, :, 0] - wanted).abs().max() <= (OUT if dtype == torch.float32 else 2**-7)
    (dv,) = torch.autograd.grad(o.sum(), v)
    counts = torch.stack([(better == b).sum() for b in (0, 1)]).float() / 45
    assert (dv[0, 0] - counts[torch.arange(90, device=DEVICE) % 2][:, None]).abs().max() <= (
        GRAD if dtype == torch.float32 else 2**-9
    )


def test_the_number_of_kept_keys_is_about_k():
    x = torch.randn(64, 4096, device=DEVICE, dtype=torch.float64)
    counts = _reference.kept(x, 256, True, None).sum(-1).double()
    assert abs(counts.mean() - 256) < 6 and 5 < counts.std() < 16


def test_every_run_is_the_same_bit_by_bit():
    torch.manual_seed(1)
    first = compare(M=9, N=40, halves=True, causal=True, r=4)
    torch.manual_seed(1)
    for one, two in zip(first, compare(M=9, N=40, halves=True, causal=True, r=4), strict=True):
        assert torch.equal(one, two)


def test_strides_are_taken_as_they_are():
    wide = draw(1, 9, 3, 2, 32)
    q, k, v = (wide[:, :, n, :, ::2].transpose(1, 2) for n in range(3))
    for kw in (dict(r=8, halves=True), dict(gate=False)):
        packed = spark_attention(q.contiguous(), k.contiguous(), v.contiguous(), 3, **kw)
        assert torch.equal(spark_attention(q, k, v, 3, **kw), packed)


def test_the_operations_are_clean():
    q, k, v = (draw(1, 1, 5, 8).requires_grad_() for _ in range(3))
    keys = torch.ones(1, 5, dtype=torch.uint8, device=DEVICE)
    numbers = (3, 4, True, True, True, 0.3)
    torch.library.opcheck(
        torch.ops.hfext_spark.attention_forward, (q, k, v, None, None, keys, None, None, *numbers, 0.0)
    )
    fixed = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.hfext_spark.attention_decode, (*fixed, None, None, keys, None, *numbers, 0))


def test_it_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(spark_attention, fullgraph=True, backend="aot_eager")
    q, k, v = (draw(1, 2, 6, 8).requires_grad_() for _ in range(3))
    kw = dict(r=4, causal=True)
    one, two = compiled(q, k, v, 3, **kw), spark_attention(q, k, v, 3, **kw)
    for a, b in zip(torch.autograd.grad(one.sum(), (q, k, v)), torch.autograd.grad(two.sum(), (q, k, v)), strict=True):
        assert torch.equal(a, b)


def test_nothing_to_do():
    assert spark_attention(draw(1, 2, 0, 16), draw(1, 2, 5, 16), draw(1, 2, 5, 16), r=4).shape == (1, 0, 2, 16)
    for learns in (False, True):
        q = draw(1, 2, 3, 16).requires_grad_(learns)
        none = spark_attention(q, draw(1, 2, 0, 16), draw(1, 2, 0, 16), r=4)
        assert torch.equal(none, torch.zeros(1, 3, 2, 16, device=DEVICE))


def test_there_is_no_second_derivative_and_no_zero_in_its_place():
    q, k, v = (draw(1, 1, 4, 8).requires_grad_() for _ in range(3))
    (gradient,) = torch.autograd.grad(spark_attention(q, k, v, 2, r=4).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), q)


def test_the_plain_path_has_a_second_derivative(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(q, k, v):
        return spark_attention(q, k, v, 2, r=2)

    assert torch.autograd.gradcheck(run, (q, k, v)) and torch.autograd.gradgradcheck(run, (q, k, v))


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(r=None), ValueError, "r is None"),
        (dict(r=0), ValueError, r"r is 0 but must be an integer in \[1, 7\]"),
        (dict(r=8), ValueError, "r is 8"),
        (dict(r=3, halves=True), ValueError, "both must be even"),
        (dict(topk=0), ValueError, "topk is 0 but must be >= 1"),
        (dict(topk=True), TypeError, "topk is True"),
        (dict(topk=2.5), TypeError, "topk is 2.5 but must be an integer"),
        (dict(q=torch.zeros(1, 2, 5, 8, dtype=torch.long)), TypeError, "must share one of"),
        (dict(q=torch.zeros(1, 3, 5, 8)), ValueError, "not a multiple"),
        (dict(lo=torch.zeros(1, 5, dtype=torch.int32)), ValueError, "given together"),
        (dict(keys=torch.ones(1, 4, dtype=torch.bool)), ValueError, "keys is"),
        (dict(mask=torch.ones(1, 1, 5, 5)), ValueError, "mask is torch.float32"),
        (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0"),
    ],
)
def test_bad_arguments(change, error, match):
    call = dict(q=torch.zeros(1, 2, 5, 8), k=torch.zeros(1, 2, 5, 8), v=torch.zeros(1, 2, 5, 8), topk=3, r=4)
    with pytest.raises(error, match=match):
        spark_attention(**{**call, **change})
