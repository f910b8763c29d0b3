"""Weights from small tables, which are then all that is trained: fine-tuning without adapters.

A row of a weight is cut into P equal parts; a part has a table of 2^b numbers, and each weight is one of them:

    w'_rc = table[r, part(c), code_rc],        dL/dtable[r, p, k] = sum of (dL/dy^T x)_rc over c in p with code_rc = k

To learn tables and codes, given H = X^T X / N = (I + M) D (I + M)^T (see `_column_rounding.py`): (1) the table of a
part is the result of a weighted k-means in one dimension, with D_cc^(a/2) as the weight of column c; (2) codes follow
column by column, each the nearest entry to the weight that the columns before have pushed. With the upper Cholesky
factor U of H^-1, D_cc = U_cc^-2, so that a = 2 weighs by the loss of (2) and the default of 4 by its square.

Sketch to Adapt: Fine-Tunable Sketches for Efficient LLM Adaptation (SketchTune), arXiv 2410.06364. Not in the paper: a
part with at most 2^b different weights keeps them exactly, and tables are rounded to the stored type before codes are
found.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .._fields import in_range
from ..registry import Method, Result
from ._affine import columns_of
from ._checkpoint import fingerprint
from ._column_rounding import Elimination, weighted_elimination
from ._config import CalibratedConfig
from ._quantizer import quantized_layers
from ._sketch_linear import SketchLinear, parts_misfit

DELTA = "sketches.safetensors"


@dataclass(kw_only=True, repr=False)
class SketchTuneConfig(CalibratedConfig):
    """Options of SketchTune, beside those of `CalibratedConfig`.

    `train_grids(model, norms=False)` makes the tables trainable; [`save_sketch_delta`] writes them alone.
    `scale_dtype` is the type of the tables.

    Args:
        groups_per_row (`int`, *optional*): Tables of a row; it divides the inputs of every layer. 4 when neither this
            nor `group_size` is given.
        group_size (`int`, *optional*, defaults to -1): The same by the inputs of a table, in place of
            `groups_per_row`. -1 leaves it to that.
        exponent (`float`, *optional*, defaults to 4.0): a in the weights U_cc^-a of the k-means. >= 0; 0 weighs all
            columns alike.
        iterations (`int`, *optional*, defaults to 100): Most steps of k-means.
        tolerance (`float`, *optional*, defaults to 1e-6): k-means ends when no entry moves more than this share of the
            range of its part. >= 0.
        act_order (`bool`, *optional*, defaults to `True`): Round columns by falling size of their inputs.
        damp (`float`, *optional*, defaults to 0.01): This share of the mean diagonal of H is added to it. >= 0.

    Raises:
        ValueError: A value out of its range, or both `groups_per_row` and `group_size`.
    """

    method: ClassVar[str] = "sketchtune"
    group_size: int = -1
    groups_per_row: int | None = None
    exponent: float = 4.0
    iterations: int = 100
    tolerance: float = 1e-6
    act_order: bool = True
    damp: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        in_range("exponent", self.exponent, 0.0, 16.0)
        in_range("iterations", self.iterations, 0, 100_000)
        in_range("tolerance", self.tolerance, 0.0, 1.0)
        in_range("damp", self.damp, 0.0, 1e6)
        if self.groups_per_row is not None:
            in_range("groups_per_row", self.groups_per_row, 1, 65536)
            if self.group_size != -1:
                raise ValueError(
                    f"groups_per_row is {self.groups_per_row} and group_size {self.group_size}, which say the same: "
                    "give one of them."
                )

    def parts(self, in_features: int) -> int:
        """Tables of a row of so many inputs."""
        return in_features // self.group_size if self.group_size != -1 else self.groups_per_row or 4

    def problem(self, linear: nn.Linear, bits: int) -> str:
        if self.group_size != -1:
            return super().problem(linear, bits)
        return parts_misfit(linear.in_features, bits, self.parts(linear.in_features))

    def empty_layer(self, linear: nn.Linear, bits: int) -> SketchLinear:
        weight = linear.weight
        sizes = linear.in_features, linear.out_features, bits, self.parts(linear.in_features), linear.bias is not None
        types = weight.dtype, getattr(torch, self.scale_dtype)
        return SketchLinear(*sizes, *types, device=weight.device)

    def quantize_layer(self, weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> "Sketch":
        return sketch(
            weight,
            hessian,
            bits,
            weight.shape[1] // self.parts(weight.shape[1]),
            exponent=self.exponent,
            iterations=self.iterations,
            tolerance=self.tolerance,
            act_order=self.act_order,
            damp=self.damp,
            seed=self.seed,
            stored=getattr(torch, self.scale_dtype),
        )


class Sketch(NamedTuple):
    """A weight [rows, columns] as codes uint8 [rows, columns] into tables [rows, parts, 2^bits]."""

    codes: Tensor
    tables: Tensor


def sketch(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int = -1,
    exponent: float = 4.0,
    iterations: int = 100,
    tolerance: float = 1e-6,
    act_order: bool = True,
    damp: float = 0.01,
    seed: int = 0,
    stored: torch.dtype | None = None,
) -> Sketch:
    """Codes uint8 [rows, columns] and tables [rows, columns / group_size, 2^bits] in ascending order of a weight
    [rows, columns], given H [columns, columns]; the options are those of [`SketchTuneConfig`]. Tables are rounded to
    `stored` before codes are found for them. `RuntimeError` when H has no Cholesky factor at any damping."""
    elimination, diagonal = weighted_elimination(hessian, act_order, damp)
    width = columns_of(weight, group_size)
    parts = weight.unflatten(1, (-1, width))
    shares = diagonal.pow(exponent / 2).view(-1, width).expand(parts.shape)
    found = k_means(parts.flatten(0, 1), shares.flatten(0, 1), 2**bits, iterations, tolerance, seed)
    tables = found.view(*parts.shape[:2], -1).to(stored or weight.dtype).to(weight.dtype)
    return Sketch(round_to_tables(weight, tables, elimination), tables)


def k_means(
    x: Tensor, weights: Tensor, k: int, iterations: int = 100, tolerance: float = 1e-6, seed: int = 0
) -> Tensor:
    """Weighted k-means of numbers, in all rows at once; a row's result does not depend on the others.

    In one dimension clusters are intervals, so a step is two look-ups in running sums over the sorted numbers. An
    empty cluster keeps its centre. A row of at most k different numbers gets exactly these.

    Args:
        x (`torch.Tensor`): [rows, n].
        weights (`torch.Tensor`): [rows, n], >= 0.
        k (`int`): Clusters. Up to 8 start evenly spaced between the ends of a row, more from k-means++.
        iterations (`int`): Most steps.
        tolerance (`float`): Least movement of a centre to go on, as a share of the range of its row.
        seed (`int`): Of k-means++.

    Returns:
        Centres [rows, k] in float64, ascending.
    """
    x, order = x.double().sort(dim=1)
    weights = weights.double().gather(1, order)
    low, high = x[:, :1], x[:, -1:]
    rank = torch.cat([torch.zeros_like(order[:, :1]), (x[:, 1:] != x[:, :-1]).cumsum(1)], 1)
    few = rank[:, -1:] < k
    if k <= 8:
        centres = low + (high - low) * torch.linspace(0, 1, k, dtype=x.dtype, device=x.device)
    else:
        centres = plus_plus(x, weights, k, seed)
    start = torch.zeros_like(low)
    mass = torch.cat([start, weights.cumsum(1)], 1)
    moment = torch.cat([start, (weights * (x - low)).cumsum(1)], 1)
    goes_on = torch.ones_like(few)
    for _ in range(iterations):
        inside = torch.searchsorted(x, (centres[:, 1:] + centres[:, :-1]) / 2)
        edges = torch.cat([torch.zeros_like(inside[:, :1]), inside, torch.full_like(inside[:, :1], x.shape[1])], 1)
        held, summed = mass.gather(1, edges).diff(dim=1), moment.gather(1, edges).diff(dim=1)
        filled = goes_on & (edges.diff(dim=1) > 0) & (held > 0)
        moved = torch.where(filled, low + summed / held.clamp(min=torch.finfo(x.dtype).tiny), centres)
        step = (moved - centres).abs().amax(1, keepdim=True)
        goes_on &= step > tolerance * (high - low)
        centres = moved.sort(dim=1).values
        if not goes_on.any():
            break
    exact = high.repeat(1, k).scatter(1, rank.clamp(max=k - 1), x)
    return torch.where(few, exact, centres)


def plus_plus(x: Tensor, weights: Tensor, k: int, seed: int = 0) -> Tensor:
    """First centres [rows, k], ascending: drawn from the numbers of each row [rows, n] by weight times squared
    distance to the nearest centre so far, with the same random numbers for every row."""
    generator = torch.Generator().manual_seed(seed)
    distances, drawn = torch.ones_like(x), []
    for _ in range(k):
        running = (weights * distances).cumsum(1)
        u = torch.rand((), generator=generator, dtype=torch.float64).to(x)
        # Strictly below the sum, so that nothing of weight 0 is drawn while anything else is left.
        at = torch.searchsorted(running, u * running[:, -1:], right=True).clamp(max=x.shape[1] - 1)
        centre = x.gather(1, at)
        gap = (x - centre).square_()
        distances = gap if not drawn else torch.minimum(distances, gap)
        drawn.append(centre)
    return torch.cat(drawn, 1).sort(dim=1).values


def round_to_tables(weight: Tensor, tables: Tensor, elimination: Elimination, block: int = 32) -> Tensor:
    """Codes uint8 [rows, columns]: column by column the nearest entry (a tie goes to the lower one) of ascending
    tables [rows, parts, entries], where each column makes up for the errors of those before it."""
    order, feedback = elimination.order, elimination.feedback.to(weight.dtype)
    width = weight.shape[1] // tables.shape[1]
    weights = weight.T[order]
    errors, codes = torch.zeros_like(weights), torch.empty_like(weights, dtype=torch.uint8)
    by_part = tables.unbind(1)
    halves = [((t[:, 1:] + t[:, :-1]) / 2).contiguous() for t in by_part]
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        moved = torch.addmm(weights[start:stop], feedback[start:stop, :start], errors[:start])
        for j in range(start, stop):
            target = moved[j - start].addmv_(errors[start:j].T, feedback[j, start:j])
            part = int(order[j]) // width
            code = torch.searchsorted(halves[part], target[:, None])
            codes[j] = code[:, 0]
            errors[j] = weights[j] - by_part[part].gather(1, code)[:, 0]
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def save_sketch_delta(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the tables of a model, and nothing else, to `sketches.safetensors` in `folder`.

    The file names its base by a digest of everything but the tables, so what else was trained, norms for example,
    makes another base.

    Raises:
        ValueError: The model has no layers of SketchTune.
    """
    layers = _sketched(model)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.sketch": layer.sketch.detach().cpu().contiguous() for name, layer in layers.items()}
    save_file(tensors, path / DELTA, metadata={"format": "pt", "base": json.dumps(base_of(model))})
    return path / DELTA


