"""The weights, biases and grids of a layer tuned on its outputs, one layer after the other.

With X the inputs of a layer and Y the outputs to keep, sought are a perturbation V of its weights, one s and z for
each group, and its bias b where it has one:

    min  mean |X W'^T + b - Y|^2      W' = s q + z,   q = clamp(round(u), 0, 2^b - 1),   u = (W + V - z) / s

Rounding passes gradients on as if q - u were constant (straight-through). With G = dL/dW', and a weight inside where
its rounded u is a code:

              inside      outside
    dL/dV     G           0
    dL/ds     G (q - u)   G q          summed over the group
    dL/dz     0           G            summed over the group

Adam takes random rows of X and Y. On a fixed part of the rows the result is measured as it is stored, and the best of
all is kept, rounding to nearest included, so that no layer gets worse there.

V, s and z are in units of the first step of their group, so that a learning rate means the same for every layer: Adam
moves a weight by about lr_weight steps an iteration, and iterations * lr_weight near 1 lets any weight reach the next
code. The paper's 1e-5 in 1000 iterations is the same for its convolutions, whose steps at 4 bits are near 1e-2. The
bias is in units of the layer's mean output. Rates fall linearly to 0.

Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming, arXiv 2006.10518. Inputs
are not quantised here; `bos_aware` does that.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from .._fields import in_range
from ..registry import Method, Result
from ._affine import Grid, Quantized, away_from_zero, clipped, grouped, nearest, round_to_nearest
from ._calibration import Block
from ._config import CalibratedConfig
from ._modules import put

logger = logging.get_logger(__name__)
FIXED = 1024  # tokens on which results are compared


@dataclass(kw_only=True, repr=False)
class AdaQuantConfig(CalibratedConfig):
    """Options of AdaQuant, beside those of `CalibratedConfig`. What enters a block in the plain model is kept beside
    what enters it in the quantised one.

    Args:
        inputs (`str`, *optional*, defaults to "sequential"): "parallel": inputs and outputs are those of the plain
            model; "sequential": inputs come from the part that is quantised already, outputs from the plain model, so
            that later layers make up for earlier ones. Experts always keep what the plain expert gives for its inputs.
        iterations (`int`, *optional*, defaults to 100): Steps of a layer. The paper takes 1000.
        rows (`int`, *optional*, defaults to 256): Random tokens of a step. The paper takes 200 images.
        lr_weight (`float`, *optional*, defaults to 0.01): Of the weights, in steps of the first grid.
        lr_grid (`float`, *optional*, defaults to 0.01): Of scales and offsets, in the same units.
        lr_bias (`float`, *optional*, defaults to 0.001): Of biases, in units of the root mean square of the outputs.
        clip_search (`bool`, *optional*, defaults to `True`): Start from the best for sum |w' - w|^2.4 of 16 shrunken
            ranges.
    """

    method: ClassVar[str] = "adaquant"
    plain_too: ClassVar[bool] = True
    inputs: Literal["parallel", "sequential"] = "sequential"
    iterations: int = 100
    rows: int = 256
    lr_weight: float = 0.01
    lr_grid: float = 0.01
    lr_bias: float = 0.001
    clip_search: bool = True

    def __post_init__(self):
        super().__post_init__()
        in_range("iterations", self.iterations, 0, 1_000_000)
        in_range("rows", self.rows, 1, 2**31)
        for name in ("lr_weight", "lr_grid", "lr_bias"):
            in_range(name, getattr(self, name), 0.0, 1.0)

    def quantize_block(self, block: Block) -> None:
        self.prepare_block(block)
        for stage in block.stages:
            with plain_block(block):
                wanted = stage_inputs(block, stage)
            given = wanted if self.inputs == "parallel" else stage_inputs(block, stage)
            for name in stage:
                if block.few_tokens(name):
                    block.replace(name, block.nearest(name))
                else:
                    self.tune(block, name, given[name], wanted[name])
        self.finish_block(block)

    def tune(self, block: Block, name: str, given: Tensor, wanted: Tensor) -> None:
        """Quantise one layer of a block from its inputs [tokens, in] in the quantised and in the plain model."""
        linear, weight = block.layers[name][0], block.weight(name)
        bias = None if linear.bias is None else linear.bias.detach().float()
        same = given is wanted or block.routed(name)
        tuned = adaquant(
            weight,
            given,
            block.bits(name),
            self.group_size,
            bias=bias,
            missing=None if same else (wanted - given) @ weight.T,
            iterations=self.iterations,
            rows=self.rows,
            lr_weight=self.lr_weight,
            lr_grid=self.lr_grid,
            lr_bias=self.lr_bias,
            clip_search=self.clip_search,
            seed=self.seed,
            stored=getattr(torch, self.scale_dtype),
            stored_bias=linear.weight.dtype,
        )
        block.replace(name, tuned.quantized)
        if bias is not None:
            block.module.get_submodule(name).bias.data.copy_(tuned.bias)
        block.errors[name] = tuned.after / max(tuned.size, 1e-30)
        logger.info(f"{block.name}.{name}: mean squared error {tuned.before:.3e} -> {tuned.after:.3e}")


class Tuned(NamedTuple):
    """A layer, its bias [out] if it has one, and on the fixed part of the rows: its mean squared error as rounded to
    nearest and as it is now, and the mean square of the outputs to keep."""

    quantized: Quantized
    bias: Tensor | None
    before: float
    after: float
    size: float


class Slopes(NamedTuple):
    """Gradients for weights [out, in], scales and offsets [out, groups]."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor


