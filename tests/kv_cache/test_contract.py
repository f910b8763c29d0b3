"""What every compressed cache must do, over the list of `kv_cache_cases.py`."""

import copy
import gc

import pytest
import torch
import transformers
from kv_cache_cases import CASES, MODELS
from transformers import AutoModelForCausalLM, DynamicCache

from hfext import kv_cache
from hfext.kv_cache._cache import CompressedLayer

PROMPT, NEW = 44, 12
every_case = pytest.mark.parametrize("name", CASES)


def inputs(rows=2, pads=(0, 7), tokens=PROMPT, seed=3):
    ids = torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads[:rows]):
        mask[row, :count], ids[row, :count] = 0, 0
    return ids, mask


def greedy(model, ids, mask, **kwargs):
    settings = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(ids, attention_mask=mask, **{**settings, **kwargs})


@torch.no_grad()
def stepwise(model, cache, ids, mask, steps=8, seed=11):
    """Logits of the last prompt token and of `steps` given tokens, one call each: [rows, 1 + steps, vocabulary]."""
    given = torch.randint(3, 128, (len(ids), steps), generator=torch.Generator().manual_seed(seed))
    logits = []
    for new in [ids, *given.unbind(1)]:
        new = new.view(len(ids), -1)
        if logits:
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out = model(new, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits[:, -1:])
    return torch.cat(logits, dim=1)


def fresh(model):
    return DynamicCache(config=model.config)


@every_case
@pytest.mark.parametrize("kind", MODELS)
def test_lossless_limit_equals_a_plain_cache(name, kind):
    model = MODELS[kind]()
    config = CASES[name].lossless(model)
    ids, mask = inputs()
    want = stepwise(model, fresh(model), ids, mask)
    torch.testing.assert_close(stepwise(model, config.make_cache(model), ids, mask), want, atol=1e-4, rtol=0)


@every_case
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 9},
        {"prompt_lookup_num_tokens": 4, "rows": 1},
        {"tokens": 1},
    ],
    ids=lambda s: next(iter(s), "greedy"),
)
def test_lossless_limit_generates_the_same_tokens(name, settings):
    model = MODELS["llama"]()
    config = CASES[name].lossless(model)
    settings = dict(settings)
    ids, mask = inputs(
        rows=settings.pop("rows", 2),
        pads=(0, 0) if "tokens" in settings else (0, 7),
        tokens=settings.pop("tokens", PROMPT),
    )
    want = greedy(model, ids, mask, **settings)
    kv_cache.apply(model, config)
    out = greedy(model, ids, mask, **settings, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, kv_cache.CompressedCache)
    assert torch.equal(out.sequences, want)


@every_case
def test_sampling_several_sequences_at_the_lossless_limit(name):
    model = MODELS["llama"]()
    config = CASES[name].lossless(model)
    ids, mask = inputs()
    runs = []
    for use in (False, True):
        if use:
            kv_cache.apply(model, config)
        torch.manual_seed(0)
        runs.append(greedy(model, ids, mask, do_sample=True, num_return_sequences=3))
    assert torch.equal(*runs)


@every_case
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_row_of_a_padded_batch_equals_the_row_alone(name, kind):
    model = MODELS[kind]()
    config = CASES[name].lossy(model)
    ids, mask = inputs()
    together = stepwise(model, config.make_cache(model), ids, mask)
    alone = stepwise(model, config.make_cache(model), ids[1:, 7:], mask[1:, 7:])
    # the given tokens of a single row are those of row 0
    given = stepwise(model, config.make_cache(model), ids[:1], mask[:1])
    torch.testing.assert_close(together[:1], given, atol=1e-3, rtol=0)
    torch.testing.assert_close(together[1:, 0], alone[:, 0], atol=1e-3, rtol=0)


@every_case
def test_padding_of_a_row_changes_nothing_later(name):
    """Row 1 of a padded batch and the row alone, both continued by the same tokens."""
    model = MODELS["llama"]()
    config = CASES[name].lossy(model)
    ids, mask = inputs(pads=(7, 7))
    padded = stepwise(model, config.make_cache(model), ids, mask)
    bare = stepwise(model, config.make_cache(model), ids[:, 7:], mask[:, 7:])
    torch.testing.assert_close(padded, bare, atol=1e-3, rtol=0)


