"""A2ATS beyond the contract: its quantiser against closed forms, its selection against brute force."""

import dataclasses
import functools
import json

import pytest
import torch
from kv_cache_cases import MODELS, data

from hfext import kv_cache
from hfext.kv_cache import A2ATSConfig
from hfext.kv_cache._codec_layer import marked
from hfext.kv_cache._geometry import geometry
from hfext.kv_cache._query_aware_vq import encode, factor, kmeans, nearest, score_table, spread_out
from hfext.kv_cache._retrieval import at_distance, best, chosen
from hfext.kv_cache.a2ats import A2ATSLayer


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@functools.cache
def calibrated(kind="llama", **fields):
    settings = {"topk": 0.1, "window": 4, "n_sink": 2, "codebook_size": 16, **fields}
    return A2ATSConfig(**settings).calibrate(MODELS[kind](), data(), max_iterations=5)


def inputs(rows=2, pads=(0, 7), tokens=44):
    ids = torch.randint(3, 128, (rows, tokens), generator=seeded(3))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads[:rows]):
        mask[row, :count], ids[row, :count] = 0, 0
    return ids, mask


def greedy(model, ids, mask, **kwargs):
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(ids, attention_mask=mask, **settings, **kwargs)


def given_tokens(rows, steps):
    return torch.randint(3, 128, (rows, steps), generator=seeded(11))


@torch.no_grad()
def stepwise(model, cache, ids, mask, steps=8, given=None):
    """Logits of the last prompt token and of the given tokens, one call each: [rows, 1 + steps, vocabulary]."""
    logits = []
    for new in [ids, *(given_tokens(len(ids), steps) if given is None else given).unbind(1)]:
        new = new.view(len(ids), -1)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1) if logits else mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out = model(new, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits[:, -1:])
    return torch.cat(logits, dim=1)


# -- the quantiser


def test_factor_is_the_cholesky_factor_of_the_normalised_moment_and_its_inverse():
    queries = normal(2, 500, 6).double()
    moment = queries.transpose(1, 2) @ queries
    lower, inverse = factor(moment)
    rms = torch.stack([m.pow(2).mean().sqrt() for m in moment])
    want = moment / rms[:, None, None] + 1e-6 * torch.eye(6)
    torch.testing.assert_close((lower @ lower.transpose(1, 2)).double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lower @ inverse, torch.eye(6).expand(2, 6, 6), atol=1e-5, rtol=0)
    assert torch.equal(lower, lower.tril())
    torch.testing.assert_close(factor(7.0 * moment)[0], lower, atol=1e-5, rtol=0)


def test_a_singular_moment_is_factored():
    one = normal(1, 1, 6)
    lower, inverse = factor(one.transpose(1, 2) @ one)
    assert torch.isfinite(lower).all() and (lower @ inverse - torch.eye(6)).abs().max() < 1e-3


def test_squared_distance_in_the_space_of_l_is_the_error_of_scores():
    queries, keys = normal(1, 400, 5).double(), normal(1, 30, 5, seed=1)
    moment = queries.transpose(1, 2) @ queries
    lower, inverse = factor(moment, epsilon=0.0)
    codebook = normal(1, 4, 5, seed=2) @ lower
    code = encode(keys[None], codebook, lower)[0, 0]
    approximate = score_table(queries[None].float(), codebook, inverse)[0, 0][:, code]
    error = (queries[0].float() @ keys[0].T - approximate).pow(2).sum()
    distance = (keys[0] @ lower[0] - codebook[0, code]).pow(2).sum()
    torch.testing.assert_close(error, distance * moment.pow(2).mean().sqrt().float(), rtol=1e-4, atol=0)
    brute = torch.stack([(keys[0] @ lower[0] - c).pow(2).sum(-1) for c in codebook[0]]).argmin(0)
    assert torch.equal(code, brute)


def test_kmeans_never_gets_worse_and_ends_where_every_centroid_is_the_mean_of_its_points():
    x = torch.cat([normal(2, 40, 3) + c for c in (0.0, 6.0, 12.0)], dim=1)
    centroids, objective = kmeans(x, 9, seeded())
    assert len(objective) > 2 and all(b <= a * (1 + 1e-6) for a, b in zip(objective, objective[1:], strict=False))
    code = nearest(x, centroids)
    for head in range(2):
        for m in range(9):
            mean = x[head][code[head] == m].mean(0)
            torch.testing.assert_close(centroids[head, m], mean, atol=1e-3, rtol=0)
    again, _ = kmeans(x, 9, seeded())
    assert torch.equal(centroids, again)


