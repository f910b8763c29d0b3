import dataclasses

import pytest
import torch
from kv_cache_cases import MODELS, data

from hfext.experiments.kv_budgets import Config, mass_kept
from hfext.kv_cache import KVCacheConfig
from hfext.kv_cache.prefixkv import PrefixKVConfig, forget_counts, interpolated

PROMPT, PADS, LAYERS = 60, (0, 17), 3


def padded(tokens=PROMPT, pads=PADS, seed=4):
    ids = torch.randint(3, 128, (len(pads), tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count], ids[row, :count] = 0, 0
    return ids, mask


@torch.no_grad()
def feed(model, cache, ids, mask, calls, start=0):
    for count in calls:
        stop = start + count
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
        start = stop
    return cache


def filled(model, config, ids, mask, calls=(PROMPT,)):
    cache = config.make_cache(model)
    cache.shared.prompt_length = PROMPT
    feed(model, cache, ids, mask, calls)
    cache.finish_prefill()
    return cache


@torch.no_grad()
def eager_scores(model, ids):
    """Column sums of the attention averaged over heads, of a text without padding: [layers, tokens]."""
    model.set_attn_implementation("eager")
    found = model(ids[None], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack([a[0].mean(0).sum(0) for a in found])


def kept(layer, row, pad=0):
    index = layer.held["kept_index"][row, 0]
    return (index[index >= 0] - pad).tolist()


def sharp_llama():
    """Layers that attend more and more narrowly."""
    model = MODELS["llama"]()
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, (1, 200, 1000), strict=True):
            layer.self_attn.q_proj.weight *= factor
    return model


def random_scores(seed, layers=5, tokens=80):
    """Layers from nearly flat to nearly one token."""
    g = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.1, 5.0, layers)[:, None]
    return (torch.randn(1, layers, tokens, generator=g) * sharpness).softmax(-1)


RATIOS = [0.0, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95]


@pytest.mark.parametrize("seed", range(6))
def test_budget_is_met_and_all_layers_keep_the_same_mass(seed):
    scores = random_scores(seed)
    tokens = torch.tensor([80])
    share = scores[0].double().sort(descending=True).values.cumsum(-1)
    share = torch.cat([torch.zeros(5, 1), share / share[:, -1:], torch.ones(5, 3)], dim=1)
    before = torch.zeros(5)
    for ratio in RATIOS:
        forget = forget_counts(scores, tokens, ratio)[0]
        wanted = ratio * 5 * 80
        assert wanted - 5 <= int(forget.sum()) <= wanted + 1e-6
        assert (forget >= before).all()  # more forgotten in all, in no layer less
        before = forget
        n = 80 - forget - 2
        assert (n >= 1).all()
        low, high = (share.gather(1, (n + step)[:, None])[:, 0] for step in (-1, 1))
        high[forget == 0] = 1.0  # first and last token are kept anyway
        assert low.max() <= high.min()  # one mass for all, up to a token


def test_counts_equal_an_exhaustive_search():
    """The smallest mass of all that occur with which not more than the target is forgotten."""
    scores = random_scores(9, layers=4, tokens=30)
    share = scores[0].double().sort(descending=True).values.cumsum(-1)
    share = share / share[:, -1:]
    for ratio in (0.2, 0.5, 0.75):
        best = None
        for p in sorted(share.flatten().tolist()):
            lengths = (share < p - 1e-12).sum(-1) + 1
            forget = (30 - lengths - 2).clamp(min=0)
            if forget.sum() <= ratio * 120:
                best = forget
                break
        got = forget_counts(scores, torch.tensor([30]), ratio)[0]
        assert (got - best).abs().sum() <= 4 and ((got - best) >= 0).all() and ((got - best) <= 1).all()


def test_equal_layers_get_equal_budgets():
    one = random_scores(3)[:, 2:3].expand(-1, 6, -1)
    for ratio in RATIOS[1:]:
        assert forget_counts(one, torch.tensor([80]), ratio)[0].tolist() == [int(ratio * 80 + 1e-6)] * 6


