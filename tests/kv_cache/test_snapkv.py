import pytest
import torch
from kv_cache_cases import MODELS

from hfext.kv_cache.snapkv import SnapKVConfig, pooled

PROMPT, PADS = 40, (0, 11)


def padded(tokens=PROMPT, pads=PADS, seed=6):
    ids = torch.randint(3, 128, (len(pads), tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count], ids[row, :count] = 0, 0
    return ids, mask


@torch.no_grad()
def filled(model, config, ids, mask, calls=None):
    cache = config.make_cache(model)
    cache.shared.prompt_length = ids.shape[1]
    start = 0
    for count in calls or (ids.shape[1],):
        stop = start + count
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
        start = stop
    cache.finish_prefill()
    return cache


@torch.no_grad()
def chosen(model, ids, capacity, window, size, kind):
    """Tokens kept in every layer and KV head of a text without padding, from eager attention."""
    model.set_attn_implementation("eager")
    attentions = model(ids[None], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    before, made = len(ids) - window, []
    for attention in attentions:
        mass = attention[0, :, before:, :before].sum(1)
        smooth = torch.zeros_like(mass)
        for t in range(before):
            near = mass[:, max(0, t - size // 2) : t + size // 2 + 1]
            smooth[:, t] = near.sum(-1) / size if kind == "avg" else near.amax(-1)
        score = (smooth[0::2] + smooth[1::2]) / 2
        best = [sorted(range(before), key=lambda t, row=row: (-row[t], t)) for row in score.tolist()]
        made.append([sorted(row[: capacity - window]) + list(range(before, len(ids))) for row in best])
    return made


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("calls", [None, (25, 9, 6), (39, 1)])
def test_kept_tokens_are_those_of_eager_attention(kind, calls):
    model = MODELS["llama"]()
    ids, mask = padded()
    config = SnapKVConfig(capacity=0.5, window=8, kernel_size=5, pooling=kind)
    cache = filled(model, config, ids, mask, calls)
    for row, pad in enumerate(PADS):
        want = chosen(model, ids[row, pad:], round((PROMPT - pad) / 2), 8, 5, kind)
        for layer, heads in zip(cache.layers, want, strict=True):
            for index, kept in zip(layer.held["kept_index"][row], heads, strict=True):
                assert (index[index >= 0] - pad).tolist() == kept


def test_pooling_by_hand():
    x = torch.tensor([[[1.0, 0.0, 0.0, 6.0]]])
    assert pooled(x, 3, "avg").tolist() == [[pytest.approx([1 / 3, 1 / 3, 2.0, 2.0])]]
    assert pooled(x, 3, "max").tolist() == [[[1.0, 1.0, 6.0, 6.0]]]
    assert torch.equal(pooled(x, 1, "avg"), x)


def test_a_prompt_within_the_capacity_is_kept_and_a_longer_row_is_not():
    model = MODELS["llama"]()
    ids, mask = padded(pads=(0, 18))
    cache = filled(model, SnapKVConfig(capacity=30, window=25), ids, mask)
    for layer in cache.layers:
        assert (layer.filled.sum(-1) == torch.tensor([[30, 30], [22, 22]])).all()
        assert (layer.held["kept_index"][1, 0, -22:].long() == torch.arange(18, 40)).all()
        assert "window_queries" not in layer.held


def test_tokens_after_the_prompt_all_stay():
    model = MODELS["llama"]()
    ids, mask = padded()
    cache = filled(model, SnapKVConfig(capacity=0.5, window=4), ids, mask)
    with torch.no_grad():
        for step in range(1, 5):
            model(
                ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:].expand(-1, step)], 1), past_key_values=cache
            )
    for layer in cache.layers:
        assert layer.slots == 24 and (layer.held["kept_index"][..., -4:] == torch.arange(40, 44)).all()


def test_a_prompt_whose_share_does_not_hold_the_window_is_kept_whole():
    model = MODELS["llama"]()
    ids, mask = padded()
    config = SnapKVConfig(capacity=0.5, window=16)
    cache = filled(model, config, ids, mask)
    for layer in cache.layers:
        kept = (layer.held["kept_index"] >= 0).sum(-1)
        assert (kept[mask.sum(1) == 29] == 29).all() and (kept[mask.sum(1) >= 34] < 34).all()
    assert filled(model, config, ids[:, -1:], mask[:, -1:]).layers[0].slots == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 32}, "capacity is 32 but must be above window"),
        ({"capacity": 0.0}, "capacity is 0.0"),
        ({"window": 0}, "window is 0"),
        ({"kernel_size": 4}, "kernel_size is 4 but must be odd"),
        ({"pooling": "sum"}, "pooling is 'sum'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SnapKVConfig(**options)
