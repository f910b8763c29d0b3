"""Fine-tuning a quantised model through its grids, with its codes as they are."""

import torch
from torch import nn

from ._quantizer import quantized_layers
from ._wrapper import WrapperConfig


def train_grids(model: nn.Module, norms: bool = True, dtype: torch.dtype = torch.float32) -> int:
    """Make scales and offsets of all quantised layers the trainable parameters of a model, in place.

    The Trainer then takes the model as it is (`is_qat_trainable`). Stored halves would lose small steps, so the grids
    are kept, and saved, in `dtype` from now on; `scale_dtype` of the config says so.

    Args:
        model (`PreTrainedModel`): A model with layers that hfext has quantised.
        norms (`bool`, *optional*, defaults to `True`): Train the weights of norms too.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the trained grids.

    Returns:
        `int`: How many numbers are trained.

    Raises:
        ValueError: The model has no quantised layers.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("The model has no layers that hfext has quantised, so there are no grids to train.")
    model.requires_grad_(False)
    chosen = []
    for layer in layers.values():
        for name in layer.kept_types():
            parameter = layer._parameters[name]
            parameter.data = parameter.data.to(dtype)
            chosen.append(parameter)
    for module in model.modules():
        if norms and "norm" in type(module).__name__.lower():
            chosen += module.parameters(recurse=False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    model.hf_quantizer.trained = True
    config = model.hf_quantizer.quantization_config
    while isinstance(config, WrapperConfig):
        config.scale_dtype = str(dtype).removeprefix("torch.")
        config = config.quantizer
    config.scale_dtype = str(dtype).removeprefix("torch.")
    return sum(parameter.numel() for parameter in chosen)
