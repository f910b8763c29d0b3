"""The operations as torch sees them, and the functions of the flash_attn package against plain attention."""

import pytest
import torch
from hfext_attention import attention, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, intervals

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def arguments(learns):
    from hfext_attention import _autograd

    q, k, v = (draw(1, h, 9, 16).requires_grad_(learns) for h in (2, 1, 1))
    bias, sink = draw(1, 2, 9, 9).requires_grad_(learns), draw(2).requires_grad_(learns)
    lo, hi = intervals(9, 9, 0, True, 4, DEVICE)
    keys = torch.ones(1, 9, dtype=torch.uint8, device=DEVICE)
    common = (q, k, v, lo, hi, keys, None, bias, sink, None)
    if learns:
        return _autograd.forward, (*common, None, 0.25, 2.0, 0, 0.0)
    return _autograd.decode, (*common, 0.25, 2.0, 0, 2)


@pytest.mark.parametrize("learns", [True, False], ids=["forward", "decode"])
def test_the_operations_are_what_they_say(learns):
    torch.library.opcheck(*arguments(learns))


def test_the_backward_operation_is_what_it_says():
    from hfext_attention import _autograd

    operation, given = arguments(True)
    o, lse = operation(*(x.detach() if torch.is_tensor(x) else x for x in given))
    q, k, v, lo, hi, keys, mask, bias, sink, slopes, seed, *numbers = (
        x.detach() if torch.is_tensor(x) else x for x in given
    )
    call = (torch.randn_like(o), None, q, k, v, o, lse, lo, hi, keys, mask, bias, sink, slopes, seed, *numbers, True)
    torch.library.opcheck(_autograd.backward, call)


def test_compiled_without_a_break_it_is_the_same():
    def run(q, k, v, sink):
        return attention(q, k, v, causal=True, window=5, softcap=3.0, sink=sink)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    leaves = [draw(1, 2, 20, 16), draw(1, 1, 20, 16), draw(1, 1, 20, 16), draw(2)]
    results = []
    for function in (run, compiled):
        own = [x.clone().requires_grad_() for x in leaves]
        out = function(*own)
        results.append([out, *torch.autograd.grad(out.square().sum(), own)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def plain(q, k, v, seen, **kw):
    """[batch, tokens, heads, head_dim] with a dense mask."""
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), mask=seen[:, None], **kw)


def lower_right(m, n, causal, window):
    i, j = torch.arange(m, device=DEVICE)[:, None] + n - m, torch.arange(n, device=DEVICE)
    seen = torch.ones(m, n, dtype=torch.bool, device=DEVICE)
    left, right = window
    right = 0 if causal else right
    return seen & ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))


SETTINGS = [(False, (-1, -1)), (True, (-1, -1)), (True, (3, 0)), (False, (2, 3)), (False, (-1, 1)), (True, (4, -1))]


@pytest.mark.parametrize("causal, window", SETTINGS)
def test_flash_attn_func(causal, window):
    q, k, v = draw(2, 7, 4, 16), draw(2, 12, 2, 16), draw(2, 12, 2, 16)
    out, lse, none = flash_attn_func(q, k, v, causal=causal, window_size=window, softcap=2.0, return_attn_probs=True)
    expected = plain(q, k, v, lower_right(7, 12, causal, window)[None], softcap=2.0)
    assert none is None and lse.shape == (2, 4, 7) and (out - expected).abs().max() <= 1e-6
    assert torch.equal(out, flash_attn_func(q, k, v, causal=causal, window_size=window, softcap=2.0))


