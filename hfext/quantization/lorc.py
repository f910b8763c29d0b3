"""Low-rank compensation: the largest part of what rounding took away, kept beside the codes.

    E = W - W',  E = U S V^T,   u = U_m S_m^(1/2) [out, m],  v = S_m^(1/2) V_m^T [m, in],   W'' = W' + u v

u and v are the best pair of rank m for the Frobenius norm of E, and are stored in 8 bits with one scale for each row
of u and of v (or in 16 bits). A layer computes y = x W'^T + (x v^T) u^T. It comes after any quantiser.

LoRC of "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation",
arXiv 2303.08302. Not in the paper, off by default: `activations=True` takes the best pair for tr(E H E^T) with the
second moments H of the inputs, from the SVD of E H^(1/2), as LQER and EoRA do.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._fields import in_range
from ..registry import Method, Result
from ._linear import QuantLinear
from ._modules import put
from ._wrapper import WrapperConfig


@dataclass(kw_only=True, repr=False)
class LoRCConfig(WrapperConfig):
    """Low-rank compensation around another quantiser: `LoRCConfig(quantizer=RTNConfig(bits=3))`.

    Args:
        quantizer (`WeightConfig`): What makes codes and grid; its options are its own.
        rank (`int`, *optional*, defaults to 8): m. Cut to the smaller side of a layer.
        factor_bits (`int`, *optional*, defaults to 8): 8, or 16 for factors in the type of the scales.
        activations (`bool`, *optional*, defaults to `False`): Weigh the error by the inputs of the layer; needs a
            quantiser that sees data.
    """

    method: ClassVar[str] = "lorc"
    rank: int = 8
    factor_bits: Literal[8, 16] = 8
    activations: bool = False

    def check(self) -> None:
        in_range("rank", self.rank, 0, 65536)
        if self.activations and not self.calibrated:
            raise ValueError(f"activations is True, but {self.quantizer.method} sees no data: use gptq or decoupleq.")

    def empty_layer(self, linear: nn.Linear, bits: int) -> "LoRCLinear":
        made = LoRCLinear.like(linear, bits, self.group_size, getattr(torch, self.scale_dtype))
        made.add_factors(self.rank, self.factor_bits)
        return made

    def complete(self, layer: "LoRCLinear", weight: Tensor, hessian: Tensor | None) -> None:
        if not layer.rank:
            return
        # The error that stays is that of the grid as it is stored.
        error = weight.float() - layer.dequantized(torch.float32)
        layer.store_factors(*factors(error, layer.rank, hessian if self.activations else None))


class Factors(NamedTuple):
    """u [out, m] and v [m, in]."""

    u: Tensor
    v: Tensor


def factors(error: Tensor, rank: int, hessian: Tensor | None = None) -> Factors:
    """The best pair of a rank for the squared error of weights [out, in], or of outputs given H [in, in]; float64."""
    error = error.double()
    if hessian is None:
        u, s, vt = torch.linalg.svd(error, full_matrices=False)
    else:
        values, vectors = torch.linalg.eigh(hessian.double())
        root = values.clamp(min=1e-10 * values[-1].clamp(min=1e-30)).sqrt()
        u, s, vt = torch.linalg.svd(error @ (vectors * root), full_matrices=False)
        vt = (vt / root) @ vectors.T
    half = s[:rank].sqrt()
    return Factors(u[:, :rank] * half, half[:, None] * vt[:rank])


def rows_of_bytes(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric rounding of the rows of x to int8: codes, and scales [rows, 1] in `dtype`, rounded up."""
    scales = (x.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(dtype).tiny)
    stored = scales.to(dtype)
    stored = torch.where(stored < scales, torch.nextafter(stored, torch.full_like(stored, torch.inf)), stored)
    return (x / stored.to(x.dtype)).round().clamp(-127, 127).to(torch.int8), stored


