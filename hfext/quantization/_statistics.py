"""Corrections of a quantised model that move no code: means and deviations of channels, and biases tuned on the loss.

`tune_statistics` goes through the blocks in the order in which they run. A quantised layer with a bias b gets, for
each output channel, the mean that the plain layer has on the same text (bias correction), and with `std=True` its
deviation too, by scaling the row of its grid:

    b <- b + mean(y_plain) - mean(y)            s, z, b <- k s, k z, k b   with k = std(y_plain) / std(y), before

A norm that feeds no such layer has its gain multiplied by std(n_plain) / std(n), and its bias, where it has one, moved
by what its mean lacks. This stands for the re-estimated statistics of batch norms ("para-normalisation") in
"Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming", arXiv 2006.10518, which
language models do not have. `tune_biases` is the paper's bias tuning: Adam on biases by the loss of the whole model.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._fields import in_range, one_of
from ._calibration import Sample, entering, first, quiet
from ._data import batches, token_rows
from ._linear import QuantLinear
from ._modules import block_lists
from ._quantizer import quantized_layers
from ._sensitivity import logits_of, measuring

CLOSE = 4.0  # deviations are brought closer by at most this factor: channels that hardly vary would run away


@dataclass
class Tuning:
    """What was changed in a model, in place.

    Attributes:
        report (`list[dict]`): A row for each change, or for each epoch of `tune_biases`.
    """

    report: list[dict[str, Any]]
    kept: list[tuple[nn.Parameter, Tensor]] = field(repr=False)

    def undo(self) -> None:
        """Put everything back bit for bit."""
        for parameter, old in self.kept:
            parameter.data.copy_(old)
        self.kept.clear()


def tune_statistics(
    model: nn.Module,
    reference: nn.Module,
    data: Any,
    tokenizer: Any = None,
    std: bool = False,
    norms: bool = True,
    num_samples: int = 128,
    sequence_length: int = 2048,
    batch_size: int = 4,
    seed: int = 0,
) -> Tuning:
    """Match means, and deviations where asked for, of a quantised model's channels to those of the plain one.

    Args:
        model (`PreTrainedModel`): With layers that hfext has quantised; changed in place.
        reference (`PreTrainedModel`): The same model before it was quantised.
        data, tokenizer, num_samples, sequence_length, batch_size, seed: As of `CalibratedConfig`.
        std (`bool`, *optional*, defaults to `False`): Match the deviations of layers with a bias too.
        norms (`bool`, *optional*, defaults to `True`): Match the deviations behind norms that feed layers without
            biases, through their gain.

    Returns:
        [`Tuning`]: `report` has for each layer or norm `name`, `block`, `by` ("bias", "bias and scales", "norm gain"
        or "norm gain and bias") and the mean squared error of the channels' means, and of their deviations, before
        and after; a block without any has one row with `by="nothing"`.

    Raises:
        ValueError: The models do not match, or the model has no layers that hfext has quantised.
    """
    if not quantized_layers(model):
        raise ValueError("model has no layers that hfext has quantised, so there is nothing to correct.")
    lists, others = block_lists(model), block_lists(reference)
    if lists.keys() != others.keys() or any(len(lists[name]) != len(others[name]) for name in lists):
        raise ValueError("reference has other blocks than model: give the model that was quantised.")
    if quantized_layers(reference):
        raise ValueError("reference is quantised but must be the plain model.")
    if len(lists) > 1:
        raise NotImplementedError(f"Statistics are tuned in one chain of blocks, not in {' and '.join(lists)}.")
    ((prefix, blocks),) = lists.items()
    rows = batches(token_rows(data, model, tokenizer, num_samples, sequence_length, seed), batch_size)
    tuning = Tuning([], [])
    with quiet(model), quiet(reference), torch.no_grad():
        try:
            ours, theirs = entering(model, blocks, rows), entering(reference, others[prefix], rows)
            for index, (block, other) in enumerate(zip(blocks, others[prefix], strict=True)):
                run = [_runner(block, ours, index), _runner(other, theirs, index)]
                units = correctable(block, run[0], norms)
                for name in units:
                    _correct(tuning, f"{prefix}.{index}", name, block, other, run, std)
                if not units:
                    tuning.report.append({"block": f"{prefix}.{index}", "name": "", "by": "nothing"})
                for samples, go in zip((ours, theirs), run, strict=True):
                    for sample, hidden in zip(samples, go(), strict=True):
                        sample.hidden = hidden
            outer = [
                name
                for name, module in model.named_modules()
                if norms and is_norm(module) and not name.startswith(f"{prefix}.")
            ]
            for name in outer:
                whole = [_caller(model, rows), _caller(reference, rows)]
                _correct(tuning, "", name, model, reference, whole, std)
        except BaseException:
            tuning.undo()
            raise
    return tuning


def correctable(block: nn.Module, run: Callable[[], list[Tensor]], norms: bool) -> list[str]:
    """Names of the quantised layers with a bias, and of the norms whose output goes to no such layer, in the order in
    which they run."""
    order: list[str] = []
    made: dict[int, str] = {}
    alive: list[Any] = []
    feeds: set[str] = set()

    def ran(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, out: Any) -> None:
            if name not in order:
                order.append(name)
            # Kept, so that no other tensor can take its address.
            alive.append((args[0], out))
            if is_norm(module):
                made[id(out)] = name
            elif id(args[0]) in made:
                feeds.add(made[id(args[0])])

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in block.named_modules():
            if isinstance(module, QuantLinear) and module.bias is not None or norms and is_norm(module):
                hooks.callback(module.register_forward_hook(ran(name, module)).remove)
        run(1)
    return [name for name in order if name not in feeds]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with a gain."""
    return "norm" in type(module).__name__.lower() and isinstance(vars(module)["_parameters"].get("weight"), Tensor)


