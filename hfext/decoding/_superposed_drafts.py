"""The drafts of superposed decoding: k alive and k finished ones of each prompt, as in a beam search of width k."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


class Drafts:
    """Token paths and scores of B prompts. A slot with the score -inf is empty.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, L)`): The prompts.
        k (`int`): Drafts of each prompt.
        early_exit (`bool`): Whether a prompt is done once its finished drafts cannot be beaten.
    """

    def __init__(self, input_ids: Tensor, k: int, early_exit: bool):
        batch, self.prompt = input_ids.shape
        self.k, self.early_exit = k, early_exit
        self.alive = input_ids[:, None].expand(batch, k, -1).contiguous()
        self.scores = torch.full((batch, k), -torch.inf, device=input_ids.device)
        self.ended, self.ended_scores = self.alive, self.scores.clone()
        self.ended_lengths = torch.full_like(self.scores, self.prompt, dtype=torch.long)
        self.scores[:, 0] = 0
        self.one = True
        self.done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)

    @property
    def heads(self) -> Tensor:
        """What is continued, [B, r, L]: the first draft alone at the beginning and after `keep_one`."""
        return self.alive[:, :1] if self.one else self.alive

    @property
    def used(self) -> Tensor:
        """Which heads count, [B, r]."""
        return torch.isfinite(self.scores[:, : self.heads.shape[1]]) & ~self.done[:, None]

    def advance(self, log_p: Tensor, ids: Tensor, kept: int, stopping_criteria: Any) -> None:
        """Continue with the best pairs of head and candidate, by log p and ids [B, r, c]; looks at `kept` pairs."""
        heads = self.heads
        totals = self.scores[:, : heads.shape[1], None] + log_p
        totals = torch.where(self.used[..., None], totals, -torch.inf).flatten(1)
        missing = max(self.k - totals.shape[1], 0)
        top, pair = pad(totals, (0, missing), value=-torch.inf).sort(descending=True, stable=True)
        top, pair = top[:, :kept], pair[:, :kept].clamp(max=totals.shape[1] - 1)
        tokens = ids.flatten(1).gather(1, pair)
        paths = torch.cat([_rows(heads, pair // ids.shape[-1]), tokens[..., None]], -1)
        hit = stopping_criteria(paths.flatten(0, 1), None).reshape(top.shape)
        # An end counts only where a beam search of width k would continue: below, greedy decoding would go on.
        self._finish(
            paths, top.masked_fill(~hit | (torch.arange(top.shape[1], device=top.device) >= self.k), -torch.inf)
        )
        scores, best = top.masked_fill(hit, -torch.inf).sort(descending=True, stable=True)
        self.scores, self.alive, self.one = scores[:, : self.k], _rows(paths, best[:, : self.k]), False
        unbeaten = self.ended_scores[:, -1] >= self.scores[:, 0]
        self.done = torch.isneginf(self.scores[:, 0]) | (unbeaten & self.early_exit)

    def _finish(self, paths: Tensor, scores: Tensor) -> None:
        scores, best = torch.cat([self.ended_scores, scores], 1).sort(descending=True, stable=True)
        self.ended_scores, best = scores[:, : self.k], best[:, : self.k]
        lengths = torch.full(paths.shape[:2], paths.shape[-1], device=paths.device)
        self.ended_lengths = torch.cat([self.ended_lengths, lengths], 1).gather(1, best)
        self.ended = _rows(torch.cat([pad(self.ended, (0, 1)), paths], 1), best)

    def keep_one(self, gamma: Tensor, generator: torch.Generator) -> Tensor:
        """Keep of each prompt one alive draft, drawn by gamma [B, k]; returns which, one-hot [B, k]."""
        chosen = torch.multinomial(gamma.to(generator.device), 1, generator=generator).to(gamma.device)
        self.alive = _rows(self.alive, chosen).expand(-1, self.k, -1).contiguous()
        kept = self.scores.gather(1, chosen)
        self.scores = torch.cat([kept, torch.full_like(self.scores[:, 1:], -torch.inf)], 1)
        self.one = True
        return torch.nn.functional.one_hot(chosen[:, 0], self.k).to(gamma.dtype)

    def best(self, pad_token_id: int | None) -> tuple[Tensor, Tensor]:
        """The best k of all drafts, finished before alive at equal scores: ids [B k, longest], scores [B k]."""
        scores, best = torch.cat([self.ended_scores, self.scores], 1).sort(descending=True, stable=True)
        scores, best = scores[:, : self.k], best[:, : self.k]
        alive_lengths = torch.full_like(self.ended_lengths, self.alive.shape[-1])
        lengths = torch.cat([self.ended_lengths, alive_lengths], 1).gather(1, best)
        lengths = lengths.masked_fill(torch.isneginf(scores), self.prompt)
        paths = _rows(torch.cat([self.ended, self.alive], 1), best)[..., : int(lengths.max())]
        padding = torch.arange(paths.shape[-1], device=paths.device) >= lengths[..., None]
        if bool(padding.any()):
            if pad_token_id is None:
                raise ValueError("Drafts end at different lengths: set pad_token_id.")
            paths = paths.masked_fill(padding, pad_token_id)
        return paths.flatten(0, 1), scores.flatten()


def _rows(paths: Tensor, index: Tensor) -> Tensor:
    """[B, m, L] and [B, k] -> [B, k, L]."""
    return paths.gather(1, index[..., None].expand(*index.shape, paths.shape[-1]))