@every_case
def test_lossy_setting_loses_something(name):
    model = MODELS["llama"]()
    ids, mask = inputs()
    want = stepwise(model, fresh(model), ids, mask)
    got = stepwise(model, CASES[name].lossy(model).make_cache(model), ids, mask)
    torch.testing.assert_close(got[:, 0], want[:, 0], atol=1e-5, rtol=0)  # the prompt itself is attended to exactly
    assert (got - want)[:, 1:].abs().max() > 1e-4


@every_case
@pytest.mark.parametrize("setting", ["lossless", "lossy"])
def test_lengths_agree_at_every_step_and_layer(name, setting, monkeypatch):
    model = MODELS["llama"]()
    cache = getattr(CASES[name], setting)(model).make_cache(model)
    ids, mask = inputs()
    announced, returned = [], []
    update = CompressedLayer.update

    def spy(self, keys, values, *args, **kwargs):
        announced.append((self.layer_idx, self.get_mask_sizes(keys.shape[2])[0]))
        out = update(self, keys, values, *args, **kwargs)
        returned.append((self.layer_idx, out[0].shape[2]))
        assert out[0].shape[2] == out[1].shape[2]
        return out

    monkeypatch.setattr(CompressedLayer, "update", spy)
    stepwise(model, cache, ids, mask, steps=3)
    assert announced == returned
    assert [layer.get_seq_length() for layer in cache.layers] == [
        PROMPT + 3
    ] * 3 and cache.get_seq_length() == PROMPT + 3


def reachable(root):
    """Storages of every tensor that a cache holds, found by walking its objects and not by asking it."""
    seen, todo, storages = set(), [root], {}
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, torch.nn.Module | type) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            todo += list(item.values())
        elif isinstance(item, list | tuple | set):
            todo += list(item)
        elif type(item).__module__.startswith("hfext.kv_cache") and not isinstance(item, kv_cache.KVCacheConfig):
            todo += list(vars(item).values())
    return sum(storages.values())


@every_case
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_nothing_is_held_that_is_not_counted(name, kind):
    model = MODELS[kind]()
    cache = CASES[name].lossy(model).make_cache(model)
    ids, mask = inputs()
    for steps in (0, 3, 9):
        cache.reset()
        stepwise(model, cache, ids, mask, steps=steps)
        assert reachable(cache) <= cache.nbytes() + 64, steps


@every_case
def test_reload_generates_the_same_tokens(name, tmp_path):
    model = MODELS["llama"]()
    config = CASES[name].lossy(model)
    ids, mask = inputs()
    kv_cache.apply(model, config)
    want = greedy(model, ids, mask, max_new_tokens=24)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(greedy(again, ids, mask, max_new_tokens=24), want)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    if config.calibration is not None:
        loaded = half.config.quantization_config.kv_cache.calibration.tensors
        assert all(torch.equal(x, loaded[key]) for key, x in config.calibration.tensors.items())
    config.save_pretrained(tmp_path)
    sidecar = kv_cache.KVCacheConfig.from_pretrained(tmp_path)
    kv_cache.remove(model)
    assert torch.equal(greedy(kv_cache.apply(model, sidecar), ids, mask, max_new_tokens=24), want)


@every_case
def test_given_to_from_pretrained(name, tmp_path):
    model = MODELS["llama"]()
    config = CASES[name].lossy(model)
    ids, mask = inputs()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    want = greedy(kv_cache.apply(model, config), ids, mask)
    assert torch.equal(greedy(loaded, ids, mask), want)


