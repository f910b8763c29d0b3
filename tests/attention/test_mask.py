"""Intervals against transformers' dense masks, pattern by pattern, and what happens to patterns that are not known."""

import pytest
import torch
from transformers import masking_utils as masks
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from hfext.attention import IntervalMask, _mask, interval_mask
from hfext.compat import mask_parts

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9]).bool()
RIGHT = LEFT.flip(1)
HOLES = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 0], [1] * 9]).bool()
NOTHING = torch.tensor([[0] * 9, [1] * 9]).bool()
PLACES = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5, 0]])
IDS = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 2]])

PATTERNS = {
    "causal": causal_mask_function,
    "bidirectional": masks.bidirectional_mask_function,
    "sliding": masks.sliding_window_causal_mask_function(3),
    "window": masks.sliding_window_bidirectional_mask_function(2),
    "chunked": masks.chunked_causal_mask_function(4, torch.tensor([3, 0])),
}


@pytest.mark.parametrize("padding", [None, LEFT, RIGHT, HOLES, NOTHING], ids=["none", "left", "right", "holes", "all"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_with_padding(name, padding):
    for q, offset in ((9, 0), (4, 5), (1, 8), (3, 2)):
        call = dict(
            batch_size=2, q_length=q, kv_length=9, q_offset=offset, mask_function=PATTERNS[name],
            attention_mask=padding, allow_is_causal_skip=False,
        )  # fmt: skip
        ours, dense = interval_mask(**call), sdpa_mask(**call)
        assert isinstance(ours, IntervalMask) and ours.shape == dense.shape
        assert torch.equal(ours.dense(), dense)


@pytest.mark.parametrize("inner", ["causal", "sliding"])
def test_packed_sequences(inner):
    function = masks.packed_sequence_compatibility_function(PATTERNS[inner], PLACES, IDS)
    call = dict(batch_size=2, q_length=9, kv_length=9, mask_function=function, allow_is_causal_skip=False)
    ours = interval_mask(**call)
    assert isinstance(ours, IntervalMask) and torch.equal(ours.dense(), sdpa_mask(**call))


@pytest.mark.parametrize("name", PATTERNS)
def test_a_cache_that_has_moved_on(name):
    # A sliding cache holds keys 5 to 8 and gets one more; the padding mask counts from the first token.
    call = dict(
        batch_size=2, q_length=2, kv_length=5, q_offset=7, kv_offset=4, mask_function=PATTERNS[name],
        attention_mask=LEFT, allow_is_causal_skip=False,
    )  # fmt: skip
    assert torch.equal(interval_mask(**call).dense(), sdpa_mask(**call))


def test_a_static_cache_and_an_offset_that_is_a_tensor():
    call = dict(
        batch_size=2,
        q_length=2,
        kv_length=16,
        q_offset=torch.tensor(7),
        attention_mask=LEFT,
        mask_function=causal_mask_function,
    )
    ours = interval_mask(**call)
    assert torch.equal(ours.dense(), sdpa_mask(**call, allow_is_causal_skip=False))
    # Without a padding mask transformers takes all keys of one query; places not written yet are not seen here.
    alone = interval_mask(batch_size=1, q_length=1, kv_length=16, q_offset=3)
    assert alone.hi.tolist() == [[4]]


def test_padding_of_one_stretch_needs_no_mask_of_keys():
    made = {name: interval_mask(2, 9, 9, attention_mask=mask) for name, mask in (("left", LEFT), ("holes", HOLES))}
    assert made["left"].keys is None and made["holes"].keys.shape == (2, 9)
    assert interval_mask(2, 9, 9, attention_mask=torch.ones(2, 9, dtype=torch.bool)) is None


def test_memory_is_that_of_one_row_for_each_query():
    mask = interval_mask(1, 4096, 4096, mask_function=PATTERNS["sliding"], attention_mask=torch.ones(1, 4096).bool())
    assert mask.lo.numel() + mask.hi.numel() <= 2 * 4096 and mask.keys is None


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: k <= q,
        masks.or_masks(causal_mask_function, masks.blockwise_overlay(IDS)),
        masks.and_masks(causal_mask_function, lambda b, h, q, k: k % 2 == 0),
    ],
    ids=["own", "blocks", "joined"],
)
def test_an_unknown_pattern_is_made_as_a_whole(function):
    call = dict(batch_size=2, q_length=9, kv_length=9, mask_function=function, attention_mask=LEFT)
    ours = interval_mask(**call)
    assert torch.is_tensor(ours) and torch.equal(ours, sdpa_mask(**call, allow_is_causal_skip=False))
    assert mask_parts(function) is None


def test_functions_that_have_to_be_mapped_are_never_guessed():
    assert torch.is_tensor(interval_mask(1, 4, 4, mask_function=causal_mask_function, use_vmap=True))


def test_another_meaning_in_transformers_is_noticed(monkeypatch):
    def overlay(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window  # one more than today

        return inner_mask

    from hfext.compat import _masks

    monkeypatch.setattr(masks, "sliding_window_overlay", overlay)
    for cached in (_masks._known, _mask._compared):
        cached.cache_clear()
    try:
        call = dict(batch_size=1, q_length=6, kv_length=6, mask_function=masks.sliding_window_causal_mask_function(2))
        ours = interval_mask(**call)
        assert torch.is_tensor(ours) and torch.equal(ours, sdpa_mask(**call, allow_is_causal_skip=False))
    finally:
        monkeypatch.undo()
        for cached in (_masks._known, _mask._compared):
            cached.cache_clear()


def test_the_names_are_registered_with_their_masks():
    from transformers import AttentionInterface

    for name in ("hfext_triton", "hfext_pasta", "hfext_spark", "hfext_topk"):
        assert AttentionInterface()[name] and AttentionMaskInterface()[name] is interval_mask
    own = AttentionMaskInterface()["hfext_stickbreaking"]  # refuses patterns that are not causal
    assert (
        own is not interval_mask and own(batch_size=2, q_length=3, kv_length=3, attention_mask=LEFT[:, :3]) is not None
    )


def test_other_code_gets_the_dense_mask():
    mask = interval_mask(2, 9, 9, attention_mask=LEFT)
    dense = mask.dense()
    assert torch.equal(mask[:, :, -1:], dense[:, :, -1:]) and torch.equal(~mask, ~dense)
    assert torch.equal(torch.where(mask, 1.0, 0.0), dense.float()) and torch.equal(mask & mask, dense)
    assert torch.equal(torch.zeros(2, 1, 9, 9).masked_fill(mask, 1.0), dense.float())
    assert mask.to("cpu").shape == dense.shape and torch.equal(mask.to(torch.float32), dense.float())
    assert mask.ndim == mask.dim() == 4 and mask.size(2) == 9 and mask.contiguous() is mask
    assert interval_mask(2, 9, 9, attention_mask=mask) is mask