def test_an_empty_cluster_starts_again_at_the_farthest_point(monkeypatch):
    x = torch.cat([normal(1, 60, 2) * 0.1, torch.tensor([[[50.0, 50.0], [50.1, 50.0]]])], dim=1)
    far = torch.tensor([[[0.0, 0.0], [1e3, 1e3], [-1e3, 1e3]]])
    monkeypatch.setattr("hfext.kv_cache._query_aware_vq.spread_out", lambda *a: far)
    centroids, objective = kmeans(x, 3, seeded())
    assert len(nearest(x, centroids).unique()) == 3
    assert centroids[0].max() < 51 and all(b <= a for a, b in zip(objective, objective[1:], strict=False))


def test_first_centroids_are_different_points():
    x = normal(1, 5, 2).repeat(1, 20, 1)
    first = spread_out(x, 5, seeded())
    assert len(first[0].unique(dim=0)) == 5 and (torch.cdist(first[0], x[0]).min(1).values == 0).all()
    with pytest.raises(ValueError, match="only 5 different keys"):
        spread_out(x, 6, seeded())


def test_codes_keep_products_with_queries_better_than_plain_ones():
    """Anisotropic queries never seen in calibration: at least a tenth less error at the same size."""
    scale = torch.logspace(0.5, -1.5, 16)
    seen, held_out = (normal(1, 2000, 16, seed=s) * scale for s in (1, 2))
    keys, new = normal(1, 3000, 16, seed=3), normal(1, 500, 16, seed=4)
    error = {}
    for name, moment in (("aware", seen.transpose(1, 2) @ seen), ("plain", torch.eye(16)[None])):
        lower, inverse = factor(moment)
        codebook, _ = kmeans(keys @ lower, 32, seeded(), 20)
        table = score_table(held_out[None], codebook, inverse)[0, 0]
        error[name] = (held_out[0] @ new[0].T - table[:, encode(new[None], codebook, lower)[0, 0]]).pow(2).mean()
    assert error["aware"] <= 0.9 * error["plain"]


def test_without_queries_it_is_ordinary_vector_quantisation():
    config = calibrated(query_aware=False)
    keys = normal(1, 2, 9, 8)
    for index in range(3):
        codebook, lower, inverse = config.learnt(index, torch.device("cpu"))
        torch.testing.assert_close(lower / lower[0, 0, 0], torch.eye(8).expand(2, 8, 8), atol=1e-6, rtol=0)
        plain = codebook @ inverse
        want = torch.stack([torch.cdist(keys[0, h], plain[h]).argmin(-1) for h in range(2)])
        assert torch.equal(encode(keys, codebook, lower)[0], want)


# -- scores and selection


@pytest.mark.parametrize("kind", ["llama", "yarn", "glm", "stablelm"])
@pytest.mark.parametrize("partial_scale", [False, True])
def test_score_is_exact_for_keys_at_the_distance_without_code_error(kind, partial_scale):
    """Also where the embedding scales what it turns (yarn), and turns a part of the channels only."""
    fields = {}
    if partial_scale and kind == "stablelm":
        scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
        fields = {"rope_parameters": {**scaled, "partial_rotary_factor": 0.25}}
    shape = geometry(MODELS[kind](**fields))
    rotary, dim = shape.rotary, shape.head_dim
    query, keys = normal(1, 4, 1, dim), normal(1, 2, 6, dim, seed=1)
    place, distance = 40, 13
    cos, sin = rotary.tables(torch.tensor([[place, place - distance]]), torch.float32)
    turned = rotary.rotate(query, cos[:, :1], sin[:, :1])
    want = turned @ rotary.rotate(keys, cos[:, 1:], sin[:, 1:]).repeat_interleave(2, 1).transpose(2, 3)
    lower, inverse = factor(normal(2, 50, dim, seed=2).transpose(1, 2) @ normal(2, 50, dim, seed=2))
    table = score_table(at_distance(query, rotary, distance), keys[0] @ lower, inverse)
    torch.testing.assert_close(table, want, atol=1e-3, rtol=1e-3)