@every_case
def test_saved_prompt_continues_as_before(name, tmp_path):
    model = MODELS["llama"]()
    config = CASES[name].lossy(model)
    ids, mask = inputs()
    cache = config.make_cache(model)
    stepwise(model, cache, ids, mask, steps=2)
    cache.save(tmp_path / "prompt.safetensors")
    again = config.load_cache(model, tmp_path / "prompt.safetensors")
    assert again.nbytes() == cache.nbytes()
    more = torch.tensor([[5, 6, 7], [8, 9, 10]])
    longer = torch.cat([mask, torch.ones(2, 2 + 3, dtype=mask.dtype)], dim=1)
    with torch.no_grad():
        a, b = (model(more, attention_mask=longer, past_key_values=c).logits for c in (cache, again))
    assert torch.equal(a, b)
    raw = (tmp_path / "prompt.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="not a whole"):
        config.load_cache(model, tmp_path / "cut.safetensors")


@every_case
def test_prefix_is_reused_in_a_second_call(name):
    """A filled cache given to `generate` again, at the lossless limit."""
    model = MODELS["llama"]()
    config = CASES[name].lossless(model)
    ids, mask = inputs()
    first = greedy(model, ids, mask)
    more = torch.cat([first, torch.tensor([[9, 9, 8], [4, 5, 6]])], dim=1)
    longer = torch.cat([mask, torch.ones(2, more.shape[1] - PROMPT, dtype=mask.dtype)], dim=1)
    want = greedy(model, more, longer)
    cache = config.make_cache(model)
    assert torch.equal(greedy(model, ids, mask, past_key_values=cache), first)
    kept = copy.deepcopy(cache)
    assert torch.equal(greedy(model, more, longer, past_key_values=cache), want)
    assert torch.equal(greedy(model, more, longer, past_key_values=kept), want)


@every_case
def test_rows_are_reordered_repeated_and_selected(name):
    model = MODELS["llama"]()
    cache = CASES[name].lossy(model).make_cache(model)
    ids, mask = inputs()
    stepwise(model, cache, ids, mask, steps=2)
    new = torch.tensor([[5], [6]])
    longer = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], dim=1)
    rows = torch.tensor([1, 0, 1])

    @torch.no_grad()
    def run(changed, pick):
        positions = (longer.cumsum(-1) - 1)[:, -1:]
        return model(
            new[pick], attention_mask=longer[pick], position_ids=positions[pick], past_key_values=changed
        ).logits

    want = run(copy.deepcopy(cache), torch.tensor([0, 1]))
    for change in ("reorder_cache", "batch_select_indices"):
        changed = copy.deepcopy(cache)
        getattr(changed, change)(rows)
        torch.testing.assert_close(run(changed, rows), want[rows], atol=1e-5, rtol=0)
    changed = copy.deepcopy(cache)
    changed.batch_repeat_interleave(2)
    twice = torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(run(changed, twice), want[twice], atol=1e-5, rtol=0)


@every_case
def test_reset_begins_anew(name):
    model = MODELS["llama"]()
    cache = CASES[name].lossy(model).make_cache(model)
    ids, mask = inputs()
    want = stepwise(model, cache, ids, mask)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0
    assert torch.equal(stepwise(model, cache, ids, mask), want)


