"""A cost model of prefill policies on a server: what each iteration reads and computes, and so how long it takes.

A layer that sees t tokens reads the weights of its attention, the experts that these tokens choose and the KV of its
contexts, and computes on each token; the time of the layer is the larger of bytes / bandwidth and operations / peak.
With k of E experts chosen independently, t tokens choose E (1 - (1 - k/E)^t) experts on average, and E when saturated.

Policies: `layered`; `orca`, the whole prompt in one iteration, which is layered prefill with one group; `chunked`,
iterations of at most c tokens, decode first.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ._layered_forward import partition
from .layered_prefill import LayeredPrefillConfig, LayeredPrefillScheduler

POLICIES = ("orca", "chunked", "layered")


@dataclass(frozen=True, kw_only=True)
class ServerModel:
    """Sizes and speeds; the defaults are those of Qwen3-30B-A3B in bfloat16 on two H100, at half of the peak rates.

    Args:
        layers, experts, top_k: Of the model.
        expert_bytes, dense_bytes: Weights of one expert, and of the rest of a layer.
        kv_bytes: Keys and values of one token in one layer.
        attention_width: Query heads times head size.
        bandwidth: Bytes per second that are reached.
        compute: Operations per second that are reached.
        overhead: Seconds of an iteration besides its layers.
        saturated: Any number of tokens loads all experts.
    """

    layers: int = 48
    experts: int = 128
    top_k: int = 8
    expert_bytes: float = 3 * 2048 * 768 * 2
    dense_bytes: float = 2 * 2048 * (32 + 4) * 128 * 2
    kv_bytes: float = 2 * 4 * 128 * 2
    attention_width: int = 32 * 128
    bandwidth: float = 3.35e12
    compute: float = 0.99e15
    overhead: float = 2e-3
    saturated: bool = False

    def experts_loaded(self, tokens: int) -> float:
        """Experts of one layer that `tokens` tokens load."""
        if tokens == 0 or self.saturated:
            return float(self.experts if tokens else 0)
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


@dataclass(frozen=True)
class Work:
    """One iteration: contexts of the decoding sequences, (start, end) of the prompt chunks and their layers."""

    decode: Sequence[int] = ()
    chunks: Sequence[tuple[int, int]] = ()
    prompt_layers: int = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(end - start for start, end in self.chunks)

    def token_layers(self, layers: int) -> int:
        """Token-layers: every decoding sequence in all layers, the prompt tokens in theirs."""
        return len(self.decode) * layers + self.prompt_tokens * self.prompt_layers


@dataclass
class Totals:
    """Sums over iterations: seconds, bytes of experts and of everything, operations."""

    seconds: float = 0.0
    expert_bytes: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0


def iteration_cost(server: ServerModel, work: Work) -> Totals:
    """The cost of one iteration, its layers one after another."""
    total = Totals(seconds=server.overhead)
    kinds = ((server.layers - work.prompt_layers, ()), (work.prompt_layers, work.chunks))
    for count, chunks in kinds:
        tokens = len(work.decode) + sum(end - start for start, end in chunks)
        if count == 0 or tokens == 0:
            continue
        experts = server.experts_loaded(tokens) * server.expert_bytes
        kv = (sum(work.decode) + sum(end for _, end in chunks)) * server.kv_bytes
        # Every weight serves a multiplication and an addition; bf16 weights have two bytes.
        per_token = server.dense_bytes + server.top_k * server.expert_bytes
        pairs = sum(work.decode) + sum((end * (end + 1) - start * (start + 1)) / 2 for start, end in chunks)
        operations = tokens * per_token + 4 * pairs * server.attention_width
        moved = experts + server.dense_bytes + kv
        total.seconds += count * max(moved / server.bandwidth, operations / server.compute)
        total.expert_bytes += count * experts
        total.bytes += count * moved
        total.operations += count * operations
    return total


def prefill_work(policy: str, tokens: int, server: ServerModel, size: int) -> list[Work]:
    """The iterations of one prompt alone; `size` is the chunk for `chunked`, the number of groups for `layered`."""
    if policy == "chunked":
        cuts = [*range(0, tokens, size), tokens]
        return [Work((), ((a, b),), server.layers) for a, b in zip(cuts, cuts[1:], strict=False)]
    if policy in ("layered", "orca"):
        groups = partition(server.layers, size if policy == "layered" else 1)
        return [Work((), ((0, tokens),), end - first) for first, end in groups]
    raise ValueError(f"policy is {policy!r} but must be one of {', '.join(POLICIES)}.")


@dataclass(frozen=True)
class Arrival:
    """A request of a trace: seconds, prompt tokens, and tokens to emit."""

    time: float
    prompt: int
    output: int


@dataclass
class Served:
    """What a simulated server did: per request the times of its tokens; sums; seconds of every iteration."""

    tokens: list[list[float]]
    totals: Totals = field(default_factory=Totals)
    iterations: list[float] = field(default_factory=list)

    def summary(self, trace: Sequence[Arrival]) -> dict[str, float]:
        """Time to first token, time between tokens, latency in seconds, and bytes and operations per emitted token."""
        first = [times[0] - a.time for times, a in zip(self.tokens, trace, strict=True)]
        gaps = [b - a for times in self.tokens for a, b in zip(times, times[1:], strict=False)]
        emitted = sum(len(times) for times in self.tokens)
        return {
            "ttft_mean": statistics.fmean(first),
            "ttft_p90": _quantile(first, 0.9),
            "tbt_mean": statistics.fmean(gaps),
            "tbt_p99": _quantile(gaps, 0.99),
            "tbt_max": max(gaps),
            "latency_mean": statistics.fmean(t[-1] - a.time for t, a in zip(self.tokens, trace, strict=True)),
            "expert_bytes_per_token": self.totals.expert_bytes / emitted,
            "bytes_per_token": self.totals.bytes / emitted,
            "operations_per_token": self.totals.operations / emitted,
        }


def simulate(
    policy: str,
    trace: Sequence[Arrival],
    server: ServerModel,
    config: LayeredPrefillConfig | None = None,
    chunk: int = 512,
) -> Served:
    """Serve `trace` (in order of arrival) by one policy with unlimited KV blocks."""
    config = config or LayeredPrefillConfig()
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r} but must be one of {', '.join(POLICIES)}.")
    if policy == "orca":
        config = LayeredPrefillConfig(**{**vars(config), "max_groups": 1})
    queue = (
        _Chunked(chunk, config.max_num_seqs, server.layers) if policy == "chunked" else _Layered(config, server.layers)
    )
    served, clock, arrived = Served([[] for _ in trace]), 0.0, 0
    while arrived < len(trace) or queue.unfinished:
        if not queue.unfinished:
            clock = max(clock, trace[arrived].time)
        while arrived < len(trace) and trace[arrived].time <= clock:
            queue.add(arrived, trace[arrived])
            arrived += 1
        work, emits = queue.next(lambda i: trace[i].prompt + len(served.tokens[i]))
        cost = iteration_cost(server, work)
        clock += cost.seconds
        served.iterations.append(cost.seconds)
        for name in vars(cost):
            setattr(served.totals, name, getattr(served.totals, name) + getattr(cost, name))
        for i in emits:
            served.tokens[i].append(clock)
    return served


class _Layered:
    def __init__(self, config: LayeredPrefillConfig, layers: int):
        self.scheduler, self.layers = LayeredPrefillScheduler(config), layers

    @property
    def unfinished(self):
        return self.scheduler.unfinished

    def add(self, i, arrival):
        self.scheduler.add(i, arrival.prompt, arrival.output)

    def next(self, context):
        plan = self.scheduler.plan()
        layers = 0
        if plan.chunks:
            first, end = partition(self.layers, plan.groups)[plan.group]
            layers = end - first
        self.scheduler.advance()
        chunks = tuple((c.start, c.end) for c in plan.chunks)
        return Work(tuple(map(context, plan.decode)), chunks, layers), plan.emits


class _Chunked:
    """Decode first, then prompt tokens in order of arrival up to `chunk` tokens in all (stall-free, Sarathi-Serve)."""

    def __init__(self, chunk: int, max_num_seqs: int, layers: int):
        self.chunk, self.max_num_seqs, self.layers = chunk, max_num_seqs, layers
        self.waiting: deque[list[int]] = deque()  # name, prompt, done
        self.left: dict[int, int] = {}
        self.running: list[int] = []

    @property
    def unfinished(self):
        return len(self.waiting) + len(self.running)

    def add(self, i, arrival):
        self.waiting.append([i, arrival.prompt, 0])
        self.left[i] = arrival.output

    def next(self, context):
        decode, chunks, emits = tuple(self.running), [], list(self.running)
        budget = self.chunk - len(decode)
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            entry = self.waiting[0]
            taken = min(budget, entry[1] - entry[2])
            chunks.append((entry[2], entry[2] + taken))
            entry[2] += taken
            budget -= taken
            if entry[2] < entry[1]:
                break
            self.waiting.popleft()
            self.running.append(entry[0])
            emits.append(entry[0])
        work = Work(tuple(map(context, decode)), tuple(chunks), self.layers)
        for i in emits:
            self.left[i] -= 1
        self.running = [i for i in self.running if self.left[i]]
        return work, emits


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
