"""MixDQ: layers of different roles are judged by different metrics, and bits are shared out in each role on its own.

    S_l(b) = metric of l's family: outputs with only layer l at b bits against the model's own, higher = better
    per family f:  max sum_l S_l(b_l)   s.t.   |mean bits of f - B_f| <= 0.02
    B_last = B sum_f n_f / sum_f k_f n_f,  B_f = k_f B_last      the ratios k and the budget B are scanned

Numbers of different metrics are never added. Every allocation that the scan gives is measured for real, and the one
with the least loss is kept. The paper's families are those of a diffusion model; for a language model the feed-forward
layers carry content (KL of the next-token distribution) and attention quality (noise over signal in the final hidden
states). The paper's SQNR is that ratio in dB. Every layer gains about 6 dB a bit, so that a sum of dB hardly tells
layers apart: measured on small language models it loses to the same bits for all, and the ratio itself does not.

MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled Mixed Precision Quantization,
arXiv 2405.17873.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..registry import Method, Result
from ._affine import round_to_nearest
from ._bit_program import one_of_each
from ._sensitivity import Layer, logits_of, mean_loss, measuring, replaced

CLOSEST = 1e-15


class Outputs(NamedTuple):
    """What a metric compares: next-token logits [tokens, vocabulary] and final hidden states [tokens, hidden]."""

    logits: Tensor
    hidden: Tensor


Metric = Callable[[Outputs, Outputs], float]


def negative_kl(reference: Outputs, seen: Outputs) -> float:
    """-KL(p || p') of the next-token distributions in nats, mean over the tokens."""
    p, q = reference.logits.log_softmax(-1), seen.logits.log_softmax(-1)
    return -(p.exp() * (p - q)).sum(-1).mean().item()


def sqnr(reference: Outputs, seen: Outputs) -> float:
    """10 log10(||y||^2 / ||y' - y||^2) of the final hidden states in dB, at most 150."""
    signal = reference.hidden.double().square().sum()
    noise = (seen.hidden.double() - reference.hidden.double()).square().sum()
    return 10 * torch.log10(signal / torch.maximum(noise, CLOSEST * signal)).item()


def negative_nsr(reference: Outputs, seen: Outputs) -> float:
    """-||y' - y||^2 / ||y||^2 of the final hidden states: the SQNR without the logarithm, so that errors add up."""
    return -(10 ** (-sqnr(reference, seen) / 10))


METRICS: dict[str, Metric] = {"kl": negative_kl, "sqnr": sqnr, "nsr": negative_nsr}
FAMILIES = {r"mlp|ffn|feed_forward|expert|\.fc\d": "kl", r"": "nsr"}


@dataclass(frozen=True, kw_only=True)
class MixDQConfig:
    """Options of `allocate(metric="mixdq")`.

    Args:
        families (`dict[str, str | Callable]`, *optional*): Metric of the layers whose name a regular expression is
            found in; the first that fits counts. "kl", "sqnr", "nsr" (the SQNR without its logarithm) or a function
            `(reference, seen)` of two `Outputs`, higher = better. By default feed-forward layers by "kl" and all
            others by "nsr".
        family_bits (`dict[str, tuple[int, ...]]`, *optional*): Bits to choose from in a family, by its regular
            expression; those of the call by default. The paper has (2, 4, 8) for content and (4, 8) for quality.
        ratios (`tuple[float, ...]`, *optional*): Mean bits of a family over those of the last one, to be scanned; by
            default 10 values from 0.46 to 1.36.
        window (`float`, *optional*, defaults to 0.02): How far a family's mean may be from its budget, in bits.
        below (`float`, *optional*, defaults to 0.3): Budgets are scanned from so many bits below the one asked for.
        budgets (`int`, *optional*, defaults to 10): How many of them.
        protect (`float`, *optional*, defaults to 0.0): Share of layers, those most sensitive to 8-bit inputs in each
            family, that are listed in `Allocation.protected`. Their weights have bits like all others; give 0.01, as
            in the paper, when activations are quantised too.
    """

    families: Mapping[str, str | Metric] = field(default_factory=lambda: dict(FAMILIES))
    family_bits: Mapping[str, tuple[int, ...]] | None = None
    ratios: tuple[float, ...] = tuple(np.linspace(0.46, 1.36, 10).round(2).tolist())
    window: float = 0.02
    below: float = 0.3
    budgets: int = 10
    protect: float = 0.0

    def __post_init__(self):
        if not self.families:
            raise ValueError("families is empty but must name a metric for every layer.")
        for pattern, metric in self.families.items():
            if metric not in METRICS and not callable(metric):
                raise ValueError(
                    f"families[{pattern!r}] is {metric!r} but must be one of kl, sqnr, nsr, or a function."
                )
        unknown = set(self.family_bits or ()) - set(self.families)
        if unknown:
            raise ValueError(f"family_bits has {sorted(unknown)} but must have expressions that are in families.")
        if not self.ratios or min(self.ratios) <= 0:
            raise ValueError(f"ratios is {self.ratios} but must be one or more numbers > 0.")
        if self.window < 0 or self.below < 0 or self.budgets < 1:
            raise ValueError(
                f"window is {self.window}, below {self.below} and budgets {self.budgets} but must be >= 0, >= 0, >= 1."
            )
        if not 0 <= self.protect <= 1:
            raise ValueError(f"protect is {self.protect} but must be in [0, 1].")


def families_of(names: Sequence[str], patterns: Sequence[str]) -> dict[str, list[int]]:
    """Indices of the layers of each family, without families that have none."""
    found: dict[str, list[int]] = {pattern: [] for pattern in patterns}
    for i, name in enumerate(names):
        pattern = next((p for p in patterns if re.search(p, name)), None)
        if pattern is None:
            raise ValueError(f"{name} is in no family: no expression of {list(patterns)} is found in it.")
        found[pattern].append(i)
    return {pattern: members for pattern, members in found.items() if members}


def family_program(
    scores: np.ndarray, sizes: Sequence[int], bits: Sequence[int], mean_bits: float, window: float = 0.02
) -> list[int] | None:
    """The option of each layer with the largest sum of `scores` [layers, options] whose mean bits, by `sizes`, are
    within `window` of `mean_bits`; `None` where there is none."""
    from scipy.optimize import LinearConstraint

    scores = np.asarray(scores, np.float64)
    share = np.asarray(sizes, np.float64) / np.sum(sizes)
    spent = (share[:, None] * np.asarray(bits, np.float64)).reshape(1, -1)
    span = np.ptp(scores, axis=1).sum() or 1.0
    worth = (scores.max(1, keepdims=True) - scores) * (1e4 / span)
    return one_of_each(worth, [LinearConstraint(spent, mean_bits - window, mean_bits + window)])


def splits(mean_bits: float, sizes: Sequence[int], ratios: Sequence[float]) -> list[tuple[float, ...]]:
    """Mean bits of each family for each ratio to the last one's, so that all layers together have `mean_bits`."""
    found = []
    for k in itertools.product(ratios, repeat=len(sizes) - 1):
        last = mean_bits * sum(sizes) / (sum(a * n for a, n in zip(k, sizes, strict=False)) + sizes[-1])
        found.append((*(a * last for a in k), last))
    return found


@torch.no_grad()
def outputs(model: nn.Module, batches: Sequence[Tensor]) -> Outputs:
    """Of all tokens of all batches."""
    made = [logits_of(model, batch, output_hidden_states=True) for batch in batches]
    found = Outputs(
        torch.cat([out.logits.flatten(0, 1) for out in made]),
        torch.cat([out.hidden_states[-1].flatten(0, 1) for out in made]),
    )
    if not torch.isfinite(found.hidden).all():
        raise ValueError("A final hidden state is NaN or infinite: a weight or an activation of the model is NaN.")
    return found


def scores(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Tensor],
    options: Mapping[int, Sequence[int]],
    metrics: Mapping[int, Metric],
    quantized: Callable[[Layer, int], Tensor],
) -> dict[int, list[float]]:
    """S_l(b) of each layer by its index, for its `options`, with its metric."""
    reference, found = outputs(model, batches), {}
    for i, layer in enumerate(logging.tqdm(layers, desc="one layer at a time")):
        found[i] = []
        for bits in options[i]:
            with replaced([(layer, quantized(layer, bits))]):
                found[i].append(metrics[i](reference, outputs(model, batches)))
    return found


