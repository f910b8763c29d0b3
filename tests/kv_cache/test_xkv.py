import copy

import pytest
import torch
from kv_cache_cases import MODELS

from hfext import kv_cache
from hfext.kv_cache._low_rank import factorised, pays
from hfext.kv_cache.xkv import XKVConfig, report

PROMPT, PADS = 40, (0, 11)


def padded(tokens=PROMPT, pads=PADS, seed=9):
    ids = torch.randint(3, 128, (len(pads), tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count], ids[row, :count] = 0, 0
    return ids, mask


@torch.no_grad()
def filled(model, config, ids, mask, calls=None):
    cache = config.make_cache(model)
    start = 0
    for count in calls or (ids.shape[1],):
        stop = start + count
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
        start = stop
    cache.finish_prefill()
    return cache


@torch.no_grad()
def projected(model, ids):
    """Keys before the rotary embedding and values of one text, [tokens, channels] of every layer."""
    found = {"k": [], "v": []}
    hooks = [
        getattr(layer.self_attn, f"{side}_proj").register_forward_hook(lambda m, a, out, to=to: to.append(out[0]))
        for layer in model.model.layers
        for side, to in found.items()
    ]
    model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found["k"], found["v"]


def rotated(flat):
    """Keys [tokens, channels] of heads of 8 channels at positions 0, 1, ..: [heads, tokens, 8]."""
    x = flat.view(len(flat), -1, 8).transpose(0, 1)
    angle = torch.arange(len(flat))[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def truncated(x, rank):
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]).float()


@pytest.mark.parametrize("solver", ["gram", "exact"])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20)])
def test_squared_error_is_that_of_the_discarded_singular_values(solver, shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=g) * torch.logspace(0, -2, shape[1])
    x[1, :5] = 0
    token, basis = factorised(x, 7, solver)
    sigma = torch.linalg.svdvals(x.double())
    torch.testing.assert_close((x - token @ basis).double().square().sum((1, 2)), sigma[:, 7:].square().sum(1))
    torch.testing.assert_close(basis @ basis.mT, torch.eye(7).expand(2, 7, 7), atol=1e-5, rtol=0)
    assert torch.equal(token[1, :5].abs() < 1e-6, torch.ones(5, 7, dtype=torch.bool))
    whole = factorised(x, min(shape), solver)
    torch.testing.assert_close(whole[0] @ whole[1], x, atol=1e-5, rtol=0)
    order = torch.randperm(shape[1], generator=g)
    other = factorised(x[..., order], 7, solver)
    torch.testing.assert_close(other[0] @ other[1], (token @ basis)[..., order], atol=1e-4, rtol=0)


