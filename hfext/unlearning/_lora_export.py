"""Changes of low rank as a PEFT LoRA adapter: r = alpha = the largest rank, smaller ones are filled with zeros."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from ._edit_changes import Kept


def write_lora(model: nn.Module, kept: "Sequence[Kept]", folder: str | Path | None) -> tuple[Any, dict[str, Tensor]]:
    """`LoraConfig` and weights (float32) under the names that PEFT stores; `folder` gets both as files."""
    from peft import LoraConfig

    if not kept:
        raise ValueError("The edit changed nothing: there is no adapter to export.")
    rank = max((part.tensors["left"].shape[1] for part in kept if part.kind == "low_rank"), default=0)
    weights, names, transposed = {}, [], False
    for part in kept:
        path, _, leaf = part.name.rpartition(".")
        if ".lora_" in f".{part.name}":
            raise ValueError(f"{part.name} belongs to an adapter: an adapter cannot hold the change of another one.")
        module = model.get_submodule(path)
        if part.kind != "low_rank":
            raise ValueError(
                f"{part.name} was changed in {'single' if part.kind == 'entries' else 'all'} entries, which is "
                "no change of low rank: a LoRA adapter cannot hold it. Use `save`."
            )
        if leaf != "weight" or not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(f"{part.name} is no weight of a linear layer: a LoRA adapter cannot hold its change.")
        left, right = part.tensors["left"].float(), part.tensors["right"].float()
        # Conv1D keeps [in, out], the transpose of what LoRA adds to.
        b, a = (right.T, left.T) if isinstance(module, Conv1D) else (left, right)
        transposed |= isinstance(module, Conv1D)
        fill = rank - a.shape[0]
        name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
        names.append(name)
        key = f"base_model.model.{name}"
        weights[f"{key}.lora_A.weight"] = torch.cat([a, a.new_zeros(fill, a.shape[1])]).contiguous()
        weights[f"{key}.lora_B.weight"] = torch.cat([b, b.new_zeros(b.shape[0], fill)], 1).contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules="|".join(re.escape(name) for name in names),
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    if folder is not None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return config, weights
