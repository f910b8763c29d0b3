"""Checks that need one call, or nearly: numbers, memory layouts, vocabularies and rows."""

import copy
import random

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from ._conformance_checks import INF, Subject, check, law, logits, removed, require, same, sound, tokens


@check
def shape_dtype_and_device_are_kept(s: Subject) -> None:
    """The result has the shape, dtype and device of the scores, because the next processor relies on them."""
    for rows in (1, 4):
        scores = logits(rows, s.vocab)
        out = s.once(tokens(rows, 5, s.vocab), scores)
        require(out.shape == scores.shape, f"shape {tuple(out.shape)} for scores of {tuple(scores.shape)}")
        require(out.dtype == scores.dtype, f"dtype {out.dtype} for scores of {scores.dtype}")
        require(out.device == scores.device, f"device {out.device} for scores on {scores.device}")


@check
def half_precision_is_sane(s: Subject) -> None:
    """bfloat16 and float16 scores keep their dtype and give nearly the law that the same numbers give in float32."""
    ids = tokens(4, 5, s.vocab)
    for dtype in (torch.bfloat16, torch.float16):
        scores = logits(4, s.vocab).to(dtype)
        out, full = s.once(ids, scores), s.once(ids, scores.float())
        require(out.dtype == dtype, f"dtype {out.dtype} for scores of {dtype}")
        sound(out, str(dtype))
        gap = 0.5 * (law(out).exp() - law(full).exp()).abs().sum(-1).max().item()
        require(gap <= 0.1, f"{dtype}: total variation {gap:.3f} from the law in float32")


@check
def inputs_are_not_modified(s: Subject) -> None:
    """`scores` and `input_ids` are left as they were: generate records raw logits in the same storage."""
    wide = 2000 if s.facts.vocab_size is None else s.vocab
    for rows, length, vocab, dtype in (
        (3, 5, s.vocab, torch.float32),
        (3, 5, s.vocab, torch.bfloat16),
        (3, 5, s.vocab, torch.float16),
        (3, 5, s.vocab, torch.float64),
        (9, 40, wide, torch.float32),
    ):
        ids, scores = tokens(rows, length, vocab), logits(rows, vocab).to(dtype)
        before = ids.clone(), scores.clone()
        s.once(ids, scores)
        where = f"in place ({rows} rows of {length} tokens, {vocab} scores, {dtype})"
        require(torch.equal(ids, before[0]), f"input_ids were modified {where}")
        require(torch.equal(scores, before[1]), f"scores were modified {where}")


@check
def strided_scores_equal_contiguous_ones(s: Subject) -> None:
    """Slices and transposed memory, as taken from [batch, position, vocab] logits, give what a copy gives."""
    ids, scores = tokens(3, 5, s.vocab), logits(3, s.vocab)
    expected = s.once(ids, scores)
    wide = torch.stack([torch.full_like(scores, 7.0), scores], dim=-1)[..., 1]
    same(s.once(ids, wide), expected, "every second element of a row")
    same(s.once(ids, scores.t().contiguous().t()), expected, "column-major scores")
    same(s.once(ids.t().contiguous().t(), scores), expected, "column-major input_ids")


@check
def expanded_scores_equal_a_copy(s: Subject) -> None:
    """Rows that share memory (stride 0, as `expand` gives) are treated like copies and are not written to."""
    ids, scores = tokens(1, 5, s.vocab), logits(1, s.vocab)
    before, expected = scores.clone(), s.once(ids.repeat(3, 1), scores.repeat(3, 1))
    same(s.once(ids.expand(3, -1), scores.expand(3, -1)), expected, "expanded rows")
    require(torch.equal(scores, before), "the shared memory was modified")


