import pytest
import torch
from kv_cache_cases import MODELS

from hfext.kv_cache._attention_mass import attention_mass, group_mean
from hfext.kv_cache.h2o import H2OConfig

TEXT, PROMPT, PADS = 36, 30, (0, 9)


def padded(tokens=TEXT, pads=PADS, seed=5):
    ids = torch.randint(3, 128, (len(pads), tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count], ids[row, :count] = 0, 0
    return ids, mask


@torch.no_grad()
def feed(model, cache, ids, mask, calls):
    """The text in calls of these lengths."""
    start = 0
    for count in calls:
        stop = start + count
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
        start = stop


@torch.no_grad()
def eager_attention(model, ids):
    """Probabilities of a text without padding: one [heads, tokens, tokens] per layer."""
    model.set_attn_implementation("eager")
    found = model(ids[None], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    return [a[0] for a in found]


@pytest.mark.parametrize("block", [None, 1, 5, 100])
def test_mass_is_the_column_sum_of_softmax_attention(block):
    g = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 4, 6, 8, generator=g), torch.randn(2, 2, 11, 8, generator=g)
    visible = torch.ones(2, 1, 11, dtype=torch.bool)
    visible[1, :, :3] = visible[1, :, 6] = False
    got = attention_mass(queries, keys, visible, scale=0.3, softcap=2.0, block=block)
    for row in range(2):
        for head in range(4):
            want = torch.zeros(11)
            for i in range(6):
                if not visible[row, 0, 5 + i]:
                    continue
                seen = [t for t in range(6 + i) if visible[row, 0, t]]
                logits = torch.stack([queries[row, head, i] @ keys[row, head // 2, t] * 0.3 for t in seen])
                want[seen] += (2.0 * torch.tanh(logits / 2.0)).softmax(0)
            torch.testing.assert_close(got[row, head], want)
    torch.testing.assert_close(group_mean(got, 2)[:, 1], (got[:, 2] + got[:, 3]) / 2)


@pytest.mark.parametrize("calls", [(PROMPT,), (7, 20, 3)])
def test_scores_of_a_prompt_are_column_sums_of_eager_attention(calls):
    model = MODELS["qwen3"]()
    ids, mask = padded(PROMPT)
    cache = H2OConfig().make_cache(model)
    cache.shared.prompt_length = PROMPT
    feed(model, cache, ids, mask, calls)
    for row, pad in enumerate(PADS):
        for layer, attention in zip(cache.layers, eager_attention(model, ids[row, pad:]), strict=True):
            got = layer.held["kept_mass"][row]
            assert (got[:, :pad] == 0).all()
            torch.testing.assert_close(got[:, pad:], attention.sum(1).view(2, 2, -1).mean(1), atol=1e-5, rtol=1e-4)


def brute_force(attention, prompt, text, heavy, recent):
    """Tokens kept by each KV head of a one-layer model after every token from the prompt's end on."""
    history = []
    kept = [list(range(prompt)) for _ in range(2)]
    score = attention[:, :prompt, :prompt].sum(1).view(2, 2, -1).mean(1)
    score = [dict(enumerate(row.tolist())) for row in score]
    for now in range(prompt, text + 1):
        for head in range(2):
            count_recent = round(recent * now) if isinstance(recent, float) else recent
            count = count_recent + (round(heavy * now) if isinstance(heavy, float) else heavy)
            while len(kept[head]) > count:
                movable = kept[head][: len(kept[head]) - count_recent]
                kept[head].remove(min(movable, key=lambda t: score[head][t]))
        history.append([list(k) for k in kept])
        for head in range(2) if now < text else ():
            seen = kept[head] + [now]
            share = attention[2 * head : 2 * head + 2, now, seen]
            share = (share / share.sum(-1, keepdim=True)).mean(0)
            for t, value in zip(seen, share.tolist(), strict=True):
                score[head][t] = score[head].get(t, 0) + value
            kept[head] = seen
    return history


@pytest.mark.parametrize(("heavy", "recent"), [(6, 4), (0.2, 0.25), (0, 5), (7, 0)])
def test_every_step_keeps_what_a_simulation_keeps(heavy, recent):
    model = MODELS["llama"](num_hidden_layers=1)
    ids, mask = padded()
    cache = H2OConfig(heavy=heavy, recent=recent).make_cache(model)
    want = [
        brute_force(eager_attention(model, ids[row, pad:])[0], PROMPT - pad, TEXT - pad, heavy, recent)
        for row, pad in enumerate(PADS)
    ]
    for step in range(TEXT - PROMPT + 1):
        if step == 0:
            feed(model, cache, ids, mask, (PROMPT,))
            cache.finish_prefill()
        else:
            stop = PROMPT + step
            with torch.no_grad():
                model(
                    ids[:, stop - 1 : stop],
                    attention_mask=mask[:, :stop],
                    position_ids=(mask.cumsum(-1) - 1)[:, stop - 1 : stop],
                    past_key_values=cache,
                )
        for row, pad in enumerate(PADS):
            for head in range(2):
                index = cache.layers[0].held["kept_index"][row, head]
                assert (index[index >= 0] - pad).tolist() == want[row][step][head], (step, row, head)


def test_a_row_with_fewer_tokens_than_the_budget_keeps_all():
    model = MODELS["llama"]()
    ids, mask = padded(PROMPT, pads=(0, 24))
    cache = H2OConfig(heavy=8, recent=6).make_cache(model)
    feed(model, cache, ids, mask, (PROMPT,))
    cache.finish_prefill()
    for layer in cache.layers:
        assert layer.held["kept_keys"].shape[2] == 14
        assert layer.filled[0].all()
        assert (layer.held["kept_index"][1].long() == torch.tensor([-1] * 8 + list(range(24, 30)))).all()


def test_bytes_are_those_of_the_kept_tokens():
    model = MODELS["llama"]()
    ids, mask = padded(PROMPT, pads=(0, 0))
    cache = H2OConfig(heavy=8, recent=6).make_cache(model)
    feed(model, cache, ids, mask, (PROMPT,))
    cache.finish_prefill()
    keys_and_values, index_and_mass = 2 * 8 * 4, 4 + 4
    slots = 3 * 2 * 2 * 14
    counts = 3 * 2 * 8
    assert cache.nbytes() == slots * (keys_and_values + index_and_mass) + counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heavy": -1}, "heavy is -1"),
        ({"recent": 1.5}, "recent is 1.5"),
        ({"heavy": 0, "recent": 0.0}, "both 0"),
        ({"heavy": "many"}, "heavy is 'many'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        H2OConfig(**options)


def test_a_cache_without_its_model_is_refused():
    cache = H2OConfig().make_cache(MODELS["llama"]())
    with pytest.raises(RuntimeError, match="make_cache"):
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
