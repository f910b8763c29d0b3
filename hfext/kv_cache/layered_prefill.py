"""Layered prefill: a prompt goes through the model one group of layers per iteration, so that decoding never stalls.

    iteration k:  every running sequence decodes through layers 0..L-1 and emits one token;
                  the admitted prompt batch (n tokens) runs in the layers of group g_k only, g_0 + ... + g_{S-1} = L

After S iterations the prompts have their whole KV and their first token. An iteration does d L + n |g_k| token-layers
of work for d decoding sequences; each layer loads its experts once for the prompt, where chunks of c tokens load them
ceil(n / c) times. The arithmetic is that of the ordinary prefill. S = 1 is the whole prompt in one iteration.

S is the largest divisor of `max_groups` that is <= 2^i, i the smallest with n <= 512 * 2^i, and `max_groups` beyond
4096 tokens. For maxima of 4, 12, 16 and 24 these are the tables of the paper's code.

From Tokens to Layers: Redefining Stall-Free Scheduling for LLM Serving with Layered Prefill, arXiv 2510.08055.
"""

import math
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..registry import Method, Result
from ._layered_forward import LayeredStep, layered_prefill, layers_of


@dataclass(frozen=True, kw_only=True)
class LayeredPrefillConfig:
    """Options of [`LayeredPrefillScheduler`].

    Args:
        max_groups: Groups of layers of a long prompt, >= 1; 1 is whole-prompt prefill.
        group_tokens: Prompt tokens, times all layers, that one iteration should do, >= 1.
        max_num_batched_tokens: Prompt tokens that are in flight together, >= 1.
        chunk_tokens: Longer prompts are cut into chunks of this many tokens, >= 1.
        max_num_seqs: Sequences that decode or prefill at a time, >= 1.
        num_blocks: KV blocks of the machine, >= 1; `None` for no limit.
        block_size: Tokens of a KV block, >= 1.
    """

    max_groups: int = 16
    group_tokens: int = 512
    max_num_batched_tokens: int = 8192
    chunk_tokens: int = 8192
    max_num_seqs: int = 256
    num_blocks: int | None = None
    block_size: int = 16

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is None and name == "num_blocks":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r} but must be an integer.")
            if value < 1:
                raise ValueError(f"{name} is {value} but must be >= 1.")


def group_count(tokens: int, max_groups: int = 16, group_tokens: int = 512) -> int:
    """S for a batch of `tokens` prompt tokens."""
    if tokens > 8 * group_tokens:
        return max_groups
    wanted = 2 ** max(0, math.ceil(math.log2(tokens / group_tokens)))
    return max(s for s in range(1, max_groups + 1) if max_groups % s == 0 and s <= wanted)


@dataclass(frozen=True)
class Chunk:
    """Tokens `start..end-1` of the prompt of `request`; `last` when the prompt ends there."""

    request: Hashable
    start: int
    end: int
    last: bool


