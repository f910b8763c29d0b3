"""Tuning the grids of a quantised block on what the block gave before, with its codes as they are.

    mean |block(x) - label|^2   over scales, offsets and, where asked for, norms and biases

The inputs x come from blocks that are quantised already, and the labels from the plain block on the same inputs.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._calibration import Block, Sample
from ._linear import QuantLinear


def tune_block(block: Block, epochs: int, lr: float, weight_decay: float, train_norm: bool, train_bias: bool) -> float:
    """The block stage: Adam on grids, norms and biases, with the codes as they are; one step for each batch.

    It runs in fp32 whatever the model's type. After each epoch everything is rounded to the type in which it is
    stored, and the best state of all, that before the first step included, is kept. Returns its loss.
    """
    chosen: dict[str, nn.Parameter] = {}
    for name, module in block.module.named_modules():
        if isinstance(module, QuantLinear):
            chosen |= {f"{name}.scales": module.scales, f"{name}.zeros": module.zeros}
            if train_bias and module.bias is not None:
                chosen[f"{name}.bias"] = module.bias
        elif train_norm and "norm" in type(module).__name__.lower():
            chosen |= {f"{name}.{key}": p for key, p in module.named_parameters(recurse=False)}
    for name, parameter in chosen.items():
        if not name.endswith((".scales", ".zeros")):
            block.keep(parameter)
    tuned = list(chosen.values())
    stored = [p.detach().clone() for p in tuned]
    floats = [p for p in block.module.parameters() if p.is_floating_point()]
    types = [p.dtype for p in floats]
    wanted = [p.requires_grad for p in floats]
    samples = [
        replace(s, hidden=s.hidden.float(), calls=[_floats(call) for call in s.calls[: block.index + 1]])
        for s in block.samples
    ]

    def loss_of(sample: Sample, label: Tensor) -> Tensor:
        return (block.run_with_grad(sample) - label.float()).square().mean()

    def mean_loss() -> float:
        with torch.no_grad():
            sizes = [label.numel() for label in block.labels]
            parts = (float(loss_of(*pair)) for pair in zip(samples, block.labels, strict=True))
            return sum(part * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes)

    try:
        for p in floats:
            p.data = p.data.float()
        for p in tuned:
            p.requires_grad_(True)
        optimizer = torch.optim.Adam(tuned, lr=lr, betas=(0.9, 0.99), eps=2e-5, weight_decay=weight_decay)
        least = mean_loss()
        for _ in range(epochs):
            for sample, label in zip(samples, block.labels, strict=True):
                optimizer.zero_grad()
                with torch.enable_grad():
                    loss_of(sample, label).backward()
                optimizer.step()
            exact = [p.detach().clone() for p in tuned]
            rounded = [p.detach().to(old.dtype) for p, old in zip(tuned, stored, strict=True)]
            _fill(tuned, rounded)
            loss = mean_loss()
            if loss < least:
                least, stored = loss, rounded
            _fill(tuned, exact)
        _fill(tuned, stored)
    finally:
        for p, kind, grad in zip(floats, types, wanted, strict=True):
            p.grad = None
            p.data = p.data.to(kind)
            p.requires_grad_(grad)
    return least


def _fill(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def _floats(thing: Any) -> Any:
    """Nested tensors with those of a floating type in fp32."""
    if isinstance(thing, Tensor):
        return thing.float() if thing.is_floating_point() else thing
    if isinstance(thing, dict):
        return {key: _floats(value) for key, value in thing.items()}
    return type(thing)(_floats(value) for value in thing) if isinstance(thing, list | tuple) else thing
