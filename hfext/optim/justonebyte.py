"""Just One Byte: machines train together by telling each other one byte for every loss that they compare.

    machine k, sample j of update t:   z = z(t, s),  s = j K + k of S = K J
    pg_s = (L_s(w + eps z) - L_s(w - eps z)) / (2 eps),  sent as one byte q_s
    everyone:   w <- w (1 - lr wd) - lr / sqrt(S) * sum_s q_s z(t, s),   in the order of s

A sample is one micro-batch with its own loss and direction, so an update sends K J bytes. The byte is a sign and a
level: level 0 is zero, level l is 2^(lowest + (l - 1) / 4). Rounding to a level is random by default, so that the mean
of what is sent is pg. Weights return from a copy after each sample: machines with the same bytes have the same bits.

Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness,
arXiv 2306.10015.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..registry import Method, Result
from ._zeroth import Move, ZerothOrderConfig, digest, gathered, mix, rank_and_processes
from .mezo import MeZO

logger = logging.get_logger(__name__)
LEVELS, STEPS = 127, 4  # levels of a magnitude, and how many of them double it


@dataclass(frozen=True, kw_only=True)
class JustOneByteConfig(ZerothOrderConfig):
    """
    Args:
        lowest: Exponent of the smallest magnitude that is sent, 2^lowest; the largest is 2^(lowest + 31.5). From -60
            to 20.
        rounding: `stochastic` sends pg in the mean; `nearest` is within 9.1 % of it.
        check_every: Updates between comparisons of the machines' settings and weights; >= 1.
    """

    lowest: int = -20
    rounding: str = "stochastic"
    check_every: int = 64

    def __post_init__(self):
        super().__post_init__()
        self.whole("lowest", -60, 20)
        self.whole("check_every", 1)
        if self.rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding is {self.rounding!r} but must be one of stochastic, nearest.")


def decode(code: int, lowest: int) -> float:
    """What a byte stands for."""
    level = code & LEVELS
    size = 2.0 ** (lowest + (level - 1) / STEPS) if level else 0.0
    return -size if code > LEVELS else size


def encode(value: float, lowest: int, coin: float | None = None) -> int:
    """A byte for `value`; `coin` in [0, 1) rounds at random between the two nearest levels, None to the nearer one.

    A value that is not finite becomes 0; one beyond the largest magnitude becomes that.
    """
    if not math.isfinite(value):
        logger.warning("A projected gradient is not finite: zero is sent for it.")
        return 0
    size, smallest = abs(value), 2.0**lowest
    if size >= decode(LEVELS, lowest):
        if size > decode(LEVELS, lowest) * 2 ** (0.5 / STEPS):
            logger.warning_once(f"Projected gradients beyond {decode(LEVELS, lowest):g} are cut; raise `lowest`.")
        level = LEVELS
    else:
        below = 1 + math.floor(STEPS * math.log2(size / smallest)) if size >= smallest else 0
        below = min(max(below, 0), LEVELS - 1)
        low, high = decode(below, lowest), decode(below + 1, lowest)
        if coin is None:
            middle = math.sqrt(low * high) if below else high / 2
            level = below + (size >= middle)
        else:
            level = below + (coin < (size - low) / (high - low))
    return (level | 128 if value < 0 else level) if level else 0


class JustOneByte(MeZO):
    """Decentralised zeroth-order training over `torch.distributed`; one process is one machine.

    In a raw loop, `step([closure, ...])` takes one closure for each sample of this machine.

    Args:
        params: As for every optimizer of torch.
        lr: Learning rate, of a sum over samples divided by sqrt(samples).
        weight_decay: Decoupled, times `lr`.
        run_seed: Seed where the config has none.
        **options: Fields of [`JustOneByteConfig`].

    Every machine brings the same number of samples to every update.
    """

    Config = JustOneByteConfig
    trajectory_of = None
    own_batches = True
    exact = True

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0, run_seed: int = 0, **options: Any):
        super().__init__(params, lr, weight_decay, run_seed, **options)

    @property
    def bytes_sent(self) -> int:
        """Bytes that all machines have sent for the updates so far."""
        return sum(map(len, self.projected))

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "lowest": self.config.lowest}

    @torch.no_grad()
    def probe(self, closures: Sequence[Callable[..., Tensor]]) -> float:
        """Compare the losses of this machine's samples, send a byte for each; returns their mean loss."""
        self._probed = None
        if self.updates % self.config.check_every == 0:
            self._compare_machines(len(closures))
        rank, machines = rank_and_processes()
        losses, codes = [], []
        for j, closure in enumerate(closures):
            sample = j * machines + rank
            up, down = self.pair([closure], mix(self.seed, self.updates, sample), count=True)
            losses.append((up + down) / 2)
            codes.append(self._code((up - down) / (2 * self.config.eps), sample))
        sent = gathered(torch.tensor(codes, dtype=torch.uint8))
        self._probed = self._unpack(sent.T.flatten())
        size = math.sqrt(math.fsum(g * g for g in self._probed) / len(self._probed))
        self.metrics["justonebyte/projected_grad"] = size
        return math.fsum(losses) / len(losses)

    def _code(self, value: float, sample: int) -> int:
        coin = mix(self.seed, self.updates, sample, 1) / 2.0**63 if self.config.rounding == "stochastic" else None
        return encode(value, self.config.lowest, coin)

    def _compare_machines(self, samples: int) -> None:
        word = digest(weight for _, _, weight in self.weights())
        settings = zlib.crc32(repr(self.config).encode())
        own = torch.tensor([samples, self.seed, self.updates, settings, word - (word >> 63 << 64)])
        names = ("samples", "seeds", "updates", "settings", "weights")
        for name, column in zip(names, gathered(own).T.tolist(), strict=True):
            if len(set(column)) > 1:
                raise RuntimeError(
                    f"The machines' {name} differ{' (digests)' if name in names[3:] else ''}: {column}. Give all the "
                    "same options and number of samples, and start or resume them from the same weights; `replay` "
                    "brings a late one up to date."
                )

    def moves(self, group: dict[str, Any], seeds: Sequence[int], projected: Sequence[float]) -> list[Move]:
        lr, root = float(group["lr"]), math.sqrt(len(projected))
        keeps = [1.0 - lr * group["weight_decay"]] + [1.0] * (len(projected) - 1)
        return [Move(seed, -lr * g / root, keep) for seed, g, keep in zip(seeds, projected, keeps, strict=True)]

    def _pack(self, projected: list[float]) -> Tensor:
        return torch.tensor([encode(g, self.config.lowest) for g in projected], dtype=torch.uint8)

    def _unpack(self, packed: Tensor) -> list[float]:
        return [decode(code, self.config.lowest) for code in packed.tolist()]