def test_a_layer_that_needs_one_token_gives_its_budget_away():
    scores = torch.full((1, 4, 80), 1 / 80)
    scores[0, 1] = 0
    scores[0, 1, 13] = 1
    forget = forget_counts(scores, torch.tensor([80]), 0.5)[0]
    assert forget[1] == 77 and forget.sum() >= 156
    assert (forget[[0, 2, 3]] - 83 / 3).abs().max() <= 1


def test_padding_and_other_rows_change_no_budget():
    scores = random_scores(1)
    longer = torch.cat([torch.zeros(1, 5, 20), scores], dim=-1)
    other = random_scores(2, tokens=100)
    both = forget_counts(torch.cat([longer, other]), torch.tensor([80, 100]), 0.6)
    assert torch.equal(both[:1], forget_counts(scores, torch.tensor([80]), 0.6))
    assert torch.equal(both[1:], forget_counts(other, torch.tensor([100]), 0.6))


@pytest.mark.parametrize("calls", [(PROMPT,), (22, 31, 7)])
def test_the_prompt_keeps_what_eager_attention_says(calls):
    model = sharp_llama()
    ids, mask = padded()
    cache = filled(model, PrefixKVConfig(ratio=0.6), ids, mask, calls)
    for row, pad in enumerate(PADS):
        scores = eager_scores(model, ids[row, pad:])
        tokens = PROMPT - pad
        forget = forget_counts(scores[None], torch.tensor([tokens]), 0.6)[0].tolist()
        assert len(set(forget)) > 1
        for layer, score, count in zip(cache.layers, scores.tolist(), forget, strict=True):
            middle = sorted(range(1, tokens - 1), key=score.__getitem__)
            assert kept(layer, row, pad) == sorted({*range(tokens)} - {*middle[:count]})
    held = [set(layer.held) for layer in cache.layers]
    common = {"kept_keys", "kept_values", "kept_index", "tokens", "prompt_kept"}
    assert held == [common | {"shares"}, common, common]
    spent = sum(int(layer.filled[0].sum()) for layer in cache.layers)
    assert abs(spent - 0.4 * LAYERS * PROMPT) <= LAYERS


@pytest.mark.parametrize(("distance", "calls"), [(-4, (1,) * 12), (-25, (1,) * 12), (-4, (5, 1, 3, 3))])
def test_later_calls_forget_at_a_fixed_place(distance, calls):
    model = sharp_llama()
    ids, mask = padded(PROMPT + 12)
    config = PrefixKVConfig(ratio=0.5, distance=distance)
    cache = filled(model, config, ids[:, :PROMPT], mask[:, :PROMPT])
    lists = [[kept(layer, row, pad) for row, pad in enumerate(PADS)] for layer in cache.layers]
    shares = cache.layers[0].held["shares"].clone()
    prompt_kept = [[len(tokens) for tokens in rows] for rows in lists]
    start = PROMPT
    for count in calls:
        feed(model, cache, ids, mask, (count,), start)
        start += count
        for index, layer in enumerate(cache.layers):
            for row, pad in enumerate(PADS):
                tokens = lists[index][row]
                tokens += range(start - count - pad, start - pad)
                place = prompt_kept[index][row] + distance
                if place < 1:
                    place = prompt_kept[index][row] // 2
                more = int(len(tokens) - (start - pad) * (1 - shares[row, index].item()) + 1e-6)
                for _ in range(more):
                    tokens.pop(place)
                assert kept(layer, row, pad) == tokens, (start, index, row)


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_the_check_of_the_experiment_sees_equal_mass_and_a_broken_budget(ratio, monkeypatch):
    model = sharp_llama()
    ids, _ = padded(pads=(0,))
    assert mass_kept(model, ids, ratio)["met"]
    monkeypatch.setattr("hfext.kv_cache.prefixkv.forget_counts", lambda scores, *_: torch.tensor([[50, 5, 30]]))
    assert not mass_kept(model, ids, ratio)["met"]
    with pytest.raises(ValueError, match="kept is"):
        Config(kept=[1.0])