def channel_statistics(
    owner: nn.Module, name: str, run: Callable[..., list[Tensor]]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and deviation of each output channel of a module, in float64, and one of its inputs."""
    count, total, squares, shift, seen = 0, 0.0, 0.0, None, None

    def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
        nonlocal count, total, squares, shift, seen
        y = out.detach().flatten(0, -2).double()
        seen = args[0].detach()
        # Around a first mean, so that a large mean costs no digits of the deviation.
        shift = y.mean(0) if shift is None else shift
        y -= shift
        count, total, squares = count + len(y), total + y.sum(0), squares + y.square().sum(0)

    handle = owner.get_submodule(name).register_forward_hook(hook)
    try:
        run()
    finally:
        handle.remove()
    if not count:
        raise NotImplementedError(f"{name} does not run in the forward pass.")
    mean = total / count
    return shift + mean, (squares / count - mean.square()).clamp(min=0).sqrt(), seen


def _correct(
    tuning: Tuning, block: str, name: str, ours: nn.Module, theirs: nn.Module, run: list[Callable], std: bool
) -> None:
    module = ours.get_submodule(name)
    aim_mean, aim_std, _ = channel_statistics(theirs, name, run[1])
    mean, deviation, seen = channel_statistics(ours, name, run[0])
    before = _distance(mean, deviation, aim_mean, aim_std)
    bias = module._parameters.get("bias")
    factor = torch.where(deviation > 0, aim_std / deviation.clamp(min=1e-30), torch.ones_like(deviation))
    factor = factor.clamp(1 / CLOSE, CLOSE)
    scaled = is_norm(module) or std and list(module.kept_types()) == ["scales", "zeros"]
    if is_norm(module):
        gain = module.weight
        tuning.kept.append((gain, gain.detach().clone()))
        offset = gain_offset(module, seen)
        gain.data.copy_((gain.double() + offset) * factor - offset)
    elif scaled:
        for parameter in (module.scales, module.zeros):
            tuning.kept.append((parameter, parameter.detach().clone()))
            parameter.data.copy_(parameter.double() * factor[:, None])
    if bias is not None:
        tuning.kept.append((bias, bias.detach().clone()))
        if scaled:
            mean = channel_statistics(ours, name, run[0])[0]
        bias.data.copy_(bias.double() + (aim_mean - mean))
    mean, deviation, _ = channel_statistics(ours, name, run[0])
    after = _distance(mean, deviation, aim_mean, aim_std)
    if is_norm(module):
        by = "norm gain" if bias is None else "norm gain and bias"
    else:
        by = "bias and scales" if scaled else "bias"
    row = {"block": block, "name": f"{block}.{name}".removeprefix("."), "by": by}
    tuning.report.append(row | {f"{key} before": x for key, x in before.items()})
    tuning.report[-1] |= {f"{key} after": x for key, x in after.items()}


def gain_offset(norm: nn.Module, x: Tensor) -> float:
    """0 of a norm that multiplies by its weight, 1 of one that multiplies by 1 + weight."""
    weight, bias = norm.weight, norm._parameters.get("bias")
    kept = weight.detach().clone()
    try:
        weight.data.zero_()
        out = norm(x) - (0 if bias is None else bias)
    finally:
        weight.data.copy_(kept)
    return float(out.abs().max() > 1e-3)


def _distance(mean: Tensor, std: Tensor, aim_mean: Tensor, aim_std: Tensor) -> dict[str, float]:
    return {"means": float((mean - aim_mean).square().mean()), "stds": float((std - aim_std).square().mean())}


def _runner(block: nn.Module, samples: list[Sample], index: int) -> Callable[..., list[Tensor]]:
    def run(most: int | None = None) -> list[Tensor]:
        found = []
        for sample in samples[:most]:
            args, kwargs = sample.calls[index]
            found.append(first(block(sample.hidden, *args, **kwargs)))
        return found

    return run


def _caller(model: nn.Module, rows: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for ids in rows:
            model(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False)

    return run


def tune_biases(
    model: nn.Module,
    reference: nn.Module | None,
    data: Any,
    tokenizer: Any = None,
    loss: Literal["kl", "ce"] = "kl",
    norms: bool = False,
    epochs: int = 4,
    lr: float = 1e-3,
    num_samples: int = 128,
    sequence_length: int = 2048,
    batch_size: int = 4,
    seed: int = 0,
) -> Tuning:
    """Adam on the biases of the linear layers of a quantised model, everything else frozen, by the loss of the model.

    After each epoch everything is rounded to the type in which it is stored, and the best state on all of the data,
    that before the first step included, is kept. It runs in float32 whatever the model's type.

    Args:
        model (`PreTrainedModel`): With layers that hfext has quantised; changed in place.
        reference (`PreTrainedModel` or `None`): The plain model, for the loss "kl".
        data, tokenizer, num_samples, sequence_length, batch_size, seed: As of `CalibratedConfig`; `seed` also orders
            the batches of an epoch.
        loss (`str`, *optional*, defaults to "kl"): KL divergence of the next-token distributions from those of the
            reference, or "ce", cross-entropy of the text, both in nats a token.
        norms (`bool`, *optional*, defaults to `False`): Tune the weights and biases of norms too; for models without
            biases this is all there is.
        epochs (`int`, *optional*, defaults to 4): Passes over the data.
        lr (`float`, *optional*, defaults to 1e-3): Adam's.

    Returns:
        [`Tuning`]: `report` has `epoch`, `loss` (nats a token, epoch 0 is before) and `kept`, true for the best.

    Raises:
        ValueError: The model has no biases and `norms` is off, or a value is out of its range.
    """
    one_of("loss", loss, ("kl", "ce"))
    in_range("epochs", epochs, 0, 100_000)
    in_range("lr", lr, 0.0, 1.0, low_open=True)
    if loss == "kl" and reference is None:
        raise ValueError('reference is None but must be the plain model with loss="kl".')
    if not quantized_layers(model):
        raise ValueError("model has no layers that hfext has quantised.")
    head = model.get_output_embeddings()
    tuned: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head and module.bias is not None:
            tuned.append(module.bias)
        elif norms and is_norm(module):
            tuned += module.parameters(recurse=False)
    if not tuned:
        raise ValueError("norms is False but must be True for a model without biases: there is nothing to tune.")
    rows = batches(token_rows(data, model, tokenizer, num_samples, sequence_length, seed), batch_size)
    rows = [batch for batch in rows if batch.shape[1] > 1]
    if not rows:
        raise ValueError("The data holds no token to predict: a row needs two tokens or more.")
    kinds, kept = [p.dtype for p in tuned], [p.detach().clone() for p in tuned]
    order = torch.Generator().manual_seed(seed)

    def mean_loss() -> float:
        with torch.no_grad():
            sizes = [batch[:, 1:].numel() for batch in rows]
            losses = (float(batch_loss(model, reference, batch, loss)) for batch in rows)
            return sum(x * n for x, n in zip(losses, sizes, strict=True)) / sum(sizes)

    other = contextlib.nullcontext() if reference is None or reference is model else measuring(reference)
    best = kept
    try:
        with quiet(model), measuring(model), other:
            for p in tuned:
                p.requires_grad_(True)
            optimizer = torch.optim.Adam(tuned, lr=lr)
            losses = [mean_loss()]
            for _ in range(epochs):
                for i in torch.randperm(len(rows), generator=order).tolist():
                    optimizer.zero_grad()
                    with torch.enable_grad():
                        batch_loss(model, reference, rows[i], loss).backward()
                    optimizer.step()
                exact = [p.detach().clone() for p in tuned]
                rounded = [p.detach().to(kind) for p, kind in zip(tuned, kinds, strict=True)]
                for p, x in zip(tuned, rounded, strict=True):
                    p.data.copy_(x)
                losses.append(mean_loss())
                if losses[-1] < min(losses[:-1]):
                    best = rounded
                for p, x in zip(tuned, exact, strict=True):
                    p.data.copy_(x)
    finally:
        for p, x in zip(tuned, best, strict=True):
            p.grad = None
            p.data.copy_(x)
    chosen = min(range(len(losses)), key=losses.__getitem__)
    report = [{"epoch": i, "loss": x, "kept": i == chosen} for i, x in enumerate(losses)]
    return Tuning(report, list(zip(tuned, kept, strict=True)))


def batch_loss(model: nn.Module, reference: nn.Module | None, batch: Tensor, loss: str) -> Tensor:
    """KL(reference || model) or cross-entropy of a batch [rows, tokens], nats a predicted token."""
    logits = logits_of(model, batch).logits[:, :-1].float().flatten(0, 1)
    if loss == "ce":
        return F.cross_entropy(logits, batch[:, 1:].flatten().to(logits.device))
    with torch.no_grad():
        aim = logits_of(reference, batch).logits[:, :-1].float().flatten(0, 1).log_softmax(-1).to(logits.device)
    return F.kl_div(logits.log_softmax(-1), aim, log_target=True, reduction="batchmean")