def adaquant(
    weight: Tensor,
    x: Tensor,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    missing: Tensor | None = None,
    iterations: int = 100,
    rows: int = 256,
    lr_weight: float = 0.01,
    lr_grid: float = 0.01,
    lr_bias: float = 0.001,
    clip_search: bool = True,
    seed: int = 0,
    stored: torch.dtype = torch.float16,
    stored_bias: torch.dtype = torch.float32,
) -> Tuned:
    """Tune a layer with weight [out, in] and bias [out] on its inputs [tokens, in].

    `missing` [tokens, out] is what the outputs of the plain layer lack for those that are to be kept; None when it is
    nothing. `stored` and `stored_bias` are the types in which grids and bias are kept; other options are those of
    [`AdaQuantConfig`]. The global random generator is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.randperm(len(x), generator=generator)[:FIXED].to(x.device)
    x_fixed, missing_fixed = x[fixed], None if missing is None else missing[fixed]

    def error(found: Quantized, moved: Tensor | None) -> float:
        return float(_missed(x_fixed, found.dequantize() - weight, moved, missing_fixed).square().mean())

    def as_stored(values: Tensor, made: Grid) -> Quantized:
        made = Grid(*(part.to(stored).float() for part in made))
        return Quantized(nearest(values, *made, bits), *made)

    start = Grid(*round_to_nearest(weight, bits, group_size)[1:])
    if clip_search:
        levels = 2**bits - 1
        start = clipped(weight, start.zeros, start.zeros + levels * start.scales, bits, steps=20)
    unit = start.scales
    zero = None if bias is None else torch.zeros_like(bias)
    best, best_moved = as_stored(weight, start), zero
    before = least = error(best, zero)
    target = x_fixed @ weight.T + (0 if bias is None else bias) + (0 if missing is None else missing_fixed)
    size = float(target.square().mean())
    v, a, c = torch.zeros_like(weight), torch.zeros_like(unit), torch.zeros_like(unit)
    tuned = [(v, lr_weight), (a, lr_grid), (c, lr_grid)]
    if bias is not None:
        moved = torch.zeros_like(bias)
        tuned.append((moved, lr_bias * size**0.5))
    # An error of 0 leaves nothing to tune.
    steps = iterations if before > 0 else 0
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in tuned], fused=True)
    for step in range(steps):
        chosen = torch.randint(len(x), (rows,), generator=generator).to(x.device)
        part = x[chosen]
        made = Grid(unit * (1 + a), start.zeros + unit * c)
        values = perturbed(weight, v, unit)
        rounded, slopes_of = surrogate(values, made, bits)
        off = _missed(part, rounded.sub_(weight), None if bias is None else moved,
                      None if missing is None else missing[chosen])  # fmt: skip
        # Relative to the first error, so that Adam's epsilon is as small for all layers.
        off.mul_(2 / (rows * before))
        slopes = slopes_of(off.T @ part)
        v.grad = grouped(slopes.weight, unit.shape[1]).mul_(unit[..., None]).flatten(1)
        a.grad, c.grad = slopes.scales * unit, slopes.zeros * unit
        if bias is not None:
            moved.grad = off.sum(0)
        for group, (_, lr) in zip(optimizer.param_groups, tuned, strict=True):
            group["lr"] = lr * (1 - step / steps)
        optimizer.step()
        if (step + 1) % max(1, steps // 5) == 0 or step + 1 == steps:
            made = Grid(unit * (1 + a), start.zeros + unit * c)
            found = as_stored(perturbed(weight, v, unit), made)
            kept = None if bias is None else (bias + moved).to(stored_bias).float() - bias
            after = error(found, kept)
            if after < least:
                best, best_moved, least = found, kept, after
    return Tuned(best, None if bias is None else bias + best_moved, before, least, size)


def perturbed(weight: Tensor, v: Tensor, unit: Tensor) -> Tensor:
    """W + V [out, in] with V in units [out, groups]."""
    groups = unit.shape[1]
    return torch.addcmul(grouped(weight, groups), grouped(v, groups), unit[..., None]).flatten(1)


def surrogate(values: Tensor, made: Grid, bits: int) -> tuple[Tensor, Callable[[Tensor], Slopes]]:
    """W' [out, in] of weights [out, in] on a grid [out, groups], and the function from dL/dW' to [`Slopes`]."""
    groups = made.scales.shape[1]
    scales = away_from_zero(made.scales)[..., None]
    u = (grouped(values, groups) - made.zeros[..., None]).div_(scales)
    near = (u + 0.5).floor_()
    q = near.clamp(0, 2**bits - 1)
    inside = near == q

    def slopes(grad: Tensor) -> Slopes:
        grad = grouped(grad, groups)
        weight = grad * inside
        scale = torch.linalg.vecdot(grad, q) - torch.linalg.vecdot(weight, u)
        return Slopes(weight.flatten(1), scale, grad.sum(-1) - weight.sum(-1))

    return torch.addcmul(made.zeros[..., None], q, made.scales[..., None]).flatten(1), slopes


def _missed(x: Tensor, difference: Tensor, moved: Tensor | None, missing: Tensor | None) -> Tensor:
    """x D^T + the bias's movement - missing [tokens, out]."""
    off = x @ difference.T
    if moved is not None:
        off += moved
    return off if missing is None else off.sub_(missing)