def test_random_solver_is_near_the_best_and_leaves_the_generator_alone():
    x = torch.randn(1, 200, 60) @ torch.diag(torch.logspace(0, -3, 60))
    state = torch.get_rng_state()
    token, basis = factorised(x, 10, "random", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    best = torch.linalg.svdvals(x)[0, 10:].norm()
    assert (x - token @ basis).norm() <= 1.01 * best
    again = factorised(x, 10, "random", seed=3)
    assert torch.equal(token, again[0]) and not torch.equal(token, factorised(x, 10, "random", seed=4)[0])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("calls", [None, (20, 17, 3)])
def test_groups_hold_the_best_approximation_of_their_row(size, calls):
    """Against decompositions of what the projections give, row by row, without padding and without a cache."""
    model = MODELS["llama"]()
    ids, mask = padded()
    config = XKVConfig(layer_group_size=size, groups=[[0, 1]] if size == 2 else None, rank_k=5, rank_v=7)
    cache = filled(model, config, ids, mask, calls)
    groups = [[0, 1]] if size == 2 else [[0], [1], [2]]
    for row, pad in enumerate(PADS):
        keys, values = projected(model, ids[row, pad:])
        for group in groups:
            k, v = (
                truncated(torch.cat([keys[i] for i in group], 1), 5),
                truncated(torch.cat([values[i] for i in group], 1), 7),
            )
            for index, a, b in zip(group, k.split(16, 1), v.split(16, 1), strict=True):
                layer = cache.layers[index]
                torch.testing.assert_close(layer.keys[row, :, pad:], rotated(a), atol=2e-5, rtol=0)
                torch.testing.assert_close(
                    layer.values[row, :, pad:], b.view(-1, 2, 8).transpose(0, 1), atol=2e-5, rtol=0
                )
    if size == 2:  # a layer in no group stays as it is
        assert cache.layers[2].compressed_prompt == 0 and set(cache.layers[2].held) == {"key_recent", "value_recent"}


def test_equal_layers_cost_one_token_factor_and_no_error():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 40, 16, generator=g)
    token, basis = factorised(x, 6)
    both, bases = factorised(torch.cat([x, x], -1), 6)
    one, two = (both @ part for part in bases.split(16, -1))
    torch.testing.assert_close(one, token @ basis, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_bytes_are_those_of_the_formula():
    model = MODELS["llama"]()
    ids, mask = padded(pads=(0, 0))
    cache = filled(model, XKVConfig(layer_group_size=3, rank_k=6, rank_v=9), ids, mask)
    factors = (6 + 9) * PROMPT + (6 + 9) * 3 * 16
    assert cache.nbytes() - cache.shared.nbytes() == 2 * 4 * factors
    dense = 2 * 3 * PROMPT * 16
    rows = report(cache)
    assert sum(row["bytes"] for row in rows) == 4 * factors
    assert [(row["layers"], row["tokens"], row["rank"]) for row in rows] == [([0, 1, 2], PROMPT, r) for r in (6, 9)]
    assert dense / factors == pytest.approx(2 * 3 * PROMPT * 16 / ((6 + 9) * PROMPT + (6 + 9) * 3 * 16))
    assert rows[0]["ratio"] == pytest.approx(3 * PROMPT * 16 / (6 * PROMPT + 6 * 3 * 16))
    assert [layer.compressed_prompt for layer in cache.layers] == [PROMPT] * 3
    with torch.no_grad():
        model(ids[:, :2], past_key_values=cache)
    assert cache.nbytes() - cache.shared.nbytes() == 2 * 4 * (factors + 2 * 3 * 2 * 16)


def test_a_prompt_that_would_grow_stays_as_it_is():
    rank, width, layers = 8, 16, 2
    even = rank * layers * width / (layers * width - rank)  # 10.67
    assert not pays(10, rank, layers, width, 2) and pays(11, rank, layers, width, 2) and 10 < even < 11
    model = MODELS["llama"](num_hidden_layers=2)
    for tokens, kept in ((10, 0), (11, 11)):
        ids, mask = padded(tokens=tokens, pads=(0,))
        cache = filled(model, XKVConfig(layer_group_size=2, rank_k=8, rank_v=8), ids, mask)
        assert [layer.compressed_prompt for layer in cache.layers] == [kept] * 2
        assert [row["rank"] for row in report(cache)] == [8 if kept else 0] * 2
    always = filled(model, XKVConfig(layer_group_size=2, rank_k=8, rank_v=8, always=True), ids[:, :5], mask[:, :5])
    assert always.layers[1].compressed_prompt == 5 and report(always)[0]["ratio"] < 1
    keys_only = filled(model, XKVConfig(layer_group_size=2, rank_k=8, merge_value=False), ids, mask)
    assert "key_basis" in keys_only.layers[0].held and "value_basis" not in keys_only.layers[0].held


def test_the_shared_factor_is_held_once_and_follows_the_rows():
    model = MODELS["llama"]()
    ids, mask = padded(pads=(0, 0))
    cache = filled(model, XKVConfig(layer_group_size=3, rank_k=6, rank_v=9), ids, mask)
    assert ["key_token" in layer.held for layer in cache.layers] == [True, False, False]
    copied = copy.deepcopy(cache)
    assert copied.layers[2].first is copied.layers[0] and cache.layers[2].first is cache.layers[0]
    want = [layer.keys.clone() for layer in cache.layers]
    copied.shared.end()  # as after a call of the model
    copied.reorder_cache(torch.tensor([1, 1, 0]))
    for layer, keys in zip(copied.layers, want, strict=True):
        assert torch.equal(layer.keys, keys[[1, 1, 0]])
        layer.offload()
        layer.prefetch()
        assert torch.equal(layer.keys, keys[[1, 1, 0]])
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, want, strict=True))


