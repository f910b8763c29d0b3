"""HAWQ-V2: a layer's bits from the average curvature of the loss along its weights.

    Tr(H_i) = E[v_i^T (H v)_i],  v of +-1                    Hutchinson; H = second derivative of the task loss
    Omega_i(b) = 1/2 Tr(H_i) / n_i ||Q_b(W_i) - W_i||^2      estimated rise of the loss, in nats a token
    bits = argmin sum_i Omega_i(b_i)  within the budget      an integer program, solved exactly

v is drawn for all layers at once: v_i^T H_ij v_j has mean zero for two layers i and j. Drawing stops when no layer's
running mean moves by more than `tolerance`. The paper has no factor 1/2, which changes no choice.
Activations: the same with the second derivative by what enters a layer, one row at a time.

HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks, arXiv 1911.03852.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..registry import Method, Result
from ._sensitivity import Layer, measuring, summed_loss, targets_in

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class HAWQ2Config:
    """Options of `allocate(metric="hawq2")`.

    Args:
        max_draws (`int`, *optional*, defaults to 100): Most draws of v, >= 1.
        min_draws (`int`, *optional*, defaults to 10): Least draws before the stop rule is asked, >= 2.
        tolerance (`float`, *optional*, defaults to 1e-3): Relative change of the running mean at which drawing stops,
            for the layer that moves most; 0 takes `max_draws`.
        joint (`bool`, *optional*, defaults to `True`): One v for all layers, so that a draw costs one double backward.
            `False` takes one for each layer: as many times the cost, less variance.
        monotone (`bool`, *optional*, defaults to `False`): Layers with a smaller average trace get no more bits.
        seed (`int`, *optional*, defaults to 0): Of the draws.
    """

    max_draws: int = 100
    min_draws: int = 10
    tolerance: float = 1e-3
    joint: bool = True
    monotone: bool = False
    seed: int = 0

    def __post_init__(self):
        for name, least in (("max_draws", 1), ("min_draws", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= {least}.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance} but must be in [0, 1).")


@dataclass(frozen=True)
class Traces:
    """Tr(H_i) by layer, its standard error, the layer's number of weights (or activations of a row), and the draws."""

    trace: dict[str, float]
    error: dict[str, float]
    size: dict[str, float]
    draws: int

    @property
    def average(self) -> dict[str, float]:
        """Tr(H_i) / n_i."""
        return {name: value / self.size[name] for name, value in self.trace.items()}


def rademacher(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """+-1 with equal chances, in the type and on the device of `like`; the same on every device."""
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8).to(like).mul_(2).sub_(1)


def quadratic_forms(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor], generator: torch.Generator, joint: bool = True
) -> Tensor:
    """v_i^T (H v)_i for each tensor, float64 [tensors], from first derivatives that can be differentiated again."""
    vs = [rademacher(x.shape, generator, x) for x in inputs]
    # A gradient that depends on nothing has no second derivative.
    curved = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
    forms = torch.zeros(len(inputs), dtype=torch.float64)
    for group in [curved] if joint else [[i] for i in curved]:
        if group:
            targets, given = [inputs[i] for i in group], [vs[i] for i in group]
            products = torch.autograd.grad(
                [grads[i] for i in group], targets, given, retain_graph=True, allow_unused=True
            )
            for i, hv in zip(group, products, strict=True):
                if hv is not None:
                    forms[i] = (vs[i] * hv).sum(dtype=torch.float64)
    return forms


def stops_at(samples: Tensor, tolerance: float, min_draws: int) -> int | None:
    """The first number of draws k >= `min_draws` at which |mean_k - mean_(k-1)| < tolerance (|mean_(k-1)| + 1e-6) in
    every column of `samples` [draws, layers]."""
    means = samples.cumsum(0) / torch.arange(1, len(samples) + 1)[:, None]
    still = ((means[1:] - means[:-1]).abs() < tolerance * (means[:-1].abs() + 1e-6)).all(1)
    later = [k for k, calm in enumerate(still.tolist(), start=2) if calm and k >= min_draws]
    return later[0] if later else None


def hutchinson(
    losses: Sequence[Callable[[], Tensor]],
    inputs: Sequence[Tensor],
    max_draws: int = 100,
    min_draws: int = 10,
    tolerance: float = 1e-3,
    joint: bool = True,
    seed: int = 0,
    at_once: int = 10,
) -> Tensor:
    """v_i^T (H v)_i of each draw and tensor, float64 [draws, tensors], whose column means estimate the traces.

    Args:
        losses: Functions whose results add up to the loss, such as one for each batch. All see the same v.
        inputs: Tensors that require grad.
        at_once: Draws for which one first derivative is kept; it changes the time and nothing else.
    """
    samples = torch.zeros(0, len(inputs), dtype=torch.float64)
    with logging.tqdm(total=max_draws, desc="Hessian draws") as bar:
        while len(samples) < max_draws:
            draws = range(len(samples), min(len(samples) + at_once, max_draws))
            new = torch.zeros(len(draws), len(inputs), dtype=torch.float64)
            for loss in losses:
                value = loss()
                if not torch.isfinite(value):
                    raise ValueError("The loss is not finite: a weight or an activation of the model is NaN.")
                grads = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
                for row, draw in zip(new, draws, strict=True):
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
                    row += quadratic_forms(grads, inputs, generator, joint)
                del grads, value
            samples = torch.cat([samples, new])
            bar.update(len(draws))
            stop = stops_at(samples, tolerance, min_draws) if tolerance else None
            if stop is not None:
                return samples[:stop]
    return samples


def omega(trace: float, size: float, perturbation: float) -> float:
    """1/2 Tr(H) / n ||Q(W) - W||^2; a negative trace counts as 0."""
    return 0.5 * max(trace, 0.0) / size * perturbation


