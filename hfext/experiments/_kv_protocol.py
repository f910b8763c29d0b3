"""One protocol for all caches: prefill with exact attention, compress, then continue; quality, bytes and time.

A prompt is prefilled once with the plain model, and the inputs of its attention modules are kept. `replay` hands them
to the attention modules again with another cache, which sees the same keys, values, hidden states and rotary tables as
in a prefill, for a tenth of the work, since attention, MLPs and head are not needed.

    perplexity   exp of the mean NLL of the tokens after the prefill, fed in calls of `call` tokens
    retrieval    a question and its answer in one call after a context that was compressed without the question
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

Make = Callable[[PreTrainedModel], Cache]


@dataclass(frozen=True)
class Recording:
    """Token ids [1, n], and for each layer what entered it and what entered its attention module, [1, n, hidden]."""

    ids: Tensor
    layers: list[Tensor]
    hidden: list[Tensor]

    def resized(self, tokens: int) -> "Recording":
        """The recording repeated or cut to `tokens` tokens."""
        index = torch.arange(tokens) % self.ids.shape[1]
        return Recording(self.ids[:, index], [x[:, index] for x in self.layers], [h[:, index] for h in self.hidden])

    def to(self, dtype: torch.dtype) -> "Recording":
        return Recording(self.ids, [x.to(dtype) for x in self.layers], [h.to(dtype) for h in self.hidden])


@torch.no_grad()
def record(model: PreTrainedModel, ids: Tensor) -> Recording:
    """Prefill `ids` [1, n] without a cache."""
    made = Recording(ids, [], [])

    def note(into: list[Tensor]) -> Callable[..., None]:
        return lambda module, args, kwargs: into.append(args[0] if args else kwargs["hidden_states"])

    handles = []
    for layer in model.get_decoder().layers:
        handles.append(layer.register_forward_pre_hook(note(made.layers), with_kwargs=True))
        handles.append(layer.self_attn.register_forward_pre_hook(note(made.hidden), with_kwargs=True))
    try:
        model.get_decoder()(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return made


@torch.no_grad()
def replay(model: PreTrainedModel, cache: Cache, recording: Recording) -> None:
    """Fill an empty `cache` as the prefill of the recorded prompt does."""
    decoder = model.get_decoder()
    entering = [*recording.layers, recording.layers[-1]]

    def no_attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return query

    def forward(index: int) -> Callable[..., Tensor]:
        def attention_alone(hidden: Tensor, **kwargs: Any) -> Tensor:
            decoder.layers[index].self_attn(hidden_states=recording.hidden[index], **kwargs)
            return entering[index + 1]

        return attention_alone

    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", no_attention))
        for index, layer in enumerate(decoder.layers):
            stack.enter_context(mock.patch.object(layer, "forward", forward(index)))
        decoder(inputs_embeds=recording.layers[0], past_key_values=cache, use_cache=True)
    finish(cache)


@torch.no_grad()
def prefill(model: PreTrainedModel, cache: Cache, ids: Tensor) -> None:
    """Fill an empty `cache` by the model's own forward."""
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finish(cache)


def finish(cache: Cache) -> None:
    """Let a cache compress what it still holds of the prompt."""
    end = getattr(cache, "finish_prefill", None)
    if end is not None:
        end()


def held_bytes(cache: Cache) -> int:
    """Bytes of all tensors of a cache: its own count, or what its layers hold."""
    own = getattr(cache, "nbytes", None)
    return tensor_bytes(cache.layers) if own is None else int(own() if callable(own) else own)


