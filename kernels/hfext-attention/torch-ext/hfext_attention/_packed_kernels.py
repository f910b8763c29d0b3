"""Triton kernel of attention that reads keys and values as codes of 8, 4, 3 or 2 bits: nothing is made whole.

    x = code * scale + minimum, scale and minimum of a group of tokens (keys) or of a group of channels (values)

in fp32, then rounded to the queries' dtype, which is what making the cache whole would give. Codes lie as
`hfext._packing.pack` leaves them: the first code of a byte in its lowest bits; three bits as a plane of the two low
bits of all channels and a plane of the high bits.
"""

import triton
import triton.language as tl

from ._kernels import LOG2E, _interval, _rows, _scores, _tiles


@triton.jit
def _spread(data, COUNT: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr):
    """The COUNT codes of each byte of a tile [BN, WIDTH / COUNT], in order: [BN, WIDTH]."""
    shifts = tl.arange(0, COUNT) * BITS
    codes = (data.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes, [BN, WIDTH])


@triton.jit
def _codes(at, j, stride_n, N, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr):
    """Codes of tokens j as int32 [BN, BD]; 0 outside."""
    at += j[:, None].to(tl.int64) * stride_n
    inside = j[:, None] < N
    if BITS == 8:
        d = tl.arange(0, BD)[None, :]
        return tl.load(at + d, mask=inside & (d < D), other=0).to(tl.int32)
    elif BITS == 3:
        low = tl.arange(0, BD // 4)[None, :]
        high = tl.arange(0, BD // 8)[None, :]
        FIRST: tl.constexpr = (D + 7) // 8 * 2
        two = tl.load(at + low, mask=inside & (low < FIRST), other=0)
        one = tl.load(at + FIRST + high, mask=inside & (high < FIRST // 2), other=0)
        return _spread(two, 4, 2, BN, BD) | (_spread(one, 8, 1, BN, BD) << 2)
    else:
        COUNT: tl.constexpr = 8 // BITS
        byte = tl.arange(0, BD // COUNT)[None, :]
        data = tl.load(at + byte, mask=inside & (byte < (D + COUNT - 1) // COUNT), other=0)
        return _spread(data, COUNT, BITS, BN, BD)


@triton.jit
def _grid(
    at, j0, j, stride_n, N, GROUP: tl.constexpr, TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scales or minima of tokens j, fp32, in a shape that broadcasts to [BN, BD]."""
    d = tl.arange(0, BD)[None, :]
    if TOKENS and ALIGNED:  # all tokens of the tile are of one group
        return tl.load(at + tl.cast(j0 // GROUP, tl.int64) * stride_n + d, mask=d < D, other=0.0).to(tl.float32)
    elif TOKENS:
        row = (j // GROUP)[:, None].to(tl.int64)
        return tl.load(at + row * stride_n + d, mask=(j[:, None] < N) & (d < D), other=0.0).to(tl.float32)
    else:
        row = j[:, None].to(tl.int64)
        return tl.load(at + row * stride_n + d // GROUP, mask=(j[:, None] < N) & (d < D), other=0.0).to(tl.float32)


@triton.jit
def attention_packed(
    q, k, k_scale, k_minimum, v, v_scale, v_minimum, o, lse, lo, hi, keys,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, ks_b, ks_h, ks_n, v_b, v_h, v_n, vs_b, vs_h, vs_n,
    lo_b, keys_b, B, H, G, M, N, first, stop, chunk, part0, k_first, v_first, scale, softcap,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr,
    KGROUP: tl.constexpr, VGROUP: tl.constexpr, KTOKENS: tl.constexpr, VTOKENS: tl.constexpr, KALIGNED: tl.constexpr,
    VALIGNED: tl.constexpr, INTERVAL: tl.constexpr, SOFTCAP: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of keys first to stop, for some rows of a key head: as `attention_decode`. KBITS or VBITS of 16 stands
    for tokens that are not coded; their tensor begins with token k_first or v_first. Grid (parts, B HK, rows / BR)."""
    part = tl.program_id(0)
    heads = H // G
    b = (tl.program_id(1) // heads).to(tl.int64)
    hk = (tl.program_id(1) % heads).to(tl.int64)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    valid = r < G * M
    i = tl.where(valid, r % M, M)
    h = hk * G + tl.where(valid, r // M, 0)
    row_lo, row_hi = _interval(lo + b * lo_b, hi + b * lo_b, i, M, N, INTERVAL)
    start, _full_start, _full_end, end = _tiles(row_lo, row_hi, i, M, N, BN, False)
    begin = first + part * chunk
    # Tiles count from the part's first token.
    start = begin + tl.maximum(start - begin, 0) // BN * BN
    end = tl.minimum(tl.minimum(end, stop), begin + chunk)

    d = tl.arange(0, BD)
    at = q + b * q_b + (h * q_h + i * q_m)[:, None] + d[None, :] * q_d
    qt = tl.load(at, mask=valid[:, None] & (d[None, :] < D), other=0.0)
    if UPCAST:
        qt = qt.to(tl.float32)
    k += b * k_b + hk * k_h
    v += b * v_b + hk * v_h
    if KBITS < 16:
        k_scale += b * ks_b + hk * ks_h
        k_minimum += b * ks_b + hk * ks_h
    if VBITS < 16:
        v_scale += b * vs_b + hk * vs_h
        v_minimum += b * vs_b + hk * vs_h
    keys += b * keys_b
    if not SOFTCAP:
        scale = scale * LOG2E

    acc = tl.zeros([BR, BD], tl.float32)
    m = tl.full([BR], float("-inf"), tl.float32)
    l = tl.zeros([BR], tl.float32)
    cols = tl.arange(0, BN)
    for j0 in tl.range(start, end, BN):
        j = j0 + cols
        if KBITS == 16:
            kt = _rows(k, j0 - k_first, cols, k_n, d, 1, stop - k_first, D, D == BD, False, UPCAST)
        else:
            kt = _codes(k, j, k_n, stop, D, BD, BN, KBITS).to(tl.float32)
            kt = kt * _grid(k_scale, j0, j, ks_n, stop, KGROUP, KTOKENS, KALIGNED, D, BD, BN)
            kt += _grid(k_minimum, j0, j, ks_n, stop, KGROUP, KTOKENS, KALIGNED, D, BD, BN)
            kt = kt.to(qt.dtype)
        s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * scale
        s, _tanh = _scores(
            s, i[:, None], j0, cols[None, :], row_lo[:, None], tl.minimum(row_hi, end)[:, None], q, 0, 0, q, 0, 0,
            keys, softcap, 0.0, 0, M, N, SOFTCAP, False, False, KEYS, False, True,
        )  # fmt: skip
        new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - base[:, None])
        a = tl.exp2(m - base)
        l = l * a + tl.sum(p, 1)
        if VBITS == 16:
            seen = tl.minimum(stop, tl.max(row_hi, 0))
            vt = _rows(v, j0 - v_first, cols, v_n, d, 1, seen - v_first, D, D == BD, False, UPCAST)
        else:
            vt = _codes(v, j, v_n, stop, D, BD, BN, VBITS).to(tl.float32)
            vt = vt * _grid(v_scale, j0, j, vs_n, stop, VGROUP, VTOKENS, VALIGNED, D, BD, BN)
            vt += _grid(v_minimum, j0, j, vs_n, stop, VGROUP, VTOKENS, VALIGNED, D, BD, BN)
            vt = vt.to(qt.dtype)
        acc = tl.dot(p.to(vt.dtype), vt, acc * a[:, None], input_precision=PRECISION)
        m = new
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    row = (((part0 + part) * B + b) * H + h) * M + i
    tl.store(lse + row, m + tl.log2(l), mask=valid)
    tl.store(o + row[:, None] * D + d[None, :], acc, mask=valid[:, None] & (d[None, :] < D))
