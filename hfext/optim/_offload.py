"""Blocks of a model that live in host memory and visit the device when they are called.

Outside a visit the parameters of a block hold the host's tensors, so that saving and counting see the model as usual;
buffers stay on the device. A visit is: copy up (begun while the block before it ran), make the moves that were put
off, copy the result back, run, drop. On a GPU the copies run in streams of their own, from and to pinned memory. At
most three blocks' worth of memory is taken: the one that runs, the next one on its way up, and what is on its way
back. The host waits for a block to have run before it sends the one after the next.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..compat import undivided_modules
from ._zeroth import Move, apply_


def checked_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """`ValueError` unless these are modules of the model, at least one."""
    known = {id(m) for m in model.modules()}
    if not len(blocks) or not all(id(block) in known for block in blocks):
        raise ValueError("blocks must be modules of the model, in the order in which they run, at least one.")
    return list(blocks)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers: the `ModuleList` with most parameters whose members are layers that are never split."""
    names = undivided_modules(model)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    layers = [m for m in lists if names & {type(layer).__name__ for layer in m}] or [
        m for m in lists if len({type(layer) for layer in m}) == 1
    ]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no ModuleList of layers to stream. Pass blocks=[...], the modules in the "
            "order in which they run, or use optim='mezo'."
        )
    return list(max(layers, key=lambda m: sum(p.numel() for p in m.parameters())))


class _Ahead(NamedTuple):
    index: int
    tensors: list[Tensor]
    arrived: Any