def tensor_bytes(thing: Any) -> int:
    """Bytes of the storages of all tensors in nested lists, mappings, objects and tensor subclasses, each once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def walk(x: Any) -> None:
        if id(x) in seen or isinstance(x, nn.Module):
            return
        seen.add(id(x))
        if isinstance(x, Tensor):
            if type(x) is not Tensor and hasattr(x, "__tensor_flatten__"):
                for name in x.__tensor_flatten__()[0]:
                    walk(getattr(x, name))
            elif x.numel():
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, Mapping):
            for value in x.values():
                walk(value)
        elif isinstance(x, list | tuple):
            for value in x:
                walk(value)
        elif hasattr(x, "__dict__") and not isinstance(x, type):
            walk(vars(x))

    walk(thing)
    return sum(storages.values())


@torch.no_grad()
def continuation_nll(model: PreTrainedModel, cache: Cache, ids: Tensor, start: int, call: int) -> tuple[float, int]:
    """NLL, summed, and number of the predictions at `ids[:, start:]` [1, n] in calls of `call` tokens."""
    total, count, n = 0.0, 0, ids.shape[1]
    for first in range(start, n, call):
        end = min(first + call, n)
        logits = model(ids[:, first:end], past_key_values=cache, use_cache=True).logits[0]
        targets = ids[0, first + 1 : end + 1]
        logp = logits[: len(targets)].float().log_softmax(-1).gather(-1, targets[:, None])
        total, count = total - logp.double().sum().item(), count + len(targets)
    return total, count


@dataclass(frozen=True)
class Question:
    """A context [1, n] and the question and answer that are fed after it, each [1, *]."""

    context: Tensor
    question: Tensor
    answer: Tensor


@torch.no_grad()
def answer_scores(model: PreTrainedModel, cache: Cache, question: Question) -> tuple[float, float]:
    """Share of the answer tokens that are the argmax, and their mean log-probability, teacher-forced in one call."""
    ids = torch.cat([question.question, question.answer], dim=1)
    n = question.answer.shape[1]
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=n + 1).logits[0, :-1].float()
    right = (logits.argmax(-1) == question.answer[0]).double().mean().item()
    return right, logits.log_softmax(-1).gather(-1, question.answer[0][:, None]).mean().item()


@dataclass(frozen=True)
class Setting:
    """What is measured: text segments [1, n] and two lists of questions, with the recordings of their prompts."""

    segments: list[Tensor]
    prefill: int
    call: int
    questions: dict[str, list[Question]]
    prompts: list[Recording]
    contexts: dict[str, list[Recording]]


def quality(model: PreTrainedModel, make: Make, setting: Setting, use_replay: bool = True) -> dict[str, Any]:
    """Perplexity of every segment and the retrieval scores of one method, with their CPU seconds."""

    def filled(recording: Recording) -> Cache:
        cache = make(model)
        if use_replay:
            replay(model, cache, recording)
        else:
            prefill(model, cache, recording.ids)
        return cache

    start = time.process_time()
    nll = [
        continuation_nll(model, filled(prompt), ids, setting.prefill, setting.call)
        for ids, prompt in zip(setting.segments, setting.prompts, strict=True)
    ]
    found: dict[str, Any] = {"nll": nll, "segments_cpu_s": time.process_time() - start}
    start = time.process_time()
    for name, questions in setting.questions.items():
        scores = [
            answer_scores(model, filled(context), question)
            for question, context in zip(questions, setting.contexts[name], strict=True)
        ]
        if scores:
            found[name] = {
                "exact": statistics.fmean(right == 1.0 for right, _ in scores),
                "tokens": statistics.fmean(right for right, _ in scores),
                "logprob": statistics.fmean(logp for _, logp in scores),
            }
    return found | {"retrieval_cpu_s": time.process_time() - start}


def perplexity(nll: Sequence[tuple[float, int]]) -> float:
    """Pooled over segments."""
    return math.exp(sum(total for total, _ in nll) / sum(count for _, count in nll))


def replay_difference(model: PreTrainedModel, make: Make, recording: Recording, ids: Tensor, call: int) -> float:
    """Largest difference of logits after a replayed and after a real prefill, over one call of `call` tokens."""
    n = recording.ids.shape[1]
    logits = []
    for real in (False, True):
        cache = make(model)
        if real:
            prefill(model, cache, recording.ids)
        else:
            replay(model, cache, recording)
        with torch.no_grad():
            logits.append(model(ids[:, n : n + call], past_key_values=cache, use_cache=True).logits)
    return (logits[0] - logits[1]).abs().max().item()


@torch.no_grad()
def decode_times(
    model: PreTrainedModel, caches: Mapping[str, Cache], token: Tensor, steps: int, warm: int = 1
) -> dict[str, list[float]]:
    """CPU seconds of `steps` decoded tokens for each filled cache, by turns, after `warm` untimed ones."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(warm + steps):
        for name, cache in caches.items():
            start = time.process_time()
            model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if step >= warm:
                times[name].append(time.process_time() - start)
    return times