@dataclass(frozen=True)
class Plan:
    """One iteration: who decodes through all layers, and which chunks run in group `group` of `groups`."""

    decode: tuple[Hashable, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    group: int = 0
    groups: int = 1
    preempted: tuple[Hashable, ...] = ()

    @property
    def emits(self) -> tuple[Hashable, ...]:
        """The requests that have one more token after this iteration."""
        done = self.chunks if self.group == self.groups - 1 else ()
        return self.decode + tuple(chunk.request for chunk in done if chunk.last)


@dataclass(eq=False)
class _Request:
    name: Hashable
    length: int  # prompt and emitted tokens
    remaining: int
    prompt: int  # tokens to prefill: those before the first decode, or all of them after a pre-emption
    done: int = 0
    blocks: int = 0


@dataclass
class LayeredPrefillScheduler:
    """Plans the iterations of a server: decode first, one prompt batch in flight, one group of layers at a time.

    Call `add` for every prompt, then in turns `plan()`, which says what the iteration runs, and `advance(stopped)`,
    once it ran. Waiting prompts are admitted in order of arrival when no prompt is in flight. When a decoding sequence
    finds no KV block, the sequence admitted last is sent back to the front of the queue and later prefilled again,
    together with the tokens it has emitted.

    Args:
        config (`LayeredPrefillConfig`, *optional*): The limits.
    """

    config: LayeredPrefillConfig = field(default_factory=LayeredPrefillConfig)

    def __post_init__(self):
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._prefilling: list[_Request] = []
        self._plan: Plan | None = None
        self._batch: list[Chunk] = []
        self._group, self._groups = 0, 1

    def add(self, request: Hashable, prompt_tokens: int, max_new_tokens: int) -> None:
        """Queue a prompt. `ValueError` for a name in use, empty prompts, and one that can never fit."""
        if request in (r.name for r in (*self._waiting, *self._running, *self._prefilling)):
            raise ValueError(f"request is {request!r}, which is already queued.")
        for name, value in (("prompt_tokens", prompt_tokens), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value} but must be >= 1.")
        limit = self.config.num_blocks
        if limit is not None and self._blocks(prompt_tokens + max_new_tokens - 1) > limit:
            raise ValueError(
                f"prompt_tokens + max_new_tokens is {prompt_tokens + max_new_tokens} but must fit into num_blocks="
                f"{limit} blocks of {self.config.block_size} tokens."
            )
        self._waiting.append(_Request(request, prompt_tokens, max_new_tokens, prompt_tokens))

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._prefilling)

    def plan(self) -> Plan:
        """The next iteration; an empty plan when nothing is queued. `RuntimeError` before `advance`."""
        if self._plan is not None:
            raise RuntimeError("plan() was called twice: call advance() when the iteration ran.")
        preempted = self._reserve_decode()
        if not self._batch and not preempted:
            self._admit()
        decode, chunks = tuple(r.name for r in self._running), tuple(self._batch)
        group, groups = (self._group, self._groups) if chunks else (0, 1)
        self._plan = Plan(decode, chunks, group, groups, tuple(preempted))
        return self._plan

    def advance(self, stopped: Collection[Hashable] = ()) -> None:
        """The planned iteration ran; `stopped` are the requests that emitted their last token before their maximum."""
        if self._plan is None:
            raise RuntimeError("advance() was called before plan().")
        plan, self._plan = self._plan, None
        unknown = set(stopped) - set(plan.emits)
        if unknown:
            raise ValueError(
                f"stopped is {sorted(map(str, unknown))} but may name only requests that emitted a token."
            )
        if self._batch:
            self._group += 1
            if self._group == self._groups:
                self._retire()
        emitted = set(plan.emits)
        for request in [r for r in self._running if r.name in emitted]:
            request.length += 1
            request.remaining -= 1
            if request.remaining == 0 or request.name in stopped:
                self._running.remove(request)
                request.blocks = 0

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def _free(self) -> float:
        held = sum(r.blocks for r in (*self._running, *self._prefilling))
        return math.inf if self.config.num_blocks is None else self.config.num_blocks - held

    def _reserve_decode(self) -> list[Hashable]:
        """Blocks for the token that each running sequence writes now; sequences from the tail make room."""
        preempted = []
        for request in list(self._running):
            while request in self._running and self._blocks(request.length) - request.blocks > self._free():
                victim = (self._running + self._prefilling)[-1]
                self._preempt(victim)
                preempted.append(victim.name)
            if request in self._running:
                request.blocks = max(request.blocks, self._blocks(request.length))
        return preempted

    def _preempt(self, victim: _Request) -> None:
        (self._prefilling if victim in self._prefilling else self._running).remove(victim)
        self._batch = [chunk for chunk in self._batch if chunk.request != victim.name]
        victim.blocks, victim.done, victim.prompt = 0, 0, victim.length
        self._waiting.appendleft(victim)

    def _admit(self) -> None:
        """Form the next batch: the rest of a long prompt first, then waiting prompts while all limits allow."""
        c, free = self.config, self._free()
        budget = c.max_num_batched_tokens
        for request in self._prefilling:
            budget -= self._take(request, budget)
        while self._waiting and len(self._running) + len(self._prefilling) < c.max_num_seqs:
            request = self._waiting[0]
            blocks, tokens = self._blocks(request.prompt), min(request.prompt, c.chunk_tokens)
            if blocks > free or (self._batch and tokens > budget):
                break
            self._prefilling.append(self._waiting.popleft())
            request.blocks = blocks
            free -= blocks
            budget -= self._take(request, budget)
        total = sum(chunk.end - chunk.start for chunk in self._batch)
        if total:
            self._group, self._groups = 0, group_count(total, c.max_groups, c.group_tokens)

    def _take(self, request: _Request, budget: int) -> int:
        tokens = min(request.prompt - request.done, self.config.chunk_tokens, budget)
        if tokens > 0:
            end = request.done + tokens
            self._batch.append(Chunk(request.name, request.done, end, end == request.prompt))
        return tokens

    def _retire(self) -> None:
        ends = {chunk.request: chunk for chunk in self._batch}
        for request in [r for r in self._prefilling if r.name in ends]:
            request.done = ends[request.name].end
            if ends[request.name].last:
                self._prefilling.remove(request)
                self._running.append(request)
        self._batch = []