def load_sketch_delta(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Give the base model, in place, the tables that [`save_sketch_delta`] wrote, in their type.

    Raises:
        ValueError: The tables belong to another base, or the file is damaged; the model is then as it was.
    """
    layers, path = _sketched(model), Path(folder) / DELTA
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {DELTA}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("base", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    here = base_of(model)
    if about != here:
        raise ValueError(
            f"{path} belongs to the base {about.get('digest')} ({about.get('dtype')}), and this model is "
            f"{here['digest']} ({here['dtype']}). Load the model that was tuned, in the same type; norms and other "
            "weights that were trained with the tables make another base."
        )
    for name, layer in layers.items():
        table = tensors.get(f"{name}.sketch")
        if table is None or table.shape != layer.sketch.shape or not table.isfinite().all():
            raise ValueError(f"{path} is damaged: {name}.sketch is missing, of another shape, or not finite.")
    for name, layer in layers.items():
        layer.sketch.data = tensors[f"{name}.sketch"].to(layer.sketch.device)
    kinds = {str(layer.sketch.dtype).removeprefix("torch.") for layer in layers.values()}
    (model.hf_quantizer.quantization_config.scale_dtype,) = kinds
    return model


def base_of(model: nn.Module) -> dict[str, Any]:
    """A digest of names, codes and all tensors but the tables, and the model's type."""
    state = {name: x for name, x in sorted(model.state_dict().items()) if not name.endswith(".sketch")}
    kind = str(model.dtype).removeprefix("torch.") if hasattr(model, "dtype") else ""
    names = torch.tensor(list("\n".join(state).encode()), dtype=torch.uint8)
    return {"digest": fingerprint([names, *state.values()]), "dtype": kind}


def _sketched(model: nn.Module) -> dict[str, SketchLinear]:
    layers = {name: layer for name, layer in quantized_layers(model).items() if isinstance(layer, SketchLinear)}
    if not layers:
        raise ValueError("The model has no layers of SketchTune.")
    return layers


METHOD = Method(
    name="sketchtune",
    family="quantization",
    title="Sketch to Adapt: Fine-Tunable Sketches for Efficient LLM Adaptation",
    authors="Zhang et al.",
    arxiv="2410.06364",
    year=2024,
    repo="LeanModels/SketchTune",
    status="faithful",
    target="hfext.quantization.sketchtune:SketchTuneConfig",
    config=SketchTuneConfig,
    usage="from_pretrained(path, quantization_config=SketchTuneConfig(bits=4, groups_per_row=4, dataset=texts))",
    summary="Holds weights as codes into small tables per row, and fine-tunes the tables instead of adapters.",
    claim="Tuning the tables of a compressed model reaches a lower loss than LoRA with as many trained numbers.",
    headline=Result(
        metric="accuracy",
        setting="GSM8K, against LoftQ with 7.3 times as many trained numbers",
        value="14.48 points above",
    ),
    recipe="quantization/sketchtune-llama-arithmetic.yaml",
    notes="`train_grids(model, norms=False)` chooses the tables for the Trainer. At 8 bits, and with parts of few "
    "columns, tables are larger than the codes.",
)
