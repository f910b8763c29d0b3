"""The kernels against the same formula in fp64, shape by shape and mask by mask."""

import pytest
import torch
from hfext_stickbreaking import _reference, stickbreaking_attention
from hfext_stickbreaking._launch import launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT, GRAD = 2e-6, 5e-6
BACKWARD = ("stickbreaking_edges", "stickbreaking_query_gradient", "stickbreaking_key_gradient")


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def brute(q, k, v, attend_current=False, remainder=False, scale=None, lo=None, hi=None, keys=None, mask=None):
    """o and the remainder by breaking each stick key by key, from a query's own key to the left."""
    B, H, M, D = q.shape
    HK, N = k.shape[1:3]
    k, v = k.repeat_interleave(H // HK, 1), v.repeat_interleave(H // HK, 1)
    beta = torch.sigmoid(torch.einsum("bhid,bhjd->bhij", q, k) * (D**-0.5 if scale is None else scale))
    i, j = torch.arange(M, device=DEVICE)[:, None] + N - M, torch.arange(N, device=DEVICE)
    seen = (j <= i if attend_current else j < i).expand(B, H, M, N)
    if lo is not None:
        seen = seen & ((j >= lo[..., None]) & (j < hi[..., None]))[:, None]
    if keys is not None:
        seen = seen & keys[:, None, None]
    if mask is not None:
        seen = seen & mask
    beta = beta * seen
    stick, o = torch.ones_like(beta[..., 0]), 0
    for n in reversed(range(N)):
        o = o + (stick * beta[..., n])[..., None] * v[:, :, n : n + 1]
        stick = stick * (1 - beta[..., n])
    if remainder:
        own = v[:, :, max(0, N - M) :]
        own = torch.nn.functional.pad(own, (0, 0, M - own.shape[2], 0))
        o = o + stick[..., None] * own
    return (o + 0 * v.sum()).transpose(1, 2), stick


def compare(B=1, H=1, HK=1, M=37, N=37, D=16, DV=None, learns=True, parts=0, **kw):
    kw = {name: make() if callable(make) else make for name, make in kw.items()}
    leaves = [draw(B, n, h, d).transpose(1, 2) for n, h, d in ((M, H, D), (N, HK, D), (N, HK, DV or D))]
    for x in leaves:
        x.requires_grad_(learns)
    before = launches.copy()
    o, rest = stickbreaking_attention(*leaves, return_remainder=True, parts=parts, **kw)
    assert o.shape == (B, M, H, DV or D) and o.is_contiguous() and rest.shape == (B, H, M)
    assert (launches - before)["stickbreaking_forward" if learns else "stickbreaking_decode"] == 1
    twins = [x.detach().double().requires_grad_(learns) for x in leaves]
    expected, stick = brute(*twins, **kw)
    assert (o - expected).abs().max() <= OUT and (rest - stick).abs().max() <= OUT
    if not learns:
        return
    do, drest = torch.randn_like(o), torch.randn_like(rest)
    got = torch.autograd.grad([o, rest], leaves, [do, drest])
    wanted = torch.autograd.grad([expected, stick], twins, [do.double(), drest.double()])
    for x, mine, theirs in zip(leaves, got, wanted, strict=True):
        assert mine.shape == x.shape and mine.dtype == x.dtype
        assert (mine - theirs).abs().max() <= GRAD
    assert all((launches - before)[name] >= 1 for name in BACKWARD)


def some(*shape):
    return lambda: torch.rand(*shape, device=DEVICE) > 0.4


CASES = {
    "own key seen": dict(attend_current=True),
    "own key not seen": {},
    "remainder": dict(remainder=True),
    "remainder and own key": dict(remainder=True, attend_current=True),
    "scale": dict(scale=0.5),
    "more keys": dict(N=70, attend_current=True),
    "more queries": dict(M=50, N=33),
    "padding": dict(B=2, keys=lambda: torch.arange(37, device=DEVICE) >= torch.tensor([[5], [0]], device=DEVICE)),
    "holes": dict(keys=some(1, 37), attend_current=True),
    "nothing seen": dict(keys=lambda: torch.zeros(1, 37, dtype=torch.bool, device=DEVICE)),
    "mask": dict(mask=some(1, 2, 37, 37), H=2),
    "mask of a row": dict(mask=some(1, 1, 1, 37), attend_current=True),
    "window": dict(
        lo=lambda: (torch.arange(37, device=DEVICE) - 8).clamp(min=0).int()[None],
        hi=lambda: torch.full((1, 37), 37, dtype=torch.int32, device=DEVICE),
    ),
    "uneven intervals": dict(
        lo=lambda: torch.randint(0, 30, (2, 37), device=DEVICE, dtype=torch.int32),
        hi=lambda: torch.randint(0, 38, (2, 37), device=DEVICE, dtype=torch.int32),
        B=2, H=2, attend_current=True, remainder=True,
    ),
}  # fmt: skip
SHAPES = [
    dict(M=1, N=1), dict(M=1, N=70), dict(M=32, N=32), dict(M=65, N=66, attend_current=True), dict(D=24, DV=40),
    dict(D=80), dict(D=128, M=17, N=40), dict(D=256, DV=64, M=9, N=20), dict(D=1, DV=3),
    dict(H=4, HK=2, B=2, M=12, N=14), dict(H=3, HK=3, M=10, N=12),
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_case(name):
    compare(**CASES[name])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shape(shape):
    compare(**shape)


@pytest.mark.parametrize("rows, parts", [(1, 1), (1, 3), (4, 2)])
@pytest.mark.parametrize("name", ["own key seen", "remainder", "holes", "nothing seen"])
def test_decoding(name, rows, parts):
    case = {n: x for n, x in CASES[name].items() if n != "keys"}
    if "keys" in CASES[name]:
        hidden = name == "nothing seen"
        case["keys"] = lambda: (torch.rand(1, 70, device=DEVICE) > 0.4) & (not hidden)
    compare(learns=False, M=rows, N=70, H=2, HK=1, parts=parts, **case)


def test_decoding_with_a_mask_of_every_head():
    compare(learns=False, B=2, H=6, HK=2, M=2, N=33, mask=some(2, 6, 2, 33))


def test_any_split_of_the_keys_gives_the_same():
    q, k, v = draw(1, 2, 1, 16) * 0.3, draw(1, 1, 200, 16), draw(1, 1, 200, 16)
    q[..., 0], k[..., 0] = 1.0, -5.0  # no key takes much, so that all parts count
    whole, rest = stickbreaking_attention(q, k, v, return_remainder=True, parts=1, scale=1.0)
    assert rest.min() > 1e-3
    for parts in (2, 5, 300):
        split, left = stickbreaking_attention(q, k, v, return_remainder=True, parts=parts, scale=1.0)
        assert (split - whole).abs().max() <= 1e-6 and (left - rest).abs().max() <= 1e-6


def test_decoding_equals_the_last_row_of_a_prefill():
    q, k, v = draw(1, 2, 40, 16), draw(1, 1, 40, 16), draw(1, 1, 40, 16)
    prefill = stickbreaking_attention(q.clone().requires_grad_(), k, v, attend_current=True)
    last = stickbreaking_attention(q[:, :, -1:], k, v, attend_current=True)
    assert (last - prefill[:, -1:]).abs().max() <= 1e-6


def test_the_worked_example():
    q = torch.tensor([[1.0, 0], [0, 1], [1, 1]], device=DEVICE)[None, None]
    k = torch.tensor([[1.0, 2], [0, 1], [-1, 1]], device=DEVICE)[None, None]
    v = torch.eye(3, device=DEVICE)[None, None]
    inclusive = [[0.66976, 0, 0], [0.26565, 0.66976, 0], [0.14744, 0.33488, 0.5]]
    a = stickbreaking_attention(q, k, v, attend_current=True)[0, :, 0]
    torch.testing.assert_close(a, torch.tensor(inclusive, device=DEVICE), atol=6e-6, rtol=0)
    a, rest = stickbreaking_attention(q, k, v, return_remainder=True)
    torch.testing.assert_close(a[0, 2, 0], torch.tensor([0.29489, 0.66976, 0], device=DEVICE), atol=6e-6, rtol=0)
    torch.testing.assert_close(rest + a.sum(-1).transpose(1, 2), torch.ones(1, 1, 3, device=DEVICE))
    full = stickbreaking_attention(q, k, v, remainder=True)[0, :, 0]
    torch.testing.assert_close(full.sum(-1), torch.ones(3, device=DEVICE))
    assert full[2, 2] == rest[0, 0, 2]


def test_long_sticks_keep_small_parts():
    """4000 keys that take 1e-6 each leave exp(-0.004), and a key behind used up sticks gets no gradient."""
    n = 512
    k = torch.ones(1, 1, n, 16, device=DEVICE)
    q = torch.full((1, 1, 1, 16), -14.0 / 16, device=DEVICE)
    _, rest = stickbreaking_attention(q, k, k, scale=1.0, attend_current=True, return_remainder=True)
    exact = (1 - torch.sigmoid(torch.tensor(-14.0, dtype=torch.float64))) ** n
    assert abs(rest.item() - exact.item()) <= 1e-7
    q, k, v = draw(1, 1, 40, 16).mul(30).requires_grad_(), draw(1, 1, 40, 16), draw(1, 1, 40, 16)
    k = torch.where(torch.arange(40, device=DEVICE)[:, None] < 32, q.detach(), -q.detach()).requires_grad_()
    stickbreaking_attention(q, k, v).square().sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


def gradients(q, k, v, **kw):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, rest = stickbreaking_attention(*leaves, return_remainder=True, **kw)
    return (o, rest, *torch.autograd.grad([o, rest], leaves, [torch.ones_like(o), torch.ones_like(rest)]))


@pytest.fixture
def qkv():
    return draw(2, 2, 19, 16), draw(2, 1, 19, 16), draw(2, 1, 19, 16)


def test_every_run_is_the_same_bit_by_bit(qkv):
    for first, second in zip(gradients(*qkv), gradients(*qkv), strict=True):
        assert torch.equal(first, second)


def test_heads_taken_in_groups_give_the_same_bits(qkv, monkeypatch):
    from hfext_stickbreaking import _autograd

    whole, before = gradients(*qkv), launches.copy()
    monkeypatch.setattr(_autograd, "EDGE_BYTES", 1)
    for mine, other in zip(gradients(*qkv), whole, strict=True):
        assert torch.equal(mine, other)
    assert (launches - before)["stickbreaking_key_gradient"] == 2


@pytest.mark.parametrize("BM, BN, BK", [(16, 16, 16), (32, 16, 64)])
def test_tiles_do_not_change_the_result(qkv, monkeypatch, BM, BN, BK):
    """Also where one tile of keys of dk and dv holds several of dq."""
    from hfext_stickbreaking import _autograd

    kw = dict(keys=some(2, 19)(), attend_current=True)
    first, setting = gradients(*qkv, **kw), _autograd._setting
    monkeypatch.setattr(
        _autograd,
        "_setting",
        lambda op, *a: (
            setting(op, *a) | {"BM": BM} | ({"BN": BK, "APART": True} if op == "key_gradient" else {"BN": BN})
        ),
    )
    for mine, other in zip(first, gradients(*qkv, **kw), strict=True):
        assert (mine - other).abs().max() <= 3e-6


def test_grouped_heads_are_repeated_keys_and_batches_do_not_mix(qkv):
    q, k, v = qkv
    q.requires_grad_()  # so that both calls take the kernel for training
    o = stickbreaking_attention(q, k, v)
    assert torch.equal(o, stickbreaking_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    assert torch.equal(o.flip(0), stickbreaking_attention(q.flip(0), k.flip(0), v.flip(0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["own key not seen", "holes"])
def test_16_bits_are_rounded_once(dtype, name):
    kw = {n: x() if callable(x) else x for n, x in CASES[name].items()}
    leaves = [draw(1, h, 37, 16).to(dtype).requires_grad_() for h in (2, 1, 1)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected, _ = brute(*exact, **kw)
    o = stickbreaking_attention(*leaves, **kw)
    assert o.dtype == dtype
    do = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, exact, do)
    got = torch.autograd.grad(o, leaves, do.to(dtype))
    # One rounding of the result and of do, twice that where the interpreter cuts off instead of rounding.
    unit = 2.0 ** (-8 if dtype == torch.bfloat16 else -11) * 2
    for x, y in zip((o, *got), (expected, *wanted), strict=True):
        assert (x.double() - y).abs().max() <= unit * max(1.0, y.abs().max()) * 1.5


def test_strides_are_taken_as_they_are():
    wide = draw(2, 17, 3, 2, 32)
    q, k, v = (wide[:, :, n, :, ::2].transpose(1, 2) for n in range(3))
    assert not q.is_contiguous()
    contiguous = stickbreaking_attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(stickbreaking_attention(q, k, v), contiguous)


def test_nothing_to_do():
    empty = stickbreaking_attention(draw(1, 2, 0, 16), draw(1, 2, 5, 16), draw(1, 2, 5, 16))
    assert empty.shape == (1, 0, 2, 16)
    q = draw(1, 2, 3, 16).requires_grad_()
    none = stickbreaking_attention(q, draw(1, 2, 0, 16), draw(1, 2, 0, 16))
    assert torch.equal(none, torch.zeros(1, 3, 2, 16, device=DEVICE))
    assert torch.equal(torch.autograd.grad(none.sum(), q)[0], torch.zeros_like(q))


def test_there_is_no_second_derivative_and_no_zero_in_its_place(qkv):
    q, k, v = (x.requires_grad_() for x in qkv)
    (gradient,) = torch.autograd.grad(stickbreaking_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), q)


def test_the_plain_path_has_a_second_derivative_and_equals_brute_force(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    keys = torch.tensor([[True, True, False, True]])

    def run(q, k, v):
        return stickbreaking_attention(q, k, v, attend_current=True, remainder=True, return_remainder=True, keys=keys)

    assert torch.autograd.gradcheck(run, (q, k, v))
    assert torch.autograd.gradgradcheck(run, (q, k, v))
    for mine, other in zip(run(q, k, v), brute(q, k, v, True, True, keys=keys), strict=True):
        assert (mine - other).abs().max() <= 1e-14


def test_the_operations_are_sound():
    from hfext_stickbreaking import _autograd

    q, k, v = (draw(1, h, 5, 8).requires_grad_() for h in (2, 1, 1))
    lo, hi = (
        torch.zeros(1, 5, dtype=torch.int32, device=DEVICE),
        torch.arange(5, dtype=torch.int32, device=DEVICE)[None],
    )
    keys, mask = (torch.ones(shape, dtype=torch.uint8, device=DEVICE) for shape in ((1, 5), (1, 1, 5, 5)))
    torch.library.opcheck(_autograd.forward, (q, k, v, lo, hi, keys, mask, 0.3))
    plain = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(_autograd.decode, (*plain, lo, hi, keys, None, 0.3, 2))
    o, rest = _autograd.forward(*plain, lo, hi, None, mask, 0.3)
    torch.library.opcheck(_autograd.backward, (o, rest, *plain, rest, lo, hi, None, mask, 0.3))


def test_it_compiles_without_a_break(qkv):
    def step(q, k, v):
        return stickbreaking_attention(q, k, v, attend_current=True, remainder=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in qkv]
    before = launches.copy()
    out = compiled(*leaves)
    assert torch.equal(out, step(*leaves))
    for mine, other in zip(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(step(*leaves).sum(), leaves), strict=True
    ):
        assert torch.equal(mine, other)
    assert (launches - before)["stickbreaking_key_gradient"] == 2


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(lo=torch.zeros(1, 5, dtype=torch.int32)), ValueError, "must be given together"),
        (dict(lo=torch.zeros(1, 5), hi=torch.zeros(1, 5)), ValueError, "lo is torch.float32"),
        (dict(keys=torch.ones(1, 4, dtype=torch.bool)), ValueError, "keys is"),
        (dict(mask=torch.ones(1, 3, 5, 5, dtype=torch.bool)), ValueError, "mask is"),
        (dict(mask=torch.zeros(1, 1, 5, 5)), ValueError, "mask is torch.float32"),
        (dict(own=torch.zeros(1, 4, dtype=torch.int64)), ValueError, "own is"),
        (dict(q=torch.zeros(1, 3, 5, 8)), ValueError, "not a multiple"),
        (dict(q=torch.zeros(1, 2, 5, 9)), ValueError, "do not fit"),
        (dict(q=torch.zeros(2, 5, 8)), ValueError, "q has shape"),
        (dict(q=torch.zeros(1, 2, 5, 8).half()), TypeError, "must share one"),
        ({n: torch.zeros(1, 2, 5, 300) for n in "qkv"}, ValueError, "Head sizes 300"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_arguments(change, error, words):
    given = {n: torch.zeros(1, 2, 5, 8) for n in "qkv"} | change
    given = {n: x.to(DEVICE) for n, x in given.items()}
    with pytest.raises(error, match=words):
        stickbreaking_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_the_plain_path_without_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    before = launches.copy()
    o = stickbreaking_attention(q, k, v)
    assert launches == before
    lo, hi = torch.zeros(1, 5, dtype=torch.int32), torch.arange(5, dtype=torch.int32)[None]
    assert torch.equal(o, _reference.stickbreaking(q, k, v, 8**-0.5, lo, hi)[0])