def test_uniform_and_listed_profiles():
    model = MODELS["llama"]()
    ids, mask = padded()
    for profile, shares in (("uniform", [0.6] * 3), ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9])):
        cache = filled(model, PrefixKVConfig(ratio=0.6, profile=profile), ids, mask)
        for layer, share in zip(cache.layers, shares, strict=True):
            counts = [tokens - round(share * tokens) for tokens in (PROMPT, PROMPT - PADS[1])]
            assert layer.filled.sum(-1)[:, 0].tolist() == counts
    with pytest.raises(ValueError, match="profile has 2 shares"):
        PrefixKVConfig(profile=[0.1, 0.2]).make_cache(model)


def test_a_short_prompt_is_kept_whole_and_later_thinned_out():
    model = MODELS["llama"]()
    ids, mask = padded(20, pads=(0,))
    cache = PrefixKVConfig(ratio=0.75).make_cache(model)
    feed(model, cache, ids, mask, (8,))
    cache.finish_prefill()
    assert [layer.slots for layer in cache.layers] == [8] * 3
    feed(model, cache, ids, mask, (1,) * 12, start=8)
    assert [layer.slots for layer in cache.layers] == [5] * 3
    assert all(kept(layer, 0)[0] == 0 and kept(layer, 0)[-1] == 19 for layer in cache.layers)


def test_calibration_is_the_mean_of_the_shares_of_its_texts():
    model = sharp_llama()
    texts = data(rows=3, tokens=48)
    config = PrefixKVConfig(ratio=0.5).calibrate(model, texts, ratios=[0.25, 0.5])
    profile = config.calibration.tensors["prefix_profile"]
    assert config.profile == "offline" and config.profile_ratios == [0.25, 0.5]
    for place, ratio in enumerate((0.25, 0.5)):
        want = torch.zeros(3)
        for text in texts:
            want += forget_counts(eager_scores(model, text)[None], torch.tensor([48]), ratio)[0] / 48 / 3
        torch.testing.assert_close(profile[place], want)
    ids, mask = padded()
    cache = filled(model, config, ids, mask)
    want = [PROMPT - round(PROMPT * share) for share in profile[1].tolist()]
    assert [int(layer.filled[0].sum()) for layer in cache.layers] == want
    again = KVCacheConfig.from_dict(config.to_dict())
    assert again == config


def test_profiles_are_interpolated_between_nothing_and_everything():
    profile = torch.tensor([[0.2, 0.4], [0.5, 0.7]])
    for ratio, want in (
        (0.0, [0.0, 0.0]),
        (0.15, [0.1, 0.2]),
        (0.3, [0.2, 0.4]),
        (0.45, [0.35, 0.55]),
        (0.8, [0.75, 0.85]),
    ):
        torch.testing.assert_close(interpolated(ratio, [0.3, 0.6], profile), torch.tensor(want, dtype=torch.float64))


def test_a_tampered_profile_is_refused():
    model = MODELS["llama"]()
    config = PrefixKVConfig().calibrate(model, data(rows=1), ratios=[0.5])
    config.calibration.tensors["prefix_profile"][0, 0] = 1.5
    with pytest.raises(ValueError, match="prefix_profile must be in"):
        config.make_cache(model)
    with pytest.raises(ValueError, match=r"float32 \[1, 3\]"):
        dataclasses.replace(config, profile_ratios=[0.25, 0.5]).make_cache(model)
    with pytest.raises(ValueError, match="not calibrated"):
        PrefixKVConfig(profile="offline").make_cache(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"profile": "mean"}, "profile is 'mean'"),
        ({"profile": [0.5, 1.0]}, "shares must be in"),
        ({"distance": 0}, "distance is 0"),
        ({"n_start": -1}, "n_start is -1"),
        ({"profile_ratios": [0.5, 0.2]}, "profile_ratios"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixKVConfig(**options)
