"""Zeroth-order optimizers: an update from values of the loss alone, along directions that a seed gives back.

    pg = (L(w + eps z) - L(w - eps z)) / (2 eps),   z ~ N(0, I)
    w <- w - lr (pg z + wd w)

Everything that happens to a weight is a list of `Move`s, each a rounded w <- keep * w + scale * z(seed), so that two
methods that make the same moves in the same order hold the same bits, whenever and wherever they make them. The noise
of a weight depends on the seed of the direction and on the weight's place among the optimizer's parameters, never on a
global generator, and is drawn a chunk at a time: no gradient is made, and no second tensor of a weight's size unless
the weight is not contiguous.
"""

import contextlib
import functools
import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import logging

from ._one_pass import OnePass
from ._passes import rng_state, set_rng_state

logger = logging.get_logger(__name__)
CHUNK = 1 << 20
_WORD = (1 << 64) - 1


class Move(NamedTuple):
    """w <- keep * w + scale * z(seed)."""

    seed: int
    scale: float
    keep: float = 1.0


def mix(*numbers: int) -> int:
    """A seed below 2^63 from integers: splitmix64 over each in turn."""
    state = 0
    for number in numbers:
        state = (state + (number & _WORD) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state >> 1


@torch.no_grad()
def apply_(weight: Tensor, moves: Sequence[Move], place: int) -> None:
    """Make `moves` in order, in place; `place` is the weight's number. Noise is float32 (float64 for float64)."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    flat = weight.detach().reshape(-1)  # a copy where the weight is not contiguous
    for seed, run in itertools.groupby(moves, key=lambda move: move.seed):
        run = list(run)
        generator = torch.Generator(weight.device).manual_seed(mix(seed, place))
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            z = torch.randn(part.numel(), generator=generator, device=weight.device, dtype=dtype)
            for _, scale, keep in run:
                if keep != 1.0:
                    part.mul_(keep)
                if scale:
                    part.add_(z, alpha=scale)
            del z  # before the next chunk is drawn
    if flat.data_ptr() != weight.data_ptr():
        weight.detach().copy_(flat.view(weight.shape))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """An interrupt from the keyboard waits until the end: half a weight must not be moved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        torch.clear_autocast_cache()  # casts of weights as they were
        if waiting:
            raise KeyboardInterrupt


@torch.no_grad()
def digest(weights: Iterable[Tensor]) -> int:
    """Sum of all stored words, each times the odd number of its place, modulo 2^64: one changed bit changes it."""
    total, words = 0, {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    place = 0
    for weight in weights:
        flat = weight.detach().reshape(-1).view(words[weight.element_size()])
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK].long()
            odd = 2 * torch.arange(place, place + part.numel(), device=part.device) + 1
            total, place = (total + int((part * odd).sum())) & _WORD, place + part.numel()
    return total


def rank_and_processes() -> tuple[int, int]:
    """0 and 1 without `torch.distributed`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gathered(numbers: Tensor) -> Tensor:
    """A vector of every process [processes, n]; of this one alone without `torch.distributed`."""
    if rank_and_processes()[1] == 1:
        return numbers[None]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    numbers = numbers.to(device)
    parts = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, numbers)
    return torch.stack(parts).cpu()


def mean_over_processes(value: float, seed: int, updates: int) -> float:
    """The same bits on every process; processes that draw other directions are stopped."""
    words = torch.cat([torch.tensor([value], dtype=torch.float64).view(torch.int64), torch.tensor([seed, updates])])
    all_words = gathered(words)
    if (all_words[:, 1:] != all_words[:1, 1:]).any():
        raise RuntimeError(
            f"Processes draw different directions: seeds {all_words[:, 1].tolist()}, updates made "
            f"{all_words[:, 2].tolist()}. Give every process the same `seed` and resume all from one checkpoint."
        )
    values = all_words[:, 0].contiguous().view(torch.float64).tolist()
    return math.fsum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class ZerothOrderConfig:
    """
    Args:
        eps: Length of the step to either side, in units of the noise; > 0.
        seed: Of the directions; the Trainer's `seed` by default.
    """

    eps: float = 1e-3
    seed: int | None = None

    def __post_init__(self):
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not 0 < self.eps < math.inf:
            raise ValueError(f"eps is {self.eps!r} but must be a number above 0 and finite.")
        if self.seed is not None:
            self.whole("seed", 0, 2**63 - 1)

    def whole(self, name: str, least: int, most: int | None = None) -> None:
        """`ValueError` unless a field is an integer in its range."""
        value = getattr(self, name)
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value
        if not fits or (most is not None and value > most):
            allowed = f">= {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"{name} is {value!r} but must be an integer {allowed}.")


class ZerothOrder(OnePass):
    """Abstract: a method implements `pair`, the losses on both sides of the weights along one direction.

    In a raw loop, `step(closure)` is the whole update: `closure()` returns the loss and runs no backward pass. The
    Trainer calls `probe` at the last micro-batch of an update and then `step()`.

    Attributes:
        projected: The projected gradients of every update, a list for each, empty where it was skipped. With the seed
            they are the training: `replay` makes the same moves again.
        rates: The learning rates of every update, one for each group.
    """

    hfext_zeroth_order = True
    place: Callable[..., None] | None = None  # `place(model, device)` in place of moving the model to the device
    trajectory_of: ClassVar[str | None] = None  # the method whose trajectories this one shares
    own_batches = False  # whether each micro-batch is a loss of its own, apart from the update's number of tokens

    def __init__(self, params, lr: float, weight_decay: float = 0.0, run_seed: int = 0, **options: Any):
        self.config = self.Config(**options)
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{type(self).__name__}: {name} is {value!r} but must be >= 0 and finite.")
        self.projected: list[list[float]] = []
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if not self.weights():
            raise ValueError(
                f"{type(self).__name__} has no parameter to train: all are frozen. An adapter that is loaded needs "
                "PeftModel.from_pretrained(..., is_trainable=True)."
            )
        self.seed = run_seed if self.config.seed is None else self.config.seed
        self.rates: list[list[float]] = []
        self.metrics: dict[str, float] = {}
        self._probed: list[float] | None = None

    @classmethod
    def check_arguments(cls, args) -> None:
        name = args.optim.value
        if args.deepspeed is not None or args.fsdp:
            raise NotImplementedError(
                f"optim={name!r} needs whole weights on each process, and DeepSpeed and FSDP split them. It keeps no "
                "gradients and no state, so that one device holds what it needs; or use optim='zo2'."
            )
        if args.fp16:
            raise NotImplementedError(
                f"optim={name!r} has no gradients for fp16=True to scale. Load the model in float16, or use bf16=True."
            )
        if args.n_gpu > 1:
            raise NotImplementedError(f"optim={name!r} does not run with DataParallel: start with torchrun.")

    @classmethod
    def trainer_kwargs(cls, context, config) -> dict[str, Any]:
        return {"weight_decay": context.args.weight_decay, "run_seed": context.args.seed}

    # ---- one update -------------------------------------------------------------------------------------------

    def pair(self, closures: Sequence[Callable[..., Tensor]], seed: int, count: bool) -> tuple[float, float]:
        """Sum of the closures at w + eps z and at w - eps z; the weights are back afterwards, or the error leaves."""
        raise NotImplementedError

    def directions(self, count: int) -> list[int]:
        """Seeds of this update's directions."""
        return [mix(self.seed, self.updates, i) for i in range(count)]

    @torch.no_grad()
    def probe(self, closures: Sequence[Callable[..., Tensor]]) -> float:
        """Evaluate both sides along every direction; returns the mean loss. Each closure is one micro-batch."""
        self._probed, losses = None, []
        found = []
        for i, seed in enumerate(self.directions(self.config.directions)):
            up, down = self.pair(closures, seed, count=i == 0)
            losses.append((up + down) / 2)
            found.append(mean_over_processes((up - down) / (2 * self.config.eps), self.seed, self.updates))
        self._probed = found
        self.metrics[f"{type(self).__name__.lower()}/projected_grad"] = math.sqrt(
            math.fsum(g * g for g in found) / len(found)
        )
        return math.fsum(losses) / len(losses)

    def moves(self, group: dict[str, Any], seeds: Sequence[int], projected: Sequence[float]) -> list[Move]:
        """The update of one group: w (1 - lr wd) - lr mean_j(pg_j z_j)."""
        lr, count = float(group["lr"]), len(projected)
        keeps = [1.0 - lr * group["weight_decay"]] + [1.0] * (count - 1)
        return [Move(seed, -lr * g / count, keep) for seed, g, keep in zip(seeds, projected, keeps, strict=True)]

    def step(self, closure: Callable[[], Tensor] | Sequence[Callable[[], Tensor]] | None = None):
        """Apply what `probe` found; with a closure, or one a micro-batch, probe first and return the mean loss."""
        loss = None
        if closure is not None:
            given, start = [closure] if callable(closure) else list(closure), rng_state()
            if not given:
                raise ValueError(f"{type(self).__name__}.step was given no closure to evaluate.")
            loss = self.probe([functools.partial(_valued, value, start) for value in given])
        if self._probed is None:
            raise RuntimeError(
                f"{type(self).__name__}.step was called without values of the loss. Either a Trainer subclass "
                "overrides `training_step` without calling super().training_step, or the optimizer is used outside "
                "the Trainer: then call optimizer.step(closure) with a closure that returns the loss."
            )
        found, self._probed = self._probed, None
        if not all(map(math.isfinite, found)):
            logger.warning("Update skipped: the loss is not finite. The weights are as before it.")
            found = []
        else:
            seeds = self.directions(len(found))
            self.update([self.moves(group, seeds, found) for group in self.param_groups])
        self.projected.append(found)
        self.rates.append([float(group["lr"]) for group in self.param_groups])
        return loss

    def update(self, moves: list[list[Move]]) -> None:
        """Make the moves of each group on its weights."""
        with undisturbed():
            for place, group, weight in self.weights():
                apply_(weight, moves[group], place)

    def weights(self) -> list[tuple[int, int, Tensor]]:
        """Place, number of the group, and weight of all that is trained, each weight once."""
        placed: dict[Tensor, tuple[int, int]] = {}
        for number, group in enumerate(self.param_groups):
            for weight in group["params"]:
                placed.setdefault(weight, (len(placed), number))
        return [(*where, weight) for weight, where in placed.items() if weight.requires_grad]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, before the first update: later ones follow from the places of all parameters."""
        if self.projected:
            raise ValueError(f"{type(self).__name__}: groups cannot be added after an update.")
        super().add_param_group(param_group)

    @property
    def updates(self) -> int:
        """Updates made."""
        return len(self.projected)

    @property
    def is_perturbed(self) -> bool:
        """True while the weights are not those of the trained model."""
        return False

    def flush(self) -> None:
        """Make the moves that were put off: afterwards the weights are those of the trained model."""

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def replay(self, trajectory: dict[str, Any]) -> None:
        """Make the updates of a saved trajectory on these weights, which must be those that its training began with.

        `trajectory` is `state_dict()["hfext"]`. Rounding left by the probes is not in it: see each method.
        """
        if self.projected:
            raise ValueError(f"{type(self).__name__} has made {self.updates} updates: replay begins with none.")
        self._load_trajectory(trajectory)
        made, self.projected = self.projected, []
        for found, rates in zip(made, self.rates, strict=True):
            groups = [{**group, "lr": lr} for group, lr in zip(self.param_groups, rates, strict=True)]
            if found:
                seeds = self.directions(len(found))
                self.update([self.moves(group, seeds, found) for group in groups])
            self.projected.append(found)

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        own = {
            **self.facts(),
            "counts": torch.tensor([len(found) for found in self.projected], dtype=torch.int64),
            "projected": self._pack([g for found in self.projected for g in found]),
            "rates": torch.tensor(self.rates, dtype=torch.float64),
        }
        return {**super().state_dict(), "hfext": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        own = state_dict.pop("hfext", None)
        if not isinstance(own, dict) or "projected" not in own:
            raise ValueError(
                f"{type(self).__name__}: this optimizer state was saved by another optimizer. Start without it, or go "
                "on with that one."
            )
        self._load_trajectory(own)
        super().load_state_dict(state_dict)

    def facts(self) -> dict[str, Any]:
        """What a trajectory belongs to; `MeZO` and `ZO2` go on from each other's."""
        return {"method": self.trajectory_of or type(self).__name__, "seed": self.seed}

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps three entries; all but its tables of hooks are needed to go on.
        return {name: value for name, value in vars(self).items() if "hook" not in name}

    def _pack(self, projected: list[float]) -> Tensor:
        return torch.tensor(projected, dtype=torch.float64)

    def _unpack(self, packed: Tensor) -> list[float]:
        return packed.tolist()

    def _load_trajectory(self, own: dict[str, Any]) -> None:
        counts, packed, rates = (own.get(key) for key in ("counts", "projected", "rates"))
        sound = all(isinstance(x, Tensor) for x in (counts, packed, rates)) and isinstance(own.get("seed"), int)
        if not sound or len(counts) != len(rates) or int(counts.sum()) != len(packed) or (counts < 0).any():
            raise ValueError(
                "Corrupt optimizer state: hfext needs a seed, the number of projected gradients and the rates of each "
                "update, and all projected gradients."
            )
        if not (torch.isfinite(packed).all() and torch.isfinite(rates).all()):
            raise ValueError("Corrupt optimizer state: a projected gradient or a rate is not finite.")
        if rates.dim() > 1 and rates.shape[1] != len(self.param_groups):
            raise ValueError(
                f"The checkpoint has learning rates of {rates.shape[1]} groups, the optimizer has "
                f"{len(self.param_groups)} groups."
            )
        for name, mine in self.facts().items():
            if own.get(name, mine) != mine and len(counts):
                raise ValueError(
                    f"The checkpoint was trained with {name} {own[name]!r}, this run has {name} {mine!r}. Use the "
                    "same: every later update follows from it."
                )
        values = iter(self._unpack(packed))
        self.projected = [list(itertools.islice(values, count)) for count in counts.tolist()]
        self.rates = rates.tolist()


def _valued(closure: Callable[[], Tensor], start: dict[str, Any], count: bool) -> Tensor:
    """The loss of a raw loop: without a graph, and at the same random numbers on every side."""
    set_rng_state(start)
    with torch.no_grad():
        return closure()