def test_best_takes_the_highest_and_of_equal_ones_the_latest():
    scores = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 2.0, -torch.inf]], [[0.0] + [-torch.inf] * 5]])
    got = best(scores, torch.tensor([3, 2]))
    assert got.tolist() == [[[True, False, False, True, True, False]], [[True] + [False] * 5]]
    random = normal(3, 4, 50).round(decimals=1)
    count = torch.tensor([1, 7, 50])
    got = best(random, count)
    for b in range(3):
        for h in range(4):
            order = sorted(range(50), key=lambda t: (-random[b, h, t].item(), -t))[: count[b]]
            assert got[b, h].nonzero().flatten().tolist() == sorted(order)


def test_window_and_first_tokens_are_always_taken_and_the_rest_is_bounded():
    scores = normal(2, 6, 99)
    real = torch.ones(2, 100, dtype=torch.bool)
    real[1, :30] = False
    for topk in (0.01, 0.1, 0.5):
        marks = chosen(scores, real, 2, topk, window=10, n_sink=4)
        assert marks[:, :, 90:].all() and marks[0, :, :4].all() and marks[1, :, 30:34].all()
        assert not marks[1, :, :30].any()
        for row, tokens in ((0, 100), (1, 70)):
            count = max(1, int(topk * tokens + 1e-9))
            assert (marks[row].sum(-1) <= 10 + 4 + 3 * count).all()
            for head in range(2):
                own = scores[row, 3 * head : 3 * head + 3].clone()
                own[:, 90:] = own[:, :4] = -torch.inf
                if row:
                    own[:, :34] = -torch.inf
                want = set(own.topk(count).indices.flatten().tolist())
                first = 30 if row else 0
                want |= set(range(90, 100)) | set(range(first, first + 4))
                assert set(marks[row, head].nonzero().flatten().tolist()) == want
    assert chosen(scores, real, 2, 1.0, 10, 4).eq(real[:, None]).all()
    assert chosen(scores[:1, :, :2], real[:1, :3], 2, 0.03, 64, 8).all()  # shorter than the window
    hidden = torch.zeros(1, 5, dtype=torch.bool)
    assert chosen(scores[:1, :, :4], hidden, 2, 0.5, 2, 2)[0, 0].tolist() == [False] * 4 + [True]


def test_marked_gives_the_places():
    marks = torch.tensor([[[True, False, True], [False, False, True]], [[False] * 3, [True] * 3]])
    assert marked(marks).tolist() == [[[0, 2, -1], [2, -1, -1]], [[-1, -1, -1], [0, 1, 2]]]


# -- in the model


def selections(model, config, ids, mask, monkeypatch, given):
    """What every layer selected in every step, as sets of places from the end of the text; and the logits."""
    taken = []
    append = A2ATSLayer.append

    def spy(self, keys, values):
        if self.selected is not None:
            total = self.seen + 1
            taken.append([[{total - i for i in head.tolist() if i >= 0} for head in row] for row in self.selected])
        return append(self, keys, values)

    with monkeypatch.context() as patch:
        patch.setattr(A2ATSLayer, "append", spy)
        logits = stepwise(model, config.make_cache(model), ids, mask, given=given)
    return taken, logits