def input_scores(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Tensor],
    metrics: Mapping[int, Metric],
    bits: int = 8,
) -> dict[int, float]:
    """The metric of each layer when only what enters it is rounded, to `bits` on one grid for the whole tensor."""
    reference, found = outputs(model, batches), {}

    def rounded(module: nn.Module, args: tuple) -> tuple:
        flat = round_to_nearest(args[0].reshape(1, -1), bits, -1).dequantize()
        return (flat.view_as(args[0]), *args[1:])

    for i, layer in enumerate(layers):
        handles = [layer.module.register_forward_pre_hook(rounded)]
        try:
            found[i] = metrics[i](reference, outputs(model, batches))
        finally:
            handles[0].remove()
    return found


class Mixed(NamedTuple):
    """Bits of each layer and their loss, sensitivities by layer and bits, all measured allocations as (bits, loss),
    and the layers whose inputs are most sensitive."""

    bits: list[int]
    loss: float
    sensitivities: list[dict[int, float]]
    measured: list[tuple[list[int], float]]
    protected: list[str]


def mixed_allocation(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Tensor],
    average_bits: float,
    bits: Sequence[int],
    quantized: Callable[[Layer, int], Tensor],
    config: MixDQConfig | None = None,
) -> Mixed:
    """Share `average_bits` out between and within the families.

    Args:
        model (`PreTrainedModel`): A causal language model; left as it was.
        layers (`Sequence[Layer]`): Which weights, as `layers_of(quantizable(model))` gives them.
        batches (`Sequence[torch.Tensor]`): Token ids [rows, tokens] to measure on. The logits of all of them are
            held in memory twice.
        average_bits (`float`): No allocation above it is taken.
        bits (`Sequence[int]`): To choose from, unless the config has others for a family.
        quantized: The weight of a layer at some bits.
        config (`MixDQConfig`, *optional*): Families, metrics and the scan.

    Raises:
        ValueError: Where no ratio and budget gives an allocation.
    """
    c = config or MixDQConfig()
    families = families_of([layer.name for layer in layers], list(c.families))
    choices = {p: tuple(sorted(set((c.family_bits or {}).get(p, bits)))) for p in families}
    metric_of = {i: METRICS.get(c.families[p], c.families[p]) for p, members in families.items() for i in members}
    with measuring(model):
        options = {i: choices[p] for p, members in families.items() for i in members}
        found = scores(model, layers, batches, options, metric_of, quantized)
        tried = _candidates(found, families, choices, layers, average_bits, c)
        measured = []
        for candidate in logging.tqdm(tried, desc="measured allocations"):
            with replaced((layer, quantized(layer, b)) for layer, b in zip(layers, candidate, strict=True)):
                measured.append((candidate, mean_loss(model, batches)))
        protected = _protected(model, layers, batches, families, metric_of, c.protect) if c.protect else []
    best, loss = min(measured, key=lambda pair: (pair[1], _spent(pair[0], layers)))
    by_bits = [dict(zip(options[i], found[i], strict=True)) for i in range(len(layers))]
    return Mixed(best, loss, by_bits, measured, protected)


