"""Inputs of layers in 8 bits, with the first token kept apart.

The first token of a text draws activations that are orders larger than all others, and one range for all tokens then
leaves little of the others. In a causal model what a layer gives for that token depends on nothing but the token, so

    y = [y_0; W' Q(x_1); W' Q(x_2); ...]        y_0 the plain model's output, worked out once
    Q(x) = s (clamp(round(x / s) + o) - o)      s, o per tensor, from calibration without the first tokens

y_0 is used where a call begins with exactly this token, in the first column, with no padding on its left. Otherwise
the first token of each row is not rounded, and goes through W' in floating point. Layers that are not protected round
all tokens, with ranges from all tokens. With `bos_aware=False` this is so for all layers.

MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled Mixed Precision Quantization,
arXiv 2405.17873. The paper does this for the text embedding that cross-attention reads; the layers here are those
whose inputs show it in language models.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from .._fields import in_range
from ..registry import Method, Result
from ._activation_linear import ActivationLinear, FirstTokens
from ._affine import Quantized
from ._calibration import Block
from ._config import CalibratedConfig, WeightConfig
from ._modules import block_lists
from ._wrapper import OWNED, WrapperConfig
from .rtn import RTNConfig

OF_DATA = tuple(f.name for f in dataclasses.fields(CalibratedConfig) if f.name not in OWNED)


@dataclass(kw_only=True, repr=False)
class BOSAwareConfig(WrapperConfig, CalibratedConfig):
    """Quantised inputs around another quantiser, with text to find their ranges:
    `BOSAwareConfig(quantizer=RTNConfig(bits=8), dataset=texts)`. Products are those of floats: what is seen is the
    loss of accuracy, not a gain in speed. A dequantised model has plain layers and plain inputs.

    Args:
        quantizer (`WeightConfig`, *optional*, defaults to `RTNConfig(bits=8)`): How weights are quantised; its options
            are its own. Data and its options, those of `CalibratedConfig`, are shared: each comes from this config
            where it is given here, and from the quantiser's otherwise.
        activation_bits (`int`, *optional*, defaults to 8): Bits of the inputs, 2 to 16; `None` leaves them.
        activation_range (`str`, *optional*, defaults to "affine"): "affine", from the least to the largest value, or
            "symmetric" around 0.
        bos_aware (`bool`, *optional*, defaults to `True`): Keep first tokens apart in the protected layers.
        protected (`list[str]`, *optional*): Names, endings or regular expressions of the layers that keep them apart;
            `k_proj`, `v_proj` and `down_proj` by default.
        bos_token_id (`int`, *optional*): The token that texts begin with; the model's by default.

    Raises:
        ValueError: A value out of its range, or a model without a first token.
        NotImplementedError: A quantiser with layers of its own, or a model with an encoder.
    """

    method: ClassVar[str] = "bos_aware"
    calibrated: ClassVar[bool] = True
    apart: ClassVar[tuple[str, ...]] = ("quantizer", *CalibratedConfig.apart)
    quantizer: Any = None
    activation_bits: int | None = 8
    activation_range: Literal["affine", "symmetric"] = "affine"
    bos_aware: bool = True
    protected: list[str] | None = None
    bos_token_id: int | None = None

    def __post_init__(self):
        if self.quantizer is None:
            self.quantizer = RTNConfig(bits=8)
        self.protected = ["k_proj", "v_proj", "down_proj"] if self.protected is None else self.protected
        super().__post_init__()
        inner = self.quantizer
        if type(inner).empty_layer is not WeightConfig.empty_layer:
            raise NotImplementedError(
                f"quantizer is {type(inner).__name__}, whose layers are of their own kind. Take one that keeps "
                "weights as w = s q + z and no more, such as RTNConfig or GPTQConfig."
            )
        if inner.rescales:
            raise NotImplementedError(
                f"quantizer is {type(inner).__name__}, which changes what layers give, so that outputs noted before "
                "are wrong. Take RTNConfig, HQQConfig, GPTQConfig or DecoupleQConfig."
            )
        if isinstance(inner, CalibratedConfig):
            for f in dataclasses.fields(CalibratedConfig):
                if f.name in OF_DATA and getattr(self, f.name) is f.default:
                    setattr(self, f.name, getattr(inner, f.name))

    def check(self) -> None:
        if self.activation_bits is not None:
            in_range("activation_bits", self.activation_bits, 2, 16)
        if self.bos_token_id is not None:
            in_range("bos_token_id", self.bos_token_id, 0, 2**31)

    @property
    def plain_too(self) -> bool:
        return self.quantizer.calibrated and self.quantizer.plain_too

    def layers(self, model: nn.Module) -> dict[str, tuple[nn.Linear, int]]:
        found = super().layers(model)
        self._apart = {id(linear) for name, (linear, _) in found.items() if self.protects(name)}
        return found

    def protects(self, name: str) -> bool:
        """Whether a layer keeps first tokens apart."""
        return self.bos_aware and not should_convert_module(name, self.protected)

    def empty_layer(self, linear: nn.Linear, bits: int) -> nn.Module:
        if self.activation_bits is None:
            return self.quantizer.empty_layer(linear, bits)
        layer = ActivationLinear.like(linear, bits, self.group_size, getattr(torch, self.scale_dtype))
        return layer.prepare(self.activation_bits, self.activation_range == "symmetric", id(linear) in self._apart)

    def prepare_model(self, model: nn.Module) -> None:
        """Note what the protected layers of the plain model give for the first token."""
        if self.activation_bits is None or not self.bos_aware:
            return
        first: dict[int, Tensor] = {}

        def note(module: nn.Module, args: tuple, out: Tensor) -> None:
            if out.dim() == 3:
                first[id(module)] = out[0, 0].detach().clone()

        token = self.first_token(model)
        hooks = [m.register_forward_hook(note) for m in model.modules() if id(m) in self._apart]
        try:
            ids = torch.tensor([[token]], device=model.get_input_embeddings().weight.device)
            model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self._first = first

    def quantize_block(self, block: Block) -> None:
        if self.quantizer.calibrated:
            self.quantizer.quantize_block(block)
        else:
            for name in block.layers:
                weight, bits = block.weight(name), block.bits(name)
                block.replace(name, self.quantizer.quantize_weight(weight, bits, self.group_size))
        if self.activation_bits is not None:
            self.set_ranges(block)
        self.finish_block(block)

    def set_ranges(self, block: Block) -> None:
        """Ranges of the inputs of each layer of a block, from its quantised weights and plain inputs, and outputs for
        the first token. A layer that saw no token, an expert say, keeps plain inputs."""
        ranges: dict[str, tuple[float, float]] = {}
        layers = {name: block.module.get_submodule(name) for name in block.layers}

        def hook(name: str) -> Any:
            def seen(module: nn.Module, args: tuple) -> None:
                x = args[0].detach()
                if module.protected and x.dim() == 3:
                    x = x[:, 1:]
                if x.numel():
                    low, high = (float(end) for end in torch.aminmax(x))
                    old = ranges.get(name, (low, high))
                    ranges[name] = min(old[0], low), max(old[1], high)

            return seen

        hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
        try:
            for sample in block.samples:
                block.run(sample)
        finally:
            for handle in hooks:
                handle.remove()
        for name, layer in layers.items():
            if name in ranges:
                layer.set_range(*ranges[name])
            first = getattr(self, "_first", {}).get(id(block.layers[name][0]))
            if layer.protected and first is None:
                raise NotImplementedError(
                    f"{block.name}.{name} does not get whole rows of tokens and cannot be protected: leave it out of "
                    "protected."
                )
            if layer.protected:
                layer.bos_out.copy_(first)

    def finish_model(self, model: nn.Module) -> None:
        """Let the protected layers know where the first tokens of a call are."""
        for name in ("_first", "_apart"):
            vars(self).pop(name, None)
        layers = [m for m in model.modules() if isinstance(m, ActivationLinear) and m.protected]
        if layers:
            watch = FirstTokens(self.first_token(model))
            # Some models call the owner of the blocks past the model around it.
            (blocks,) = block_lists(model)
            decoder = model.get_submodule(blocks.rpartition(".")[0])
            decoder.register_forward_pre_hook(watch.before, with_kwargs=True)
            decoder.register_forward_hook(watch.after, always_call=True)
            for layer in layers:
                layer.first_tokens = watch

    def first_token(self, model: nn.Module) -> int:
        """The token that texts begin with."""
        if model.config.is_encoder_decoder:
            raise NotImplementedError("First tokens are known in decoders alone: set bos_aware=False.")
        text = model.config.get_text_config()
        token = text.bos_token_id if self.bos_token_id is None else self.bos_token_id
        if token is None:
            raise ValueError("The model names no first token: set bos_token_id, or bos_aware=False.")
        if not 0 <= token < text.vocab_size:
            raise ValueError(f"bos_token_id is {token} but must be in [0, {text.vocab_size - 1}].")
        return token

    def quantize_layer(self, weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Quantized:
        return self.quantizer.quantize_layer(weight, hessian, bits, group_size)


METHOD = Method(
    name="bos_aware",
    family="quantization",
    title="MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled Mixed Precision "
    "Quantization",
    authors="Zhao et al.",
    arxiv="2405.17873",
    year=2024,
    repo="A-suozhang/MixDQ",
    status="variant",
    difference="For the inputs of layers of causal language models, where the paper has the text embedding of "
    "cross-attention; simulated, with no integer kernel.",
    target="hfext.quantization.bos_aware:BOSAwareConfig",
    config=BOSAwareConfig,
    usage="from_pretrained(path, quantization_config=BOSAwareConfig(quantizer=RTNConfig(bits=8), dataset=texts))",
    summary="Quantises the inputs of layers per tensor and keeps the first token, whose values are far larger, apart.",
    claim="Keeping the first token apart takes most of the harm from inputs that are quantised per tensor.",
    headline=Result(
        metric="FID and CLIP score",
        setting="SDXL-turbo, 8 bits for weights and activations",
        value="no visible loss",
    ),
    recipe="quantization/bos_aware-smollm2-wikitext2.yaml",
    notes="With gradients, adapters, padding on the left, or another first token, that token is computed in floating "
    "point from the quantised weights instead of being taken from the buffer `bos_out`.",
)
