"""Which rows a sampled linear layer keeps: draws of their own that can be repeated, and the norms seen last time.

A `Sampler` is shared by all layers of one `replace`. Before each forward pass of the model in training it looks at the
batch. Draws depend on its seed, a counter of passes, the batch, the layer and nothing else: torch's generators are
never touched. A pass over the same batch with the same state of torch's generator, before the optimizer has stepped,
is a repetition, as the second pass of a sharpness-aware optimizer is, and draws the same rows.

Examples are known by their contents, so no index column is needed: the norm cache holds, for each layer and example,
the 2-norms of the gradient's rows in bfloat16 on the CPU, one for each token that is not padding, and their mean over
the padding.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0  # of any optimizer, since a sampler first listened
_listener: Any = None


def steps_taken() -> int:
    """A count that grows with every step of any optimizer: copies of a sampler hear of them as it does."""
    global _listener
    if _listener is None:
        _listener = register_optimizer_step_post_hook(_count)
    return _steps


def _count(optimizer, args, kwargs) -> None:
    global _steps
    _steps += 1


def digest(*parts: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(struct.pack("<q", len(part)))
        found.update(part)
    return found.digest()


def raw(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Selection:
    """What one layer kept of one input, for the other layers that read the same input.

    Attributes:
        index: Kept rows, int32 [k].
        scale: What their products are multiplied by, float32 [k].
        layer: Whose place in the cache the norms have.
        examples: Keys of the batch, or `None` where rows cannot be told apart by example.
        mask: Which of their positions are no padding, or `None`.
        rows: The kept rows themselves, as long as a graph holds them.
        squares: Sum over the layers of the squared row norms of the gradient, made in the backward pass.
    """

    index: Tensor
    scale: Tensor
    layer: str
    examples: list[bytes] | None
    mask: Tensor | None
    rows: Any = None
    squares: Tensor | None = None


@dataclass
class Sampler:
    """Draws and norm cache of all layers of one `replace`."""

    seed: int
    keep_norms: bool
    counter: int = 0
    norms: dict[str, dict[bytes, Tensor]] = field(default_factory=dict)
    recent: dict[bytes, int] = field(default_factory=dict)
    steps: int = -1  # of optimizers, when `recent` was begun
    examples: list[bytes] | None = None
    mask: Tensor | None = None
    batch: bytes = b""
    draw: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    last: tuple[Any, int, Any] | None = None  # weak references to an input and its selection

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which repeat no pass of this one and hold no reference to its tensors."""
        return {**self.__dict__, "recent": {}, "last": None}

    def watch(self, model: nn.Module) -> list[Any]:
        """Look at the batches of `model` from now on; returns the handles that end it."""
        return [model.register_forward_pre_hook(_Watcher(self), with_kwargs=True)]

    def begin(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """A pass over a batch begins."""
        inputs = {str(i): x for i, x in enumerate(args) if isinstance(x, Tensor)}
        inputs |= {name: x for name, x in kwargs.items() if isinstance(x, Tensor)}
        self.calls, self.last = {}, None
        self.batch = digest(*(part for name in sorted(inputs) for part in (name.encode(), raw(inputs[name]))))
        self.examples, self.mask = self._read(inputs) if self.keep_norms else (None, None)
        states = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            states.append(torch.cuda.get_rng_state())
        key = digest(self.batch, *map(raw, states))
        if self.steps != steps_taken():
            self.recent, self.steps = {}, steps_taken()
        if key not in self.recent:
            self.counter += 1
            self.recent[key] = self.counter
            while len(self.recent) > 4096:
                self.recent.pop(next(iter(self.recent)))
        self.draw = self.recent[key]

    @staticmethod
    def _read(inputs: dict[str, Tensor]) -> tuple[list[bytes] | None, Tensor | None]:
        """Key of each example and which of its positions are no padding, bool [batch, tokens] or `None`."""
        names = [name for name in inputs if "label" not in name and inputs[name].dim() > 1]
        if not names:
            return None, None
        main = inputs["input_ids" if "input_ids" in names else names[0]].detach().cpu()
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape != main.shape[:2] or mask.dim() != 2:
            return [digest(raw(row)) for row in main], None
        mask = mask.detach().bool().cpu()
        return [digest(raw(row[keep])) for row, keep in zip(main, mask, strict=True)], mask

    def uniform(self, layer: str, count: int) -> Tensor:
        """`count` numbers in [0, 1), float64 on the CPU."""
        call = self.calls[layer] = self.calls.get(layer, -1) + 1
        state = digest(struct.pack("<qqq", self.seed, self.draw, call), self.batch, layer.encode())
        generator = torch.Generator().manual_seed(int.from_bytes(state, "little") >> 1)
        return torch.rand(count, generator=generator, dtype=torch.float64)

    def known_norms(self, layer: str, shape: torch.Size) -> Tensor | None:
        """Norms of an earlier pass for the rows of an input of this shape, float32 [rows], or `None` without any.
        Examples not seen yet get the mean of the others."""
        if not self._fits(shape):
            return None
        cache, length = self.norms.get(layer, {}), shape[1:-1].numel()
        mask = self.mask if self.mask is not None and self.mask.shape[1] == length else None
        found = torch.full((shape[0], length), torch.nan)
        for i, key in enumerate(self.examples):
            kept = cache.get(key)
            keep = torch.ones(length, dtype=torch.bool) if mask is None else mask[i]
            if kept is not None and len(kept) == keep.sum() + 1:
                found[i, keep], found[i, ~keep] = kept[:-1].float(), kept[-1].float()
        known = ~found.isnan()
        if not known.any():
            return None
        return found.masked_fill_(~known, found[known].mean()).flatten()

    def _fits(self, shape: torch.Size) -> bool:
        return self.examples is not None and len(shape) > 1 and shape[0] == len(self.examples)

    def note(self, selection: Selection, squares: Tensor, shape: torch.Size) -> None:
        """Keep the row norms of a gradient, summed in squares over the layers that share the input."""
        if selection.examples is None or shape[0] != len(selection.examples):
            return
        selection.squares = squares if selection.squares is None else selection.squares + squares
        norms = selection.squares.sqrt().to("cpu", torch.bfloat16).view(shape[0], -1)
        mask = selection.mask if selection.mask is not None and selection.mask.shape == norms.shape else None
        cache = self.norms.setdefault(selection.layer, {})
        for i, key in enumerate(selection.examples):
            keep = torch.ones(norms.shape[1], dtype=torch.bool) if mask is None else mask[i]
            padding = norms[i][~keep].float().mean() if not keep.all() else torch.zeros(())
            cache[key] = torch.cat([norms[i][keep], padding.to(torch.bfloat16)[None]])

    def nbytes(self) -> int:
        """Of the norm cache."""
        return sum(x.nbytes for cache in self.norms.values() for x in cache.values())

    def save(self, path: str) -> None:
        """Counter and norms as one safetensors file."""
        names = [(layer, key) for layer, cache in self.norms.items() for key in cache]
        kept = [self.norms[layer][key] for layer, key in names]
        layers = list(self.norms)
        tensors = {
            "norms": torch.cat(kept) if kept else torch.zeros(0, dtype=torch.bfloat16),
            "lengths": torch.tensor([len(x) for x in kept], dtype=torch.int32),
            "layers": torch.tensor([layers.index(layer) for layer, _ in names], dtype=torch.int32),
            "keys": torch.tensor([list(key) for _, key in names], dtype=torch.uint8).view(-1, 8),
        }
        record = {"seed": self.seed, "counter": self.counter, "layers": layers}
        save_file(tensors, path, metadata={"sampler": json.dumps(record)})

    def load(self, path: str) -> None:
        """Take back what `save` wrote; `ValueError` where it does not fit together."""
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get("sampler", "{}"))
            if {"seed", "counter", "layers"} - set(record):
                raise ValueError(f"{path} was not saved by a sampler of WTA-CRS.")
            tensors = {name: file.get_tensor(name) for name in ("norms", "lengths", "layers", "keys")}
        lengths = tensors["lengths"].tolist()
        if sum(lengths) != len(tensors["norms"]) or not len(lengths) == len(tensors["layers"]) == len(tensors["keys"]):
            raise ValueError(f"{path} is damaged: its parts have different lengths.")
        self.seed, self.counter, self.norms = record["seed"], record["counter"], {}
        self.recent, self.last = {}, None
        for x, layer, key in zip(
            tensors["norms"].split(lengths), tensors["layers"].tolist(), tensors["keys"].tolist(), strict=True
        ):
            self.norms.setdefault(record["layers"][layer], {})[bytes(key)] = x.clone()


class _Watcher:
    """The hook, as an object that a deep copy of the model copies together with its sampler."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self.sampler.begin(model, args, kwargs)
