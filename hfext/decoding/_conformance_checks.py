"""What the checks of [`conformance`] are made of: the declared processor, the register of checks, and comparisons."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor

INF = float("inf")
PAD, EOS = 0, 2
Text = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a processor promises of itself.

    Args:
        filters_only (`bool`, *optional*, defaults to `True`): It sets scores to -inf and changes no other score.
        keeps_best (`bool`, *optional*, defaults to `True`): The best token of a row is never removed.
        reads_ids (`bool`, *optional*, defaults to `False`): The result depends on `input_ids`.
        stateful (`bool`, *optional*, defaults to `False`): The result depends on earlier calls.
        min_tokens_to_keep (`bool`, *optional*, defaults to `False`): The factory takes `min_tokens_to_keep`.
        needs_prompt_ids (`bool`, *optional*, defaults to `False`): The factory takes `prompt_ids` and `prompt_mask`,
            both `[prompts, length]`, the mask 0 where the prompt is padding on its left.
        vocabulary_symmetric (`bool`, *optional*, defaults to `True`): No token id has a meaning of its own.
        vocab_size (`int`, *optional*): The only vocabulary it works with; any by default.
        exempt (`Mapping[str, str]`, *optional*): Checks that contradict the method's definition, with the reason.
    """

    filters_only: bool = True
    keeps_best: bool = True
    reads_ids: bool = False
    stateful: bool = False
    min_tokens_to_keep: bool = False
    needs_prompt_ids: bool = False
    vocabulary_symmetric: bool = True
    vocab_size: int | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)


class Skip(Exception):
    """The check does not apply; the message says why."""


class Failure(AssertionError):
    """The check does not hold; the message names the numbers."""


@dataclass(frozen=True)
class Subject:
    """A factory of processors and what they promise."""

    factory: Callable[..., LogitsProcessor]
    facts: Facts

    @property
    def vocab(self) -> int:
        return self.facts.vocab_size or 64

    def make(self, prompt: Tensor, mask: Tensor | None = None, **options) -> LogitsProcessor:
        """A fresh processor for a generation that starts from `prompt` [prompts, length]."""
        if self.facts.needs_prompt_ids:
            options |= {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt) if mask is None else mask}
        return self.factory(**options)

    def once(self, ids: Tensor, scores: Tensor, **options) -> Tensor:
        """The first call of a fresh processor; [rows, length] and [rows, vocab] -> [rows, vocab]."""
        return self.make(ids, **options)(ids, scores)

    def needs(self, condition: bool, reason: str) -> None:
        if not condition:
            raise Skip(reason)

    def vocabularies(self, *sizes: int) -> list[int]:
        self.needs(self.facts.vocab_size is None, f"it works with {self.facts.vocab_size} tokens only")
        return list(sizes)


CHECKS: dict[str, Callable[[Subject], None]] = {}


def check(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    CHECKS[function.__name__] = function
    return function


def require(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise Failure(message)


def logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, length: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1000 + seed))


def same(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Equal keep-sets and values; NaN is equal to nothing."""
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    found, expected = found.double(), expected.double()
    near = (found - expected).abs() <= tolerance * (1 + expected.abs())
    close = (found == expected) | (near & found.isfinite() & expected.isfinite())
    if not close.all():
        at = tuple((~close).nonzero()[0].tolist())
        count = int((~close).sum())
        raise Failure(f"{what}: {count} scores differ, first {at}: {found[at]:.6g}, expected {expected[at]:.6g}")


def sound(out: Tensor, what: str) -> None:
    require(not out.isnan().any(), f"{what}: NaN in the result")
    require(not (out == INF).any(), f"{what}: +inf in the result")
    empty = (~out.isfinite().any(-1)).nonzero().flatten().tolist()
    require(not empty, f"{what}: no token is left in row {empty[:1]}")


def removed(out: Tensor) -> Tensor:
    """-inf, or a number as low as the dtype has, which some processors write in its place."""
    return out <= torch.finfo(out.dtype).min / 2


def law(scores: Tensor) -> Tensor:
    return scores.double().log_softmax(-1)


def texts_of(s: Subject, rows: int, length: int, seed: int = 0) -> list[Text]:
    return [tuple(row) for row in tokens(rows, length, s.vocab, seed).clamp(min=min(3, s.vocab - 1)).tolist()]
