import pytest
import torch
from kv_cache_cases import MODELS

from hfext.kv_cache.streamingllm import StreamingLLMConfig

PROMPT, PADS, SINKS, WINDOW = 30, (0, 8), 3, 9


def padded(tokens, pads=PADS, seed=8):
    ids = torch.randint(3, 128, (len(pads), tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count], ids[row, :count] = 0, 0
    return ids, mask


@pytest.mark.parametrize("reposition", [True, False])
@pytest.mark.parametrize("kind", ["llama", "glm", "stablelm", "yarn"])
def test_logits_of_one_layer_are_those_of_the_kept_text(kind, reposition):
    """Keys of one layer depend on their tokens alone, so a fresh forward of the kept tokens says what is right."""
    model = MODELS[kind](num_hidden_layers=1)
    calls = (PROMPT, 1, 1, 3, 1)
    ids, mask = padded(sum(calls))
    cache = StreamingLLMConfig(window=WINDOW, sinks=SINKS, reposition=reposition).make_cache(model)
    start = 0
    kept = [list(range(pad, PROMPT)) for pad in PADS]
    with torch.no_grad():
        for count in calls:
            stop = start + count
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
            got = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache
            ).logits
            for row, pad in enumerate(PADS) if start else ():
                seen = kept[row][:SINKS] + kept[row][-WINDOW:] + list(range(start, stop))
                where = range(len(seen)) if reposition else [t - pad for t in seen]
                # with a mask, or gaps between positions would be read as the ends of packed texts
                ones = torch.ones(1, len(seen))
                alone = model(
                    ids[row, seen][None],
                    attention_mask=ones,
                    position_ids=torch.tensor([list(where)]),
                    use_cache=False,
                ).logits
                torch.testing.assert_close(got[row], alone[0, -count:], atol=2e-5, rtol=1e-4)
                kept[row] = seen
            start = stop
    for row in range(2):
        assert cache.layers[0].held["kept_index"][row, 0].tolist() == kept[row][:SINKS] + kept[row][-WINDOW:]


def test_a_share_holds_sinks_and_latest_tokens():
    model = MODELS["llama"]()
    ids, mask = padded(PROMPT)
    cache = StreamingLLMConfig(window=0.5, sinks=4).make_cache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.finish_prefill()
    for layer in cache.layers:
        rows = [index[index >= 0].tolist() for index in layer.held["kept_index"][:, 0]]
        assert rows == [[0, 1, 2, 3, *range(19, 30)], [8, 9, 10, 11, *range(23, 30)]]
        assert layer.held["kept_index"].shape[1] == 1  # one index for all heads


def test_a_short_row_keeps_everything_while_it_fits():
    model = MODELS["llama"]()
    ids, mask = padded(PROMPT, pads=(0, 25))
    cache = StreamingLLMConfig(window=WINDOW, sinks=SINKS).make_cache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.finish_prefill()
    index = cache.layers[0].held["kept_index"][1, 0]
    assert index.tolist() == [-1] * 7 + [25, 26, 27, 28, 29]


def test_positions_within_the_cache_matter_once_tokens_have_left():
    model = MODELS["llama"]()
    ids, mask = padded(PROMPT + 1, pads=(0, 0))
    logits = []
    for reposition in (True, False):
        cache = StreamingLLMConfig(window=WINDOW, sinks=SINKS, reposition=reposition).make_cache(model)
        with torch.no_grad():
            model(ids[:, :PROMPT], past_key_values=cache)
            logits.append(model(ids[:, PROMPT:], past_key_values=cache).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_models_without_a_rotary_embedding_keep_their_positions(tiny_gpt2):
    model = tiny_gpt2(n_layer=1)
    with pytest.raises(ValueError, match="reposition=False"):
        StreamingLLMConfig().make_cache(model)
    ids, _ = padded(PROMPT + 1, pads=(0,))
    cache = StreamingLLMConfig(window=WINDOW, sinks=SINKS, reposition=False).make_cache(model)
    seen = [*range(SINKS), *range(PROMPT - WINDOW, PROMPT + 1)]
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        got = model(ids[:, PROMPT:], past_key_values=cache).logits[0, -1]
        want = model(
            ids[:, seen],
            attention_mask=torch.ones(1, len(seen)),
            position_ids=torch.tensor([seen]),
            use_cache=False,
        ).logits[0, -1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 0}, "window is 0"), ({"window": 1.2}, "window is 1.2"), ({"sinks": -1}, "sinks is -1")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        StreamingLLMConfig(**options)