def test_tokens_of_the_prompt_can_be_taken_back():
    model = MODELS["llama"]()
    ids, mask = padded()
    cache = filled(model, XKVConfig(layer_group_size=2, rank_k=4, rank_v=6), ids, mask)
    with torch.no_grad():
        longer = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], 1)
        model(ids[:, -3:], attention_mask=longer, past_key_values=cache)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    held = cache.nbytes()
    cache.crop(-(3 + 9))
    assert cache.get_seq_length() == PROMPT - 9 and cache.nbytes() < held
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        torch.testing.assert_close(layer.keys, keys[:, :, : PROMPT - 9], atol=1e-6, rtol=0)
        torch.testing.assert_close(layer.values, values[:, :, : PROMPT - 9], atol=1e-6, rtol=0)
    cache.crop(-(PROMPT - 9))
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        again = model(ids[:1], past_key_values=config_cache(model, cache)).logits
        torch.testing.assert_close(again, model(ids[:1]).logits, atol=1e-5, rtol=0)


def config_cache(model, cache):
    cache.batch_select_indices(torch.tensor([0]))
    return cache


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_token_factors_are_quantised_by_token(bits):
    model = MODELS["llama"]()
    ids, mask = padded()
    plain = XKVConfig(layer_group_size=3, rank_k=8, rank_v=12)
    caches = [
        filled(model, config, ids, mask)
        for config in (plain, XKVConfig(layer_group_size=3, rank_k=7, rank_v=12, bits=bits, quant_group=4))
    ]
    for side, rank in (("key", 8), ("value", 12)):
        first, second = (cache.layers[0].held for cache in caches)
        assert second[f"{side}_token_codes"].shape == (2, PROMPT, rank * bits // 8)
        exact = first[f"{side}_token"]
        groups = exact.view(2, PROMPT, rank // 4, 4)
        step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
        got = caches[1].layers[0].token(side, rank)
        assert ((got - exact).view(groups.shape).abs() <= 0.51 * step[..., None] + 1e-3 * groups.abs()).all()
    assert caches[1].nbytes() < caches[0].nbytes()
    assert sum(row["bytes"] for row in report(caches[1])) * 2 == caches[1].nbytes() - caches[1].shared.nbytes()


def test_prompt_lookup_decodes_what_plain_decoding_does():
    model = MODELS["llama"]()
    ids = torch.randint(3, 9, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    kv_cache.apply(model, XKVConfig(layer_group_size=3, rank_k=4, rank_v=6, bits=4, quant_group=2))
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **settings), want)


def test_groups_and_ranks_follow_the_model_and_the_options():
    hybrid, llama = kv_cache._geometry.geometry(MODELS["gemma3"]()), kv_cache._geometry.geometry(MODELS["llama"]())
    assert XKVConfig().layer_groups(hybrid) == [[0], [2]]  # a sliding layer is between them
    assert XKVConfig(layer_group_size=2).layer_groups(llama) == [[0, 1], [2]]
    assert XKVConfig(layer_group_size=2, rank_k=5, rank_v=1.0).ranks(llama) == [
        {"key": 5, "value": 32},
        {"key": 3, "value": 16},
    ]
    given = XKVConfig(groups=[[2, 0]], rank_k=[0.5], rank_v=[100])
    assert given.layer_groups(llama) == [[2, 0]] and given.ranks(llama) == [{"key": 16, "value": 32}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_k": 0}, "rank_k is 0"),
        ({"rank_v": 1.5}, "rank_v is 1.5"),
        ({"layer_group_size": 0}, "layer_group_size is 0"),
        ({"bits": 5}, "bits is 5"),
        ({"solver": "lanczos"}, "solver is 'lanczos'"),
        ({"groups": [[0, 1], [1]]}, "groups is"),
        ({"groups": [[0, 7]]}, "names layer 7"),
        ({"rank_k": [4, 4, 4]}, "rank_k has 3 ranks"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        XKVConfig(**options).make_cache(MODELS["llama"]())
