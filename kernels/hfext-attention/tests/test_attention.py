"""The kernels against the same formula in fp64, shape by shape and modifier by modifier."""

import pytest
import torch
from hfext_attention import _reference, attention
from hfext_attention._launch import launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT, GRAD = 2e-6, 5e-6
KERNELS = ("attention_forward", "attention_query_gradient", "attention_key_gradient")


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def reference(q, k, v, kw):
    """o and lse in fp64 from a dense mask of its own making: every pair is looked at."""
    B, H, M, D = q.shape
    HK, N = k.shape[1:3]
    k, v = k.repeat_interleave(H // HK, 1), v.repeat_interleave(H // HK, 1)
    s = torch.einsum("bhid,bhjd->bhij", q, k) * kw.get("scale", D**-0.5)
    if "softcap" in kw:
        s = kw["softcap"] * torch.tanh(s / kw["softcap"])
    if "bias" in kw:
        s = s + kw["bias"]
    off = N - M
    i, j = torch.arange(M, device=DEVICE)[:, None], torch.arange(N, device=DEVICE)[None]
    if "alibi_slopes" in kw:
        s = s - kw["alibi_slopes"][:, None, None] * (j - i - off).abs()
    seen = torch.ones(B, H, M, N, dtype=torch.bool, device=DEVICE)
    if kw.get("causal"):
        seen &= j <= i + off
    window = kw.get("window")
    if isinstance(window, int):
        seen &= j > i + off - window
    elif window is not None:
        left, right = window
        seen &= (left < 0) | (j >= i + off - left)
        seen &= (right < 0) | (j <= i + off + right)
    if "lo" in kw:
        seen &= ((j >= kw["lo"][..., None]) & (j < kw["hi"][..., None]))[:, None]
    if "keys" in kw:
        seen &= kw["keys"][:, None, None]
    if "mask" in kw:
        seen &= kw["mask"]
    e = torch.where(seen, s, -torch.inf)
    top = e.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    if "sink" in kw:
        top = torch.maximum(top, kw["sink"].detach()[None, :, None, None])
    e = (e - top).exp()
    z = e.sum(-1)
    if "sink" in kw:
        z = z + (kw["sink"][None, :, None] - top[..., 0]).exp()
    p = e / torch.where(z == 0, 1.0, z)[..., None]
    if kw.get("dropout_p"):
        p = p * _reference.kept(kw["seed"], B * H, M, N, kw["dropout_p"]).view(B, H, M, N)
    lse = torch.where(z == 0, -torch.inf, torch.where(z == 0, 1.0, z).log() + top[..., 0])
    return torch.einsum("bhij,bhjd->bhid", p, v).transpose(1, 2), lse


def compare(B=1, H=2, HK=1, M=37, N=50, D=16, DV=None, learns=True, **kw):
    kw = {name: make() if callable(make) else make for name, make in kw.items()}
    DV = DV or D
    q, k, v = (draw(B, n, h, d).transpose(1, 2) for n, h, d in ((M, H, D), (N, HK, D), (N, HK, DV)))
    leaves = [q, k, v, *(kw[name] for name in ("bias", "sink") if name in kw)]
    for x in leaves:
        x.requires_grad_(learns)
    before = launches.copy()
    o, lse = attention(q, k, v, return_lse=True, **kw)
    assert o.shape == (B, M, H, DV) and o.is_contiguous() and lse.shape == (B, H, M)
    assert (launches - before)[KERNELS[0] if learns else "attention_decode"] == 1

    twin = {id(x): x.detach().double().requires_grad_(learns) for x in leaves}
    floats = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in kw.items()}
    expected, expected_lse = reference(
        *(twin[id(x)] for x in (q, k, v)), {n: twin.get(id(kw[n]), x) for n, x in floats.items()}
    )
    assert (o - expected).abs().max() <= OUT
    seen = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen) and bool(((lse - expected_lse)[seen].abs() <= OUT).all())
    if not learns:
        return
    do, dlse = torch.randn_like(o), torch.randn_like(lse) * seen
    got = torch.autograd.grad([o, torch.where(seen, lse, 0.0)], leaves, [do, dlse])
    wanted = torch.autograd.grad(
        [expected, torch.where(seen, expected_lse, 0.0)], [twin[id(x)] for x in leaves], [do.double(), dlse.double()]
    )
    for x, mine, theirs in zip(leaves, got, wanted, strict=True):
        assert mine.shape == x.shape and mine.dtype == x.dtype
        assert (mine - theirs).abs().max() <= GRAD
    assert all((launches - before)[name] == 1 for name in KERNELS)
    assert (launches - before)["attention_bias_gradient"] == ("bias" in kw)