@every_case
def test_crop_is_exact_or_refused(name):
    model = MODELS["llama"]()
    config = CASES[name].lossy(model)
    ids, mask = inputs(pads=(0, 0))
    cache, other = config.make_cache(model), config.make_cache(model)
    for one in (cache, other):
        stepwise(model, one, ids, mask, steps=3)
    drafts = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    longer = torch.ones(2, PROMPT + 3 + 4, dtype=mask.dtype)
    before = {i: {k: v.clone() for k, v in layer.held.items()} for i, layer in enumerate(cache.layers)}
    if not cache.is_croppable:
        with pytest.raises(NotImplementedError, match="Assisted"):
            cache.activate_past_recording()
        with pytest.raises(NotImplementedError, match="taken back"):
            cache.crop(-2)
        assert all(torch.equal(v, cache.layers[i].held[k]) for i, kept in before.items() for k, v in kept.items())
        return
    cache.activate_past_recording()
    with torch.no_grad():
        model(drafts, attention_mask=longer, past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == PROMPT + 3
        again = model(drafts[:, :1], attention_mask=longer[:, : PROMPT + 4], past_key_values=cache).logits
        want = model(drafts[:, :1], attention_mask=longer[:, : PROMPT + 4], past_key_values=other).logits
    torch.testing.assert_close(again, want, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="more than"):
        cache.crop(-1000)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(2)


@every_case
def test_what_is_stored_never_changes(name):
    """Codes of old tokens are bitwise the same after new tokens have come."""
    if CASES[name].evicts:
        pytest.skip("tokens leave this cache")
    model = MODELS["llama"]()
    cache = CASES[name].lossy(model).make_cache(model)
    ids, mask = inputs()
    stepwise(model, cache, ids, mask, steps=2)
    before = [{k: v.clone() for k, v in layer.held.items() if "recent" not in k} for layer in cache.layers]
    longer = torch.cat([mask, torch.ones(2, 2 + 9, dtype=mask.dtype)], dim=1)
    with torch.no_grad():
        model(ids[:, :9], attention_mask=longer, past_key_values=cache)
    assert any(before)
    for old, layer in zip(before, cache.layers, strict=True):
        for key, tensor in old.items():
            now = layer.held[key]
            assert torch.equal(now[tuple(slice(n) for n in tensor.shape)], tensor), key


@every_case
def test_training_and_plain_forwards_are_untouched(name):
    model = MODELS["llama"]()
    config = CASES[name].lossy(model)
    ids, mask = inputs()
    plain = copy.deepcopy(model).train()
    kv_cache.apply(model, config)
    model.train()
    for one in (model, plain):
        one.zero_grad()
        one(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    model.eval(), plain.eval()
    off = dict(attention_mask=mask, use_cache=False)
    assert torch.equal(model(ids, **off).logits, plain(ids, **off).logits)
    stock = greedy(model, ids, mask, past_key_values=fresh(model))
    assert torch.equal(stock, greedy(plain, ids, mask))


@every_case
def test_bfloat16(name):
    model = MODELS["llama"]().to(torch.bfloat16)
    config = CASES[name].lossless(model)
    ids, mask = inputs()
    want = stepwise(model, fresh(model), ids, mask).float()
    got = stepwise(model, config.make_cache(model), ids, mask).float()
    assert (got - want).abs().max() < 0.05 * want.abs().max()


@every_case
def test_eager_attention_equals_sdpa(name):
    model = MODELS["llama"]()
    config = CASES[name].lossy(model)
    ids, mask = inputs()
    want = stepwise(model, config.make_cache(model), ids, mask)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(stepwise(model, config.make_cache(model), ids, mask), want, atol=1e-4, rtol=0)


@every_case
def test_apply_twice_is_once_and_remove_leaves_nothing(name):
    model = MODELS["llama"]()
    config = CASES[name].lossy(model)
    ids, mask = inputs()
    want = greedy(model, ids, mask)
    before = {key: len(vars(m)["_forward_pre_hooks"]) for key, m in model.named_modules()}
    attributes = set(vars(model))
    kv_cache.apply(kv_cache.apply(model, config), config)
    hooks = sum(len(vars(m)["_forward_pre_hooks"]) for m in model.modules())
    kv_cache.apply(model, config)
    assert sum(len(vars(m)["_forward_pre_hooks"]) for m in model.modules()) == hooks
    copied = copy.deepcopy(model)
    assert torch.equal(greedy(copied, ids, mask), greedy(model, ids, mask))
    kv_cache.remove(model)
    assert {key: len(vars(m)["_forward_pre_hooks"]) for key, m in model.named_modules()} == before
    assert set(vars(model)) - attributes <= {"hf_quantizer", "is_quantized"}
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(greedy(model, ids, mask), want)


@every_case
def test_no_cache_stays_alive(name):
    model = MODELS["llama"]()
    kv_cache.apply(model, CASES[name].lossy(model))
    ids, mask = inputs()
    gc.collect()
    gc.disable()
    try:
        greedy(model, ids, mask)
        assert not any(isinstance(item, kv_cache.CompressedCache) for item in gc.get_objects())
    finally:
        gc.enable()


@every_case
def test_bad_use_is_named(name):
    model = MODELS["llama"]()
    config = CASES[name].lossy(model)
    ids, mask = inputs()
    with pytest.raises(TypeError, match="no option 'bitts'"):
        type(config)(bitts=2)
    values = {**config.to_dict(), "nonsense": 1}
    with pytest.raises(TypeError, match="nonsense"):
        kv_cache.KVCacheConfig.from_dict(values)
    kv_cache.apply(model, config)
    right = mask.flip(1)
    with pytest.raises(ValueError, match="padded on the right"):
        greedy(model, ids, right)
    with pytest.raises(ValueError, match="already uses"):
        kv_cache.apply(model, kv_cache.KIVIConfig(bits=8, group_size=2, residual_length=4))
    if config.calibration is not None:
        other = MODELS["llama"](num_hidden_layers=2)
        with pytest.raises(ValueError, match="another model"):
            kv_cache.apply(other, config)
        bare = copy.copy(config)
        bare.calibration = None
        if not bare.calibration_optional:
            with pytest.raises(ValueError, match="not calibrated"):
                kv_cache.apply(other, bare)


@every_case
def test_json_form_is_read_back(name):
    model = MODELS["llama"]()
    config = CASES[name].lossy(model)
    values = transformers.AutoConfig.for_model("llama", quantization_config=config).to_dict()["quantization_config"]
    again = kv_cache.KVCacheConfig.from_dict(values)
    assert again == config and type(again) is type(config)
