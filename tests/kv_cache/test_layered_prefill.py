"""Layered prefill: exact for every number of groups, a scheduler that never stalls, and its cost model."""

import math

import pytest
import torch
import transformers
from transformers import DynamicCache

from hfext import recipe
from hfext.experiments import _smollm2
from hfext.experiments.layered_prefill_costs import OWN, SIZE, Config, expert_loads, tiny
from hfext.kv_cache._layered_forward import CHECKED, partition
from hfext.kv_cache._prefill_costs import Arrival, ServerModel, Work, iteration_cost, prefill_work, simulate
from hfext.kv_cache.layered_prefill import (
    LayeredPrefillConfig,
    LayeredPrefillEngine,
    LayeredPrefillScheduler,
    group_count,
    layered_prefill,
)

LAYERS = 4
EXTRA = {
    **OWN,
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4},
    "olmo3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "gemma": {"head_dim": 8},
    "glm4": {"head_dim": 8},
}


def make(kind, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            kind, **{**SIZE, "num_hidden_layers": LAYERS, **EXTRA.get(kind, {}), **fields}
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for p in model.parameters():
            # Logits of a fresh tiny model are nearly flat; larger weights make a wrong mask visible.
            p.data.mul_(3.0 if p.dim() > 1 else 1.0)
    return model


def padded(rows=2, length=17, pad=5):
    ids = torch.randint(3, 128, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return ids, mask


def plain(model, ids, mask, cache=None):
    """The ordinary prefill with the positions of `generate`."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    positions = mask.cumsum(-1).sub(1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits, cache


def assert_same(cache, reference):
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length()
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CHECKED)
def test_equals_the_ordinary_prefill_for_every_number_of_groups_and_for_chunks(kind):
    model = make(kind)
    ids, mask = padded()
    whole, whole_cache = plain(model, ids, mask)
    assert whole[mask.bool()].std() > 0.01
    _, half_cache = plain(model, ids[:, :9], mask[:, :9])
    second, half_cache = plain(model, ids[:, 9:], mask, half_cache)
    for groups in range(1, LAYERS + 1):
        steps = list(layered_prefill(model, ids, groups, attention_mask=mask))
        assert [(s.first, s.end) for s in steps] == partition(LAYERS, groups)
        assert [s.logits is None for s in steps] == [True] * (groups - 1) + [False]
        torch.testing.assert_close(steps[-1].logits[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-5)
        assert_same(steps[-1].cache, whole_cache)
        cache = DynamicCache(config=model.config)
        list(layered_prefill(model, ids[:, :9], groups, cache, mask[:, :9]))
        *_, last = layered_prefill(model, ids[:, 9:], LAYERS + 1 - groups, cache, mask, logits_to_keep=1)
        torch.testing.assert_close(last.logits, second[:, -1:], rtol=0, atol=1e-5)
        assert_same(cache, half_cache)


def test_other_work_runs_between_groups_and_each_layer_once(tiny_llama):
    model = tiny_llama(num_hidden_layers=LAYERS)
    ids, mask = padded()
    alone, _ = plain(model, ids, mask)
    other = model(ids[1:])
    calls = []
    handles = [x.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, x in enumerate(model.model.layers)]
    seen = []
    for step in layered_prefill(model, ids, 3, attention_mask=mask):
        seen += calls
        assert [x.get_seq_length() for x in step.cache.layers[: step.end]] == [17] * step.end
        torch.testing.assert_close(model(ids[1:]).logits, other.logits)
        calls.clear()
    for handle in handles:
        handle.remove()
    assert seen == [0, 1, 2, 3]
    torch.testing.assert_close(step.logits[mask.bool()], alone[mask.bool()])


def test_a_compressed_cache_is_filled_as_by_the_ordinary_prefill(tiny_llama):
    from hfext.kv_cache import KIVIConfig

    model = tiny_llama(num_hidden_layers=LAYERS)
    make = KIVIConfig(bits=2, group_size=8, residual_length=8).make_cache
    ids, mask = padded(length=37)
    seen = []
    for groups in (1, 3):
        ours, theirs = make(model), make(model)
        logits, _ = plain(model, ids, mask, theirs)
        attention = model.model.layers[2].self_attn
        handle = attention.register_forward_pre_hook(lambda *_, c=ours: seen.append(c.shared.padding))
        *_, last = layered_prefill(model, ids, groups, ours, mask)
        handle.remove()
        torch.testing.assert_close(last.logits[mask.bool()], logits[mask.bool()], rtol=0, atol=1e-5)
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            assert a.held.keys() == b.held.keys()
            assert all(torch.equal(a.held[name], b.held[name]) for name in a.held)
    assert len(seen) == 2 and all(torch.equal(padding, mask.bool()) for padding in seen)


def test_generate_goes_on_from_the_cache_of_a_left_padded_batch(tiny_llama):
    model = tiny_llama(num_hidden_layers=LAYERS)
    ids, mask = padded()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    *_, last = layered_prefill(model, ids[:, :-1], 3, attention_mask=mask[:, :-1])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        past_key_values=last.cache,
    )
    assert torch.equal(out, expected)


def test_bfloat16_is_the_same_bits(tiny_llama):
    model = tiny_llama(num_hidden_layers=LAYERS).bfloat16()
    ids, mask = padded()
    *_, last = layered_prefill(model, ids, 4, attention_mask=mask)
    assert torch.equal(last.logits[mask.bool()], plain(model, ids, mask)[0][mask.bool()])


def test_the_layers_are_put_back_after_an_error(tiny_llama):
    model = tiny_llama()
    layers = model.model.layers
    with pytest.raises((IndexError, RuntimeError)):
        next(layered_prefill(model, torch.full((1, 4), 999), 2))
    assert model.model.layers is layers
    steps = layered_prefill(model, torch.full((1, 4), 5), 2)
    next(steps)
    assert model.model.layers is layers
    steps.close()
    assert [n for n, _ in model.named_children()] == ["model", "lm_head"]


def test_bad_input_of_the_prefill_is_named(tiny_llama, tiny_t5, tiny_bert_classifier):
    model, ids = tiny_llama(), torch.full((1, 4), 5)
    for groups in (0, 3):
        with pytest.raises(ValueError, match=rf"groups is {groups} .*\[1, 2\]"):
            next(layered_prefill(model, ids, groups))
    for other in (tiny_t5(), tiny_bert_classifier()):
        with pytest.raises(ValueError, match="causal, decoder-only"):
            next(layered_prefill(other, ids, 1))
    gemma = make("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="causal, decoder-only"):
        next(layered_prefill(gemma, ids, 1))
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(NotImplementedError, match="'opt'.*as a whole"):
        next(layered_prefill(opt, ids, 1))
    for mask in ([1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match="attention_mask has padding"):
            next(layered_prefill(model, ids, 1, attention_mask=torch.tensor([mask])))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        next(layered_prefill(model, ids, 1, attention_mask=torch.ones(1, 3)))
    with pytest.raises(ValueError, match="training mode"):
        next(layered_prefill(model.train(), ids, 1))
    steps = layered_prefill(model.eval(), ids, 2)
    next(steps).cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 1)
    with pytest.raises(RuntimeError, match="between groups"):
        next(steps)


@pytest.mark.parametrize(
    "maximum, expected",
    [(4, [1, 2, 4, 4, 4]), (12, [1, 2, 4, 6, 12]), (16, [1, 2, 4, 8, 16]), (24, [1, 2, 4, 8, 24]), (1, [1] * 5)],
)
def test_numbers_of_groups_are_the_tables_of_the_paper(maximum, expected):
    for edge, want, after in zip([512, 1024, 2048, 4096], expected, expected[1:], strict=False):
        assert group_count(edge, maximum) == want
        assert group_count(edge + 1, maximum) == after
    assert group_count(1, maximum) == expected[0] and group_count(10**6, maximum) == expected[-1]


def test_partition_is_contiguous_and_even():
    for layers in range(1, 20):
        for groups in range(1, layers + 1):
            ranges = partition(layers, groups)
            assert [i for a, b in ranges for i in range(a, b)] == list(range(layers))
            sizes = [b - a for a, b in ranges]
            assert len(sizes) == groups and max(sizes) - min(sizes) <= 1


def test_plans_of_a_small_case_by_hand():
    """Two prompts admitted together in two groups, a third that waits until they are through."""
    scheduler = LayeredPrefillScheduler(LayeredPrefillConfig(max_groups=2, group_tokens=8, max_num_batched_tokens=16))
    for name, tokens in (("a", 6), ("b", 6), ("c", 9)):
        scheduler.add(name, tokens, 3)
    rows = []
    while scheduler.unfinished:
        plan = scheduler.plan()
        rows.append(("".join(plan.decode), "".join(c.request for c in plan.chunks), plan.group, "".join(plan.emits)))
        scheduler.advance(["a"] if len(rows) == 3 else [])
    assert rows == [
        ("", "ab", 0, ""),
        ("", "ab", 1, "ab"),
        ("ab", "c", 0, "ab"),
        ("b", "c", 1, "bc"),
        ("c", "", 0, "c"),
        ("c", "", 0, "c"),
    ]


@pytest.mark.parametrize("blocks", [None, 40])
def test_every_plan_keeps_the_rules(blocks):
    rng = torch.Generator().manual_seed(1)
    config = LayeredPrefillConfig(
        max_groups=4,
        group_tokens=16,
        max_num_batched_tokens=48,
        chunk_tokens=32,
        max_num_seqs=6,
        num_blocks=blocks,
        block_size=4,
    )
    scheduler, sizes = LayeredPrefillScheduler(config), {}
    for i in range(30):
        sizes[i] = [int(torch.randint(1, 90, (), generator=rng)), int(torch.randint(1, 20, (), generator=rng))]
        scheduler.add(i, *sizes[i])
    emitted, prefilled, live, held = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0), set(), 0
    flight, preemptions = (), 0
    while scheduler.unfinished:
        plan = scheduler.plan()
        preemptions += len(plan.preempted)
        for i in plan.preempted:
            live.discard(i)
            prefilled[i] = 0
        assert set(plan.decode) == live, "every running sequence decodes in every iteration"
        if blocks:
            context = {i: sizes[i][0] + emitted[i] for i in live}
            held = sum(math.ceil(n / 4) for n in context.values())
            assert held <= blocks and scheduler._free() >= 0
        if plan.group and plan.chunks:
            kept = tuple(c for c in flight if c.request not in plan.preempted)
            assert plan.chunks == kept, "no prompt is admitted while one is in flight"
        flight = plan.chunks
        tokens = sum(c.end - c.start for c in plan.chunks)
        assert tokens <= 48 and all(c.end - c.start <= 32 for c in plan.chunks)
        assert len(plan.decode) + len(plan.chunks) <= 6
        for chunk in plan.chunks if plan.group == plan.groups - 1 else ():
            assert chunk.start == prefilled[chunk.request]
            prefilled[chunk.request] = chunk.end
            assert chunk.last == (chunk.end == sizes[chunk.request][0] + emitted[chunk.request])
        for i in plan.emits:
            emitted[i] += 1
            live.add(i)
            if emitted[i] == sizes[i][1]:
                live.discard(i)
        scheduler.advance()
    assert emitted == {i: new for i, (_, new) in sizes.items()}
    assert (preemptions > 0) == (blocks is not None)


def test_bad_input_of_the_scheduler_is_named(tiny_llama):
    with pytest.raises(ValueError, match="max_groups is 0"):
        LayeredPrefillConfig(max_groups=0)
    with pytest.raises(TypeError, match="block_size is 1.5"):
        LayeredPrefillConfig(block_size=1.5)
    scheduler = LayeredPrefillScheduler(LayeredPrefillConfig(num_blocks=2, block_size=4))
    with pytest.raises(ValueError, match="prompt_tokens is 0"):
        scheduler.add("a", 0, 1)
    with pytest.raises(ValueError, match="num_blocks=2"):
        scheduler.add("a", 8, 2)
    scheduler.add("a", 8, 1)
    with pytest.raises(ValueError, match="'a', which is already"):
        scheduler.add("a", 1, 1)
    with pytest.raises(RuntimeError, match="before plan"):
        scheduler.advance()
    scheduler.plan()
    with pytest.raises(RuntimeError, match="called twice"):
        scheduler.plan()
    with pytest.raises(ValueError, match="only requests that emitted"):
        scheduler.advance(["b"])
    with pytest.raises(ValueError, match="max_groups is 16 .* <= 2"):
        LayeredPrefillEngine(tiny_llama())


@pytest.mark.parametrize("kind, blocks", [("llama", None), ("llama", 12), ("gemma3_text", None), ("qwen3_moe", None)])
def test_serving_answers_as_generate_does(kind, blocks):
    model = make(kind)
    prompts = [torch.randint(3, 128, (n,)).tolist() for n in (5, 19, 30, 3, 11)]
    config = LayeredPrefillConfig(
        max_groups=LAYERS,
        group_tokens=4,
        max_num_batched_tokens=24,
        chunk_tokens=16,
        num_blocks=blocks,
        block_size=4,
    )
    engine = LayeredPrefillEngine(model, config)
    for prompt in prompts:
        engine.add(prompt, 9)
    preempted, lengths = 0, [0] * len(prompts)
    while engine.scheduler.unfinished:
        plan = engine.step()
        preempted += len(plan.preempted)
        for i, before in enumerate(lengths):
            lengths[i] = len(engine.outputs[i])
            assert lengths[i] - before == (i in plan.emits)
    assert (preempted > 0) == (blocks is not None)
    for prompt, output in zip(prompts, engine.outputs, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0, len(prompt) :]
        assert output == expected.tolist()


@pytest.mark.parametrize("n, c", [(1, 1), (512, 512), (1000, 256), (8192, 512), (8193, 512)])
def test_saturated_experts_are_loaded_once_per_chunk_and_once_in_layers(n, c):
    server = ServerModel(saturated=True)
    once = server.layers * server.experts * server.expert_bytes
    for policy, size, times in (
        ("chunked", c, math.ceil(n / c)),
        ("layered", 16, 1),
        ("layered", 5, 1),
        ("orca", 0, 1),
    ):
        loads = sum(iteration_cost(server, work).expert_bytes for work in prefill_work(policy, n, server, size))
        assert loads == pytest.approx(times * once)


def test_work_is_the_same_for_every_number_of_groups_and_an_iteration_is_bounded():
    server = ServerModel(layers=12)
    for groups in range(1, 13):
        works = prefill_work("layered", 777, server, groups)
        assert sum(work.token_layers(12) for work in works) == 777 * 12
        mixed = [Work((50,) * 9, work.chunks, work.prompt_layers) for work in works]
        assert max(work.token_layers(12) for work in mixed) <= 9 * 12 + 777 * math.ceil(12 / groups)


def test_expected_experts_are_those_of_random_routing():
    server = ServerModel(experts=16, top_k=4)
    rng = torch.Generator().manual_seed(0)
    for tokens in (1, 3, 10):
        draws = torch.rand(4000, tokens, 16, generator=rng).topk(4, dim=-1).indices.flatten(1)
        mean = sum(len(set(row)) for row in draws.tolist()) / 4000
        assert server.experts_loaded(tokens) == pytest.approx(mean, rel=0.02)


def test_simulation_emits_what_was_asked_and_decodes_without_stalls():
    trace = [Arrival(0.2 * i, 300 * (i % 7 + 1), 5 + i % 4) for i in range(20)]
    server = ServerModel(layers=8)
    runs = {p: simulate(p, trace, server, LayeredPrefillConfig(max_groups=8)) for p in ("orca", "chunked", "layered")}
    for served in runs.values():
        assert [len(times) for times in served.tokens] == [a.output for a in trace]
        assert all(b > a for times in served.tokens for a, b in zip(times, times[1:], strict=False))
        assert all(times[0] > a.time for times, a in zip(served.tokens, trace, strict=True))
        assert max(served.iterations) >= served.summary(trace)["tbt_max"] - 1e-12
    loads = {name: served.totals.expert_bytes for name, served in runs.items()}
    assert loads["layered"] < loads["chunked"] and runs["layered"].totals.operations == pytest.approx(
        runs["orca"].totals.operations
    )
    again = simulate("layered", trace, server, LayeredPrefillConfig(max_groups=1)).tokens
    assert again == runs["orca"].tokens


def test_counted_expert_loads_and_the_recipe(tmp_path):
    config = Config(layers=3, prompt=64, chunk=16)
    ids = torch.randint(3, 128, (1, 64))
    chunked, layered = expert_loads(tiny("qwen3_moe", config), ids, 16, 3)
    assert layered <= 3 * 4 < chunked <= 4 * layered
    result = recipe.execute(
        "kv_cache/layered_prefill-costs",
        {"models": ["llama", "qwen3_moe"], "layers": 2, "requests": 12, "rate": 20.0},
        tmp_path,
    )
    assert result["evidence"]["reproduced"] and result["evidence"]["ours"] == 4.0
    assert any(title.startswith("SIMULATED") for title in result["tables"])


@pytest.mark.slow
@pytest.mark.real_model
def test_a_real_model_has_the_same_logits_and_cache():
    try:
        model, tokenizer = _smollm2.load()
    except ImportError as error:
        pytest.skip(str(error))
    model.eval()
    ids = tokenizer("The layers of a model can be run in groups. " * 12, return_tensors="pt").input_ids
    reference = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(ids, past_key_values=reference).logits
    for groups in (1, 7, 30):
        *_, last = layered_prefill(model, ids, groups)
        torch.testing.assert_close(last.logits, logits, rtol=0, atol=1e-5)
        assert_same(last.cache, reference)