MODIFIERS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(causal=True, window=9),
    "window of one": dict(causal=True, window=1),
    "both sides": dict(window=(4, 7)),
    "left side": dict(window=(4, -1)),
    "soft cap": dict(softcap=1.5),
    "sink": dict(sink=lambda: draw(2) * 2),
    "bias": dict(bias=lambda: draw(1, 2, 37, 50)),
    "bias of all heads": dict(bias=lambda: draw(2, 1, 37, 50), B=2),
    "bias of keys": dict(bias=lambda: draw(1, 2, 1, 50)),
    "slopes": dict(alibi_slopes=lambda: draw(2).abs(), causal=True),
    "mask": dict(mask=lambda: torch.rand(1, 2, 37, 50, device=DEVICE) > 0.4),
    "keys": dict(keys=lambda: torch.rand(1, 50, device=DEVICE) > 0.4),
    "nothing seen": dict(keys=lambda: torch.zeros(1, 50, dtype=torch.bool, device=DEVICE)),
    "nothing seen but the sink": dict(
        keys=lambda: torch.zeros(1, 50, dtype=torch.bool, device=DEVICE), sink=lambda: draw(2)
    ),
    "dropout": dict(dropout_p=0.3, seed=lambda: torch.tensor([(3 << 40) + 17], device=DEVICE)),
    "scale": dict(scale=0.5),
    "uneven intervals": dict(
        lo=lambda: torch.randint(0, 30, (2, 37), device=DEVICE, dtype=torch.int32),
        hi=lambda: torch.randint(20, 51, (2, 37), device=DEVICE, dtype=torch.int32),
        B=2,
    ),
}


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_modifier(name):
    compare(**MODIFIERS[name])