@check
def forbidden_tokens_stay_forbidden(s: Subject) -> None:
    """Scores that are -inf already (grammar, bad words, an earlier filter) stay -inf and cause no NaN."""
    ids, scores = tokens(4, 5, s.vocab), logits(4, s.vocab)
    for step in (2, 3, max(2, s.vocab // 3)):
        blocked = torch.ones(s.vocab, dtype=torch.bool)
        blocked[::step] = False
        out = s.once(ids, scores.masked_fill(blocked, -INF))
        sound(out, f"{int(blocked.sum())} of {s.vocab} tokens at -inf")
        require(removed(out[:, blocked]).all(), "a token that was at -inf can be chosen")


@check
def rows_with_few_finite_scores_work(s: Subject) -> None:
    """A row with one allowed token keeps it; so does a row beside it with two, and none gets NaN."""
    scores = torch.full((3, s.vocab), -INF)
    scores[0, s.vocab // 2] = -2.0
    scores[1, [0, s.vocab - 1]] = torch.tensor([1.0, -1.0])
    scores[2] = logits(1, s.vocab)[0]
    # No token of the rows' histories is among the allowed ones, so repetition rules have nothing to say.
    out = s.once(torch.full((3, 4), 1), scores)
    sound(out, "rows with 1, 2 and all scores finite")
    require(removed(out[~scores.isfinite()]).all(), "a token that was at -inf can be chosen")
    require(out[0, s.vocab // 2].isfinite(), "the only allowed token was removed")


@check
def every_row_keeps_a_token(s: Subject) -> None:
    """From flat to extremely peaked rows at least one score stays finite, or sampling would raise."""
    for scale in (0.0, 1e-3, 1.0, 30.0, 1e4):
        sound(s.once(tokens(4, 5, s.vocab), logits(4, s.vocab, scale=scale)), f"scores of scale {scale:g}")


@check
def the_best_token_is_kept(s: Subject) -> None:
    """Truncation never removes the most probable token, so that greedy search is unchanged by it."""
    s.needs(s.facts.keeps_best, "it may remove the best token by definition")
    for scale in (0.1, 1.0, 3.0, 30.0):
        scores = logits(8, s.vocab, seed=int(10 * scale), scale=scale)
        out, best = s.once(tokens(8, 5, s.vocab), scores), scores.argmax(-1)
        lost = (~out.gather(1, best[:, None]).isfinite()).nonzero()[:, 0].tolist()
        require(not lost, f"scores of scale {scale:g}: the best token of row {lost[:1]} was removed")


@check
def survivors_are_unchanged(s: Subject) -> None:
    """A pure filter leaves the scores of the tokens it keeps bit for bit, so that others can follow in any order."""
    s.needs(s.facts.filters_only, "it changes scores by definition")
    scores = logits(4, s.vocab)
    out = s.once(tokens(4, 5, s.vocab), scores)
    require(torch.equal(out, torch.where(out == -INF, out, scores)), "a kept score was changed")


@check
def a_constant_changes_nothing(s: Subject) -> None:
    """Adding one number to a whole row leaves the law as it is, because softmax ignores it."""
    ids, scores = tokens(4, 5, s.vocab), logits(4, s.vocab)
    expected = law(s.once(ids, scores))
    for shift in (-40.0, 7.5):
        same(law(s.once(ids, scores + shift)), expected, f"scores + {shift:g}", 1e-3)


@check
def log_probabilities_equal_logits(s: Subject) -> None:
    """Beam modes hand in log-softmaxed scores; the law must be the one that raw logits give."""
    ids, scores = tokens(4, 5, s.vocab), logits(4, s.vocab) + 5
    same(law(s.once(ids, scores.log_softmax(-1))), law(s.once(ids, scores)), "log-softmaxed scores", 1e-3)


@check
def min_tokens_to_keep_is_honoured(s: Subject) -> None:
    """The m best tokens stay, for m = 1, 2 and, as beam sampling asks, len(eos) + 1; never more than there are."""
    s.needs(s.facts.min_tokens_to_keep, "it has no min_tokens_to_keep")
    ids, scores = tokens(4, 5, s.vocab), logits(4, s.vocab, scale=15.0)
    for m in (1, 2, 3, 5):
        out = s.once(ids, scores, min_tokens_to_keep=m)
        best = scores.topk(min(m, s.vocab), -1).indices
        kept = int(out.gather(1, best).isfinite().sum(-1).min())
        require(kept == best.shape[1], f"min_tokens_to_keep={m}: {kept} of the {m} best tokens are left")
    few = scores.clone().masked_fill_(torch.arange(s.vocab) >= 2, -INF)
    require(removed(s.once(ids, few, min_tokens_to_keep=5)[:, 2:]).all(), "it brought back a token that was at -inf")
    sound(s.once(ids, scores[:, :1].repeat(1, s.vocab), min_tokens_to_keep=5), "equal scores")


@check
def tiny_vocabularies_work(s: Subject) -> None:
    """Vocabularies of 1, 2 and 3 tokens, as classifiers and codebooks have, work like any other."""
    for size in s.vocabularies(1, 2, 3):
        scores = logits(3, size)
        sound(s.once(torch.zeros(3, 1, dtype=torch.long), scores), f"{size} tokens")
        sound(s.once(torch.zeros(3, 4, dtype=torch.long), scores), f"{size} tokens, a longer prompt")


@check
def large_vocabularies_work(s: Subject) -> None:
    """With 150,000 tokens, flat or peaked, rows are sound and equal to rows alone and to rows in float64."""
    for size in s.vocabularies(150_000):
        ids, scores = tokens(2, 5, size), logits(2, size) * torch.tensor([[0.3], [1.0]])
        scores[1, -1] = 20.0
        out = s.once(ids, scores)
        sound(out, f"{size} tokens")
        for row in range(2):
            same(out[[row]], s.once(ids[[row]], scores[[row]]), f"{size} tokens, row {row} alone")
        gap = 0.5 * (law(out).exp() - law(s.once(ids, scores.double())).exp()).abs().sum(-1).max().item()
        require(gap <= 0.01, f"{size} tokens: total variation {gap:.3f} from the law of float64 scores")
        if s.facts.keeps_best:
            require(out.gather(1, scores.argmax(-1, keepdim=True)).isfinite().all(), "the best token was removed")


@check
def ties_are_deterministic(s: Subject) -> None:
    """Equal scores are decided the same way on every call and wherever in a batch the row stands."""
    ids, scores = tokens(1, 5, s.vocab), logits(1, s.vocab).div(3).round()
    alone = s.once(ids, scores)
    sound(alone, "tied scores")
    same(s.once(ids, scores), alone, "tied scores, again", 0)
    mixed = torch.cat([logits(3, s.vocab, seed=1), scores, logits(2, s.vocab, seed=2), scores])
    same(s.once(ids.repeat(7, 1), mixed)[[3, 6]], alone.repeat(2, 1), "tied scores inside a batch")
    sound(s.once(ids, torch.zeros(1, s.vocab)), "all scores equal")


@check
def renaming_tokens_renames_the_result(s: Subject) -> None:
    """A permutation of the vocabulary, in the ids too, permutes the result: no rule hangs on the order of ids."""
    s.needs(s.facts.vocabulary_symmetric, "some token ids have a meaning of their own")
    ids, scores = tokens(4, 9, s.vocab), logits(4, s.vocab)
    order = torch.randperm(s.vocab, generator=torch.Generator().manual_seed(5))
    renamed = s.once(order.argsort()[ids], scores[:, order])
    same(renamed, s.once(ids, scores)[:, order], "permuted vocabulary")


@check
def padding_the_vocabulary_changes_nothing(s: Subject) -> None:
    """Unused columns of -inf, as padded embeddings give, leave the other columns as they are."""
    s.vocabularies(0)
    ids, scores = tokens(4, 5, s.vocab), logits(4, s.vocab)
    padded = s.once(ids, torch.cat([scores, torch.full((4, 37), -INF)], dim=1))
    same(padded[:, : s.vocab], s.once(ids, scores), "a vocabulary with 37 unused tokens")
    require(removed(padded[:, s.vocab :]).all(), "an unused token can be chosen")


@check
def rows_are_independent(s: Subject) -> None:
    """A batch gives what its rows give alone, whatever the other rows hold."""
    scales = torch.tensor([0.1, 1.0, 4.0, 20.0, 1.0, 2.0, 0.5, 3.0, 1.0, 7.0])
    ids, scores = tokens(10, 6, s.vocab), logits(10, s.vocab) * scales[:, None]
    out = s.once(ids, scores)
    for row in range(10):
        same(out[[row]], s.once(ids[[row]], scores[[row]]), f"row {row} alone")


@check
def permuted_rows_give_permuted_results(s: Subject) -> None:
    """The place of a row in the batch means nothing; a duplicated row gives the same result twice."""
    ids, scores, order = tokens(4, 6, s.vocab), logits(4, s.vocab), torch.tensor([2, 0, 3, 1, 2, 2])
    same(s.once(ids[order], scores[order]), s.once(ids, scores)[order], f"rows in the order {order.tolist()}")


@check
def left_padding_changes_nothing(s: Subject) -> None:
    """Pad tokens before a prompt leave its result as it is, also when pad is eos and may be generated."""
    ids, scores = tokens(3, 6, s.vocab).clamp(min=1), logits(3, s.vocab)
    pads = torch.zeros(3, 4, dtype=torch.long)
    padded = torch.cat([pads, ids], dim=1)
    out = s.make(padded, torch.cat([pads, torch.ones_like(ids)], dim=1))(padded, scores)
    same(out, s.once(ids, scores), "four pad tokens (id 0) before the prompt")


@check
def a_prompt_without_ids_works(s: Subject) -> None:
    """A prompt given as `inputs_embeds` has `input_ids` of width 0, and a decoder starts with one token."""
    scores = logits(3, s.vocab)
    sound(s.once(torch.zeros(3, 1, dtype=torch.long), scores), "one token")
    if s.facts.needs_prompt_ids:
        return
    out = s.once(torch.zeros(3, 0, dtype=torch.long), scores)
    sound(out, "no token")
    require(out.shape == scores.shape, f"no token: shape {tuple(out.shape)}")


@check
def autograd_modes_agree(s: Subject) -> None:
    """Scores that need a gradient, `no_grad` and `inference_mode` give the same numbers, also one after another."""
    ids, scores = tokens(3, 6, s.vocab), logits(3, s.vocab)
    expected = s.once(ids, scores)
    with torch.enable_grad():
        same(s.once(ids, scores.clone().requires_grad_()).detach(), expected, "requires_grad")
    same(s.once(ids, scores.clone().requires_grad_()), expected, "no_grad")
    processor = s.make(ids)
    with torch.inference_mode():
        same(processor(ids, scores.clone()), expected, "inference_mode")
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    straight = s.make(ids)
    straight(ids, scores)
    same(processor(longer, scores), straight(longer, scores), "a second call outside inference_mode")


@check
def global_generators_are_left_alone(s: Subject) -> None:
    """A call draws nothing from the global generators of torch, numpy and Python, or seeds would mean other texts."""
    ids, scores = tokens(3, 6, s.vocab), logits(3, s.vocab)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1:3], random.getstate()
    s.once(ids, scores)
    require(torch.equal(torch.get_rng_state(), torch_state), "torch's generator moved")
    now = np.random.get_state()[1:3]
    require(now[1] == numpy_state[1] and (now[0] == numpy_state[0]).all(), "numpy's generator moved")
    require(random.getstate() == python_state, "Python's generator moved")


@check
def results_are_deterministic(s: Subject) -> None:
    """Fresh processors agree bit for bit, whatever the global seed."""
    ids, scores = tokens(3, 6, s.vocab), logits(3, s.vocab)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = s.once(ids, scores)
        torch.manual_seed(2)
        same(s.once(ids, scores), one, "after another global seed", 0)


@check
def the_facts_are_true(s: Subject) -> None:
    """What says that it neither reads ids nor remembers gives the same for other ids and for later calls."""
    s.needs(not s.facts.reads_ids and not s.facts.stateful, "it reads ids or remembers by declaration")
    ids, scores = tokens(3, 6, s.vocab), logits(3, s.vocab)
    processor = s.make(ids)
    expected = processor(ids, scores)
    same(processor(tokens(3, 9, s.vocab, seed=1), scores), expected, "other ids")
    processor(ids, -scores)
    same(processor(ids, scores), expected, "after a call with other scores")


@check
def copies_are_independent(s: Subject) -> None:
    """`copy.deepcopy` works in the middle of a text, and copy and original go on without knowing each other."""
    ids, more = tokens(2, 6, s.vocab), tokens(2, 3, s.vocab, seed=1)

    def go_on(processor: LogitsProcessor, sign: float) -> list[Tensor]:
        return [
            processor(torch.cat([ids, more[:, :n]], dim=1), sign * logits(2, s.vocab, seed=n)).clone()
            for n in range(1, 4)
        ]

    def start() -> LogitsProcessor:
        processor = s.make(ids)
        processor(ids, logits(2, s.vocab))
        return processor

    original = start()
    duplicate = copy.deepcopy(original)
    go_on(original, -1.0)
    for found, expected in zip(go_on(duplicate, 1.0), go_on(start(), 1.0), strict=True):
        same(found, expected, "the copy, after the original went another way")


@check
def the_continuous_batching_flag_is_consistent(s: Subject) -> None:
    """What reads ids or remembers must say `supports_continuous_batching = False`; others must take 1-D ids."""
    ids, scores = tokens(3, 6, s.vocab), logits(3, s.vocab)
    processor = s.make(ids)
    flag = processor.supports_continuous_batching
    if flag is False:
        return
    require(
        not s.facts.reads_ids and not s.facts.stateful, f"the flag is {flag}: kept, but it sees current tokens only"
    )
    same(processor(ids[:, -1], scores), s.once(ids, scores), "input_ids [rows] as in continuous batching")