@pytest.mark.parametrize("causal, window", SETTINGS)
def test_sequences_behind_one_another_are_sequences_apart(causal, window):
    lengths_q, lengths_k = [3, 0, 6, 1], [5, 2, 6, 4]
    q, k, v = draw(10, 4, 16), draw(17, 2, 16), draw(17, 2, 16)
    ends = [torch.tensor([0, *x], device=DEVICE).cumsum(0).int() for x in (lengths_q, lengths_k)]
    sink = draw(4)
    out = flash_attn_varlen_func(q, k, v, *ends, 6, 6, causal=causal, window_size=window, s_aux=sink)
    for i in range(4):
        rows, cols = (slice(int(e[i]), int(e[i + 1])) for e in ends)
        if lengths_q[i]:
            one = flash_attn_func(
                q[None, rows], k[None, cols], v[None, cols], causal=causal, window_size=window, s_aux=sink
            )
            assert (out[rows] - one[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("causal, window", SETTINGS)
def test_a_cache_of_rows_of_several_lengths(causal, window):
    held = torch.tensor([3, 9], device=DEVICE, dtype=torch.int32)
    cache_k, cache_v = draw(2, 14, 2, 16), draw(2, 14, 2, 16)
    q, k, v = draw(2, 4, 4, 16), draw(2, 4, 2, 16), draw(2, 4, 2, 16)
    before = cache_k.clone()
    out, lse = flash_attn_with_kvcache(
        q, cache_k, cache_v, k, v, cache_seqlens=held, causal=causal, window_size=window, return_softmax_lse=True
    )
    for b, n in enumerate((7, 13)):
        assert torch.equal(cache_k[b, n - 4 : n], k[b]) and torch.equal(cache_k[b, : n - 4], before[b, : n - 4])
        one, one_lse, _ = flash_attn_func(
            q[b : b + 1], cache_k[b : b + 1, :n], cache_v[b : b + 1, :n], causal=causal, window_size=window,
            return_attn_probs=True,
        )  # fmt: skip
        assert (out[b] - one[0]).abs().max() <= 1e-6 and (lse[b] - one_lse[0]).abs().max() <= 1e-6


def test_slopes_count_from_the_last_key():
    q, k, v, slopes = draw(1, 3, 4, 16), draw(1, 8, 4, 16), draw(1, 8, 4, 16), draw(4).abs()
    bias = slopes[:, None, None] * (torch.arange(8, device=DEVICE) - torch.arange(3, device=DEVICE)[:, None] - 5)
    out = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
    expected = plain(q, k, v, lower_right(3, 8, True, (-1, -1))[None], bias=bias[None])
    assert (out - expected).abs().max() <= 1e-6
    cached = flash_attn_with_kvcache(q, k, v, causal=True, alibi_slopes=slopes)
    assert (cached - out).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda q, e: flash_attn_varlen_func(q, q, q, e.long(), e, 5, 5), ValueError, "cu_seqlens_q is torch.int64"),
        (
            lambda q, e: flash_attn_varlen_func(q, q, q, e, e.flip(0), 5, 5),
            ValueError,
            "cu_seqlens_k must rise from 0",
        ),
        (lambda q, e: flash_attn_varlen_func(q, q, q, e, e + 1, 5, 5), ValueError, "to 5"),
        (lambda q, e: flash_attn_varlen_func(q, q, q, e, e, 5, 5, block_table=e), NotImplementedError, "block_table"),
        (
            lambda q, e: flash_attn_with_kvcache(q[None], q[None], q[None], rotary_cos=q),
            NotImplementedError,
            "rotary_cos",
        ),
        (
            lambda q, e: flash_attn_varlen_func(q, q, q, e, e, 5, 5, alibi_slopes=q[0, :, 0], s_aux=q[0, :, 0]),
            NotImplementedError,
            "alibi_slopes",
        ),
    ],
)
def test_bad_calls(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(5, 2, 16), torch.tensor([0, 2, 5], dtype=torch.int32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "rows, coded_keys, coded_values, N, D, group", [(1, 64, 20, 70, 32, 32), (19, 16, 24, 30, 24, 8)]
)
def test_stored_codes_are_attended_to_as_the_whole_tensors(bits, rows, coded_keys, coded_values, N, D, group):
    from hfext_attention import PackedStates, packed_attention
    from hfext_attention._launch import launches

    def stored(x, coded, along):
        """Codes by hand: the first of a byte in its lowest bits, three bits as two planes."""
        B, HK, _, D = x.shape
        codes = torch.randint(0, 2**bits, (B, coded, HK, D), device=DEVICE)
        shape = (B, coded // group, HK, D) if along == "tokens" else (B, coded, HK, D // group)
        scale = (torch.rand(shape, device=DEVICE) / 2**bits).half()
        minimum = torch.randn(shape, device=DEVICE).half()
        wide = [t.repeat_interleave(group, 1 if along == "tokens" else 3).float() for t in (scale, minimum)]
        made = (codes * wide[0] + wide[1]).transpose(1, 2)
        whole = torch.cat([made, x[:, :, coded:]], 2)
        planes = [(codes & 3, 2), (codes >> 2, 1)] if bits == 3 else [(codes, bits)]
        data = []
        for plane, width in planes:
            fields = plane.unflatten(-1, (-1, 8 // width)) << (width * torch.arange(8 // width, device=DEVICE))
            data.append(fields.sum(-1))
        packed = torch.cat(data, -1).to(torch.uint8)
        return whole, PackedStates(x[:, :, coded:], lambda: whole, packed, scale, minimum, bits, group, along)

    q, k, v = draw(2, 4, rows, D), draw(2, 2, N, D), draw(2, 2, N, D)
    (whole_k, packed_k), (whole_v, packed_v) = stored(k, coded_keys, "tokens"), stored(v, coded_values, "channels")
    lo, hi = intervals(rows, N, N - rows, True, device=DEVICE)
    kw = dict(keys=torch.rand(2, N, device=DEVICE) > 0.2, sink=draw(4), softcap=2.0, return_lse=True)
    before = launches["attention_packed"]
    with torch.no_grad():
        out, lse = packed_attention(q, packed_k, packed_v, lo=lo, hi=hi, **kw)
        expected, other = attention(q, whole_k, whole_v, lo=lo, hi=hi, **kw)
    assert launches["attention_packed"] == before + 3
    assert (out - expected).abs().max() <= 2e-6 and (lse - other).abs().max() <= 2e-6
