"""Checks that replay whole texts as `generate` hands them out: beams, drafts, padding, finished rows, a second use.

The oracle is always the straight replay: a fresh processor that sees one text alone, one token longer at each call.
"""

import functools
import zlib

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ._conformance_checks import EOS, PAD, Subject, Text, check, same, sound, texts_of, tokens


@functools.lru_cache(maxsize=4096)
def _toy_row(text: Text, vocab: int, world: int) -> Tensor:
    seed = zlib.crc32(repr((text, world)).encode())
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def toy_scores(texts: list[Text], vocab: int, worlds: list[int] | int = 0) -> Tensor:
    """[rows, vocab]: a language model whose scores depend on the whole text and on a `world`, such as an encoder's."""
    worlds = [worlds] * len(texts) if isinstance(worlds, int) else worlds
    return torch.stack([_toy_row(text, vocab, world) for text, world in zip(texts, worlds, strict=True)])


def call(
    processor: LogitsProcessor, texts: list[Text], vocab: int, worlds: list[int] | int = 0, pads: int = 0
) -> Tensor:
    """One call with these texts, of one length, after `pads` pad tokens."""
    ids = torch.tensor([[PAD] * pads + list(text) for text in texts])
    return processor(ids, toy_scores(texts, vocab, worlds)).clone()


def start(s: Subject, texts: list[Text]) -> LogitsProcessor:
    return s.make(torch.tensor(texts))


def straight(s: Subject, text: Text, prompt: int, world: int = 0) -> Tensor:
    """[1, vocab]: what the processor gives for `text` when it has seen it grow, alone, from its prompt's length."""
    processor = start(s, [text[:prompt]])
    outputs = [call(processor, [text[:n]], s.vocab, world) for n in range(prompt, len(text) + 1)]
    return outputs[-1]


def agrees(s: Subject, out: Tensor, texts: list[Text], prompt: int, what: str, worlds: list[int] | None = None):
    for row, text in enumerate(texts):
        expected = straight(s, text, prompt, worlds[row] if worlds else 0)
        same(out[[row]], expected, f"{what}: row {row} of {len(texts)}, {len(text) - prompt} tokens after the prompt")


@check
def a_batch_replays_as_its_rows(s: Subject) -> None:
    """Four texts that grow side by side give at every step what each gives alone."""
    texts = texts_of(s, 4, 9)
    processor = start(s, [t[:3] for t in texts])
    for n in range(3, 10):
        now = [t[:n] for t in texts]
        agrees(s, call(processor, now, s.vocab), now, 3, "batch")


@check
def rows_may_change_places_at_every_step(s: Subject) -> None:
    """Texts of one prompt that change places between steps, as beams do, keep their own history."""
    texts = [texts_of(s, 1, 3)[0] + tail for tail in texts_of(s, 4, 6, seed=2)]
    processor = start(s, [texts[0][:3]])
    for n in range(3, 10):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(n)).tolist() if n > 3 else range(4)
        now = [texts[i][:n] for i in order]
        agrees(s, call(processor, now, s.vocab), now, 3, "permuted batch")


@check
def beams_may_be_reordered_and_duplicated(s: Subject) -> None:
    """A beam that goes on twice hands its history to both, and a dropped one leaves nothing behind."""
    prompts = texts_of(s, 2, 3)
    beams = [[prompt] * 3 for prompt in prompts]
    processor = start(s, prompts)
    for step in range(6):
        now = [beam for group in beams for beam in group]
        agrees(s, call(processor, now, s.vocab), now, 3, "beams")
        parents = [[0, 0, 0], [2, 0, 0], [1, 2, 1], [2, 2, 0], [0, 1, 1], [1, 0, 2]][step]
        new = tokens(6, 1, s.vocab, seed=step).flatten().tolist()
        beams = [[group[p] + (new.pop(),) for p in parents] for group in beams]


@check
def finished_rows_do_not_disturb_live_ones(s: Subject) -> None:
    """Rows that have ended go on to be called with pad tokens; live rows do not notice and nothing becomes NaN."""
    texts = [list(t) for t in texts_of(s, 4, 10)]
    for row, end in ((0, 5), (2, 7)):
        texts[row][end:] = [min(EOS, s.vocab - 1)] + [PAD] * (9 - end)
    texts = [tuple(t) for t in texts]
    processor = start(s, [t[:3] for t in texts])
    for n in range(3, 11):
        out = call(processor, [t[:n] for t in texts], s.vocab)
        sound(out, f"{n - 3} tokens after the prompt, with finished rows")
        agrees(s, out[[1, 3]], [texts[1][:n], texts[3][:n]], 3, "live rows")