def hessian_traces(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Tensor], config: HAWQ2Config | None = None
) -> Traces:
    """The traces of the second derivative of the loss, the mean over all targets, by the weights of each layer.

    Half-precision weights are raised to float32 while it is measured. Flags, modes, weights and gradients of the model
    are as before afterwards.

    Args:
        model (`PreTrainedModel`): A causal language model.
        layers (`Sequence[Layer]`): Which weights, as `layers_of(quantizable(model))` gives them.
        batches (`Sequence[torch.Tensor]`): Token ids [rows, tokens]; how rows are batched changes only the time.
        config (`HAWQ2Config`, *optional*): Draws and stop rule.
    """
    c, total, weights = config or HAWQ2Config(), targets_in(batches), [layer.module.weight for layer in layers]
    parts = [lambda batch=batch: summed_loss(model, batch) / total for batch in batches]
    with measuring(model), differentiable(model, weights):
        samples = hutchinson(parts, weights, c.max_draws, c.min_draws, c.tolerance, c.joint, c.seed)
    return _summary(samples, [layer.name for layer in layers], [layer.size for layer in layers])


def activation_traces(
    model: nn.Module, layers: Sequence[Layer], rows: Sequence[Tensor], config: HAWQ2Config | None = None
) -> Traces:
    """The traces of the second derivative of a row's loss by what enters each layer, averaged over the rows.

    Modules that share an input count apart. `rows` are ids [1, tokens]; `size` is the mean number of inputs of a row,
    and the error the spread between rows. The rest is as in [`hessian_traces`].
    """
    c, samples, sizes = config or HAWQ2Config(), [], torch.zeros(len(layers), dtype=torch.float64)
    with measuring(model), differentiable(model, [model.get_input_embeddings().weight]):
        for row in rows:
            seen: dict[int, Tensor] = {}
            handles = [layer.module.register_forward_pre_hook(_noting(seen, i)) for i, layer in enumerate(layers)]
            try:
                loss = summed_loss(model, row) / targets_in([row])
            finally:
                for handle in handles:
                    handle.remove()
            order, inputs = list(seen), list(seen.values())
            drawn = hutchinson(
                [lambda loss=loss: loss], inputs, c.max_draws, c.min_draws, c.tolerance, c.joint, c.seed, c.max_draws
            )
            samples.append(torch.zeros(len(layers), dtype=torch.float64))
            samples[-1][order] = drawn.mean(0)
            sizes[order] += torch.tensor([float(x.numel()) for x in inputs], dtype=torch.float64) / len(rows)
    return _summary(torch.stack(samples), [layer.name for layer in layers], sizes.tolist())


def _noting(seen: dict[int, Tensor], index: int) -> Callable[..., tuple]:
    def note(module: nn.Module, args: tuple) -> tuple:
        # A view of its own, so that modules with one input have different derivatives.
        seen[index] = args[0].view_as(args[0])
        return (seen[index], *args[1:])

    return note


@contextmanager
def differentiable(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Only `weights` require grad, even under `no_grad`; the flags are put back."""
    if not weights:
        raise ValueError("No weight could require grad: there is no layer to measure.")
    flags = {p: p.requires_grad for p in model.parameters()}
    if any(w.is_inference() for w in weights):
        raise ValueError("No weight can require grad: the model was made under torch.inference_mode().")
    try:
        for p in flags:
            p.requires_grad_(False)
        for w in weights:
            w.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


def _summary(samples: Tensor, names: Sequence[str], sizes: Sequence[float]) -> Traces:
    """Means and standard errors of `samples` [draws, layers]."""
    error = samples.std(0) / math.sqrt(len(samples)) if len(samples) > 1 else torch.full_like(samples[0], math.nan)

    def named(values: Sequence[float]) -> dict[str, float]:
        return dict(zip(names, values, strict=True))

    return Traces(named(samples.mean(0).tolist()), named(error.tolist()), named(sizes), len(samples))


def sensitivities(traces: Traces, perturbations: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """Omega_i(b) by layer and bits, from ||Q_b(W_i) - W_i||^2 by layer and bits."""
    negative = [name for name, value in traces.trace.items() if value < 0]
    if negative:
        logger.warning(f"The Hessian trace is negative and counts as 0, so the fewest bits will do: {negative}")
    return {
        name: {b: omega(traces.trace[name], traces.size[name], d) for b, d in by_bits.items()}
        for name, by_bits in perturbations.items()
    }


METHOD = Method(
    name="hawq2",
    family="quantization",
    title="HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks",
    authors="Dong et al.",
    arxiv="1911.03852",
    year=2019,
    repo="Zhen-Dong/HAWQ",
    status="variant",
    difference=(
        "The paper ranks layers of convolutional networks and searches the Pareto frontier among allocations whose "
        "bits follow the order of the traces; here the integer program is solved exactly over all allocations, and "
        "`monotone=True` gives the paper's search space. Grids are those of the quantiser, with groups."
    ),
    target="hfext.quantization.hawq2:hessian_traces",
    config=HAWQ2Config,
    usage='hfext.quantization.allocate(model, data, metric="hawq2", average_bits=3.0)',
    summary="Gives each linear layer its own number of bits, from the trace of the loss's Hessian over its weights.",
    claim=(
        "At equal size, bits allocated by the average Hessian trace times the squared quantisation error lose less "
        "than uniform bits."
    ),
    headline=Result(
        metric="top-1 accuracy, %",
        setting="ImageNet, ResNet-50, mixed weights, about 12x smaller",
        value="75.76 (figure not re-checked)",
        baseline="75.48 (HAWQ)",
    ),
    recipe="quantization/hawq2-llama-shakespeare.yaml",
)