# Of two rows with two key heads, each with masks of its own: a wrong row, head or group shows here.
EVERY_ROW = {
    "keys": dict(keys=lambda: torch.rand(2, 50, device=DEVICE) > 0.4),
    "mask": dict(mask=lambda: torch.rand(2, 4, 37, 50, device=DEVICE) > 0.4),
    "bias of all": dict(bias=lambda: draw(1, 4, 37, 50)),
    "bias of rows": dict(bias=lambda: draw(2, 1, 37, 50)),
    "bias of each": dict(bias=lambda: draw(2, 4, 37, 50), causal=True),
    "slopes": dict(alibi_slopes=lambda: draw(4).abs()),
    "sink": dict(sink=lambda: draw(4), window=(9, 3)),
    "dropout": dict(dropout_p=0.3, seed=lambda: torch.tensor([77], device=DEVICE), bias=lambda: draw(1, 1, 37, 50)),
    "moving intervals": dict(
        lo=lambda: torch.stack([torch.arange(37) // 2, torch.arange(37).clamp(max=20)]).int().to(DEVICE),
        hi=lambda: torch.stack([torch.arange(37) + 5, torch.arange(37) + 14]).int().clamp(max=50).to(DEVICE),
    ),
}


@pytest.mark.parametrize("name", EVERY_ROW)
def test_a_modifier_of_every_row_and_head(name):
    compare(B=2, H=4, HK=2, **EVERY_ROW[name])


@pytest.mark.parametrize("slope", [5.0, -9.0])
def test_steep_slopes_do_not_reach_rows_that_are_none(slope, monkeypatch):
    leaves = [draw(1, h, n, 16).requires_grad_() for h, n in ((2, 37), (1, 120), (1, 120))]
    slopes, results = torch.full((2,), slope, device=DEVICE), []
    for interpret in ("1", "0") if DEVICE == "cpu" else ("1",):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        o = attention(*leaves, alibi_slopes=slopes)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for a, b in zip(results[0], results[-1], strict=True):
        assert a.isfinite().all() and (a - b).abs().max() <= 2e-3  # scores near 1000 are rounded to 6e-5


@pytest.mark.parametrize("least", [-torch.inf, -1e38, torch.finfo(torch.float32).min])
def test_a_bias_that_hides_whole_tiles_and_rows(least):
    bias = torch.zeros(1, 1, 70, 130, device=DEVICE)
    bias[..., :64] = least
    bias[:, :, 5] = least
    q, k, v = (draw(1, 2, n, 16).requires_grad_() for n in (70, 130, 130))
    results = []
    for kw in (dict(bias=bias), dict(mask=bias > -1e37)):
        o, lse = attention(q, k, v, return_lse=True, **kw)
        assert torch.equal(o[:, 5], torch.zeros_like(o[:, 5])) and bool((lse[:, :, 5] == -torch.inf).all())
        results.append([o, *torch.autograd.grad(o.square().sum(), [q, k, v])])
    with torch.no_grad():
        results.append([attention(q[:, :, :8], k, v, bias=bias[:, :, :8])])
    for a, b in zip(*results[:2], strict=True):
        assert a.isfinite().all() and (a - b).abs().max() <= 2e-6
    assert (results[2][0] - results[0][0][:, :8]).abs().max() <= 1e-6


@pytest.mark.parametrize("rows", [1, 37])
def test_intervals_beyond_the_keys_are_cut(rows):
    lo, hi = (torch.full((1, rows), n, device=DEVICE, dtype=torch.int32) for n in (-70, 200))
    q, k, v = draw(1, 2, rows, 16), draw(1, 1, 50, 16), draw(1, 1, 50, 16)
    assert torch.equal(attention(q, k, v, lo=lo, hi=hi), attention(q, k, v, lo=lo.clamp(0), hi=hi.clamp(max=50)))
    both = torch.zeros(2, rows, device=DEVICE, dtype=torch.int32)
    q, k, v = (x.repeat(2, 1, 1, 1) for x in (q, k, v))
    out = attention(q, k, v, lo=both, hi=hi)  # one row of each for two of the other
    assert torch.equal(out, attention(q, k, v, lo=both, hi=hi.repeat(2, 1)))


@pytest.mark.parametrize("rows", [1, 40])
def test_places_behind_the_last_visible_key_may_hold_anything(rows):
    q, k, v = draw(1, 2, rows, 16), draw(1, 1, 90, 16), draw(1, 1, 90, 16)
    hi = torch.full((1, rows), 41, device=DEVICE, dtype=torch.int32)
    expected = attention(q, k[:, :, :41], v[:, :, :41])
    k[:, :, 41:], v[:, :, 41:] = torch.nan, torch.nan
    assert (attention(q, k, v, lo=torch.zeros_like(hi), hi=hi) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("parts", [1, 4])
def test_a_sink_far_above_all_scores(parts):
    compare(learns=False, M=2, N=90, parts=parts, sink=lambda: torch.full((2,), 300.0, device=DEVICE))


PAIRS = [
    (a, b)
    for index, a in enumerate(MODIFIERS)
    for b in list(MODIFIERS)[index + 1 :]
    if {a, b}.isdisjoint(
        {"plain", "scale", "nothing seen", "uneven intervals", "window of one", "left side", "both sides"}
    )
    and not set(MODIFIERS[a]) & set(MODIFIERS[b]) - {"causal"}
    and "B" not in {**MODIFIERS[a], **MODIFIERS[b]}
]


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_modifiers(pair):
    compare(**MODIFIERS[pair[0]], **{k: v for k, v in MODIFIERS[pair[1]].items() if k not in MODIFIERS[pair[0]]})


@pytest.mark.parametrize(
    "shape",
    [
        dict(M=1, N=1), dict(M=1, N=70), dict(M=70, N=33), dict(M=64, N=64), dict(M=65, N=129), dict(M=3, N=200),
        dict(D=24, DV=40), dict(D=80), dict(D=128, M=17, N=40), dict(D=256, DV=64, M=9, N=20), dict(D=1, DV=3),
        dict(H=6, HK=2), dict(H=3, HK=3, B=2), dict(H=8, HK=1, M=5), dict(B=3, H=1, HK=1),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_shape(shape, causal):
    compare(causal=causal, **shape)


DECODED = [
    "plain",
    "causal",
    "window",
    "soft cap",
    "sink",
    "slopes",
    "keys",
    "nothing seen",
    "nothing seen but the sink",
]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", DECODED)
def test_decoding(name, rows, parts):
    compare(learns=False, M=rows, H=2, HK=1, parts=parts, **MODIFIERS[name])


@pytest.mark.parametrize("B, H, HK, M, N, D", [(2, 6, 2, 1, 300, 16), (1, 8, 1, 3, 90, 40), (2, 4, 4, 2, 33, 16)])
def test_decoding_with_masks_of_every_head(B, H, HK, M, N, D):
    compare(
        learns=False, B=B, H=H, HK=HK, M=M, N=N, D=D, bias=lambda: draw(B, H, M, N),
        mask=lambda: torch.rand(B, H, M, N, device=DEVICE) > 0.3,
    )  # fmt: skip


def test_any_split_of_the_keys_gives_the_same():
    q, k, v = draw(1, 4, 1, 16), draw(1, 2, 300, 16), draw(1, 2, 300, 16)
    whole, lse = attention(q, k, v, return_lse=True, parts=1)
    for parts in (2, 5, 300):
        split, split_lse = attention(q, k, v, return_lse=True, parts=parts)
        assert (split - whole).abs().max() <= 1e-6 and (split_lse - lse).abs().max() <= 1e-6


def test_decoding_equals_the_last_row_of_a_prefill():
    q, k, v = draw(1, 4, 40, 16), draw(1, 2, 40, 16), draw(1, 2, 40, 16)
    with torch.enable_grad():
        prefill = attention(q.requires_grad_(), k, v, causal=True)
    last = attention(q.detach()[:, :, -1:], k, v, causal=True)
    assert (last - prefill[:, -1:]).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "soft cap", "bias", "sink"])
def test_16_bits_are_as_near_as_those_of_torch(dtype, name):
    kw = {n: x() if callable(x) else x for n, x in MODIFIERS[name].items()}
    leaves = [x.to(dtype) for x in (draw(1, 2, 37, 16), draw(1, 1, 50, 16), draw(1, 1, 50, 16))]
    exact = [x.double().requires_grad_() for x in leaves]
    expected, _ = reference(*exact, {n: x.double() if torch.is_tensor(x) else x for n, x in kw.items()})
    mine = [x.clone().requires_grad_() for x in leaves]
    o = attention(*mine, **kw)
    assert o.dtype == dtype
    do = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, exact, do)
    got = torch.autograd.grad(o, mine, do.to(dtype))
    # One rounding of the result, twice that where the interpreter cuts off instead of rounding.
    unit = 2.0 ** (-8 if dtype == torch.bfloat16 else -11) * 2
    for x, y in zip((o, *got), (expected, *wanted), strict=True):
        assert (x.double() - y).abs().max() <= unit * max(1.0, y.abs().max()) * 1.5
