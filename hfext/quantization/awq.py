"""Weights of channels with large inputs are kept finer, by a scale that the operation before takes back.

For layers with one input x and the operation before them: s_j = (mean |x_j|)^a, divided by sqrt(max s min s). The
weights become Q(W s) / s, and s moves into the operation before, so that nothing is computed at run time. The ratio a
is that of 0, 1/20, .., 19/20 with the least mean squared error of the module's output. Then for each group the ends of
the range are cut to (1 - i/20) of the largest weight, i = 0 .. 9, where that lowers d H_g d^T with d the error of the
group and H_g the second moments of its inputs; weights of queries and keys are not cut.

AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, arXiv 2306.00978. Unlike in the
authors' code the inputs come from blocks that are quantised already, all tokens count for the cut, and whether a scale
can be moved is not known from a list of architectures but tried: the block's output must not change.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .._fields import in_range
from ..registry import Method, Result
from ._affine import Grid, Quantized, dequantize, ends, grid, grouped, nearest, round_to_nearest
from ._calibration import Block, first
from ._config import CalibratedConfig

NOT_CUT = re.compile(r"(^|[._])(q|k)_|query|key|Wqkv|qkv", re.IGNORECASE)
STEPS = 20


@dataclass(kw_only=True, repr=False)
class AWQConfig(CalibratedConfig):
    """Options of AWQ, beside those of `CalibratedConfig`.

    Args:
        scale (`bool`, *optional*, defaults to `True`): Search for scales of channels.
        clip (`bool`, *optional*, defaults to `True`): Cut ranges where that lowers the error.
        search_rows (`int`, *optional*): Rows of calibration text that the search for scales runs on; all by default.
        zero_point (`str`, *optional*, defaults to "int"): As of `RTNConfig`.
        symmetric (`bool`, *optional*, defaults to `False`): As of `RTNConfig`.
    """

    method: ClassVar[str] = "awq"
    rescales: ClassVar[bool] = True
    group_size: int = 128
    scale: bool = True
    clip: bool = True
    search_rows: int | None = None
    zero_point: Literal["float", "int"] = "int"
    symmetric: bool = False

    def check(self) -> None:
        if self.search_rows is not None:
            in_range("search_rows", self.search_rows, 1, 2**31)

    def rounded(self, weight: Tensor, bits: int) -> Quantized:
        """Rounding to nearest with the options of the zero point."""
        return round_to_nearest(weight, bits, self.group_size, self.zero_point, self.symmetric)

    def quantize_layer(self, weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Quantized:
        return self.rounded(weight, bits)

    def prepare_block(self, block: Block) -> None:
        for stage in block.stages if self.scale else ():
            move = mover(block, stage)
            if move is None:
                continue
            scales = best_scales(self, block, stage)
            if scales is not None:
                move(scales)

    def quantize_block(self, block: Block) -> None:
        self.prepare_block(block)
        for stage in block.stages:
            hessians = block.hessians(stage)
            for name in stage:
                weight, bits = block.weight(name), block.bits(name)
                result = self.rounded(weight, bits)
                if self.clip and not NOT_CUT.search(name):
                    made = cut(weight, hessians[name], bits, self.group_size, self.zero_point, self.symmetric)
                    result = Quantized(nearest(weight, *made, bits), *made)
                block.replace(name, result, hessians[name])
        self.finish_block(block)


def channel_scales(size: Tensor, ratio: float) -> Tensor:
    """s [in] from mean |x| [in]: its power, around 1."""
    scales = size.pow(ratio).clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


def cut(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, zero_point: str = "int", symmetric: bool = False
) -> Grid:
    """The grid of each group between the ends of its weights, cut to (1 - i/20) of the largest, i = 0 .. 9, with the
    least d H_g d^T; weight [out, in], H [in, in] of which the blocks of the groups are used."""
    low, high = ends(weight, group_size, with_zero=zero_point == "int" or symmetric)
    groups, width = low.shape[1], weight.shape[1] // low.shape[1]
    most = torch.maximum(low.abs(), high.abs())
    blocks = torch.stack([hessian[k : k + width, k : k + width] for k in range(0, weight.shape[1], width)])
    best, least = grid(low, high, bits, zero_point, symmetric), torch.full_like(low, torch.inf)
    for i in range(STEPS // 2):
        limit = most * (1 - i / STEPS)
        tried = grid(torch.maximum(low, -limit), torch.minimum(high, limit), bits, zero_point, symmetric)
        error = grouped(dequantize(nearest(weight, *tried, bits), *tried) - weight, groups).transpose(0, 1)
        loss = ((error @ blocks) * error).sum(-1).T
        better = loss < least
        least = torch.where(better, loss, least)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(tried, best, strict=True)))
    return best


def best_scales(config: AWQConfig, block: Block, stage: list[str]) -> Tensor | None:
    """s [in] of the layers of a stage with the least error of what they lead to; `None` where no scale helps."""
    size, calls = observed(block, stage, config.search_rows)
    module = block.module.get_submodule(common(stage))
    with torch.no_grad():
        labels = [first(module(*args, **kwargs)) for args, kwargs in calls]
        best, least = None, torch.inf
        for i in range(STEPS):
            scales = channel_scales(size, i / STEPS)
            with rounded(config, block, stage, scales):
                outputs = (first(module(*args, **kwargs)) for args, kwargs in calls)
                pairs = zip(outputs, labels, strict=True)
                loss = sum(float((out - label).float().square().sum()) for out, label in pairs)
            if loss < least:
                best, least = scales if i else None, loss
    return best


def common(stage: list[str]) -> str:
    """The module whose output is judged: the one that holds the layers of a stage, or a layer that is alone."""
    return stage[0] if len(stage) == 1 else stage[0].rpartition(".")[0]


@contextmanager
def rounded(config: AWQConfig, block: Block, stage: list[str], scales: Tensor) -> Iterator[None]:
    """The layers of a stage hold Q(W s) / s for a while."""
    layers = {name: block.layers[name][0] for name in stage}
    kept = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            made = config.rounded(kept[name].float() * scales, block.bits(name)).dequantize() / scales
            layer.weight.data = made.to(layer.weight.dtype)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = kept[name]


def observed(block: Block, stage: list[str], rows: int | None) -> tuple[Tensor, list[tuple[tuple, dict]]]:
    """Mean |x| [in] of what enters a stage, and the calls of the module that holds it."""
    sums: list[Tensor] = []
    counts: list[int] = []
    calls: list[tuple[tuple, dict]] = []

    def size(name: str, x: Tensor) -> None:
        sums.append(x.float().abs().sum(0))
        counts.append(len(x))

    def entered(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))

    handle = block.module.get_submodule(common(stage)).register_forward_pre_hook(entered, with_kwargs=True)
    try:
        block.inputs(stage[:1], size)
    finally:
        handle.remove()
    if rows is not None:
        seen = torch.tensor([s.hidden.shape[0] for s in block.samples]).cumsum(0)
        calls = calls[: int((seen < rows).sum()) + 1]
    return torch.stack(sums).sum(0) / sum(counts), calls


def mover(block: Block, stage: list[str]) -> Callable[[Tensor], None] | None:
    """What moves a scale s [in] from the input of a stage's layers to the operation before; `None` where none can.

    Tried are norms that give the layers their input, with weights w or 1 + w, and single layers before a single one. A
    move is right when the output of the block stays, for scales drawn at random.
    """
    if any(block.routed(name) for name in stage):
        return None
    width = block.layers[stage[0]][0].in_features
    tries: list[Callable[[Tensor], None]] = []
    for module in norms_before(block, stage[0]):
        for shift in (0.0, 1.0):
            tries.append(lambda s, module=module, shift=shift: scale_norm(block, module, shift, 1 / s))
    if len(stage) == 1:
        before = [name for other in block.stages[: block.stages.index(stage)] for name in other]
        for name in reversed(before):
            if block.layers[name][0].out_features == width:
                tries.append(lambda s, name=name: scale_rows(block, name, 1 / s))
    for attempt in tries:
        if stays(block, stage, attempt):
            return lambda s, attempt=attempt: moved(block, stage, attempt, s)
    return None


def moved(block: Block, stage: list[str], before: Callable[[Tensor], None], scales: Tensor) -> None:
    """Scale the columns of a stage's layers by s, and what gives their input by 1 / s."""
    for name in stage:
        block.rescale(name, block.weight(name) * scales)
    before(scales)