def _spent(bits: Sequence[int], layers: Sequence[Layer]) -> int:
    return sum(b * layer.size for b, layer in zip(bits, layers, strict=True))


def _candidates(found, families, choices, layers, average_bits: float, c: MixDQConfig) -> list[list[int]]:
    """Every allocation of the scan once, none above the average."""
    sizes = [sum(layers[i].size for i in members) for members in families.values()]
    most = average_bits * sum(sizes) * (1 + 1e-12)
    solved: dict[tuple[str, float], list[int] | None] = {}
    tried: dict[tuple[int, ...], None] = {}
    for budget in np.linspace(average_bits - c.below, average_bits, c.budgets):
        for means in splits(float(budget), sizes, c.ratios):
            whole: list[int] | None = [0] * len(layers)
            for (pattern, members), mean in zip(families.items(), means, strict=True):
                key = (pattern, round(mean, 9))
                if key not in solved:
                    family = np.array([found[i] for i in members])
                    solved[key] = family_program(
                        family, [layers[i].size for i in members], choices[pattern], mean, c.window
                    )
                if solved[key] is None:
                    whole = None
                    break
                for i, option in zip(members, solved[key], strict=True):
                    whole[i] = choices[pattern][option]
            if whole is not None and _spent(whole, layers) <= most:
                tried[tuple(whole)] = None
    if not tried:
        ends = [[end(choices[p]) for p in families] for end in (min, max)]
        low, high = (sum(b * n for b, n in zip(e, sizes, strict=True)) / sum(sizes) for e in ends)
        raise ValueError(
            f"No split of average_bits={average_bits} over {len(families)} families fits within {c.window} bits; "
            f"attainable: {low:.3g} to {high:.3g}. Widen window, below or ratios."
        )
    return [list(candidate) for candidate in tried]


def _protected(model, layers, batches, families, metric_of, share: float) -> list[str]:
    """The most sensitive `share` of each family by `input_scores`, rounded to the nearest number of layers."""
    seen = input_scores(model, layers, batches, metric_of)
    least = [i for members in families.values() for i in sorted(members, key=seen.get)[: round(share * len(members))]]
    return [layers[i].name for i in sorted(least)]


METHOD = Method(
    name="mixdq",
    family="quantization",
    title=(
        "MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled Mixed Precision "
        "Quantization"
    ),
    authors="Zhao et al.",
    arxiv="2405.17873",
    year=2024,
    repo="A-suozhang/MixDQ",
    status="variant",
    difference=(
        "The paper's families are the cross-attention and feed-forward layers of a diffusion model, judged by SSIM, "
        "and the rest, judged by SQNR. Here they are the feed-forward layers of a language model, judged by the KL "
        "divergence of the next token, and attention, judged by the noise-to-signal ratio of the final hidden states "
        "(the paper's SQNR without the logarithm, since decibels of different layers do not add up); both can be "
        "replaced, and `sqnr` is there. Budgets are scanned up to the one asked for, which is never exceeded."
    ),
    target="hfext.quantization.mixdq:mixed_allocation",
    config=MixDQConfig,
    usage='hfext.quantization.allocate(model, data, metric="mixdq", average_bits=3.0)',
    summary="Shares bits out among layers, with one sensitivity metric and one integer program for each family.",
    claim="At equal size, bits allocated by metric-decoupled sensitivities lose less than uniform bits.",
    headline=Result(
        metric="memory, MB",
        setting="SDXL-turbo, weights and activations in 8 bits, no loss of quality",
        value="2631 (figure not re-checked)",
        baseline="5239 (fp16)",
    ),
    recipe="quantization/mixdq-llama-shakespeare.yaml",
)