def test_a_step_attends_exactly_to_what_the_codes_rank_highest(monkeypatch):
    """Everything again by hand: codes, scores, union, then a plain model whose mask hides all else."""
    model = MODELS["llama"](num_hidden_layers=1)
    config = A2ATSConfig(topk=0.1, window=4, n_sink=2, codebook_size=16).calibrate(model, data(), max_iterations=5)
    ids, mask = inputs(rows=1, pads=(0,))
    given = given_tokens(1, 1)
    taken, logits = selections(model, config, ids, mask, monkeypatch, given)
    whole = torch.cat([ids, given], dim=1)
    attention = model.model.layers[0].self_attn
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(whole))
    keys = attention.k_proj(x).view(45, 2, 8).transpose(0, 1)
    query = attention.q_proj(x[:, -1]).view(4, 8)
    cos, sin = model.model.rotary_emb(x, torch.tensor([[2048]]))
    half = torch.cat([-query[:, 4:], query[:, :4]], dim=-1)
    query = query * cos[0] + half * sin[0]
    codebook, lower, inverse = config.learnt(0, torch.device("cpu"))
    wanted = []
    for head in range(2):
        code = torch.cdist(keys[head] @ lower[head], codebook[head]).argmin(-1)
        scores = query[2 * head : 2 * head + 2] @ (codebook[head] @ inverse[head])[code].T
        far = range(2, 41)
        union = {0, 1, *range(41, 45)}
        for row in scores:
            union |= set(sorted(far, key=lambda t: (-row[t].item(), -t))[: int(0.1 * 45)])
        wanted.append({45 - t for t in union})
    assert taken[0][0] == wanted
    hidden = torch.full((1, 4, 45, 45), -1e30).triu(1)
    for head in range(4):
        hidden[0, head, -1] = -1e30
        hidden[0, head, -1, [45 - t for t in wanted[head // 2]]] = 0
    want = model(whole, attention_mask=hidden).logits[:, -1]
    torch.testing.assert_close(logits[:, 1], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "yarn"])
def test_rows_of_a_padded_batch_select_what_they_select_alone(kind, monkeypatch):
    model, config = MODELS[kind](), calibrated(kind)
    ids, mask = inputs(pads=(7, 7))
    ids[0, :7], mask[0, :7] = 5, 1
    given = given_tokens(2, 6)
    both, logits = selections(model, config, ids, mask, monkeypatch, given)
    for row, first in ((0, 0), (1, 7)):
        rows = slice(row, row + 1)
        taken, alone = selections(model, config, ids[rows, first:], mask[rows, first:], monkeypatch, given[rows])
        assert [step[0] for step in taken] == [step[row] for step in both] and len(taken) == 3 * 6
        torch.testing.assert_close(alone[0], logits[row], atol=1e-4, rtol=0)
    assert all(len(head) < 30 for step in both for row in step for head in row)


def test_calls_of_several_tokens_attend_to_everything():
    model, config = MODELS["llama"](), calibrated()
    ids, mask = inputs(pads=(0, 7))
    cache, plain = config.make_cache(model), model(ids, attention_mask=mask).past_key_values
    more, longer = ids[:, :5], torch.cat([mask, torch.ones_like(ids[:, :5])], dim=1)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        got, want = (model(more, attention_mask=longer, past_key_values=c).logits for c in (cache, plain))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_prompt_lookup_leaves_the_codes_of_the_kept_tokens():
    model, config = MODELS["llama"](), calibrated(topk=1.0)
    ids = inputs(rows=1, pads=(0,))[0].repeat(1, 2)
    want = greedy(model, ids, torch.ones_like(ids))
    cache = config.make_cache(model)
    got = greedy(model, ids, torch.ones_like(ids), past_key_values=cache, prompt_lookup_num_tokens=4)
    assert torch.equal(got, want)
    for layer in cache.layers:
        assert layer.held["codes"].shape == (1, 2, layer.seen) and layer.store.seen == layer.seen
    fresh = config.make_cache(model)
    with torch.no_grad():
        model(got[:, : cache.get_seq_length()], past_key_values=fresh)
    for a, b in zip(cache.layers, fresh.layers, strict=True):
        assert (a.held["codes"] == b.held["codes"]).float().mean() > 0.99


@pytest.mark.parametrize("storage", ["rotatekv", "turboquant"])
def test_selected_rows_of_a_storage_are_those_of_the_whole(storage, monkeypatch):
    """Over other codecs: what the attention gets is what decoding everything gives, gathered."""
    inner = {
        "rotatekv": kv_cache.RotateKVConfig(bits=4, group_size=8, sink_topk=2, residual_length=6),
        "turboquant": kv_cache.TurboQuantConfig(bits=4, residual_length=2),
    }[storage]
    model = MODELS["llama"]()
    config = dataclasses.replace(calibrated(), storage=inner)
    checked = []
    append = A2ATSLayer.append

    def spy(self, keys, values):
        index = self.selected
        if index is None:
            return append(self, keys, values)
        old = self.decompressed()
        out = append(self, keys, values)
        for side, whole, new in zip(out, old, (keys, values), strict=True):
            rows = torch.cat([whole, new], dim=2).gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, 8))
            real = (index >= 0)[..., None]
            torch.testing.assert_close(side * real, rows * real, atol=1e-5, rtol=0)
            checked.append(int(real.sum()))
        return out

    monkeypatch.setattr(A2ATSLayer, "append", spy)
    stepwise(model, config.make_cache(model), *inputs())
    assert len(checked) == 2 * 3 * 8


def test_bytes_are_those_of_keys_values_codes_and_positions():
    model = MODELS["llama"]()
    ids, mask = inputs(rows=1, pads=(0,))
    for size, width in ((16, 1), (300, 2)):
        config = A2ATSConfig(window=8, codebook_size=size, offload=True)
        config = config.calibrate(model, data(rows=8), max_iterations=1)
        cache = config.make_cache(model)
        stepwise(model, cache, ids, mask, steps=5)
        tokens = 44 + 5
        assert cache.nbytes() == 3 * (2 * 2 * 8 * 4 * tokens + 2 * width * tokens) + 4 * tokens
        for layer in cache.layers:  # 44 - 8 left at the prompt's end, none since
            recent = layer.held["key_recent"].shape[2]
            assert recent == 8 + 5 and layer.store.home == torch.device("cpu")
            assert layer.device_nbytes() == 2 * 2 * 8 * 4 * recent + 2 * width * tokens


