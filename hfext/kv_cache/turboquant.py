"""Scalar TurboQuant: a random rotation makes every channel nearly normal, and one fixed codebook serves them all.

per head of a token x in R^d:   r = |x|,   u = sqrt(d) M S x / r,   code_i = nearest level to u_i
back:                           x = r S M^T level / sqrt(d)
S flips signs at random (the same for all tokens), M is the orthonormal Hadamard matrix, the levels are those of least
mean squared error on N(0, 1). Nothing is learnt from data and only the norm is stored: b + 16 / d bits a channel.

"TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", arXiv 2504.19874; its scalar form is that
of HIGGS, arXiv 2411.17525. The paper's rotation is a dense random one and it has a second stage for inner products.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._fields import in_range, one_of
from .._packing import dequantize_packed_codebook, pack
from ..registry import Method
from ._codec_layer import CodecLayer
from ._config import KVCacheConfig
from ._hadamard import rotate, rotation_block
from ._quantize import lloyd_max_codebook, quantize_codebook, random_signs
from ._state import Shared


@dataclass(kw_only=True, repr=False)
class TurboQuantConfig(KVCacheConfig):
    """Options of scalar TurboQuant.

    Args:
        bits (`int`, *optional*, defaults to 4): Bits of a code: 2, 3, 4 or 8; 16 stores the channels as they are.
        residual_length (`int`, *optional*, defaults to 0): Latest tokens kept in full precision, at least.
        seed (`int`, *optional*, defaults to 0): Of the random signs.
    """

    method: ClassVar[str] = "turboquant"
    bits: int = 4
    residual_length: int = 0
    seed: int = 0

    def check(self) -> None:
        one_of("bits", self.bits, (2, 3, 4, 8, 16))
        in_range("residual_length", self.residual_length, 0, 65536)
        in_range("seed", self.seed, 0, 2**31 - 1)

    def make_layer(self, shared: Shared, layer_idx: int) -> CodecLayer:
        return TurboQuantLayer(shared, layer_idx, self)


def spread(x: Tensor, signs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x [..., d] float32 as channels of unit variance [..., d] and norms float16 [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).half()
    size = norm.float().clamp(min=2.0**-24)
    return rotate(x * signs, block) * (math.sqrt(x.shape[-1]) / size), norm


def gather(u: Tensor, norm: Tensor, signs: Tensor, block: int) -> Tensor:
    """The inverse of `spread`."""
    return rotate(u, block, inverse=True) * (signs / math.sqrt(u.shape[-1])) * norm.float()


class TurboQuantLayer(CodecLayer):
    """Codes [batch, tokens, kv_heads, packed channels] and norms [batch, tokens, kv_heads, 1]."""

    def __init__(self, shared: Shared, layer_idx: int, config: TurboQuantConfig):
        super().__init__(shared, layer_idx, config.residual_length)
        self.bits, self.seed = config.bits, config.seed

    def encode(self, side: str, x: Tensor, start: int) -> dict[str, Tensor]:
        x = x.transpose(1, 2)
        if self.bits == 16:
            return {"codes": x.contiguous()}
        dim = x.shape[-1]
        u, norm = spread(x.float(), random_signs(dim, self.seed, x.device), rotation_block(1, dim, 1))
        return {"codes": pack(quantize_codebook(u, lloyd_max_codebook(self.bits, x.device)), self.bits), "norm": norm}

    def decode(self, side: str, codes: dict[str, Tensor], start: int) -> Tensor:
        if self.bits == 16:
            return codes["codes"].transpose(1, 2)
        dim, device = self.shared.geometry.head_dim, codes["norm"].device
        u = dequantize_packed_codebook(codes["codes"], lloyd_max_codebook(self.bits, device), self.bits, dim)
        x = gather(u, codes["norm"], random_signs(dim, self.seed, device), rotation_block(1, dim, 1))
        return x.to(self.dtype).transpose(1, 2)


METHOD = Method(
    name="turboquant",
    family="kv_cache",
    title="TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
    arxiv="2504.19874",
    year=2025,
    authors="Amir Zandieh et al.",
    status="variant",
    difference="The scalar quantiser alone, without the one-bit stage for inner products; a signed Hadamard rotation "
    "stands in for a dense random one.",
    target="hfext.kv_cache.turboquant:TurboQuantConfig",
    config=TurboQuantConfig,
    usage="from_pretrained(path, quantization_config=hfext.kv_cache.TurboQuantConfig(bits=4))",
    summary="A random rotation and one fixed codebook for every channel: nothing is learnt from data.",
    notes="A baseline of this family; `hfext bench kv` measures it.",
)