class LayeredPrefillEngine:
    """Serves prompts greedily on one model by the scheduler's plans, each sequence with a cache of its own.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model that `layered_prefill` takes.
        config (`LayeredPrefillConfig`, *optional*): The limits; `max_groups` at most the number of layers.
        eos_token_id (`int`, *optional*): Ends a sequence; that of the generation config by default.
    """

    def __init__(
        self, model: PreTrainedModel, config: LayeredPrefillConfig | None = None, eos_token_id: int | None = None
    ):
        self.scheduler = LayeredPrefillScheduler(config or LayeredPrefillConfig())
        layers = len(layers_of(model))
        if self.scheduler.config.max_groups > layers:
            raise ValueError(f"max_groups is {self.scheduler.config.max_groups} but must be <= {layers}, the layers.")
        eos = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        self.model, self.eos = model, set([eos] if isinstance(eos, int) else eos or [])
        self.outputs: list[list[int]] = []
        self._prompts: list[list[int]] = []
        self._caches: dict[int, Cache] = {}
        self._steps: dict[int, Iterator[LayeredStep]] = {}

    def add(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Queue token ids; returns the index of the prompt in `outputs`."""
        self.scheduler.add(len(self.outputs), len(prompt), max_new_tokens)
        self._prompts.append(list(prompt))
        self.outputs.append([])
        return len(self.outputs) - 1

    def step(self) -> Plan:
        """Run one iteration: a token for each running sequence, one group of layers for the prompts in flight."""
        plan = self.scheduler.plan()
        for i in plan.preempted:
            self._caches.pop(i, None)
            self._steps.pop(i, None)
        for i in plan.decode:
            self._emit(i, self._decode(i))
        for chunk in plan.chunks:
            if plan.group == 0:
                cache = self._caches.setdefault(chunk.request, DynamicCache(config=self.model.config))
                tokens = (self._prompts[chunk.request] + self.outputs[chunk.request])[chunk.start : chunk.end]
                ids = torch.tensor([tokens], device=self.model.device)
                self._steps[chunk.request] = layered_prefill(
                    self.model, ids, plan.groups, cache=cache, logits_to_keep=1
                )
            done = next(self._steps[chunk.request])
            if chunk.request in plan.emits:
                self._emit(chunk.request, done.logits)
        self.scheduler.advance([i for i in plan.emits if self.outputs[i][-1] in self.eos])
        return plan

    def run(self) -> list[list[int]]:
        """Step until every prompt is answered; the new tokens of each, with the end token if there was one."""
        while self.scheduler.unfinished:
            self.step()
        return self.outputs

    @torch.no_grad()
    def _decode(self, i: int) -> Tensor:
        ids = torch.tensor([self.outputs[i][-1:]], device=self.model.device)
        return self.model(ids, past_key_values=self._caches[i], use_cache=True).logits

    def _emit(self, i: int, logits: Tensor) -> None:
        self.outputs[i].append(int(logits[0, -1].argmax()))


METHOD = Method(
    name="layered_prefill",
    family="kv_cache",
    title="From Tokens to Layers: Redefining Stall-Free Scheduling for LLM Serving with Layered Prefill",
    authors="",
    arxiv="2510.08055",
    year=2025,
    repo="scale-snu/layered-prefill",
    status="variant",
    difference="A scheduler and an exact prefill by groups of layers for transformers models, run row by row; the "
    "paper's fused batches inside vLLM are only simulated.",
    target="hfext.kv_cache.layered_prefill:LayeredPrefillScheduler",
    config=LayeredPrefillConfig,
    usage="steps = list(hfext.kv_cache.layered_prefill.layered_prefill(model, input_ids, groups=4))",
    summary="Prefills a prompt one group of layers per iteration, so that running sequences never wait and "
    "experts are loaded once.",
    claim="Chunked prefill loads the experts of a layer ceil(n/c) times, layered prefill once, with identical logits.",
    headline=Result(
        metric="mean time to first token, ms",
        setting="Qwen3-30B-A3B, arXiv trace, 2 H100",
        value="712.8",
        baseline="1018.8 (vLLM 0.10.2)",
    ),
    recipe="kv_cache/layered_prefill-costs.yaml",
)