def scale_norm(block: Block, norm: nn.Module, shift: float, factor: Tensor) -> None:
    """Multiply what a norm gives by a factor [channels]; its weight is w + `shift`."""
    for name, parameter in norm.named_parameters(recurse=False):
        block.keep(parameter)
        add = shift if name == "weight" else 0.0
        parameter.data = ((parameter.data.float() + add) * factor - add).to(parameter.dtype)


def scale_rows(block: Block, name: str, factor: Tensor) -> None:
    """Multiply what a linear layer gives by a factor [out]."""
    bias = block.layers[name][0].bias
    block.rescale(name, block.weight(name) * factor[:, None], None if bias is None else bias.float() * factor)


def norms_before(block: Block, name: str) -> list[nn.Module]:
    """Norms whose output is the very tensor that enters a layer."""
    given: list[tuple[nn.Module, Tensor]] = []
    seen: list[Tensor] = []
    handles = [block.module.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))]
    for module in block.module.modules():
        if "norm" in type(module).__name__.lower() and list(module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(lambda m, args, out: given.append((m, out))))
    try:
        block.run(block.samples[0])
    finally:
        for handle in handles:
            handle.remove()
    return [module for module, out in given if any(out is x for x in seen)]


def stays(block: Block, stage: list[str], attempt: Callable[[Tensor], None]) -> bool:
    """Whether the block gives the same after a move of random scales, which is taken back."""
    width = block.layers[stage[0]][0].in_features
    weight = block.layers[stage[0]][0].weight
    scales = torch.rand(width, generator=torch.Generator().manual_seed(0)).add_(0.5).to(weight.device)
    want = block.run(block.samples[0]).float()
    done = len(block.undo)
    layers = dict(block.layers)
    try:
        moved(block, stage, attempt, scales)
        got = block.run(block.samples[0]).float()
    finally:
        for undo in reversed(block.undo[done:]):
            undo()
        del block.undo[done:]
        block.layers.update(layers)
    near = 1e-4 if weight.dtype == torch.float32 else 0.05
    return bool((got - want).norm() <= near * want.norm())


METHOD = Method(
    name="awq",
    family="quantization",
    title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    authors="Lin et al.",
    arxiv="2306.00978",
    year=2023,
    repo="mit-han-lab/llm-awq",
    status="faithful",
    target="hfext.quantization.awq:AWQConfig",
    config=AWQConfig,
    usage="from_pretrained(path, quantization_config=AWQConfig(bits=4, dataset=texts))",
    summary="Keeps channels with large inputs finer by scales that the operation before takes back.",
    headline=Result(
        metric="perplexity",
        setting="WikiText-2, LLaMA-2-7B, 3 bits in groups of 128",
        value="6.24",
        baseline="6.66 (RTN)",
    ),
    notes="A baseline here: it stands in the table of `hfext bench weight_quality`.",
)
