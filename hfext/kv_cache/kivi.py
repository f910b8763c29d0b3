"""KIVI: keys quantised per channel over groups of tokens, values per token over groups of channels.

key group:    x[t..t+g, c]   scale = (max - min) / (2^b - 1), zero = min, code = round((x - zero) / scale)
value group:  x[t, c..c+g]   the same along the channels
The last tokens stay in full precision: keys until `residual_length` of them can be coded together, values always
`residual_length` of them.

"KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750. Keys are coded after the rotary
embedding, as the paper has it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._fields import divides, in_range, one_of
from .._packing import dequantize_packed_minmax, pack
from ..registry import Method
from ._codec_layer import CodecLayer
from ._config import KVCacheConfig
from ._geometry import Geometry
from ._quantize import quantize_minmax
from ._state import Shared


@dataclass(kw_only=True, repr=False)
class KIVIConfig(KVCacheConfig):
    """Options of KIVI.

    Args:
        bits (`int`, *optional*, defaults to 2): Bits of a code: 2, 3, 4, 8 or 16.
        group_size (`int`, *optional*, defaults to 32): Tokens of a key group, channels of a value group. Divides the
            head dimension and `residual_length`.
        residual_length (`int`, *optional*, defaults to 128): Tokens kept in full precision.
    """

    method: ClassVar[str] = "kivi"
    bits: int = 2
    group_size: int = 32
    residual_length: int = 128

    def check(self) -> None:
        one_of("bits", self.bits, (2, 3, 4, 8, 16))
        in_range("group_size", self.group_size, 1, 1024)
        in_range("residual_length", self.residual_length, self.group_size, 65536)
        divides("group_size", self.group_size, self.residual_length, "tokens of residual_length")

    def check_model(self, geometry: Geometry) -> None:
        divides("group_size", self.group_size, geometry.head_dim, "channels of a head")

    def make_layer(self, shared: Shared, layer_idx: int) -> CodecLayer:
        return KIVILayer(shared, layer_idx, self)


class KIVILayer(CodecLayer):
    """Codes [batch, tokens, kv_heads, packed channels]; scales of keys [batch, tokens / g, kv_heads, channels]."""

    def __init__(self, shared: Shared, layer_idx: int, config: KIVIConfig):
        super().__init__(shared, layer_idx, config.residual_length)
        self.bits, self.group = config.bits, config.group_size
        self.rates = {"key_scale": self.group, "key_zero": self.group}

    def due(self, side: str, recent: int) -> int:
        return recent // self.residual * self.residual if side == "key" else max(0, recent - self.residual)

    def encode(self, side: str, x: Tensor, start: int) -> dict[str, Tensor]:
        codes, scale, zero = quantize_minmax(x, self.bits, self.group, dim=-2 if side == "key" else -1)
        parts = {"codes": pack(codes, self.bits), "scale": scale, "zero": zero}
        return {name: part.transpose(1, 2).contiguous() for name, part in parts.items()}

    def decode(self, side: str, codes: dict[str, Tensor], start: int) -> Tensor:
        part = {name: tensor.transpose(1, 2) for name, tensor in codes.items()}
        dim, width = -2 if side == "key" else -1, self.shared.geometry.head_dim
        return dequantize_packed_minmax(
            part["codes"], part["scale"], part["zero"], self.bits, self.group, width, dim, self.dtype
        )

    def grid(self, side: str) -> dict[str, Any] | None:
        along = "tokens" if side == "key" else "channels"
        return None if self.bits == 16 else {"bits": self.bits, "group": self.group, "along": along}


METHOD = Method(
    name="kivi",
    family="kv_cache",
    title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    arxiv="2402.02750",
    year=2024,
    authors="Zirui Liu et al.",
    repo="jy-yuan/KIVI",
    status="faithful",
    target="hfext.kv_cache.kivi:KIVIConfig",
    config=KIVIConfig,
    usage="from_pretrained(path, quantization_config=hfext.kv_cache.KIVIConfig(bits=2))",
    summary="Keys quantised per channel over tokens, values per token, the latest tokens in full precision.",
    notes="A baseline of this family; `hfext bench kv` measures it.",
)
