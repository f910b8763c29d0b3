"""Integer codes packed into bytes, and back, in a few vector operations.

Within a byte the first code is in the lowest bits: with 2 bits, byte = q0 + 4 q1 + 16 q2 + 64 q3. Three bits are held
as two planes, first the two low bits of every code and then the high bits, which is 8 codes in 3 bytes and reads back
with the fast paths of 2 and 1 bits. Sixteen bits are little-endian.

Unpacking spreads the fields of a byte over a wider integer by multiplications whose partial products do not overlap
(8 bits at 0 and 12, masked to nibbles, then at 0 and 6, masked to pairs of bits) and reads the result as bytes; for
8192 x 192 two-bit codes on one core that takes 0.2 ms, where shifts against a broadcast axis take 1.5 ms.
"""

import sys
from functools import lru_cache

import torch
from torch import Tensor

BITS = (1, 2, 3, 4, 8, 16)


def check_bits(bits: int) -> None:
    """Raise ValueError unless codes of this width can be packed."""
    if bits not in BITS:
        raise ValueError(f"`bits` must be one of {BITS}, got {bits!r}.")


def packed_length(n: int, bits: int) -> int:
    """Bytes that `n` codes take: full bytes, and with 3 bits full triples of bytes."""
    check_bits(bits)
    return -(-n // 8) * 3 if bits == 3 else -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """
    Codes as bytes.

    Args:
        codes (`torch.Tensor`): Integers [..., n] in [0, 2^bits), of any integer type; higher bits are cut off. The
            torch types hold 16 bits without a sign only in int32 and int64.
        bits (`int`): 1, 2, 3, 4, 8 or 16.

    Returns:
        uint8 [..., packed_length(n, bits)]; bits that no code fills are zero.
    """
    check_bits(bits)
    if codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise TypeError(f"`codes` must hold integers, got {codes.dtype}.")
    if bits == 16:
        wide = codes.to(torch.int32)
        return torch.stack((wide & 255, (wide >> 8) & 255), -1).to(torch.uint8).flatten(-2)
    if bits == 8:
        return codes.to(torch.uint8)
    _check_byte_order()
    codes = (codes & (2**bits - 1)).to(torch.uint8)
    step = 8 if bits == 3 else 8 // bits
    if codes.shape[-1] % step:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % step))
    if bits == 3:
        return torch.cat((_squeeze(codes & 3, 2), _squeeze(codes >> 2, 1)), -1)
    return _squeeze(codes, bits)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """
    The inverse of `pack`.

    Args:
        packed (`torch.Tensor`): uint8 [..., packed_length(n, bits)].
        bits (`int`): As packed.
        n (`int`): Number of codes.

    Returns:
        uint8 [..., n] (int32 for 16 bits). With 8 bits this is a view of `packed`.
    """
    if packed.shape[-1] != packed_length(n, bits):
        raise ValueError(
            f"`packed` must hold {packed_length(n, bits)} bytes in its last dimension for {n} codes of {bits} bits, "
            f"got {packed.shape[-1]}."
        )
    if bits == 16:
        low, high = packed.unflatten(-1, (n, 2)).to(torch.int32).unbind(-1)
        return low + 256 * high
    if bits == 8:
        return packed
    _check_byte_order()
    if bits == 3:
        codes = _unpack_2(packed[..., : packed.shape[-1] // 3 * 2])
        codes |= _unpack_1(packed[..., packed.shape[-1] // 3 * 2 :], value=4)
    elif bits == 1:
        codes = _unpack_1(packed)
    else:
        codes = _unpack_2(packed) if bits == 2 else _unpack_4(packed)
    return codes[..., :n]


def unpack_to(packed: Tensor, bits: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The codes of `unpack` as a fresh tensor of type `dtype`, free to be changed in place."""
    return unpack(packed, bits, n).to(dtype, copy=True, memory_format=torch.contiguous_format)


def dequantize_packed(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    n: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """scale (code - zero) [..., n] of packed codes, with `scale` and `zero` [..., n / group_size]; fp32 inside."""
    values = unpack_to(packed, bits, n)
    values.unflatten(-1, (n // group_size, group_size)).sub_(zero[..., None]).mul_(scale[..., None])
    return values.to(dtype)


def dequantize_packed_minmax(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    bits: int,
    group_size: int,
    n: int,
    dim: int = -1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """code * scale + minimum [..., n] of packed codes, groups along `dim` (-1 or -2) of the codes; fp32 inside."""
    values = unpack_to(packed, bits, n)
    groups = values.unflatten(dim, (values.shape[dim] // group_size, group_size))
    groups.mul_(scale.unsqueeze(dim)).add_(minimum.unsqueeze(dim))
    return values.to(dtype)


def dequantize_packed_codebook(packed: Tensor, codebook: Tensor, bits: int, n: int) -> Tensor:
    """codebook[code] [..., n] of packed codes in the type of `codebook`; with 2 and 4 bits a byte is one look-up."""
    if bits not in (2, 4) or codebook.dtype != torch.float32:
        return codebook.index_select(0, unpack_to(packed, bits, n, torch.int32).flatten()).unflatten(
            0, (*packed.shape[:-1], n)
        )
    every_byte = torch.arange(256, device=packed.device).to(torch.uint8)[:, None]
    table = codebook[unpack(every_byte, bits, 8 // bits).int()]
    # A row of 2 or 4 floats is moved as one number of 8 or 16 bytes, three times faster than as a row.
    table = table.view(torch.complex128 if bits == 2 else torch.complex64).flatten()
    values = table.index_select(0, packed.to(torch.int32).flatten()).view(torch.float32)
    return values.unflatten(0, (*packed.shape[:-1], packed.shape[-1] * 8 // bits))[..., :n]


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("Codes of less than 8 bits need a little-endian machine; use 8 or 16 bits.")


def _squeeze(codes: Tensor, bits: int) -> Tensor:
    """Codes of 1, 2 or 4 bits, enough to fill whole bytes: neighbours are folded together until a byte is full."""
    fields = 8 // bits
    # Flat first, as the strides of dimensions of size 0 and 1 need not allow a view in a wider type.
    wide = codes.reshape(-1).view({8: torch.int64, 4: torch.int32, 2: torch.int16}[fields])
    for i in range(fields.bit_length() - 1):
        wide = wide | (wide >> ((8 - bits) << i))
    # The cast keeps the lowest byte; the ones above hold partial sums.
    return wide.to(torch.uint8).view(*codes.shape[:-1], codes.shape[-1] // fields)


def _wide(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.to(dtype, memory_format=torch.contiguous_format)


def _unpack_4(packed: Tensor) -> Tensor:
    # low + 16 high, and 15 * 16 high more, is low + 256 high.
    wide = _wide(packed, torch.int16)
    return wide.add_(wide & 0xF0, alpha=15).view(torch.uint8)


def _unpack_2(packed: Tensor) -> Tensor:
    wide = _wide(packed, torch.int32).mul_(1 + (1 << 12)).bitwise_and_(0x000F000F)
    return wide.mul_(1 + (1 << 6)).bitwise_and_(0x03030303).view(torch.uint8)


def _unpack_1(packed: Tensor, value: int = 1) -> Tensor:
    index = _wide(packed, torch.int32)
    return _bit_table(value, packed.device).index_select(0, index.flatten()).view(index.shape).view(torch.uint8)


@lru_cache(maxsize=8)
def _bit_table(value: int, device: torch.device) -> Tensor:
    """int64 [256]: the 8 bits of a byte, lowest first, as bytes of 0 and `value`; 2 KB for each device."""
    every_byte = torch.arange(256, device=device)[:, None]
    bits = (every_byte >> torch.arange(8, device=device)) & 1
    return (bits * value).to(torch.uint8).view(torch.int64).flatten()
