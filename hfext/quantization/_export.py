"""Export of quantised weights to the `pack-quantized` layout of compressed-tensors, which vLLM and transformers read.

A layer becomes `weight_packed` int32 [out, in bits / 32], value k of a word at bit `bits k`; `weight_scale`
[out, groups]; `weight_shape` int64 [2]; and, unless every zero point is 2^(b-1), `weight_zero_point` int32
[out bits / 32, groups], packed down the rows. Rows that do not fill words are padded with zeros.

Its weights are s (q - p) with integers p in 0 .. 2^b - 1, so grids whose offset is not -s p cannot be exported. With a
symmetric grid they are exactly ours; else they differ by the rounding with which z was stored. Scales are written as
they are stored. transformers 5.23 with compressed-tensors 0.20 reads zero points only with
`from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))`: without, the library expects
them unpacked. It reads symmetric grids either way.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..compression import joined
from ._experts import SUFFIX
from ._linear import QuantLinear
from ._modules import stacked
from ._quantizer import quantized_layers

logger = logging.get_logger(__name__)


def export_compressed_tensors(model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None) -> None:
    """
    Write a checkpoint in the layout of compressed-tensors, as `save_pretrained` writes one in ours.

    Args:
        model (`PreTrainedModel`): Quantised by a method of hfext to 4 or 8 bits, by layer, with an integer zero point
            or a symmetric grid. It stays as it is.
        folder (`str` or `os.PathLike`): A folder that is new or empty. It appears when everything is written.
        tokenizer (*optional*): Saved beside the model.

    Raises:
        ValueError: The model is not quantised, has other widths, or a grid without integer zero point, which is
            named; or the folder holds something.
        NotImplementedError: Layers that hold more than codes and a grid, stacked experts, or a compressed cache.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("The model has no layers that hfext has quantised.")
    if joined(model.config.quantization_config).kv_cache is not None:
        raise NotImplementedError("There is no place for a compressed cache: take it off the model first.")
    if stacked(model) or any(f"{SUFFIX}." in name for name in layers):
        raise NotImplementedError("Stacked experts cannot be exported: readers disagree on their names and layout.")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; give a folder that is new or empty.")
    points = {name: zero_points(layer, name) for name, layer in layers.items()}
    symmetric = all(bool((points[name] == 2 ** (layer.bits - 1)).all()) for name, layer in layers.items())
    state = {key: x for key, x in model.state_dict().items()}
    for name, layer in layers.items():
        for key in ("qweight", "scales", "zeros"):
            del state[f"{name}.{key}"]
        for key, x in stored(layer, None if symmetric else points[name]).items():
            state[f"{name}.{key}"] = x
    if not symmetric:
        logger.warning(
            "transformers reads zero points of compressed-tensors only with from_pretrained(folder, "
            "quantization_config=CompressedTensorsConfig(dequantize=True)); symmetric=True of the method needs none."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        model.save_pretrained(partial, state_dict=state)
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = quantization_config(model, layers, symmetric)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def zero_points(layer: QuantLinear, name: str) -> Tensor:
    """The integers p [out, groups] for which the stored z is -s p up to the rounding of s and z when they were stored.

    Raises:
        ValueError: There are none, or the codes have a width that is not exported.
        NotImplementedError: A kind of layer that is not exported.
    """
    if type(layer) is not QuantLinear:
        raise NotImplementedError(f"{name} is a {type(layer).__name__}, which holds more than codes and a grid.")
    if layer.bits not in (4, 8):
        raise ValueError(f"{name} has {layer.bits} bits, but 4 and 8 are exported.")
    scales, zeros = layer.scales.detach().double(), layer.zeros.detach().double()
    points = (-zeros / scales).round().nan_to_num()
    limits = torch.finfo(layer.scales.dtype)
    least = limits.smallest_normal  # below, numbers are rounded to multiples of least * eps
    rounding = (points.abs() * scales.abs().clamp(min=least) + zeros.abs().clamp(min=least)) * limits.eps / 2
    whole = (zeros + scales * points).abs() <= rounding
    if not (whole & (points >= 0) & (points < 2**layer.bits) & (scales > 0)).all():
        raise ValueError(
            f"{name} has offsets that are no multiples of its scales, and compressed-tensors has no others. Quantise "
            'with zero_point="int" or symmetric=True.'
        )
    return points.to(torch.uint8)


def stored(layer: QuantLinear, points: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a layer by their names in compressed-tensors; `points` [out, groups] where they are written."""
    made = {
        "weight_packed": words(layer.codes, layer.bits),
        "weight_scale": layer.scales.detach(),
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    if points is not None:
        made["weight_zero_point"] = words(points.T, layer.bits).T.contiguous()
    return made


def words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, n] of 4 or 8 bits as int32 [rows, ceil(n bits / 32)], the first code in the lowest bits."""
    each = 32 // bits
    codes = nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each)).long()
    word = (codes << torch.arange(0, 32, bits, device=codes.device)).sum(-1)
    return torch.where(word < 2**31, word, word - 2**32).to(torch.int32)


def quantization_config(model: nn.Module, layers: dict[str, QuantLinear], symmetric: bool) -> dict[str, Any]:
    """What compressed-tensors writes into config.json."""
    by_row = all(layer.scales.shape[1] == 1 for layer in layers.values())
    schemes: dict[tuple[int, int | None], list[str]] = {}
    for name, layer in layers.items():
        schemes.setdefault((layer.bits, None if by_row else layer.group_size), []).append(name)
    groups = {}
    for i, ((bits, group_size), names) in enumerate(schemes.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "group_size": group_size,
            "strategy": "channel" if by_row else "group",
            "dynamic": False,
        }
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    return {
        "config_groups": groups,
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": plain,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
