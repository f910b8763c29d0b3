"""What attention must do whatever its numbers are: modifiers that do nothing, equal bits, strides, empty inputs."""

import pytest
import torch
from hfext_attention import _reference, attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def gradients(**kw):
    q, k, v = (kw.pop(name).detach().requires_grad_() for name in "qkv")
    o, lse = attention(q, k, v, return_lse=True, **kw)
    return (o, lse, *torch.autograd.grad([o, lse], [q, k, v], [torch.ones_like(o), torch.ones_like(lse)]))


@pytest.fixture
def qkv():
    return {"q": draw(2, 4, 33, 16), "k": draw(2, 2, 33, 16), "v": draw(2, 2, 33, 16)}


@pytest.mark.parametrize(
    "given, same",
    [
        (dict(causal=True, window=33), dict(causal=True)),
        (dict(softcap=1e6), {}),
        (dict(alibi_slopes=torch.zeros(4)), {}),
        (dict(bias=torch.zeros(1, 1, 1, 1)), {}),
        (dict(sink=torch.full((4,), -torch.inf)), {}),
        (dict(mask=torch.ones(1, 1, 1, 1, dtype=torch.bool)), {}),
        (dict(keys=torch.ones(1, 33, dtype=torch.bool)), {}),
        (dict(lo=torch.zeros(1, 33, dtype=torch.int32), hi=torch.full((1, 33), 33, dtype=torch.int32)), {}),
    ],
    ids=lambda x: " ".join(x),
)
def test_a_modifier_that_does_nothing(qkv, given, same):
    given = {n: x.to(DEVICE) if torch.is_tensor(x) else x for n, x in given.items()}
    for mine, other in zip(gradients(**qkv, **given), gradients(**qkv, **same), strict=True):
        assert (mine - other).abs().max() <= 2e-6


def test_a_sink_is_one_more_key_of_value_zero(qkv):
    z = draw(4)
    o, lse = attention(*qkv.values(), sink=z, return_lse=True)
    bias = torch.cat([torch.zeros(1, 4, 33, 33, device=DEVICE), z.view(1, 4, 1, 1).expand(1, 4, 33, 1)], -1)
    k, v = (torch.nn.functional.pad(qkv[n], (0, 0, 0, 1)) for n in "kv")
    other, other_lse = attention(qkv["q"], k, v, bias=bias, return_lse=True)
    assert (o - other).abs().max() <= 1e-6 and (lse - other_lse).abs().max() <= 1e-6


def test_a_constant_in_a_row_matters_with_a_sink_alone(qkv):
    shift = torch.full((1, 1, 1, 1), 3.0, device=DEVICE)
    assert (attention(*qkv.values(), bias=shift) - attention(*qkv.values())).abs().max() <= 2e-6
    sink = torch.zeros(4, device=DEVICE)
    assert (attention(*qkv.values(), bias=shift, sink=sink) - attention(*qkv.values(), sink=sink)).abs().max() > 1e-2


def test_grouped_heads_are_repeated_keys(qkv):
    k, v = (qkv[n].repeat_interleave(2, 1) for n in "kv")
    assert (attention(*qkv.values(), causal=True) - attention(qkv["q"], k, v, causal=True)).abs().max() <= 1e-6


def test_rows_of_a_batch_do_not_mix(qkv):
    turned = {n: x.flip(0) for n, x in qkv.items()}
    assert torch.equal(attention(*qkv.values()).flip(0), attention(*turned.values()))


def test_every_run_is_the_same_bit_by_bit(qkv):
    bias = draw(1, 1, 33, 33)
    kw = dict(causal=True, softcap=2.0, bias=bias, dropout_p=0.2, seed=torch.tensor([5], device=DEVICE))
    for first, second in zip(gradients(**qkv, **kw), gradients(**qkv, **kw), strict=True):
        assert torch.equal(first, second)


def test_dropout_does_not_depend_on_tiles(qkv, monkeypatch):
    from hfext_attention import _autograd

    kw = dict(dropout_p=0.4, seed=torch.tensor([11], device=DEVICE))
    first = gradients(**qkv, **kw)
    setting = _autograd._setting
    monkeypatch.setattr(_autograd, "_setting", lambda *a: {**setting(*a), "BM": 16, "BN": 16})
    for mine, other in zip(first, gradients(**qkv, **kw), strict=True):
        assert (mine - other).abs().max() <= 2e-6


def test_the_dropped_part_and_its_seed(qkv):
    seed = torch.tensor([1 << 50], device=DEVICE)
    factor = _reference.kept(seed, 8, 200, 200, 0.3)
    assert set(factor.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((factor == 0).double().mean() - 0.3) < 0.002
    other = _reference.kept(seed + 1, 8, 200, 200, 0.3)
    assert torch.equal(other[:-1], factor[1:])  # rows count on from the seed
    torch.manual_seed(0)
    one = attention(*qkv.values(), dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(one, attention(*qkv.values(), dropout_p=0.5))
    assert not torch.equal(one, attention(*qkv.values(), dropout_p=0.5))


def test_strides_are_taken_as_they_are():
    wide = draw(2, 33, 3, 4, 32)
    q, k, v = (wide[:, :, n, :, ::2].transpose(1, 2) for n in range(3))
    assert not q.is_contiguous()
    assert torch.equal(attention(q, k, v), attention(q.contiguous(), k.contiguous(), v.contiguous()))
    shared = draw(1, 1, 33, 16).expand(2, 2, 33, 16)
    assert torch.equal(attention(q, shared, shared), attention(q, shared.contiguous(), shared.contiguous()))


@pytest.mark.parametrize("plain", [False, True])
def test_nothing_to_do(plain, monkeypatch):
    if plain:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    empty = attention(draw(1, 2, 0, 16), draw(1, 2, 5, 16), draw(1, 2, 5, 16))
    assert empty.shape == (1, 0, 2, 16)
    q = draw(1, 2, 3, 16).requires_grad_()
    none = attention(q, draw(1, 2, 0, 16), draw(1, 2, 0, 16))
    assert torch.equal(none, torch.zeros(1, 3, 2, 16, device=DEVICE))
    assert torch.equal(torch.autograd.grad(none.sum(), q)[0], torch.zeros_like(q))
    assert attention(draw(0, 2, 3, 16), draw(0, 2, 5, 16), draw(0, 2, 5, 16)).shape == (0, 3, 2, 16)
    sink = draw(2).requires_grad_()
    _, lse = attention(q, draw(1, 2, 0, 16), draw(1, 2, 0, 16), sink=sink, return_lse=True)
    assert torch.autograd.grad(lse.sum(), sink)[0].tolist() == [3.0, 3.0]


def test_there_is_no_second_derivative_and_no_zero_in_its_place(qkv):
    q, k, v = (x.requires_grad_() for x in qkv.values())
    (gradient,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), q)


def test_the_plain_path_has_a_second_derivative(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, sink):
        return attention(q, k, v, causal=True, softcap=2.0, sink=sink)

    assert torch.autograd.gradcheck(run, (q, k, v, sink))
    assert torch.autograd.gradgradcheck(run, (q, k, v, sink))