METHOD = Method(
    name="justonebyte",
    family="optim",
    title="Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using Shared "
    "Randomness",
    authors="Zelikman et al.",
    arxiv="2306.10015",
    year=2023,
    repo="ezelikman/justonebyte",
    status="variant",
    difference="The byte is really sent: a sign and one of 127 levels a quarter octave apart, rounded at random so "
    "that its mean is the projected gradient. Weights return from a copy after each sample, where the authors replay "
    "the scalars from a backup every 16 updates. The learned step length is left out.",
    target="hfext.optim.justonebyte:JustOneByte",
    config=JustOneByteConfig,
    usage='TrainingArguments(optim="justonebyte", learning_rate=1e-3, optim_args="eps=1e-3")',
    summary="Zeroth-order training on many machines that send one byte for each micro-batch.",
    claim="One byte for each sample is enough to fine-tune close to fine-tuning with gradients.",
    headline=Result(
        metric="bytes a machine sends for each gradient estimate",
        setting="fine-tuning language models by SPSA with shared random seeds",
        value="1",
    ),
    recipe="optim/justonebyte-llama-wikipedia.yaml",
    opt_out=(
        ("accumulation", "a micro-batch is a sample with a direction of its own: more of them are another update"),
    ),
    notes="That several machines hold the bits of one machine with all samples is a test. The copy of the weights "
    "doubles their memory. Every machine must draw the same noise: the same kind of device and the same version of "
    "torch. A machine that comes late loads the first weights and calls `replay` with the state of another. Machines "
    "come and go between runs, not within one.",
)