class Offload:
    """Handle of `offload`; `remove` undoes it.

    Attributes:
        peak_blocks: The most blocks that held device memory at one time.
        uploads: Blocks copied to the device so far.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device):
        self.model, self.blocks, self.device = model, list(blocks), device
        self.cuda = device.type == "cuda"
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if self.cuda else None
        owners: dict[int, set[int]] = {}
        for i, block in enumerate(self.blocks):
            for tensor in block.parameters():
                owners.setdefault(id(tensor), set()).add(i)
        inside = {id(m) for block in self.blocks for m in block.modules()}
        others = [m for m in model.modules() if id(m) not in inside]
        outside = {id(t) for m in others for t in m.parameters(recurse=False)}
        self.tensors = [
            [t for t in dict.fromkeys(block.parameters()) if len(owners[id(t)]) == 1 and id(t) not in outside]
            for block in self.blocks
        ]
        self.home = {id(t): i for i, tensors in enumerate(self.tensors) for t in tensors}
        self.waiting: list[dict[int, tuple[int, list[Move]]]] = [{} for _ in self.blocks]
        self.host: list[list[Tensor] | None] = [None] * len(self.blocks)
        self.saved: list[Any] = [None] * len(self.blocks)
        self.ahead: _Ahead | None = None
        self.returning: list[tuple[Any, list[Tensor]]] = []
        self.done: Any = None  # when the device has run the block that was dropped last
        self.peak_blocks = self.uploads = 0
        self.on_enter: Callable[[int], bool] | None = None
        self.on_leave: Callable[[int], None] | None = None
        self._place()
        self.hooks = []
        for i, block in enumerate(self.blocks):
            self.hooks.append(block.register_forward_pre_hook(lambda *args, i=i: self._enter(i)))
            self.hooks.append(block.register_forward_hook(lambda *args, i=i: self._leave(i)))
        inside = {id(block) for block in self.blocks}
        for module in model.modules():
            if any(id(part) in inside for part in module.modules()):  # what is saved or loaded has no move left
                self.hooks.append(module.register_state_dict_pre_hook(lambda *args: self.flush()))
                self.hooks.append(module.register_load_state_dict_pre_hook(lambda *args: self.flush()))
        model.hfext_offload = self

    def __deepcopy__(self, memo: dict) -> "Offload":
        raise NotImplementedError("A model whose blocks are in host memory cannot be copied: call .remove() first.")

    def _place(self) -> None:
        for tensor in dict.fromkeys([*self.model.parameters(), *self.model.buffers()]):
            if id(tensor) not in self.home:
                tensor.data = tensor.data.to(self.device)
            else:
                held = tensor.data.to("cpu")
                tensor.data = held.pin_memory() if self.cuda else held

    # ---- what the hooks of a block do ---------------------------------------------------------------------------

    def _enter(self, i: int) -> None:
        if self.on_enter is None or self.on_enter(i):
            self.load(i)

    def _leave(self, i: int) -> None:
        if self.on_leave is None:
            self.drop(i)
        else:
            self.on_leave(i)

    # ---- moving blocks ------------------------------------------------------------------------------------------

    def load(self, i: int) -> None:
        """Bring block i to the device with all its moves made, and begin with the next one."""
        for loaded in range(len(self.blocks)):
            self.drop(loaded)  # one that an exception left, or a block that is called again
        for event in (*(event for event, _ in self.returning), *([self.done] if self.done is not None else [])):
            event.synchronize()
        self.returning = []
        tensors, arrived = self._take(i)
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(arrived)
            for x in tensors:
                x.record_stream(torch.cuda.current_stream(self.device))
        own, waiting = self.tensors[i], self.waiting[i]
        self.host[i] = [t.data for t in own]
        if waiting:
            for t, x in zip(own, tensors, strict=True):
                if id(t) in waiting:
                    place, moves = waiting[id(t)]
                    apply_(x, moves, place)
            tensors = self._save(i, tensors, [id(t) in waiting for t in own])
            self.waiting[i] = {}
        for t, x in zip(own, tensors, strict=True):
            t.data = x
        if i + 1 < len(self.blocks):
            self.ahead = _Ahead(i + 1, *self._upload(i + 1))
        self.peak_blocks = max(self.peak_blocks, 1 + (self.ahead is not None) + len(self.returning))

    def drop(self, i: int) -> None:
        """The block's parameters are the host's again."""
        if self.host[i] is not None:
            for t, held in zip(self.tensors[i], self.host[i], strict=True):
                t.data = held
            self.host[i] = None
            torch.clear_autocast_cache()  # it would keep a cast copy of the block on the device
            if self.cuda:
                self.done = torch.cuda.current_stream(self.device).record_event()

    def put_off(self, tensor: nn.Parameter, place: int, moves: Sequence[Move]) -> None:
        """Make `moves` when the tensor's block comes up next."""
        self.waiting[self.home[id(tensor)]].setdefault(id(tensor), (place, []))[1].extend(moves)

    def flush(self) -> None:
        """Make every move that was put off; afterwards the host holds the trained weights."""
        for i, waiting in enumerate(self.waiting):
            if waiting:
                self.load(i)
            self.drop(i)
        self.ahead = None
        if self.cuda:
            torch.cuda.synchronize(self.device)
        self.returning = []

    def remove(self) -> None:
        """Flush, unhook, and bring the whole model to the device."""
        self.flush()
        for hook in self.hooks:
            hook.remove()
        # From here on nothing of the model is streamed, for an optimizer too that goes on with this handle.
        self.home, self.tensors, self.waiting = {}, [[] for _ in self.blocks], [{} for _ in self.blocks]
        del self.model.hfext_offload
        self.model.to(self.device)

    def _take(self, i: int) -> tuple[list[Tensor], Any]:
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead.index == i:
            return ahead.tensors, ahead.arrived
        return self._upload(i)

    def _upload(self, i: int) -> tuple[list[Tensor], Any]:
        self.uploads += 1
        if not self.cuda:
            return [t.data.to(self.device, copy=True) for t in self.tensors[i]], None
        up = self.streams[0]
        if self.saved[i] is not None:
            up.wait_event(self.saved[i])
        with torch.cuda.stream(up):
            tensors = [t.data.to(self.device, non_blocking=True, copy=True) for t in self.tensors[i]]
            return tensors, up.record_event()

    def _save(self, i: int, tensors: list[Tensor], changed: list[bool]) -> list[Tensor]:
        """Copy changed tensors to the host; what is returned may be changed while they are on their way."""
        pairs = [(x, held) for x, held, yes in zip(tensors, self.host[i], changed, strict=True) if yes]
        if not self.cuda:
            for x, held in pairs:
                held.copy_(x)
            return tensors
        kept = [x.clone() if yes else x for x, yes in zip(tensors, changed, strict=True)]
        down = self.streams[1]
        down.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(down):
            for x, held in pairs:
                held.copy_(x, non_blocking=True)
                x.record_stream(down)
            self.saved[i] = down.record_event()
        self.returning.append((self.saved[i], [x for x, _ in pairs]))
        return kept
