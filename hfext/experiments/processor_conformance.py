"""The conformance kit on the logits processors of transformers and of hfext, and the smallest example of each failure.

A check that contradicts what a method is, or that only the test's own dtype makes fail, is exempt and listed as such.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor
from transformers.utils.logging import tqdm

from .. import registry
from ..decoding import conformance

VOCAB = 64
FILTER = {"min_tokens_to_keep": True}
CHANGES = {"filters_only": False, "keeps_best": False, "reads_ids": True}
NAMED_TOKENS = {"keeps_best": False, "reads_ids": True, "vocabulary_symmetric": False}
SPOKEN_TOKENS = {"tiny_vocabularies_work": "it is given token ids that a smaller vocabulary lacks"}


def _of(name: str, *args: Any, **fixed: Any) -> Callable[..., LogitsProcessor]:
    return lambda **options: getattr(transformers, name)(*args, **fixed, **options)


def _after_prompt(build: Callable[[int], LogitsProcessor]) -> Callable[..., LogitsProcessor]:
    """A processor that is given the length of the padded prompts, as `generate` gives it."""
    return lambda prompt_ids, prompt_mask: build(prompt_ids.shape[1])


def _guidance() -> LogitsProcessor:
    model = conformance.tiny_language_model(VOCAB, dtype=torch.float32)
    return transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)


def built_in() -> dict[str, tuple[Callable[..., LogitsProcessor], dict[str, Any]]]:
    """Name -> factory and facts."""
    rule = "the published rule divides or multiplies raw scores, so it depends on their offset"
    return {
        "temperature 1.5": (_of("TemperatureLogitsWarper", 1.5), {"filters_only": False}),
        "top_k 5": (_of("TopKLogitsWarper", 5), FILTER),
        "top_p 0.8": (_of("TopPLogitsWarper", 0.8), FILTER),
        "min_p 0.1": (_of("MinPLogitsWarper", 0.1), FILTER),
        "top_h 0.4": (_of("TopHLogitsWarper", 0.4), {}),
        "typical_p 0.8": (_of("TypicalLogitsWarper", 0.8), FILTER | {"keeps_best": False}),
        "epsilon 0.01": (_of("EpsilonLogitsWarper", 0.01), FILTER),
        "eta 0.01": (_of("EtaLogitsWarper", 0.01), FILTER),
        "normalisation": (_of("LogitNormalization"), {"filters_only": False}),
        "repetition penalty 1.3": (
            _of("RepetitionPenaltyLogitsProcessor", 1.3),
            CHANGES | {"exempt": {"a_constant_changes_nothing": rule, "log_probabilities_equal_logits": rule}},
        ),
        "no_repeat_ngram 2": (
            _of("NoRepeatNGramLogitsProcessor", 2),
            {
                "keeps_best": False,
                "reads_ids": True,
                "exempt": {"tiny_vocabularies_work": "with one token, forbidding repetition forbids everything"},
            },
        ),
        "suppressed tokens": (
            _of("SuppressTokensLogitsProcessor", [5]),
            {"keeps_best": False, "vocabulary_symmetric": False},
        ),
        "bad words": (
            _of("NoBadWordsLogitsProcessor", [[5], [7, 9]], [2]),
            NAMED_TOKENS | {"exempt": SPOKEN_TOKENS},
        ),
        "sequence bias": (
            _of("SequenceBiasLogitsProcessor", [[[5], 2.0], [[7, 9], -3.0]]),
            NAMED_TOKENS | {"filters_only": False, "exempt": SPOKEN_TOKENS},
        ),
        "min_new_tokens 3": (
            _after_prompt(lambda n: transformers.MinNewTokensLengthLogitsProcessor(n, 3, [2])),
            NAMED_TOKENS | {"needs_prompt_ids": True, "exempt": {"tiny_vocabularies_work": "eos is token 2"}},
        ),
        "exponential decay": (
            _after_prompt(lambda n: transformers.ExponentialDecayLengthPenalty((1, 1.2), 2, n)),
            NAMED_TOKENS
            | {
                "filters_only": False,
                "needs_prompt_ids": True,
                "exempt": {"tiny_vocabularies_work": "eos is token 2"},
            },
        ),
        "guidance 1.5": (
            lambda **options: _guidance(),
            CHANGES
            | {
                "stateful": True,
                "vocab_size": VOCAB,
                "vocabulary_symmetric": False,
                "exempt": {"half_precision_is_sane": "its dtype is that of its model, here float32"},
            },
        ),
        "SynthID": (lambda **options: _synth_id(), CHANGES | {"stateful": True, "vocabulary_symmetric": False}),
    }


def _synth_id() -> LogitsProcessor:
    return transformers.SynthIDTextWatermarkLogitsProcessor(
        ngram_len=3,
        keys=[654, 400, 836],
        sampling_table_size=64,
        sampling_table_seed=0,
        context_history_size=16,
        device=torch.device("cpu"),
    )


def _facts_of_ours() -> dict[str, dict[str, Any]]:
    memory = {"reads_ids": True, "stateful": True}
    return {
        "top_h": FILTER,
        "top_n_sigma": FILTER,
        "mirostat": FILTER | memory,
        "cad": CHANGES
        | memory
        | {"vocab_size": VOCAB, "vocabulary_symmetric": False, "needs_prompt_ids": True, "keeps_best": False},
    }


def ours() -> dict[str, tuple[Callable[..., LogitsProcessor], dict[str, Any]]]:
    """Name -> factory and facts of every registered method whose target is a logits processor."""
    found, facts = {}, _facts_of_ours()
    for method in registry.methods("decoding"):
        module, _, attribute = method.target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
        if not (isinstance(target, type) and issubclass(target, LogitsProcessor)):
            continue
        if method.name not in facts:
            raise KeyError(f"{method.name} is a logits processor without facts: add it to _facts_of_ours.")
        found[method.name] = (_guided_by_context(target) if method.name == "cad" else target, facts[method.name])
    return found


def _guided_by_context(target: type) -> Callable[..., LogitsProcessor]:
    """The prompts without their context are the last two tokens of the prompts."""

    def make(prompt_ids: Tensor, prompt_mask: Tensor) -> LogitsProcessor:
        model = conformance.tiny_language_model(VOCAB, dtype=torch.float32)
        return target(model, prompt_ids[:, -2:], prompt_mask[:, -2:])

    return make


def smallest_examples() -> list[dict[str, str]]:
    """Each kind of failure of a built-in processor on numbers that can be followed by hand, computed here."""
    rows = []

    def add(processor: str, example: str, expected: Any, found: Any) -> None:
        rows.append({"processor": processor, "example": example, "expected": str(expected), "found": str(found)})

    top_h = transformers.TopHLogitsWarper(0.4)(None, torch.tensor([[0.90, 0.06, 0.04]]).log())
    add("top_h 0.4", "p = .90 .06 .04, beam sampling with one eos needs 2 tokens", ">= 2 kept", _kept(top_h))
    capped = transformers.TopHLogitsWarper(1.0)(None, torch.zeros(1, 300))
    add("top_h 1.0", "300 equal scores, a share of 1 of the entropy", "300 kept", _kept(capped))
    penalty = transformers.RepetitionPenaltyLogitsProcessor(2.0)
    scores = torch.tensor([[4.0, 3.0, 1.0]])
    add(
        "repetition penalty 2",
        "scores 4 3 1, prompt [2], then padded to [0, 2] where pad = eos = 0",
        penalty(torch.tensor([[2]]), scores.clone()).tolist(),
        penalty(torch.tensor([[0, 2]]), scores.clone()).tolist(),
    )
    ngram = transformers.NoRepeatNGramLogitsProcessor(2)
    add(
        "no_repeat_ngram 2",
        f"supports_continuous_batching is {ngram.supports_continuous_batching}: kept, and given [2] as a row's ids",
        "dropped (False), since it sees no history",
        _attempt(lambda: ngram(torch.tensor([2]), torch.zeros(1, 3)).tolist()),
    )
    with torch.no_grad():
        for name, build in (("guidance 1.5", _guidance), ("SynthID", _synth_id)):
            scores, used = torch.zeros(1, VOCAB), build()
            scores[:, :4] = torch.tensor([3.0, 1.0, 0.0, 2.0])
            used(torch.tensor([[5, 6]]), scores)
            ids = torch.tensor([[7, 8]])
            gap = float((used(ids, scores) - build()(ids, scores)).abs().max())
            example = "a second text with the same object, as against a fresh one; largest difference"
            add(name, example, 0.0, round(gap, 3))
            kept, moved = build(), build()
            for step in range(4):
                ids = torch.tensor([[5, 6, *[1] * step], [5, 6, *[2] * step]])
                # What two beams of one prompt do: they grow apart and change places at the last step.
                order = [1, 0] if step == 3 else [0, 1]
                gap = kept(ids, scores.repeat(2, 1)) - moved(ids[order], scores.repeat(2, 1))[order]
            example = "two beams that change places at the third token, or not; largest difference"
            add(name, example, 0.0, round(float(gap.abs().max()), 3))
    return rows


def _kept(out: Tensor) -> str:
    return f"{int(out.isfinite().sum())} kept"


def _attempt(call: Callable[[], Any]) -> str:
    try:
        return str(call())
    except Exception as error:
        # What a foreign processor raises is the finding.
        return f"{type(error).__name__}: {error}"


@dataclass(kw_only=True)
class Config:
    """
    Args:
        names: Processors to run, by the names of the tables; all when empty.
    """

    names: list[str] | None = None

    def __post_init__(self):
        known = [*ours(), *built_in()]
        for name in self.names or []:
            if name not in known:
                raise ValueError(f"names has {name!r}. {registry.suggest(name, known)}")


def run(config: Config, out: Path) -> dict[str, Any]:
    groups = {"hfext": ours(), "transformers": built_in()}
    jobs = [
        (owner, name, *job)
        for owner, group in groups.items()
        for name, job in group.items()
        if not config.names or name in config.names
    ]
    tables: dict[str, list[dict[str, Any]]] = {owner: [] for owner in groups}
    failures, exemptions = [], []
    threads = torch.get_num_threads()
    for owner, name, make, facts in tqdm(jobs, desc="processors"):
        # The tensors are tiny: more threads only wait for each other.
        torch.set_num_threads(1)
        try:
            report = conformance.run(make, name=name, **facts)
        finally:
            torch.set_num_threads(threads)
        row = {"processor": name} | {status: report.count(status) for status in ("passed", "failed", "skipped")}
        if owner == "hfext":
            target = importlib.import_module(registry.get(name).target.partition(":")[0])
            flag = getattr(target, registry.get(name).target.partition(":")[2]).supports_continuous_batching
            row |= {"continuous batching": str(flag), "met": not report.failures and flag is not None}
        tables[owner].append(row)
        failures += [{"processor": name, "check": f.check, "reason": f.reason} for f in report.failures]
        exemptions += [
            {"processor": name, "check": check, "reason": reason} for check, reason in facts.get("exempt", {}).items()
        ]
    return {
        "tables": {
            f"Processors of hfext, {len(conformance.CHECKS)} checks": tables["hfext"],
            f"Processors of transformers {transformers.__version__}": tables["transformers"],
            "Failures": failures,
            "Smallest examples, computed": smallest_examples(),
            "Not counted as failures": exemptions,
        }
    }