class LoRCLinear(QuantLinear):
    """A quantised layer with `lorc_u` [out, m] and `lorc_v` [m, in]: int8 with scales of their rows, or 16 bits."""

    def add_factors(self, rank: int, bits: int) -> None:
        """Empty factors."""
        self.rank, self.factor_bits = min(rank, self.in_features, self.out_features), bits
        where, kind = self.scales.device, self.scales.dtype
        for name, shape in (("lorc_u", (self.out_features, self.rank)), ("lorc_v", (self.rank, self.in_features))):
            if bits == 8:
                self.register_buffer(name, torch.zeros(shape, dtype=torch.int8, device=where))
                name, shape = f"{name}_scales", (shape[0], 1)
            self.register_parameter(
                name, nn.Parameter(torch.zeros(shape, dtype=kind, device=where), requires_grad=False)
            )

    def store_factors(self, u: Tensor, v: Tensor) -> None:
        """Hold u [out, m] and v [m, in]."""
        for name, x in (("u", u), ("v", v)):
            held = getattr(self, f"lorc_{name}")
            if self.factor_bits == 8:
                codes, scales = rows_of_bytes(x, self.scales.dtype)
                held.copy_(codes)
                getattr(self, f"lorc_{name}_scales").data.copy_(scales)
            else:
                held.data.copy_(x)

    def kept_types(self) -> tuple[str, ...]:
        ending = "_scales" if self.factor_bits == 8 else ""
        return (*super().kept_types(), f"lorc_u{ending}", f"lorc_v{ending}")

    def factor(self, name: str, dtype: torch.dtype) -> Tensor:
        """u or v in `dtype`."""
        held = getattr(self, f"lorc_{name}")
        if self.factor_bits == 16:
            return held.to(dtype)
        return (held.float() * getattr(self, f"lorc_{name}_scales").float()).to(dtype)

    def effective(self, dtype: torch.dtype) -> Tensor:
        whole = self.dequantized(torch.float32) + self.factor("u", torch.float32) @ self.factor("v", torch.float32)
        return whole.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x = x.to(y.dtype)
        return y + F.linear(F.linear(x, self.factor("v", x.dtype)), self.factor("u", x.dtype))

    def adapter(self) -> tuple[Tensor, Tensor]:
        """A = v [m, in] and B = u [out, m] of a LoRA with scaling 1, in float32."""
        return self.factor("v", torch.float32), self.factor("u", torch.float32)


def to_lora(model: nn.Module) -> nn.Module:
    """The corrections of a model as a trainable PEFT LoRA with scaling 1, in place: the outputs stay, and fine-tuning
    starts from them (one step of LoftQ).

    Args:
        model (`PreTrainedModel`): Quantised with [`LoRCConfig`].

    Returns:
        `PeftModel`: Around the model, whose layers have lost their corrections and are those of `quantizer` alone.

    Raises:
        ValueError: The model has no corrections.
    """
    import peft

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRCLinear)}
    if not layers:
        raise ValueError("The model has no corrections: quantise it with LoRCConfig first.")
    pairs = {name: layer.adapter() for name, layer in layers.items()}
    config = model.hf_quantizer.quantization_config
    for name, layer in layers.items():
        made = QuantLinear(
            layer.in_features,
            layer.out_features,
            layer.bits,
            layer.group_size,
            layer.bias is not None,
            layer.compute_dtype,
            layer.scales.dtype,
            layer.scales.device,
        )
        made.load_state_dict({key: x for key, x in layer.state_dict().items() if not key.startswith("lorc_")})
        put(model, name, made)
    model.hf_quantizer.quantization_config = model.hf_quantizer.compression.weights = config.quantizer
    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    lora = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        task_type=peft.TaskType.CAUSAL_LM if "CausalLM" in type(model).__name__ else None,
    )
    adapted = peft.get_peft_model(model, lora)
    for name, (a, b) in pairs.items():
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return adapted


METHOD = Method(
    name="lorc",
    family="quantization",
    title="ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank "
    "Compensation",
    authors="Yao et al.",
    arxiv="2303.08302",
    year=2023,
    repo="microsoft/DeepSpeed",
    status="faithful",
    target="hfext.quantization.lorc:LoRCConfig",
    config=None,
    usage="from_pretrained(path, quantization_config=LoRCConfig(quantizer=RTNConfig(bits=3), rank=8))",
    summary="Keeps the low-rank part of the rounding error of any quantiser beside its codes.",
    claim="A correction of rank 8 wins back a large part of the perplexity that coarse quantisation costs.",
    headline=Result(
        metric="share of the perplexity gap",
        setting="4-bit weights in coarse blocks, OPT and BLOOM",
        value="large, less with fine-grained blocks",
    ),
    recipe="quantization/lorc-smollm2-wikitext2.yaml",
)