@contextlib.contextmanager
def plain_block(block: Block) -> Iterator[None]:
    """Inside, the block has its plain layers and gets what enters it in the plain model."""
    samples, layers = block.samples, {name: block.module.get_submodule(name) for name in block.layers}
    block.samples = [replace(s, hidden=hidden) for s, hidden in zip(samples, block.plain, strict=True)]
    for name, (linear, _) in block.layers.items():
        put(block.module, name, linear)
    try:
        yield
    finally:
        block.samples = samples
        for name, layer in layers.items():
            put(block.module, name, layer)


def stage_inputs(block: Block, stage: list[str]) -> dict[str, Tensor]:
    """The inputs [tokens, in] in float32 of the layers of a stage, which share one tensor where they can."""
    shared = not any(block.routed(name) for name in stage)
    found: dict[str, list[Tensor]] = {name: [] for name in stage}
    block.inputs(stage[:1] if shared else stage, lambda name, x: found[name].append(x.float()))
    joined = {name: torch.cat(parts) for name, parts in found.items() if parts}
    for name, x in joined.items():
        if not x.isfinite().all():
            raise ValueError(f"{block.name}.{name}: its calibration input holds NaN or infinity.")
    if shared:
        joined = dict.fromkeys(stage, joined[stage[0]])
    joined |= {name: torch.zeros(0, block.weight(name).shape[1]) for name in stage if name not in joined}
    block.tokens.update({name: len(x) for name, x in joined.items()})
    return joined


METHOD = Method(
    name="adaquant",
    family="quantization",
    title="Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
    authors="Hubara et al.",
    arxiv="2006.10518",
    year=2020,
    repo="itayhubara/CalibTIP",
    status="variant",
    difference="Weights only. Learning rates are relative to the step of a group and the outputs of a layer, fall "
    "linearly, and the number of iterations is a tenth; the best state on a fixed part of the tokens is kept.",
    target="hfext.quantization.adaquant:AdaQuantConfig",
    config=AdaQuantConfig,
    usage="from_pretrained(path, quantization_config=AdaQuantConfig(bits=4, dataset=texts))",
    summary="Tunes weights, biases and grids of each layer by gradient descent on the error of its outputs.",
    claim="Tuning each layer on its own outputs, on little data, lowers the loss of rounding to nearest.",
    headline=Result(
        metric="top-1 accuracy",
        setting="ImageNet, ResNet-50, 4 bits for weights and activations but in the two smallest layers",
        value="less than 1 % below float32",
    ),
    recipe="quantization/adaquant-smollm2-wikitext2.yaml",
    notes="The integer program of the paper is `allocate(metric='loss')`, its tuning of statistics and biases "
    "`tune_statistics` and `tune_biases`.",
)
