"""Block by block through a model: the calibration that every data-driven method shares.

Embeddings, masks and rotary tables are made once, by the model itself, with its blocks standing aside. Then one block
after the other is quantised on the outputs of the blocks before it, which are quantised already. Only the activations
between two blocks are kept. Finished blocks can be written to a folder, from which an interrupted run goes on.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ._affine import round_to_nearest
from ._checkpoint import Finished
from ._config import CalibratedConfig, naming
from ._data import batches, token_rows
from ._experts import of_expert
from ._modules import block_lists, put

logger = logging.get_logger(__name__)


@dataclass
class Sample:
    """One batch on its way through the model."""

    hidden: Tensor  # [rows, tokens, hidden], what enters the block
    calls: list[tuple[tuple, dict[str, Any]]]  # for each block, the arguments that follow the hidden states


class Block:
    """One block of the model with what enters it. Methods work on this.

    Attributes:
        module (`nn.Module`): The block. Its layers become quantised ones by `replace`.
        name (`str`): Its name in the model; layers are named inside it.
        index (`int`): Its place.
        samples (`list[Sample]`): What enters it, from blocks that are quantised already.
        stages (`list[list[str]]`): Names of its layers in the order in which they run; those of one stage have the
            same input, or are the same layer of different experts.
        plain (`list[Tensor]`): What enters it in the plain model, where the config asks for it with `plain_too`.
        loss (`float`): Mean error of the quantised layers so far, relative to their outputs.
    """

    def __init__(
        self,
        config: CalibratedConfig,
        module: nn.Module,
        name: str,
        index: int,
        samples: list[Sample],
        layers: dict[str, tuple[nn.Linear, int]],
    ):
        self.config, self.module, self.name, self.index, self.samples = config, module, name, index, samples
        self.layers = {key.removeprefix(f"{name}."): x for key, x in layers.items() if key.startswith(f"{name}.")}
        self.errors: dict[str, float] = {}
        self.starved: list[str] = []
        self.tokens: dict[str, int] = {}
        self.undo: list[Callable[[], None]] = []
        self.plain: list[Tensor] = []
        self.stages, self.labels = self._watch()

    # -- running

    @torch.no_grad()
    def run(self, sample: Sample) -> Tensor:
        """Output of the block as it is now [rows, tokens, hidden]."""
        return self.run_with_grad(sample)

    def run_with_grad(self, sample: Sample) -> Tensor:
        """The same with a gradient."""
        args, kwargs = sample.calls[self.index]
        return first(self.module(sample.hidden, *args, **kwargs))

    def inputs(self, names: list[str], visit: Callable[[str, Tensor], None]) -> None:
        """Run all samples and give `visit(name, x)` what enters the named layers, [tokens, in]; the rest of the block
        is left out where all of them have seen their input."""
        waiting: set[str] = set()

        def hook(name: str) -> Callable[..., None]:
            def seen(module: nn.Module, args: tuple) -> None:
                visit(name, args[0].detach().flatten(0, -2))
                waiting.discard(name)
                if not waiting and not self.routed(name):
                    raise _Enough

            return seen

        with contextlib.ExitStack() as hooks:
            for name in names:
                handle = self.module.get_submodule(name).register_forward_pre_hook(hook(name))
                hooks.callback(handle.remove)
            for sample in self.samples:
                waiting.update(names)
                with contextlib.suppress(_Enough):
                    self.run(sample)

    def hessians(self, names: list[str]) -> dict[str, Tensor]:
        """H = X^T X / N [in, in] in float32 for each of the named layers, summed in float64. Layers of one stage that
        see the same input share one tensor."""
        shared = not any(self.routed(name) for name in names)
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def add(name: str, x: Tensor) -> None:
            x = x.float()
            if not x.isfinite().all():
                raise ValueError(f"{self.name}.{name}: its calibration input holds NaN or infinity.")
            product = x.T @ x
            sums[name] = sums[name].add_(product) if name in sums else product.double()
            counts[name] = counts.get(name, 0) + len(x)

        self.inputs(names[:1] if shared else names, add)
        found = {name: (total / counts[name]).float() for name, total in sums.items()}
        if shared:
            self.tokens.update(dict.fromkeys(names, counts[names[0]]))
            return dict.fromkeys(names, found[names[0]])
        self.tokens.update({name: counts.get(name, 0) for name in names})
        empty = {name: torch.zeros(self.weight(name).shape[1], self.weight(name).shape[1]) for name in names}
        return {**empty, **found}

    # -- layers

    def weight(self, name: str) -> Tensor:
        """Float32 weight [out, in] of a layer that is not quantised yet."""
        return self.layers[name][0].weight.detach().float()

    def bits(self, name: str) -> int:
        """Bits of a layer."""
        return self.layers[name][1]

    def few_tokens(self, name: str) -> bool:
        """Whether an expert saw fewer tokens than it has inputs, too few to learn from."""
        few = self.routed(name) and self.tokens[name] < self.layers[name][0].in_features
        if few and name not in self.starved:
            self.starved.append(name)
        return few

    def nearest(self, name: str) -> Any:
        """Rounding to nearest with clip search, for layers that data says too little about."""
        return round_to_nearest(self.weight(name), self.bits(name), self.config.group_size, clip_search=True)

    def replace(self, name: str, result: Any, hessian: Tensor | None = None) -> None:
        """Put a quantised layer in the place of the plain one, filled with what the method found."""
        linear, bits = self.layers[name]
        layer = self.config.empty_layer(linear, bits)
        with naming(f"{self.name}.{name}"):
            self.config.fill(layer, result, None if linear.bias is None else linear.bias.detach())
        self.config.complete(layer, linear.weight.detach(), hessian)
        if hessian is not None:
            self.errors[name] = relative_error(self.weight(name), layer.weight.data.float(), hessian)
        self.put(name, layer.train(linear.training))

    def put(self, name: str, layer: nn.Module) -> None:
        """Set one of the block's layers."""
        linear, _ = self.layers[name]
        put(self.module, name, layer)
        self.undo.append(lambda: put(self.module, name, linear))

    def rescale(self, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Give a layer that is not quantised yet another weight [out, in]; the layer it had is kept for `undo`."""
        linear, bits = self.layers[name]
        made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta").train(linear.training)
        made.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
        bias = linear.bias if bias is None else bias
        made.bias = None if bias is None else nn.Parameter(bias.detach().to(linear.weight.dtype), requires_grad=False)
        self.put(name, made)
        self.layers[name] = (made, bits)

    def keep(self, parameter: nn.Parameter) -> None:
        """Note a parameter that is going to be changed, so that a run that fails can put it back."""
        old = parameter.detach().clone()
        self.undo.append(lambda: parameter.data.copy_(old))

    @property
    def loss(self) -> float:
        return sum(self.errors.values()) / len(self.errors) if self.errors else 0.0

    def routed(self, name: str) -> bool:
        """Whether a layer is one expert of several, which sees some of the tokens."""
        return of_expert(name)

    def _watch(self) -> tuple[list[list[str]], list[Tensor]]:
        """The stages, and the outputs of the block before it is quantised."""
        order: list[tuple[str, Any]] = []

        def hook(name: str) -> Callable[..., None]:
            # The tensor itself is kept, so that no other tensor can take its address.
            return lambda module, args: order.append((name, args[0]))

        with contextlib.ExitStack() as hooks:
            for name in self.layers:
                hooks.callback(self.module.get_submodule(name).register_forward_pre_hook(hook(name)).remove)
            labels = [self.run(self.samples[0])]
        labels += [self.run(sample) for sample in self.samples[1:]]
        stages: dict[Any, list[str]] = {}
        for name, x in order:
            key = re.sub(r"\d+$", "*", name) if self.routed(name) else id(x)
            if name not in stages.setdefault(key, []):
                stages[key].append(name)
        for name in self.layers:  # experts that no token of the first batch went to
            if all(name not in stage for stage in stages.values()):
                if not self.routed(name):
                    raise NotImplementedError(f"{self.name}.{name} does not run in the forward pass of its block.")
                stages.setdefault(re.sub(r"\d+$", "*", name), []).append(name)
        return list(stages.values()), labels


class _Enough(Exception):
    """All that was waited for has been seen."""


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W' - W: squared error of the outputs over their squared size."""
    difference, hessian = quantized - weight, hessian.float()
    whole = float(((weight @ hessian) * weight).sum())
    return float(((difference @ hessian) * difference).sum()) / max(whole, 1e-30)


def calibrate(model: nn.Module, config: CalibratedConfig, layers: dict[str, tuple[nn.Linear, int]]) -> list[Block]:
    """Quantise `layers` of `model` in place, block by block; returns what was done, for `undo` and reports.

    Raises:
        NotImplementedError: The model is no single chain of blocks.
        ValueError: No data, or NaN in weights or activations, with the layer's name.
    """
    lists = {
        name: blocks for name, blocks in block_lists(model).items() if any(k.startswith(f"{name}.") for k in layers)
    }
    if len(lists) > 1:
        raise NotImplementedError(
            f"{config.method} goes through one chain of blocks, but layers of {' and '.join(lists)} are to be "
            "quantised. Leave one out with modules_to_not_convert, or use a method that needs no data, such as hqq."
        )
    ((name, blocks),) = lists.items()
    rows = token_rows(config.dataset, model, config.tokenizer, config.num_samples, config.sequence_length, config.seed)
    finished = Finished(config, model, layers, rows)
    done: list[Block] = []
    try:
        with quiet(model), torch.no_grad():
            config.prepare_model(model)
            samples = entering(model, blocks, batches(rows, config.batch_size))
            plain = [s.hidden for s in samples] if config.plain_too else []
            bar = logging.tqdm(blocks, desc=f"Quantising ({config.method})", unit="block")
            for index, module in enumerate(bar):
                home = next(module.parameters()).device
                module.to(config.device or home)
                moved = [
                    Sample(to(s.hidden, config.device or home), to(s.calls, config.device or home)) for s in samples
                ]
                block = Block(config, module, f"{name}.{index}", index, moved, layers)
                done.append(block)
                block.plain = to(plain, config.device or home)
                plain = [block.run(replace(s, hidden=x)) for s, x in zip(moved, block.plain, strict=False)]
                if not finished.read(block):
                    with torch.enable_grad():
                        config.quantize_block(block)
                    finished.write(block)
                bar.set_postfix(error=f"{block.loss:.2e}")
                for old, new in zip(samples, moved, strict=True):
                    old.hidden = check(block.run(new), block.name)
                block.samples, block.labels, block.plain = [], [], []
                module.to(home)
    except BaseException:
        for block in reversed(done):
            for undo in reversed(block.undo):
                undo()
        raise
    starved = [f"{block.name}.{key}" for block in done for key in block.starved]
    if starved:
        logger.warning(
            f"{len(starved)} experts saw too few tokens and were rounded to nearest: {', '.join(starved[:5])}"
            f"{' ...' if starved[5:] else ''}. More calibration data reaches more experts."
        )
    finished.clear()
    return done


def check(hidden: Tensor, name: str) -> Tensor:
    """The activations, unless they hold NaN or infinity."""
    if not hidden.isfinite().all():
        raise ValueError(f"{name}: its output holds NaN or infinity.")
    return hidden


def to(thing: Any, device: Any) -> Any:
    """Nested tensors on a device."""
    if isinstance(thing, Tensor):
        return thing.to(device)
    if isinstance(thing, dict):
        return {key: to(value, device) for key, value in thing.items()}
    return type(thing)(to(value, device) for value in thing) if isinstance(thing, list | tuple) else thing


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the weights, restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, grad in wanted:
            parameter.requires_grad_(grad)


def entering(model: nn.Module, blocks: nn.ModuleList, inputs: list[Tensor]) -> list[Sample]:
    """What enters the first block for each batch of ids, and the arguments that each block is called with.

    Raises:
        NotImplementedError: The blocks are not a chain in which each gets what the one before gives.
    """
    device = model.get_input_embeddings().weight.device
    short = inputs[0][:1, :8].to(device)
    real: list[Any] = []
    with contextlib.ExitStack() as hooks:
        hooks.callback(blocks[-1].register_forward_hook(lambda module, args, out: real.append(out)).remove)
        model(input_ids=short, use_cache=False)
    tuples = isinstance(real[0], tuple) if real else False
    sample = _stand_aside(model, blocks, short, tuples)
    hidden = sample.hidden
    for block, (args, kwargs) in zip(blocks, sample.calls, strict=False):
        hidden = first(block(hidden, *args, **kwargs))
    if len(sample.calls) != len(blocks) or len(real) != 1 or not torch.equal(first(real[0]), hidden):
        raise NotImplementedError(
            f"The blocks of {type(model).__name__} are not a plain chain, so it cannot be calibrated block by block. "
            "Use a method that needs no data, such as hqq."
        )
    return [_stand_aside(model, blocks, ids.to(device), tuples) for ids in inputs]


def first(out: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return out[0] if isinstance(out, tuple) else out


def _stand_aside(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, tuples: bool) -> Sample:
    """Run the model with blocks that pass on what they get, and note it."""
    entered: list[Tensor] = []
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def passing(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        entered.append(hidden)
        calls.append((args, kwargs))
        if len(calls) == len(blocks):
            raise _Enough  # the head is not needed
        return (hidden,) if tuples else hidden

    with contextlib.ExitStack() as restored:
        for block in blocks:
            before = vars(block).get("forward")
            restored.callback(_restore, block, before)
            block.forward = passing
        with contextlib.suppress(_Enough):
            model(input_ids=ids, use_cache=False)
    return Sample(entered[0], calls)


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward
