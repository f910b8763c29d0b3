"""ZO2: MeZO on a model whose blocks live in host memory and visit the device one at a time.

Both sides of a direction go through the model together, block by block, so that a block crosses the bus once up and
once down in an update. The moves of update t wait until the block comes up in update t+1:

    block i comes up  ->  the moves that waited; the result goes back to the host
                      ->  side 1 runs at w + eps z  ->  side 2 at (w + eps z) - 2 eps z  ->  dropped

while block i+1 is on its way. What is in no block (embeddings, final norm, head) stays on the device, once for each
side. The moves and their order are those of MeZO, so the weights are MeZO's, bit for bit.

The two sides are two calls of the unchanged model in two threads, of which one runs at a time: the hooks of the blocks
hand over, and each side has its own random numbers. Any model with a `ModuleList` of blocks works, with any loss of
its outputs.

ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with Limited GPU Memory, arXiv 2503.12668.
"""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import Method, Result
from ._offload import Offload, checked_blocks, find_blocks
from ._passes import rng_state, set_rng_state
from ._zeroth import Move, ZerothOrder, apply_, undisturbed
from .mezo import MeZOConfig


def offload(
    model: nn.Module, device: torch.device | str | None = None, blocks: Sequence[nn.Module] | None = None
) -> Offload:
    """Keep the blocks of `model` in host memory and the rest on `device`; returns a handle with `remove()`.

    The model runs as before, also in `generate`, each block coming up when it is called. `optim="zo2"` does this by
    itself.

    Args:
        model: On any device; one that does not fit the device must be on the host.
        device: Where to compute; the GPU if there is one.
        blocks: The modules to stream, in the order in which they run; by default the layers of the model.
    """
    if "hfext_offload" in vars(model):
        raise ValueError(
            "The blocks of this model are in host memory already; call model.hfext_offload.remove() first."
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Offload(model, find_blocks(model) if blocks is None else checked_blocks(model, blocks), device)


class _Abandoned(BaseException):
    """Ends the side whose partner failed."""


class _Sides:
    """Two calls that take turns; the second in a thread of its own, with the settings of the first one's."""

    def __init__(self, device: torch.device, on_switch: Callable[[int], None]):
        self.turn = [threading.Semaphore(0), threading.Semaphore(0)]
        self.done, self.error = [False, False], None
        self.device, self.on_switch, self.thread = device, on_switch, None
        self.side, self.rng = 0, [None, rng_state()]

    def run(self, calls: Sequence[Callable[[], float]]) -> list[float]:
        results = [0.0, 0.0]
        context, inference = contextvars.copy_context(), torch.is_inference_mode_enabled()
        casts = {k: torch.get_autocast_dtype(k) for k in ("cpu", "cuda") if torch.is_autocast_enabled(k)}
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

        def second():
            self.turn[1].acquire()
            try:
                if self.error is None:
                    with contextlib.ExitStack() as stack:
                        stack.enter_context(torch.inference_mode(inference))
                        if stream is not None:
                            stack.enter_context(torch.cuda.device(self.device))
                            stack.enter_context(torch.cuda.stream(stream))
                        for kind, dtype in casts.items():
                            stack.enter_context(torch.autocast(kind, dtype=dtype))
                        results[1] = context.run(calls[1])
            except BaseException as error:
                self.error = self.error or error
            self.done[1] = True
            self.turn[0].release()

        self.thread = threading.Thread(target=second, daemon=True)
        self.thread.start()
        try:
            results[0] = calls[0]()
        except BaseException as error:
            self.error = self.error or error
        self.done[0] = True
        if self.error is None:
            self.switch(1)
        self.turn[1].release()
        while self.thread.is_alive():  # an interrupt must not leave it behind
            try:
                self.thread.join()
            except BaseException as error:
                self.error = self.error or error
        if self.error is not None:
            raise self.error
        return results

    def mine(self) -> int:
        return int(threading.current_thread() is self.thread)

    def switch(self, side: int) -> None:
        """The weights and random numbers of a side."""
        if side != self.side:
            self.rng[self.side] = rng_state()
            set_rng_state(self.rng[side])
            self.side = side
            self.on_switch(side)

    def hand_over(self) -> None:
        side = self.mine()
        if not self.done[1 - side]:
            self.switch(1 - side)
            self.turn[1 - side].release()
            self.turn[side].acquire()
        if self.error is not None:
            raise _Abandoned
        self.switch(side)


class ZO2(ZerothOrder):
    """MeZO with the blocks of a model in host memory: `ZO2(model.parameters(), lr=1e-6, streamed=model)`.

    Args:
        params: As for every optimizer of torch.
        lr: Learning rate.
        weight_decay: Decoupled from the direction, times `lr`.
        run_seed: Seed where the config has none.
        streamed: The model, after `offload` or to be offloaded to `device`.
        device: As in `offload`.
        **options: Fields of [`MeZOConfig`].
    """

    Config = MeZOConfig
    trajectory_of = "MeZO"

    def __init__(self, params, lr: float = 1e-6, weight_decay: float = 0.0, run_seed: int = 0, *, streamed: nn.Module,
                 device: torch.device | str | None = None, **options: Any):  # fmt: skip
        super().__init__(params, lr, weight_decay, run_seed, **options)
        self.offload = vars(streamed).get("hfext_offload") or offload(streamed, device)
        self._sides: _Sides | None = None
        self._resident: list[tuple[nn.Parameter, list[Tensor]]] = []

    @classmethod
    def check_arguments(cls, args) -> None:
        super().check_arguments(args)
        if args.torch_compile:
            raise NotImplementedError("optim='zo2' needs hooks, which compiled code skips. Use optim='mezo'.")
        if args.bf16_full_eval or args.fp16_full_eval:
            raise NotImplementedError("optim='zo2' cannot move the whole model to evaluate it: load it in that dtype.")

    @classmethod
    def trainer_kwargs(cls, context, config) -> dict[str, Any]:
        own = {"streamed": context.model, "device": context.args.device}
        return super().trainer_kwargs(context, config) | own

    @staticmethod
    def place(model: nn.Module, device: torch.device) -> None:
        """What the Trainer does in place of moving the model to its device."""
        if "hfext_offload" not in vars(model):
            offload(model, device)

    # ---- both sides of a direction ------------------------------------------------------------------------------

    def pair(self, closures: Sequence[Callable[..., Tensor]], seed: int, count: bool) -> tuple[float, float]:
        eps, stream = self.config.eps, self.offload
        streamed = [(place, w) for place, _, w in self.weights() if id(w) in stream.home]
        resident = [(place, w) for place, _, w in self.weights() if id(w) not in stream.home]
        places = {id(w): place for place, w in streamed}
        kept = [w.detach().clone() for _, w in resident] if self.config.restore == "exact" else None

        def move(i: int, distance: float) -> None:
            for t in stream.tensors[i]:
                if id(t) in places:
                    apply_(t, [Move(seed, distance)], places[id(t)])

        def enter(i: int) -> bool:
            if sides.mine() == 0 or stream.host[i] is None:
                stream.load(i)
                move(i, eps)
            if sides.mine() == 1:
                move(i, -2 * eps)
            return False

        def leave(i: int) -> None:
            if sides.mine() == 1 or sides.done[1]:
                stream.drop(i)
            sides.hand_over()

        def switch(side: int) -> None:
            torch.clear_autocast_cache()  # casts of the other side's weights, kept by parameter
            for w, versions in self._resident:
                w.data = versions[side]

        sides = _Sides(stream.device, switch)
        calls = [
            lambda first=first: sum(float(closure(count=count and first)) for closure in closures)
            for first in (True, False)
        ]
        try:
            for place, w in resident:
                apply_(w, [Move(seed, eps)], place)
                self._resident.append((w, [w.data, w.data.clone()]))
                apply_(self._resident[-1][1][1], [Move(seed, -2 * eps)], place)
            stream.on_enter, stream.on_leave = enter, leave
            up, down = sides.run(calls)
        finally:
            stream.on_enter = stream.on_leave = None
            for i in range(len(stream.blocks)):
                stream.drop(i)
            for (w, (first, second)), (place, _) in zip(self._resident, resident, strict=False):
                first.copy_(second)
                w.data = first
                apply_(w, [Move(seed, eps)], place)
            if kept is not None:
                torch._foreach_copy_([w for _, w in resident], kept)
            self._resident = []
        if self.config.restore == "copyless":
            for place, w in streamed:  # MeZO's walk, with its rounding
                stream.put_off(w, place, [Move(seed, eps), Move(seed, -2 * eps), Move(seed, eps)])
        return up, down

    def update(self, moves: list[list[Move]]) -> None:
        with undisturbed():
            for place, group, weight in self.weights():
                if id(weight) in self.offload.home:
                    self.offload.put_off(weight, place, moves[group])
                else:
                    apply_(weight, moves[group], place)

    def flush(self) -> None:
        self.offload.flush()

    @property
    def is_perturbed(self) -> bool:
        return self.offload.on_enter is not None


METHOD = Method(
    name="zo2",
    family="optim",
    title="ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with Limited GPU Memory",
    authors="Wang et al.",
    arxiv="2503.12668",
    year=2025,
    repo="liangyuwang/zo2",
    status="variant",
    difference="The two sides are two calls of the unchanged model that take turns at every block, in place of models "
    "written for the purpose. Noise comes from one seed for each weight, so that a put-off move needs no state of a "
    "generator. Weights keep their precision in host memory.",
    target="hfext.optim.zo2:ZO2",
    config=MeZOConfig,
    usage='TrainingArguments(optim="zo2", learning_rate=1e-6, optim_args="eps=1e-3")',
    summary="MeZO with the model's blocks in host memory: device memory of three blocks, and twice what is in none.",
    claim="The weights are MeZO's, with only a few blocks on the device.",
    headline=Result(
        metric="GPU memory, GB",
        setting="OPT-175B, fine-tuned on one GPU with 18 GB",
        value="18.04",
    ),
    recipe="optim/zo2-llama-equality.yaml",
    notes="On a machine without a GPU host and device are one memory: it runs, and `mezo` does the same faster. The "
    "streams of copies on a GPU were not measured.",
)
