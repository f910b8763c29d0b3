"""Options that every quantiser of weights has, and what a method writes.

A method without data writes `quantize_weight`. A calibrated one writes `quantize_layer`, which sees one layer and the
second moments of its inputs, or `quantize_block`, which sees a whole block with its inputs and the outputs to keep.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._fields import in_range, one_of
from ..compression import PartConfig
from ._affine import Quantized
from ._linear import QuantLinear, misfit
from ._modules import quantizable

if TYPE_CHECKING:
    from ._calibration import Block

KEPT = 16  # "bits" of a module that is to stay as it is


@dataclass(kw_only=True, repr=False)
class WeightConfig(PartConfig):
    """Base of the quantisers of weights; each method has its own.

    `from_pretrained(path, quantization_config=config)` quantises while it loads; `hfext.quantization.quantize(model,
    config)` a model in memory. Every method keeps weights as w = s q + z with packed integers q and one s and z for
    each `group_size` consecutive inputs of an output.

    Args:
        bits (`int` or `dict[str, int]`, *optional*, defaults to 4): Bits of a code, 2, 3, 4 or 8, for all layers or
            for each by name, as `hfext.quantization.allocate` gives them; 16 leaves a layer as it is.
        group_size (`int`, *optional*, defaults to 64): Inputs that share a scale and an offset; -1 for a whole row.
        modules_to_not_convert (`list[str]`, *optional*): Names, endings or regular expressions of layers to leave out
            beside the head and the embeddings, which are never quantised.
        on_unsupported (`str`, *optional*, defaults to "raise"): What to do with a layer whose sizes the options do not
            fit: "raise", or "skip" and list it in `skipped_modules`.
        scale_dtype (`str`, *optional*, defaults to "float16"): Type of scales and offsets: "float16", "bfloat16" or
            "float32".
        skipped_modules (`list[str]`, *optional*): Set by quantisation: the layers that were skipped.

    Raises:
        ValueError: A value out of its range.
        TypeError: An unknown option.
    """

    slot: ClassVar[str] = "weights"
    kind: ClassVar[str] = "quantiser of weights"
    calibrated: ClassVar[bool] = False
    rescales: ClassVar[bool] = False  # moves scales from layer to layer
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    hf_quantizer: ClassVar[type]  # set by _quantizer.py
    bits: int | dict[str, int] = 4
    group_size: int = 64
    modules_to_not_convert: list[str] | None = None
    on_unsupported: Literal["raise", "skip"] = "raise"
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    skipped_modules: list[str] | None = None

    def __post_init__(self):
        if isinstance(self.bits, Mapping):
            self.bits = dict(self.bits)
        super().__post_init__()
        if isinstance(self.bits, dict):
            for name, bits in self.bits.items():
                one_of(f"bits[{name!r}]", bits, (*self.widths, KEPT))
        else:
            one_of("bits", self.bits, self.widths)
        if self.group_size != -1:
            in_range("group_size", self.group_size, 1, 65536)

    # -- what a method writes

    def quantize_weight(self, weight: Tensor, bits: int, group_size: int) -> Quantized:
        """Codes and grid of a weight [out, in] in float32, from the weight alone."""
        raise NotImplementedError(f"{self.method} needs data.")

    def empty_layer(self, linear: nn.Linear, bits: int) -> nn.Module:
        """The layer that takes the place of `linear`, to be filled by `fill` or by a checkpoint."""
        return QuantLinear.like(linear, bits, self.group_size, getattr(torch, self.scale_dtype))

    def problem(self, linear: nn.Linear, bits: int) -> str:
        """Why a layer cannot be quantised so, by its sizes; empty when it can."""
        return misfit(linear.in_features, bits, self.group_size)

    def fill(self, layer: nn.Module, result: Any, bias: Tensor | None) -> None:
        """Put what the method found into the empty layer."""
        layer.store(result, bias)

    def finish_model(self, model: nn.Module) -> None:
        """After all layers of a model are quantised, or loaded."""

    def complete(self, layer: nn.Module, weight: Tensor, hessian: Tensor | None) -> None:
        """After `fill`: add what depends on the error that is left, given the weight [out, in] and, where data was
        seen, H of its inputs."""

    # -- what the frame asks

    def quantize_into(self, layer: nn.Module, weight: Tensor, bias: Tensor | None, name: str) -> None:
        """Fill an empty layer from a weight alone; a weight with NaN or infinity is a `ValueError` with its name."""
        check_finite(weight, name)
        with naming(name):
            self.fill(layer, self.quantize_weight(weight.float(), layer.bits, self.group_size), bias)
        self.complete(layer, weight, None)

    def bits_of(self, name: str) -> int:
        """Bits of a layer by its name."""
        return self.bits if isinstance(self.bits, int) else self.bits[name]

    def _rename(self, model: nn.Module, linears: Iterable[str]) -> None:
        """Names of a model with a head stand for those of its base, and the other way round."""
        prefix = f"{model.base_model_prefix}."
        known = set(linears)
        for change in (lambda name: name.removeprefix(prefix), lambda name: prefix + name):
            if isinstance(self.bits, dict) and not known & self.bits.keys():
                moved = {change(name): bits for name, bits in self.bits.items()}
                self.bits = moved if moved.keys() == known else self.bits
            if self.skipped_modules and not known & set(self.skipped_modules):
                moved = [change(name) for name in self.skipped_modules]
                self.skipped_modules = moved if set(moved) <= known else self.skipped_modules

    def layers(self, model: nn.Module) -> dict[str, tuple[nn.Linear, int]]:
        """The layers of a plain model that this config quantises, with their bits; raises on those that do not fit."""
        linears = quantizable(model, self.modules_to_not_convert)
        self._rename(model, linears)
        if isinstance(self.bits, dict):
            wrong = sorted(linears.keys() ^ self.bits.keys())
            if wrong:
                known = wrong[0] in linears
                what = "names no bits for" if known else "names"
                raise ValueError(
                    f"bits {what} {wrong[0]!r}, {'a layer' if known else 'no layer'} of the model"
                    f"{f' (and {len(wrong) - 1} more differ)' if wrong[1:] else ''}."
                )
        found, skipped = {}, []
        for name, linear in linears.items():
            bits = self.bits_of(name)
            if bits == KEPT:
                continue
            problem = self.problem(linear, bits)
            if not problem:
                found[name] = (linear, bits)
            elif self.on_unsupported == "skip" or name in (self.skipped_modules or ()):
                skipped.append(name)
            else:
                raise ValueError(
                    f'{name}: {problem} Choose another group_size, leave it out, or set on_unsupported="skip".'
                )
        self.skipped_modules = skipped or None
        return found


@dataclass(kw_only=True, repr=False)
class CalibratedConfig(WeightConfig):
    """Base of the quantisers that look at data, block by block.

    Args:
        dataset (*optional*): Calibration text: a path, texts, rows of token ids, a tensor, or a `datasets.Dataset`.
            Needed to quantise, not to load; it is not saved.
        tokenizer (*optional*): A tokenizer or its path; that of the model's folder by default. Not saved.
        num_samples (`int`, *optional*, defaults to 128): Rows of text.
        sequence_length (`int`, *optional*, defaults to 2048): Tokens of a row.
        batch_size (`int`, *optional*, defaults to 4): Rows that run together.
        seed (`int`, *optional*, defaults to 0): Of the choice of rows.
        resume_from (`str`, *optional*): Folder for finished blocks. A run that was interrupted goes on from there.
            Not saved.
        device (`str`, *optional*): Where blocks are worked on, one at a time; where they are by default. Not saved.
    """

    calibrated: ClassVar[bool] = True
    plain_too: ClassVar[bool] = False  # keep what enters each block in the plain model as well
    apart: ClassVar[tuple[str, ...]] = ("dataset", "tokenizer", "resume_from", "device")
    dataset: Any = None
    tokenizer: Any = None
    num_samples: int = 128
    sequence_length: int = 2048
    batch_size: int = 4
    seed: int = 0
    resume_from: str | None = None
    device: str | None = None

    def __post_init__(self):
        super().__post_init__()
        in_range("num_samples", self.num_samples, 1, 2**31)
        in_range("sequence_length", self.sequence_length, 2, 2**31)
        in_range("batch_size", self.batch_size, 1, 2**31)

    def __deepcopy__(self, memo):
        """Data and tokenizers are shared: transformers copies configs, and a copy of the data has no use."""
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        for name in ("bits", "modules_to_not_convert", "skipped_modules"):
            value = getattr(self, name)
            setattr(made, name, value.copy() if isinstance(value, list | dict) else value)
        return made

    # -- what a method writes

    @abstractmethod
    def quantize_layer(self, weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Quantized:
        """Codes and grid of a weight [out, in] in float32, given H = X^T X / N [in, in] of its inputs. Rows do not
        know each other: those of several layers may come together. The result is a tuple of tensors [out, ...]."""

    def prepare_model(self, model: nn.Module) -> None:
        """Before the first block; the model is plain."""

    def prepare_block(self, block: "Block") -> None:
        """Before the layers of a block are quantised."""

    def quantize_block(self, block: "Block") -> None:
        """Quantise every layer of a block: stage by stage, so that later layers see the error of earlier ones."""
        self.prepare_block(block)
        for stage in block.stages:
            hessians = block.hessians(stage)
            alike: dict[tuple[int, int], list[str]] = {}
            for name in stage:
                if block.few_tokens(name):
                    block.replace(name, block.nearest(name), hessians[name])
                else:
                    alike.setdefault((id(hessians[name]), block.bits(name)), []).append(name)
            for (_, bits), names in alike.items():
                # Rows are independent, so layers with the same input are done as one.
                weights = [block.weight(name) for name in names]
                whole = self.quantize_layer(torch.cat(weights), hessians[names[0]], bits, self.group_size)
                parts = zip(*(x.split([len(w) for w in weights]) for x in whole), strict=True)
                for name, part in zip(names, parts, strict=True):
                    block.replace(name, part if type(whole) is tuple else type(whole)(*part), hessians[name])
        self.finish_block(block)

    def finish_block(self, block: "Block") -> None:
        """After the layers of a block are quantised."""


def check_finite(weight: Tensor, name: str) -> None:
    """Raise `ValueError` with the layer's name where a weight holds NaN or infinity."""
    if not weight.isfinite().all():
        raise ValueError(f"{name}: its weight holds NaN or infinity.")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a layer's name before the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
