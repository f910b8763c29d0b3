"""What transformers calls to load and save a model with quantised weights, and the same for a loaded one."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer

from ..compression import CompressionConfig, NoWeights, adopt_weights
from ._calibration import calibrate
from ._config import WeightConfig, check_finite
from ._experts import Unstacked, apart, stack, unstack
from ._linear import QuantLinear
from ._modules import put, stacked
from ._on_load import QuantizeOnLoad, awaits_weight, finish, prepare


class WeightQuantizer(HfQuantizer):
    """The quantiser of every `WeightConfig`."""

    quantization_config: WeightConfig

    def validate_environment(self, *args, device_map: Any = None, **kwargs):
        config = self.quantization_config
        if self.pre_quantized:
            return
        if config.calibrated and config.dataset is None:
            raise ValueError(f"{type(config).__name__} needs text to calibrate on: set dataset=.")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts layers on the disk, where they cannot be quantised. Quantise on the CPU, save, and "
                "load the result with this device_map."
            )

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: Any = None, **kwargs):
        config = self.quantization_config
        self.problems: list[Exception] = []
        self.on_load = not (self.pre_quantized or config.calibrated or stacked(model))
        if self.on_load:
            prepare(model, config)
        if self.pre_quantized:
            unstack(model, config.modules_to_not_convert)
            layers = config.layers(model)
            for name, (linear, bits) in layers.items():
                put(model, name, config.empty_layer(linear, bits))
            if checkpoint_files:
                check_files(model, layers, checkpoint_files, self)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs):
        finish(model)
        if self.problems:
            raise self.problems[0]
        if not (self.pre_quantized or self.on_load):
            quantize_layers(model, self.quantization_config)
        for name, layer in quantized_layers(model).items():
            for key in layer.kept_types():
                x = layer._parameters[key].requires_grad_(False)
                if not x.is_meta and not x.isfinite().all():
                    raise ValueError(f"{name}.{key} holds NaN or infinity: the checkpoint is damaged.")
        self.quantization_config.finish_model(model)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        return not self.pre_quantized and awaits_weight(model, param_name)

    def get_quantize_ops(self) -> QuantizeOnLoad:
        return QuantizeOnLoad(self.quantization_config, self.problems)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None):
        return plain(model, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    trained = False  # whether `train_grids` or the like chose what the Trainer is to train

    @property
    def is_qat_trainable(self) -> bool:
        return self.trained

    @property
    def is_compileable(self) -> bool:
        return True


WeightConfig.hf_quantizer = WeightQuantizer


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantised layers of a model, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def quantize_layers(model: nn.Module, config: WeightConfig) -> None:
    """Quantise a plain model in place; when that fails the model is as it was."""
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta:
        raise ValueError(f"{meta[0]} is offloaded, and what is not in memory cannot be quantised. Load on one device.")
    stacks: list[Unstacked] = []
    try:
        unstack(model, config.modules_to_not_convert, stacks)
        layers = config.layers(model)
        for name, (linear, _) in layers.items():
            check_finite(linear.weight, name)
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity.")
        if config.calibrated:
            calibrate(model, config, layers)
            return
        made = {}
        for name, (linear, bits) in layers.items():
            made[name] = config.empty_layer(linear, bits).train(linear.training)
            bias = None if linear.bias is None else linear.bias.detach()
            config.quantize_into(made[name], linear.weight.detach(), bias, name)
        for name, layer in made.items():
            put(model, name, layer)
    except BaseException:
        for unstacked in stacks:
            unstacked.restore()
        raise


def plain(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put plain layers in the place of quantised ones."""
    for name, layer in quantized_layers(model).items():
        put(model, name, layer.to_linear(dtype))
    stack(model)
    return model


def quantize(model: nn.Module, config: WeightConfig) -> nn.Module:
    """Quantise a loaded model in place, as `from_pretrained(quantization_config=config)` does while loading.

    Args:
        model (`PreTrainedModel`): On one device. When quantisation fails it is left as it was.
        config (`WeightConfig`): How; calibrated methods take their text from `config.dataset`.

    Returns:
        The model, which `save_pretrained` writes with its codes.

    Raises:
        ValueError: The model is quantised already, or the options do not fit it.
    """
    if not isinstance(config, WeightConfig):
        raise TypeError(f"config is {type(config).__name__} but must be a config of hfext.quantization.")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError("The model has adapters of PEFT: merge them first, or quantise the model and add them then.")
    old = getattr(model, "hf_quantizer", None)
    if quantized_layers(model) or not (old is None or isinstance(old, NoWeights)):
        raise ValueError("The model is quantised already. Call hfext.quantization.dequantize(model) first.")
    WeightQuantizer(config, pre_quantized=False).validate_environment()
    quantize_layers(model, config)
    config.finish_model(model)
    adopt_weights(model, config)
    return model


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a model plain layers again, in place, in `dtype` or its own type; also under PEFT adapters, which can be
    merged afterwards; with experts call it once more then, which stacks them. The rounding error stays."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(base, "hf_quantizer", None)
    if apart(base) and not quantized_layers(model):
        stack(base)
        return model
    if found is None or not quantized_layers(model):
        raise ValueError("The model has no layers that hfext has quantised.")
    base.dequantize(dtype)
    return model


def check_files(model: nn.Module, layers: Iterable[str], files: Any, quantizer: HfQuantizer) -> None:
    """Refuse a checkpoint whose quantised tensors are not those that the config describes, before anything is read.

    Raises:
        ValueError: A file is truncated, a tensor is missing, or has another shape or type.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in [files] if isinstance(files, str) else files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"{path} is no safetensors file; quantised weights are kept in nothing else.")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    found[key] = (tuple(part.get_shape()), part.get_dtype())
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    state = model.state_dict()
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    names = {}
    for key in found:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state:
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, state)
        names[name] = key
    for name in layers:
        for key, x in model.get_submodule(name).state_dict().items():
            if f"{name}.{key}" not in names:
                raise ValueError(f"The checkpoint has no {name}.{key}, which its config describes.")
            shape, dtype = found[names[f"{name}.{key}"]]
            if shape != tuple(x.shape) or (x.dtype == torch.uint8) != (dtype == "U8"):
                raise ValueError(
                    f"{name}.{key} is {dtype} {list(shape)} in the checkpoint, but its config describes "
                    f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}."
                )
    codes = [name for name in names if ".qweight" in name and name not in state]
    if codes:
        raise ValueError(f"The checkpoint has {codes[0]}, which its config does not describe.")


def check_folder(folder: str | os.PathLike) -> None:
    """Check that a saved folder holds the quantised layers that its config describes, and that their grids are finite.

    Raises:
        ValueError: What is wrong.
    """
    path = Path(folder)
    config = AutoConfig.from_pretrained(path)
    weights = CompressionConfig.from_dict(config.quantization_config).weights
    quantizer = WeightQuantizer(weights, pre_quantized=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    quantizer._process_model_before_weight_loading(
        model, checkpoint_files=sorted(map(str, path.glob("*.safetensors")))
    )
    kept = {key for layer in quantized_layers(model).values() for key in layer.kept_types()}
    for file in path.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                if key.rpartition(".")[2] in kept and not tensors.get_tensor(key).isfinite().all():
                    raise ValueError(f"{key} holds NaN or infinity: the checkpoint is damaged.")