@check
def left_padded_texts_replay_as_bare_ones(s: Subject) -> None:
    """A prompt that was padded on the left grows exactly as the bare one."""
    texts = texts_of(s, 2, 9)
    prompts = torch.tensor([[PAD] * 4 + list(t[:3]) for t in texts])
    processor = s.make(prompts, torch.tensor([[0] * 4 + [1] * 3] * 2))
    for n in range(3, 10):
        now = [t[:n] for t in texts]
        agrees(s, call(processor, now, s.vocab, pads=4), now, 3, "padded rows")


@check
def rejected_drafts_leave_no_trace(s: Subject) -> None:
    """Assisted decoding asks for longer texts, rejects them, and goes on elsewhere: equal to the straight replay."""
    text = texts_of(s, 1, 12)[0]
    wrong = texts_of(s, 1, 4, seed=7)[0]
    processor, at = start(s, [text[:3]]), 3
    for accepted, drafted in ((2, 4), (0, 3), (3, 3), (1, 4)):
        draft = text[: at + accepted] + wrong[: drafted - accepted]
        for n in range(at, at + drafted + 1):
            out = call(processor, [draft[:n]], s.vocab)
            if n <= at + accepted:
                agrees(s, out, [draft[:n]], 3, "verified draft")
        at = min(at + accepted + 1, len(text))
    agrees(s, call(processor, [text[:at]], s.vocab), [text[:at]], 3, "after four rounds")


@check
def a_draft_model_leaves_no_trace(s: Subject) -> None:
    """The draft model's loop calls the same object with its own scores; the model's calls that follow count."""
    text = texts_of(s, 1, 12)[0]
    processor, at = start(s, [text[:3]]), 3
    for accepted in (2, 0, 3, 1):
        draft = text[: at + accepted] + texts_of(s, 1, 3 - accepted or 1, seed=at)[0]
        for n in range(at, at + 3):
            call(processor, [draft[:n]], s.vocab, worlds=9)
        for n in range(at, at + accepted + 1):
            agrees(s, call(processor, [draft[:n]], s.vocab), [draft[:n]], 3, "verified after the draft model")
        at += accepted + 1


@check
def a_call_may_be_repeated(s: Subject) -> None:
    """The same text asked for twice, as when a step is undone and done again, gives the same and counts once."""
    texts = texts_of(s, 2, 8)
    processor = start(s, [t[:3] for t in texts])
    for n in range(3, 9):
        now = [t[:n] for t in texts]
        call(processor, now, s.vocab)
        agrees(s, call(processor, now, s.vocab), now, 3, "second call")


@check
def an_object_may_be_used_again(s: Subject) -> None:
    """A second generation with one object, of other prompts or of the same with another model, equals a fresh one."""
    s.needs(not s.facts.needs_prompt_ids, "it belongs to its prompts")
    first, second, third = texts_of(s, 3, 8), texts_of(s, 3, 7, seed=3), texts_of(s, 1, 7, seed=5)
    processor = start(s, first)
    runs = ((first, 4, 8, 0), (second, 2, 7, 0), (first, 4, 6, 1), (third, 3, 7, 0))
    for texts, prompt, end, world in runs:
        for n in range(prompt, end + 1):
            now = [t[:n] for t in texts]
            out = call(processor, now, s.vocab, world)
            agrees(s, out, now, prompt, "generation with a used object", [world] * len(now))


@check
def rows_with_one_prefix_and_different_scores_stay_apart(s: Subject) -> None:
    """Encoder-decoder rows begin with the same ids while their scores differ: the text alone is no identity."""
    worlds, shared = [1, 2, 3], (0,) + texts_of(s, 1, 3)[0]
    texts = [shared + tail for tail in texts_of(s, 3, 3, seed=4)]
    processor = s.make(torch.zeros(3, 1, dtype=torch.long))
    for n in range(1, len(texts[0]) + 1):
        now = [t[:n] for t in texts]
        agrees(s, call(processor, now, s.vocab, worlds), now, 1, "rows of three encoder inputs", worlds)