def test_offload_moves_nothing_back_that_belongs_to_the_host():
    model, config = MODELS["llama"](), calibrated(offload=True)
    cache = config.make_cache(model)
    stepwise(model, cache, *inputs(), steps=2)
    layer = cache.layers[0]
    layer.device = torch.device("meta")
    layer.prefetch()
    on_meta = {name for name, x in layer.held.items() if x.is_meta}
    assert on_meta == {"codes", "key_recent", "value_recent"}


def test_calibrated_storage_travels_with_the_config(tmp_path):
    model = MODELS["llama"]()
    inner = kv_cache.RotateKVConfig(bits=4, group_size=8).calibrate(model, data())
    config = A2ATSConfig(codebook_size=8, storage=inner).calibrate(model, data(), max_iterations=2)
    assert torch.equal(config.stored_by().calibration.layer(1, "key_order"), inner.calibration.layer(1, "key_order"))
    config.save_pretrained(tmp_path)
    again = kv_cache.KVCacheConfig.from_pretrained(tmp_path)
    assert again == config and isinstance(again.storage, kv_cache.RotateKVConfig) and again.storage.bits == 4
    assert again.stored_by().calibration.digest == inner.calibration.digest
    assert A2ATSConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    late = dataclasses.replace(A2ATSConfig(codebook_size=8, storage=inner), calibration=calibrated().calibration)
    with pytest.raises(ValueError, match="calibrate A2ATSConfig again"):
        late.make_cache(model)


def test_what_does_not_fit_is_named():
    model = MODELS["llama"]()
    for fields, told in (
        ({"topk": 0.0}, "topk is 0.0"),
        ({"topk": 1.5}, "topk is 1.5"),
        ({"window": 0}, "window is 0"),
        ({"n_sink": -1}, "n_sink is -1"),
        ({"codebook_size": 1}, "codebook_size is 1"),
        ({"codebook_size": 40000}, "codebook_size is 40000"),
        ({"distance": -1}, "distance is -1"),
        ({"storage": {"method": "rotatkv"}}, "Did you mean 'rotatekv'"),
    ):
        with pytest.raises(ValueError, match=told):
            A2ATSConfig(**fields)
    with pytest.raises(ValueError, match="codebook_size is 200 but .* only 160 tokens"):
        A2ATSConfig(codebook_size=200).calibrate(model, data())
    with pytest.raises(ValueError, match="codebook_size is 40 but .* different keys"):
        A2ATSConfig(codebook_size=40, n_sink=0).calibrate(model, torch.full((4, 12), 5))
    for inner in (kv_cache.KIVIConfig(group_size=8), kv_cache.SnapKVConfig()):
        with pytest.raises(ValueError, match="codes every token by itself"):
            A2ATSConfig(codebook_size=8, storage=inner).calibrate(model, data())
    with pytest.raises(ValueError, match="max_iterations"):
        A2ATSConfig(codebook_size=8).calibrate(model, data(), max_iterations=0)
    config = calibrated()
    broken = dict(config.calibration.tensors)
    broken["1.inv_chol"] = broken["1.inv_chol"] * 2
    about = config.calibration
    wrong = dataclasses.replace(config, calibration=kv_cache._calibration.Calibration(broken, about.facts, 1))
    with pytest.raises(ValueError, match="1.chol and 1.inv_chol"):
        wrong.make_cache(model)
    cache = config.make_cache(model)
    stepwise(model, cache, *inputs(), steps=1)
    cache.shared.attention = "flash_attention_2"
    with pytest.raises(NotImplementedError, match="sdpa"):
        cache.layers[0].mask(1, torch.float32)


def test_a_finished_step_leaves_no_selection():
    model, config = MODELS["llama"](), calibrated()
    cache = config.make_cache(model)
    stepwise(model, cache, *inputs(), steps=2)
    for layer in cache.layers:
        assert layer.selected is None and layer.store.wanted is None
        layer.selected = torch.zeros(2, 2, 3, dtype=torch.long)  # as an interrupted call would leave
        assert layer.get_mask_sizes(4) == (50, 0)
