"""Superposed decoding: greedy for one draft, a brute-force rerun of the algorithm for more, its cost, and refusals."""

import functools
import math
import os
import subprocess
import sys
import threading
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from hfext.decoding import superposed
from hfext.decoding._superposed_hub import export_superposed, superposed_source
from hfext.decoding.ngram_store import NGramStore
from hfext.decoding.superposed import (
    SuperposedConfig,
    SuperposedGenerationMixin,
    SuperposedOutput,
    best_candidates,
    interpolate,
    mixing_weights,
    superpose,
    superposed_generate,
)

LAMBDAS = (0.01, 0.04, 0.15, 0.18, 0.12)
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def seeded(model_class, config, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def llama(**fields):
    return seeded(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**SMALL, **fields}))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=2, pad_token_id=0
    )
    config.initializer_range = 0.3
    return seeded(transformers.GPT2LMHeadModel, config)


def gemma2():
    """Embeddings times sqrt(hidden), layers with a window of 6, soft-capped logits."""
    config = transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=6, attn_implementation="eager")
    return seeded(transformers.Gemma2ForCausalLM, config)


def qwen2():
    return seeded(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**SMALL))


MODELS = {"llama": llama, "gpt2": gpt2, "gemma2": gemma2, "qwen2": qwen2}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in MODELS.items()}


def prompts(batch=1, length=9, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def drafts_of(model, input_ids, k=3, **kwargs):
    kwargs = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    return model.generate(input_ids, custom_generate=superposed_generate, num_drafts=k, **kwargs)


def greedy_and_one_draft(model, input_ids, **kwargs):
    kwargs = {"max_new_tokens": 10, "do_sample": False, **kwargs}
    greedy = model.generate(input_ids, **kwargs)
    return greedy, model.generate(input_ids, custom_generate=superposed_generate, num_drafts=1, **kwargs)


@pytest.fixture(scope="module")
def store():
    generator = torch.Generator().manual_seed(3)
    return NGramStore.build(torch.randint(3, 128, (40, 600), generator=generator).tolist(), vocab_size=128)


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, (ids != 0).long()


SETTINGS = [
    {"many_ends": True, "temperature": 50.0},
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [7, 9]]},
    {"num_candidates": 1, "alpha": 0.0, "early_exit": False, "many_ends": True},
    {},
    {"min_new_tokens": 7, "many_ends": True},
    {"many_ends": True},
    {"max_new_tokens": None, "max_length": 13},
    {"reset_every": 3},
]


@pytest.mark.parametrize(
    "name, settings",
    [(name, settings) for name in MODELS for settings in (SETTINGS if name == "llama" else SETTINGS[:2])],
    ids=str,
)
def test_one_draft_is_greedy_decoding(models, name, settings):
    model, ids = models[name], prompts(2)
    own = {key: settings[key] for key in settings if key in SuperposedConfig.__dataclass_fields__}
    kwargs = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, **settings}
    for key in own:
        del kwargs[key]
    if kwargs.pop("many_ends", False):
        # Ends that greedy decoding reaches, and others that are often the second choice.
        reached = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)[0, 13].item()
        kwargs["eos_token_id"] = [reached, *range(3, 128, 9)]
    greedy = model.generate(ids, **kwargs)
    assert torch.equal(greedy, model.generate(ids, custom_generate=superposed_generate, num_drafts=1, **own, **kwargs))


@each_model
def test_one_draft_is_greedy_decoding_in_left_padded_batches_with_ends(models, name):
    ids, mask = padded([prompts(length=n, seed=n)[0].tolist() for n in (4, 9, 7)])
    free, _ = greedy_and_one_draft(models[name], ids, attention_mask=mask, eos_token_id=None)
    ends = [free[0, 12].item(), *range(2, 128, 12)]
    greedy, ours = greedy_and_one_draft(models[name], ids, attention_mask=mask, eos_token_id=ends)
    assert torch.equal(greedy, ours)
    assert (greedy[:, 9:] == 0).any(), "no row ended early"


@each_model
def test_one_draft_is_greedy_decoding_in_bfloat16(name):
    model = MODELS[name]().to(torch.bfloat16)
    greedy, ours = greedy_and_one_draft(model, prompts(2))
    assert torch.equal(greedy, ours)
    out = drafts_of(model, prompts(), 4, eos_token_id=None)
    assert torch.isfinite(out.sequences_scores).all() and len(set(map(tuple, out.sequences.tolist()))) == 4


@pytest.mark.parametrize("implementation", ["dynamic", "static", "hybrid"])
@each_model
def test_cache_implementations_agree(models, name, implementation):
    """At tau = 1: the default tau makes 16 times of what differs between two attention kernels."""
    model = models[name]
    ids, mask = padded([prompts(length=n, seed=n)[0].tolist() for n in (4, 9)])
    expected = drafts_of(model, ids, attention_mask=mask, temperature=1.0)
    got = drafts_of(model, ids, attention_mask=mask, temperature=1.0, cache_implementation=implementation)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-3)


def test_a_cache_of_the_user_is_read_and_stays_as_it_was(models):
    model, ids = models["llama"], prompts(2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache, use_cache=True)
    keys = cache.layers[0].keys.clone()
    got = drafts_of(model, ids, past_key_values=cache, reset_every=3)
    assert torch.equal(got.sequences, drafts_of(model, ids, reset_every=3).sequences)
    assert cache.get_seq_length() == 5 and torch.equal(cache.layers[0].keys, keys)
    assert "past_key_values" not in got
    with pytest.raises(ValueError, match="past_key_values holds 5 tokens"):
        drafts_of(model, ids[:, :4], past_key_values=cache)


def brute_force(model, prompt, k, steps, counts=None, ends=(), tau=0.06, alpha=0.54, delta=200.0, width=None):
    """The algorithm again: no cache, all embeddings in one forward, python lists, a dictionary of n-grams."""
    embed = model.get_input_embeddings()
    fed, alive, finished = embed(torch.tensor([prompt])), [(0.0, list(prompt))], []
    for step in range(steps):
        logits = model(inputs_embeds=fed).logits[0, -1].double()
        top = sorted(range(len(logits)), key=lambda v: (-float(logits[v]), v))[: width or max(3 * k, k + len(ends))]
        z = [float(logits[v]) / tau for v in top]
        log_z = max(z) + math.log(sum(math.exp(a - max(z)) for a in z))
        pairs = []
        for i, (score, ids) in enumerate(alive):
            p_ng = [ngram(counts, ids, v) if counts else 1.0 for v in top]
            hits = sum(p > 0 for p in p_ng)
            blind = counts and hits < (min(k, len(top)) if len(alive) == 1 else 1)
            for j, (v, a, p) in enumerate(zip(top, z, p_ng, strict=True)):
                log_p = a - log_z
                if counts and blind:
                    log_p = (1 - alpha) * log_p - delta
                elif counts:
                    log_p = (1 - alpha) * log_p + alpha * math.log(p) if p else -math.inf
                if log_p > -math.inf:
                    pairs.append((score + log_p, i, j, [*ids, v]))
        pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))
        last = step == steps - 1
        finished += [(s, ids) for s, _, _, ids in pairs[:k] if ids[-1] in ends or last]
        finished = sorted(finished, key=lambda draft: -draft[0])[:k]
        alive = [(s, ids) for s, _, _, ids in pairs if ids[-1] not in ends][:k]
        if last or (len(finished) == k and finished[-1][0] >= alive[0][0]):
            break
        gamma = [math.exp(s - alive[0][0]) for s, _ in alive]
        x = sum(g / sum(gamma) * embed(torch.tensor(ids[-1])) for g, (_, ids) in zip(gamma, alive, strict=True))
        fed = torch.cat([fed, x[None, None].to(fed.dtype)], 1)
    return finished


def ngram(counts, ids, v):
    total = 0.0
    for n, table in counts.items():
        seen = table.get(tuple(ids[len(ids) - n + 1 :])) if len(ids) >= n - 1 else None
        total += LAMBDAS[n - 2] * seen[v] / sum(seen.values()) if seen else 0.0
    return total


@torch.no_grad()
@pytest.mark.parametrize("name, k, tau", [("llama", 3, 0.06), ("llama", 3, 2.0), ("gemma2", 4, 1.0)])
@pytest.mark.parametrize("grams", [False, True])
@pytest.mark.parametrize("ends", [(), (2,), tuple(range(3, 128, 6))], ids=["no end", "one end", "21 ends"])
def test_drafts_and_scores_equal_the_algorithm_without_cache_and_tensors(models, name, k, tau, grams, ends):
    model = MODELS[name]().double() if name == "llama" else models[name]
    documents = torch.randint(0, 128, (30, 500), generator=torch.Generator().manual_seed(1)).tolist()
    orders = (2, 3) if grams else ()
    counts = {n: defaultdict(Counter) for n in orders}
    for n in orders:
        for doc in documents:
            for i in range(n - 1, len(doc)):
                counts[n][tuple(doc[i - n + 1 : i])][doc[i]] += 1
    given = NGramStore.build(documents, vocab_size=128, orders=orders) if grams else None
    ids = prompts(seed=1)
    want = brute_force(model, ids[0].tolist(), k, 7, counts, ends, tau)
    got = drafts_of(
        model,
        ids,
        k,
        max_new_tokens=7,
        ngram_store=given,
        temperature=tau,
        eos_token_id=list(ends) or None,
    )
    assert len(want) == k
    for row, score, (s, draft) in zip(got.sequences, got.sequences_scores, want, strict=True):
        assert row.tolist()[: len(draft)] == draft and set(row.tolist()[len(draft) :]) <= {0}
        assert float(score) == pytest.approx(s, rel=2e-4, abs=2e-3)
    assert (got.uninterpolated_fraction is None) is not grams


def test_interpolation_against_scalars():
    log_p = torch.log_softmax(torch.randn(2, 3, 5), -1)
    p_ng = torch.rand(2, 3, 5) * (torch.rand(2, 3, 5) > 0.5)
    p_ng[0, 0], p_ng[1, 2, 1:] = 0, 0
    p_ng[1, 2, 0] = 0.25
    got, blind = interpolate(log_p, p_ng, 0.3, 7.0)
    for i in range(2):
        for j in range(3):
            unseen = all(p == 0 for p in p_ng[i, j].tolist())
            assert bool(blind[i, j]) is unseen
            for v in range(5):
                p, q = math.exp(log_p[i, j, v]), float(p_ng[i, j, v])
                want = math.log(p**0.7) - 7 if unseen else (math.log(p**0.7 * q**0.3) if q else -math.inf)
                assert float(got[i, j, v]) == pytest.approx(want, rel=1e-5)
    assert interpolate(log_p, p_ng, 0.3, 7.0, needed=2)[1][1, 2]


def test_candidates_are_those_of_a_stable_sort():
    logits = torch.randint(0, 6, (50, 300), generator=torch.Generator().manual_seed(0)).float()
    logits[0, 5:] = -torch.inf
    order = torch.sort(logits, descending=True, stable=True)
    values, ids = best_candidates(logits, 9)
    assert torch.equal(values, order.values[:, :9])
    assert torch.equal(ids[1:], order.indices[1:, :9]) and torch.equal(ids[0, :5], order.indices[0, :5])


def test_mixing_weights_sum_to_one_and_equal_tokens_give_their_embedding():
    scores = torch.tensor([[-1.0, -2.0, -torch.inf], [-torch.inf] * 3, [-400.0, -400.0, -401.0]])
    gamma = mixing_weights(scores)
    torch.testing.assert_close(gamma.sum(-1), torch.ones(3))
    assert gamma[0, 2] == 0 and gamma[0, 0] / gamma[0, 1] == pytest.approx(math.e, rel=1e-5)
    e = torch.randn(3, 1, 8)
    torch.testing.assert_close(superpose(e.expand(3, 3, 8), gamma), e)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        e = torch.randn(3, 1, 8, dtype=torch.float64).to(dtype)
        assert torch.equal(superpose(e, torch.ones(3, 1)), e)


def test_a_linear_model_turns_the_mixture_of_embeddings_into_that_of_logits():
    embeddings, head = torch.randn(2, 3, 8), torch.randn(8, 50)
    gamma = mixing_weights(-3 * torch.rand(2, 3))
    each = (embeddings @ head * gamma[..., None]).sum(1)
    torch.testing.assert_close((superpose(embeddings, gamma) @ head)[:, 0], each)


@pytest.mark.parametrize("k", range(1, 11))
def test_model_calls_tokens_and_cache_rows_do_not_depend_on_k(models, store, k):
    model, ids, seen = models["llama"], prompts(2), []

    def note(module, args, kwargs, output):
        fed = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        seen.append((fed.shape[0], fed.shape[1], output.past_key_values.layers[0].keys.shape[0]))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        out = drafts_of(model, ids, k, ngram_store=store, eos_token_id=None, output_mixing_weights=True)
    finally:
        handle.remove()
    assert seen == [(2, 9, 2)] + [(2, 1, 2)] * 7 and out.num_model_calls == 8
    assert out.sequences.shape == (2 * k, 17) and len(out.mixing_weights) == 7
    for gamma in out.mixing_weights:
        assert gamma.shape == (2, k)
        torch.testing.assert_close(gamma.sum(-1), torch.ones(2))


@each_model
def test_drafts_are_distinct_ordered_and_never_continue_after_an_end(models, store, name):
    ends = list(range(2, 128, 7))
    out = drafts_of(models[name], prompts(3), 5, ngram_store=store, temperature=1.0, eos_token_id=ends)
    scores = out.sequences_scores.view(3, 5)
    assert (scores[:, 1:] <= scores[:, :-1]).all() and torch.isfinite(scores).all()
    assert torch.equal(out.draft_scores, out.sequences_scores)
    for group in out.sequences.view(3, 5, -1).tolist():
        assert len({tuple(row) for row in group}) == 5
        for row in group:
            stops = [i for i, token in enumerate(row) if i >= 9 and token in ends]
            assert not stops or set(row[stops[0] + 1 :]) <= {0}
    assert any(0 in row[9:] for row in out.sequences.tolist()), "no draft ended early"


@each_model
def test_the_first_tokens_are_the_best_k(models, name):
    ids = prompts(2)
    with torch.no_grad():
        logits = models[name](ids).logits[:, -1]
    out = drafts_of(models[name], ids, 4, max_new_tokens=1, eos_token_id=None)
    assert torch.equal(out.sequences[:, -1].view(2, 4), logits.topk(4).indices)
    torch.testing.assert_close(
        out.sequences_scores.view(2, 4), (logits.topk(12).values / 0.06).log_softmax(-1)[:, :4], rtol=1e-4, atol=1e-3
    )


def test_a_temperature_near_zero_keeps_the_best_draft(models):
    ids = prompts()
    coldest = drafts_of(models["llama"], ids, temperature=1e-38)
    greedy = models["llama"].generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(coldest.sequences[:1], greedy) and coldest.sequences_scores[0] == 0


def test_no_weight_for_ngrams_is_no_ngrams(models, store):
    got, plain = (drafts_of(models["llama"], prompts(), **kw) for kw in ({"ngram_store": store, "alpha": 0.0}, {}))
    assert torch.equal(got.sequences, plain.sequences) and torch.equal(got.sequences_scores, plain.sequences_scores)
    other = drafts_of(models["llama"], prompts(), ngram_store=store)
    assert not torch.equal(other.sequences, plain.sequences)


def test_a_store_of_other_text_is_reported(models, store):
    nothing = NGramStore.build([[0, 1]], vocab_size=128)
    assert drafts_of(models["llama"], prompts(), ngram_store=nothing).uninterpolated_fraction == 1.0
    assert drafts_of(models["llama"], prompts(), ngram_store=store).uninterpolated_fraction < 1.0


@each_model
@pytest.mark.parametrize("reset_every", [None, 3])
def test_a_left_padded_batch_equals_single_runs(models, store, name, reset_every):
    """Resets draw from one generator for the whole batch, so with them k=1."""
    k = 1 if reset_every else 3
    rows = [prompts(length=n, seed=n)[0].tolist() for n in (3, 9, 6)]
    ids, mask = padded(rows)
    options = {"ngram_store": store, "temperature": 0.3, "eos_token_id": list(range(2, 128, 12))}
    options["reset_every"] = reset_every
    batch = drafts_of(models[name], ids, k, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        single = drafts_of(models[name], torch.tensor([row]), k, **options)
        new = batch.sequences[i * k : (i + 1) * k, 9:].tolist()
        for got, want in zip(new, single.sequences[:, len(row) :].tolist(), strict=True):
            assert got[: len(want)] == want and set(got[len(want) :]) <= {0}
        torch.testing.assert_close(
            batch.sequences_scores[i * k : (i + 1) * k], single.sequences_scores, rtol=1e-3, atol=1e-2
        )


def test_a_path_opens_the_store(models, store, tmp_path):
    store.save(tmp_path / "store")
    expected = drafts_of(models["llama"], prompts(), ngram_store=store)
    got = drafts_of(models["llama"], prompts(), ngram_store=str(tmp_path / "store"))
    assert torch.equal(got.sequences, expected.sequences)


def test_processors_see_the_history_of_each_draft(models):
    ids, seen = prompts(2), []

    class Note(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.clone())
            scores[:, 0] = -torch.inf
            return scores

    out = drafts_of(models["llama"], ids, 3, max_new_tokens=2, eos_token_id=None, logits_processor=[Note()])
    assert [x.shape for x in seen] == [(2, 9)] + [(2, 10)] * 3
    assert len({tuple(x[0].tolist()) for x in seen[1:]}) == 3 and all(torch.equal(x[:, :9], ids) for x in seen)
    assert out.sequences.shape == (6, 11)
    penalised = drafts_of(models["llama"], ids, 3, max_new_tokens=12, no_repeat_ngram_size=1).sequences
    assert all(len(set(row[9:])) == len(row[9:]) for row in penalised.tolist() if 0 not in row[9:])


def test_prefixes_allowed_for_a_prompt_hold_for_its_drafts(models):
    allowed = [[10, 11, 12, 13], [20, 21, 22, 23]]
    out = drafts_of(models["llama"], prompts(2), 3, prefix_allowed_tokens_fn=lambda i, ids: allowed[i])
    for i in range(2):
        assert set(out.sequences[3 * i : 3 * i + 3, 9:].flatten().tolist()) <= {*allowed[i], 0}


def test_fewer_possible_drafts_leave_rows_of_padding(models):
    out = drafts_of(models["llama"], prompts(2), 3, max_new_tokens=1, prefix_allowed_tokens_fn=lambda i, ids: [10, 11])
    assert torch.isneginf(out.sequences_scores).tolist() == [False, False, True] * 2
    assert (out.sequences[2::3, 9:] == 0).all() and torch.equal(out.sequences[2::3, :9], prompts(2))
    more = drafts_of(models["llama"], prompts(), 3, max_new_tokens=2, prefix_allowed_tokens_fn=lambda i, ids: [10, 11])
    assert torch.isfinite(more.sequences_scores).all()


class Ends(StoppingCriteria):
    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.tokens)


@each_model
def test_stopping_criteria_end_drafts_as_they_end_greedy_decoding(models, name):
    model, ids = models[name], prompts()
    reached = model.generate(ids, max_new_tokens=10, do_sample=False)[0, 13].item()
    for criteria in ([Ends([reached])], StoppingCriteriaList([MaxTimeCriteria(max_time=-1.0)])):
        greedy, ours = greedy_and_one_draft(model, ids, stopping_criteria=criteria)
        assert torch.equal(greedy, ours)
    timed = drafts_of(model, ids, stopping_criteria=[MaxTimeCriteria(max_time=-1.0)])
    assert timed.num_model_calls == 1 and timed.sequences.shape == (3, 10)


def test_a_reset_goes_on_from_one_real_draft(models):
    """Once the cache is rebuilt, the model has read a plain text: its logits are those of this text."""
    model, ids = models["llama"], prompts(2)
    kwargs = {"k": 4, "eos_token_id": None, "temperature": 2.0, "reset_every": 3, "output_mixing_weights": True}
    before = torch.get_rng_state()
    out, again, other = (
        drafts_of(model, ids, max_new_tokens=4, generator=torch.Generator().manual_seed(seed), **kwargs)
        for seed in (0, 0, 5)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(out.sequences, again.sequences) and not torch.equal(out.sequences, other.sequences)
    assert torch.equal(out.sequences, drafts_of(model, ids, max_new_tokens=4, **kwargs).sequences)
    assert out.num_model_calls == 4
    for group, chosen in zip(out.sequences.view(2, 4, 13), out.mixing_weights[-1], strict=True):
        assert len({tuple(row[:12]) for row in group.tolist()}) == 1 and sorted(chosen.tolist()) == [0, 0, 0, 1]
        with torch.no_grad():
            logits = model(group[:1, :12]).logits[0, -1]
        assert group[:, 12].tolist() == logits.topk(4).indices.tolist()


def test_the_output_is_a_tensor_unless_a_dict_is_asked_for(models):
    out = drafts_of(models["llama"], prompts())
    assert isinstance(out, SuperposedOutput) and out.mixing_weights is None
    assert torch.equal(drafts_of(models["llama"], prompts(), return_dict_in_generate=False), out.sequences)


def test_the_temperature_of_the_generation_config_is_not_tau(models):
    expected = drafts_of(models["llama"], prompts()).sequences_scores
    config = GenerationConfig(max_new_tokens=8, return_dict_in_generate=True, temperature=3.0)
    same = models["llama"].generate(prompts(), config, custom_generate=superposed_generate).sequences_scores
    assert torch.equal(same, expected)
    assert not torch.equal(drafts_of(models["llama"], prompts(), temperature=3.0).sequences_scores, expected)


def test_words_of_the_corpus_that_pad_are_no_context(models):
    """A store that has seen the padding token before the prompt's words."""
    documents = torch.randint(0, 6, (30, 300), generator=torch.Generator().manual_seed(2)).tolist()
    stored, options = NGramStore.build(documents, vocab_size=128), {"temperature": 20.0, "eos_token_id": None}
    ids, mask = padded([[5], [3, 4, 5, 3, 4, 5]])
    batch = drafts_of(models["llama"], ids, attention_mask=mask, ngram_store=stored, num_candidates=128, **options)
    single = drafts_of(models["llama"], ids[:1, -1:], ngram_store=stored, num_candidates=128, **options)
    assert torch.equal(batch.sequences[:3, 6:], single.sequences[:, 1:])
    torch.testing.assert_close(batch.sequences_scores[:3], single.sequences_scores, rtol=1e-4, atol=1e-3)


def test_drafts_stay_alive_when_nearly_all_good_tokens_are_ends(models):
    """50 is the best token, eight ends follow, then come 51 and 52: three drafts must go on."""
    order = [50, *range(10, 18), 51, 52]

    def rank(ids, scores):
        scores = torch.full_like(scores, -99.0)
        scores[:, order] = -0.1 * torch.arange(len(order)).float()
        return scores

    out = drafts_of(
        models["llama"],
        prompts(),
        temperature=1.0,
        max_new_tokens=2,
        logits_processor=[rank],
        eos_token_id=list(range(10, 18)),
        output_mixing_weights=True,
        early_exit=False,
    )
    torch.testing.assert_close(out.mixing_weights[0][0], torch.tensor([0.0, -0.9, -1.0]).softmax(-1))


def test_processors_that_write_in_place_spoil_nothing_for_other_drafts(models):
    def ban(ids, scores, copy):
        scores = scores.clone() if copy else scores
        scores[torch.arange(len(ids)), ids[:, -1]] = -torch.inf
        scores[:, ids[:, -1] - 1] -= 1
        return scores

    in_place, copied = (
        drafts_of(models["llama"], prompts(), 4, logits_processor=[functools.partial(ban, copy=copy)], temperature=1.0)
        for copy in (False, True)
    )
    assert torch.equal(in_place.sequences_scores, copied.sequences_scores)


def test_embeddings_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(1, 8, 512, generator=generator).to(torch.bfloat16)
    gamma = torch.rand(1, 8, generator=generator).softmax(-1)
    exact = (gamma[..., None].double() * e.double()).sum(1, keepdim=True)
    assert torch.equal(superpose(e, gamma), exact.to(torch.bfloat16))


def test_only_drafts_that_exist_are_asked_for_ngrams(models):
    """One token is allowed, so that two of three drafts are empty; the one that exists always has an n-gram."""
    ids = prompts()
    stored = NGramStore.build([[ids[0, -1].item(), 10, 10, 10]], vocab_size=128)
    out = drafts_of(models["llama"], ids, ngram_store=stored, prefix_allowed_tokens_fn=lambda i, ids: [10])
    assert torch.isfinite(out.sequences_scores).tolist() == [True, False, False]
    assert out.uninterpolated_fraction == 0.0


@pytest.mark.parametrize("rows", [1, 2])
@each_model
def test_resets_change_neither_the_tokens_nor_the_score_of_one_draft(models, name, rows):
    ids, mask = padded([prompts(length=n, seed=n)[0].tolist() for n in (9, 4)[:rows]])
    kwargs = {"k": 1, "attention_mask": mask, "temperature": 3.0, "eos_token_id": None, "max_new_tokens": 12}
    plain, reset = (drafts_of(models[name], ids, reset_every=every, **kwargs) for every in (None, 3))
    assert torch.equal(plain.sequences, reset.sequences)
    torch.testing.assert_close(plain.sequences_scores, reset.sequences_scores, rtol=1e-4, atol=1e-3)


def test_without_early_exit_every_token_is_asked_for(models):
    ends = list(range(3, 128, 2))
    calls, scores = [], []
    for early_exit in (True, False):
        out = drafts_of(models["llama"], prompts(), eos_token_id=ends, early_exit=early_exit, temperature=1.0)
        calls.append(out.num_model_calls)
        scores.append(out.sequences_scores)
    assert calls[0] < calls[1] == 8 and torch.equal(*scores)


class WithMixin(SuperposedGenerationMixin, transformers.LlamaForCausalLM):
    pass


def test_the_mixin_is_the_callable(models, store):
    model = seeded(WithMixin, transformers.LlamaConfig(**SMALL))
    kwargs = {"num_drafts": 3, "ngram_store": store, "max_new_tokens": 8, "return_dict_in_generate": True}
    expected = drafts_of(models["llama"], prompts(), ngram_store=store)
    for got in (
        model.generate_superposed(prompts(), **kwargs),
        SuperposedGenerationMixin.generate_superposed(models["llama"], input_ids=prompts(), **kwargs),
    ):
        assert torch.equal(got.sequences, expected.sequences)
    model.generation_config.do_sample = True
    assert torch.equal(model.generate_superposed(prompts(), **kwargs).sequences, expected.sequences)
    config = GenerationConfig(max_new_tokens=8, return_dict_in_generate=True)
    own = {"num_drafts": 3, "ngram_store": store}
    for got in (
        model.generate_superposed(prompts(), config, **own),
        model.generate_superposed(prompts(), generation_config=config, **own),
        SuperposedGenerationMixin.generate_superposed(torch.compile(model, backend="eager"), prompts(), **kwargs),
    ):
        assert torch.equal(got.sequences, expected.sequences)
    assert config.do_sample is None and config.use_cache is None
    for given in ({"do_sample": True}, {"generation_config": GenerationConfig(do_sample=True)}):
        with pytest.raises(ValueError, match="do_sample"):
            model.generate_superposed(prompts(), **given, **own)
    with pytest.raises(ValueError, match="use num_drafts"):
        model.generate_superposed(prompts(), num_return_sequences=3, **own)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        model.generate_superposed(prompts(), stop_strings="x", **kwargs)


class Letters:
    """Enough of a tokenizer for a streamer and for the check of a vocabulary."""

    name_or_path = "letters"

    def __len__(self):
        return 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)}

    def decode(self, ids, **kwargs):
        return "".join(chr(65 + int(i) % 26) for i in ids)


def test_a_store_of_another_vocabulary_is_refused(models, tmp_path):
    large = NGramStore.build([[1, 2]], vocab_size=129)
    with pytest.raises(ValueError, match="another vocabulary"):
        drafts_of(models["llama"], prompts(), ngram_store=large)
    own = NGramStore.build([[1, 2]], Letters())
    own.save(tmp_path / "store")
    call = functools.partial(SuperposedGenerationMixin.generate_superposed, models["llama"], prompts())
    call(ngram_store=own, tokenizer=Letters(), max_new_tokens=1)

    class Other(Letters):
        def get_vocab(self):
            return {chr(i): 127 - i for i in range(128)}

    with pytest.raises(ValueError, match="vocabulary of letters"):
        call(ngram_store=own, tokenizer=Other(), max_new_tokens=1)
    for given in (own, str(tmp_path / "store")):
        with pytest.raises(ValueError, match="vocabulary of letters"):
            drafts_of(models["llama"], prompts(), ngram_store=given, tokenizer=Other())
    drafts_of(models["llama"], prompts(), ngram_store=own, tokenizer=Letters())
    with pytest.raises(ValueError, match="lambdas has 2 weights"):
        drafts_of(models["llama"], prompts(), ngram_store=own, lambdas=[0.1, 0.2])


def forms(model, tmp_path):
    export_superposed(tmp_path / "repository")
    return {
        "callable": functools.partial(model.generate, prompts(), custom_generate=superposed_generate),
        "partial": functools.partial(
            model.generate, prompts(), custom_generate=functools.partial(superposed_generate, num_drafts=2)
        ),
        "mixin": functools.partial(SuperposedGenerationMixin.generate_superposed, model, prompts()),
        "folder": functools.partial(
            model.generate, prompts(), custom_generate=str(tmp_path / "repository"), trust_remote_code=True
        ),
    }


@pytest.mark.parametrize("form", ["callable", "partial", "mixin", "folder"])
def test_a_streamer_is_refused_and_nobody_waits_for_it(models, tmp_path, form):
    call, raised = forms(models["llama"], tmp_path)[form], []
    streamer = TextIteratorStreamer(Letters(), timeout=20)

    def run():
        try:
            call(streamer=streamer, max_new_tokens=3)
        except ValueError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert "".join(streamer) == ""
    thread.join(timeout=20)
    assert not thread.is_alive() and len(raised) == 1 and "`streamer` cannot be used" in raised[0]


@pytest.mark.parametrize("form", ["callable", "partial", "mixin", "folder"])
def test_an_assistant_model_is_refused(models, tmp_path, form):
    with pytest.raises(ValueError, match="`assistant_model` cannot be used"):
        forms(models["llama"], tmp_path)[form](assistant_model=models["llama"], max_new_tokens=3)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"do_sample": True}, "do_sample=False"),
        ({"num_beams": 2}, "num_beams is 2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences is 2.* use num_drafts"),
        ({"num_return_sequences": 3}, "num_return_sequences is 3.* use num_drafts"),
        ({"dola_layers": "high"}, "dola_layers"),
        ({"num_return_sequences": 2, "num_beams": 2}, "use num_drafts"),
        ({"output_scores": True}, "output_scores"),
        ({"output_logits": True}, "output_logits"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"use_cache": False}, "use_cache=True"),
        ({"stop_strings": ["a"], "tokenizer": Letters()}, "generate_superposed"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, "pad on the left"),
        ({"cache_implementation": "offloaded"}, "not with offloaded caches"),
        ({"k": 0}, "num_drafts is 0 but must be >= 1"),
        ({"temperature": 0.0}, "temperature is 0.0 but must be > 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e-46}, "temperature is 1e-46 but must be > 0"),
        ({"temperature": 1e39}, r"temperature is 1e\+39"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"alpha": 1.0}, r"alpha is 1.0 but must be in \[0, 1\)"),
        ({"unseen_penalty": -1}, "unseen_penalty is -1"),
        ({"lambdas": (0.9, 0.9)}, "lambdas is"),
        ({"reset_every": 0}, "reset_every is 0"),
        ({"num_candidates": 0}, "num_candidates is 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_has_no_meaning_is_refused_with_its_reason(models, kwargs, message):
    with pytest.raises(ValueError, match=message):
        drafts_of(models["llama"], prompts(), **kwargs)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_drafts": 2.0},
        {"num_drafts": True},
        {"temperature": "1"},
        {"temperature": True},
        {"lambdas": 0.5},
        {"lambdas": ["much"]},
    ],
)
def test_wrong_kinds(fields):
    with pytest.raises(TypeError, match=next(iter(fields))):
        SuperposedConfig(**fields)


@pytest.mark.parametrize("kwargs", [{"ngram_store": {}}, {"generator": 3}, {"streamer": object()}])
def test_objects_of_a_wrong_kind_are_named(models, kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        drafts_of(models["llama"], prompts(), **kwargs)


def test_numbers_of_numpy_and_torch_are_numbers(models, store):
    expected = drafts_of(models["llama"], prompts(), 3, temperature=0.5, ngram_store=store)
    for lambdas in (torch.tensor(LAMBDAS, dtype=torch.float64), np.array(LAMBDAS)):
        got = drafts_of(
            models["llama"], prompts(), np.int64(3), temperature=np.float32(0.5), ngram_store=store, lambdas=lambdas
        )
        assert torch.equal(got.sequences_scores, expected.sequences_scores)


def test_broken_logits_are_named(models):
    for value, message in ((float("nan"), "NaN"), (-torch.inf, "leave no token"), (torch.inf, "NaN or")):

        def break_(ids, scores, value=value):
            return torch.full_like(scores, value)

        with pytest.raises(ValueError, match=message):
            drafts_of(models["llama"], prompts(), logits_processor=[break_])


def test_embeddings_instead_of_ids_are_refused(models):
    embeds = models["llama"].get_input_embeddings()(prompts())
    for ids in ({}, {"input_ids": prompts()}):
        with pytest.raises(ValueError, match="not as `inputs_embeds`"):
            models["llama"].generate(
                inputs_embeds=embeds, **ids, max_new_tokens=2, custom_generate=superposed_generate
            )


def test_models_that_cannot_be_superposed_are_refused(tiny_t5):
    with pytest.raises(ValueError, match="encoder-decoder"):
        tiny_t5().generate(prompts(), custom_generate=superposed_generate, max_new_tokens=2)
    small = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    per_layer = transformers.Gemma3nTextConfig(
        **small,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=128,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["full_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    )
    with pytest.raises(ValueError, match="per-layer embeddings"):
        seeded(transformers.Gemma3nForCausalLM, per_layer).generate(
            prompts(), custom_generate=superposed_generate, max_new_tokens=2
        )
    mamba = transformers.MambaConfig(vocab_size=128, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(ValueError, match="no key-value cache"):
        seeded(transformers.MambaForCausalLM, mamba).generate(
            prompts(), custom_generate=superposed_generate, max_new_tokens=2
        )


NO_CACHE = {
    "recurrent gemma": lambda: seeded(
        transformers.RecurrentGemmaForCausalLM,
        transformers.RecurrentGemmaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
        ),
    ),
    "gpt": lambda: seeded(
        transformers.OpenAIGPTLMHeadModel, transformers.OpenAIGPTConfig(vocab_size=128, n_embd=32, n_layer=2, n_head=4)
    ),
    "xlm": lambda: seeded(
        transformers.XLMWithLMHeadModel,
        transformers.XLMConfig(vocab_size=128, emb_dim=32, n_layers=2, n_heads=4, pad_index=0, mask_token_id=0),
    ),
}


@pytest.mark.parametrize("name", NO_CACHE)
def test_models_without_a_key_value_cache_are_refused_by_name(name):
    with pytest.raises(ValueError, match="has no key-value cache"):
        drafts_of(NO_CACHE[name](), prompts(), eos_token_id=None, pad_token_id=0)


def test_a_reset_of_a_model_with_recurrent_states_reads_token_by_token():
    config = transformers.JambaConfig(
        **{**SMALL, "num_hidden_layers": 4},
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    )
    model = seeded(transformers.JambaForCausalLM, config)
    greedy, ours = greedy_and_one_draft(model, prompts(), eos_token_id=None)
    reset = drafts_of(model, prompts(), 1, eos_token_id=None, max_new_tokens=10, reset_every=3)
    assert torch.equal(greedy, ours) and torch.equal(greedy, reset.sequences)
    assert reset.num_model_calls == 10 + 3 * 2


def test_text_alone_of_a_model_of_text_and_images(models):
    text = {**SMALL, "head_dim": 8, "sliding_window": 5}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    model = seeded(transformers.Gemma3ForConditionalGeneration, config)
    assert torch.equal(*greedy_and_one_draft(model, prompts(), eos_token_id=None, pad_token_id=0))


def test_a_cache_that_is_off_by_default_is_turned_on():
    model = seeded(
        transformers.MptForCausalLM, transformers.MptConfig(vocab_size=128, d_model=32, n_layers=2, n_heads=4)
    )
    kwargs = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    call = functools.partial(SuperposedGenerationMixin.generate_superposed, model, prompts(), num_drafts=1)
    greedy = model.generate(prompts(), do_sample=False, **kwargs)
    assert torch.equal(call(**kwargs), greedy) and torch.equal(call(GenerationConfig(**kwargs)), greedy)
    with pytest.raises(ValueError, match="use_cache=True"):
        call(use_cache=False, **kwargs)


def test_adapters_of_virtual_tokens_are_refused_and_lora_is_not():
    peft = pytest.importorskip("peft")
    kwargs = {"input_ids": prompts(), "max_new_tokens": 4, "do_sample": False}
    for config in (peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig):
        model = peft.get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
        for call in (
            functools.partial(model.generate, custom_generate=superposed_generate),
            functools.partial(SuperposedGenerationMixin.generate_superposed, model),
        ):
            with pytest.raises(NotImplementedError, match="use LoRA"):
                call(**kwargs)
    lora = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ours = lora.generate(**kwargs, custom_generate=superposed_generate, num_drafts=1)
    assert torch.equal(ours, lora.generate(**kwargs))


def test_a_plain_function_around_the_callable_ends_the_streamer_too(models):
    streamer = TextIteratorStreamer(Letters(), timeout=5, skip_prompt=True)

    def around(*args, **kwargs):
        return superposed_generate(*args, **kwargs)

    with pytest.raises(ValueError, match="`streamer` cannot be used"):
        models["llama"].generate(prompts(), custom_generate=around, streamer=streamer, max_new_tokens=2)
    assert "".join(streamer) == ""
    # The next call has none.
    models["llama"].generate(prompts(), custom_generate=around, max_new_tokens=2, do_sample=False)


def test_a_wrapper_with_wraps_refuses_a_streamer_too(models):
    @functools.wraps(superposed_generate)
    def wrapped(*args, **kwargs):
        return superposed_generate(*args, **kwargs)

    streamer = TextIteratorStreamer(Letters(), timeout=5)
    with pytest.raises(ValueError, match="`streamer` cannot be used"):
        models["llama"].generate(prompts(), custom_generate=wrapped, streamer=streamer, max_new_tokens=2)
    assert "".join(streamer) == ""


@pytest.fixture
def hub(tmp_path):
    """A model with the Hub folder, as `from_pretrained` makes it, and the module of its file."""
    llama().save_pretrained(tmp_path / "repository")
    export_superposed(tmp_path / "repository")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "repository", trust_remote_code=True)


def test_the_own_generate_of_a_hub_model_takes_what_generate_takes(hub):
    ids, plain = prompts(), llama()
    expected = drafts_of(plain, ids, return_dict_in_generate=False)
    config = GenerationConfig(max_new_tokens=8)
    hub.generation_config.do_sample = True
    for got in (
        hub.generate(ids, max_new_tokens=8),
        hub.generate(ids, config),
        hub.generate(input_ids=ids, generation_config=config),
        hub.generate(ids, max_new_tokens=8, temperature=0.7),
        SuperposedGenerationMixin.generate_superposed(hub, ids, max_new_tokens=8),
        hub.generate.func(hub, ids, max_new_tokens=8),
        hub.generate(ids, max_new_tokens=8, do_sample=False, custom_generate=superposed_generate),
    ):
        assert torch.equal(got, expected)
    scores = {"max_new_tokens": 8, "return_dict_in_generate": True}
    got = hub.generate(ids, superposed_temperature=2.0, **scores).sequences_scores
    assert torch.equal(got, drafts_of(plain, ids, temperature=2.0).sequences_scores)
    greedy = plain.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(hub.generate(ids, max_new_tokens=8, do_sample=False, custom_generate=None), greedy)
    for kwargs in ({"do_sample": True}, {"generation_config": GenerationConfig(do_sample=True)}):
        with pytest.raises(ValueError, match="do_sample"):
            hub.generate(ids, **kwargs)


def test_a_streamer_ends_whatever_is_wrong_with_the_call_of_a_hub_model(hub):
    ids = prompts()
    for error, args, kwargs in (
        (ValueError, (ids,), {}),
        (ValueError, (ids, None, None, None, None, None, None), "positional"),
        (TypeError, (ids,), {"inputs": ids}),
        (TypeError, (ids, *[None] * 20), {}),
    ):
        streamer = TextIteratorStreamer(Letters(), timeout=5)
        args, kwargs = ((*args, streamer), {}) if kwargs == "positional" else (args, {"streamer": streamer, **kwargs})
        with pytest.raises(error):
            hub.generate(*args, **kwargs)
        assert "".join(streamer) == ""
    # The loop itself could not refuse one without the library's hook: the file keeps it for itself.
    assert "superposed_generate" not in hub.generate.func.__globals__


def test_other_users_of_generate_are_not_touched(models, monkeypatch):
    """With and without the hook: sampling draws the same, another callable is given the same."""
    hooked = GenerationMixin.__dict__["_extract_generation_mode_kwargs"]
    assert hooked._hfext_original.__name__ == hooked.__name__
    given = []

    def callable_(model, input_ids, logits_processor, stopping_criteria, generation_config, mine=None, **kwargs):
        given.append((mine, sorted(kwargs)))
        return input_ids

    results = []
    for original in (False, True):
        if original:
            monkeypatch.setattr(GenerationMixin, "_extract_generation_mode_kwargs", hooked._hfext_original)
        torch.manual_seed(0)
        results.append(models["llama"].generate(prompts(2), do_sample=True, max_new_tokens=6))
        models["llama"].generate(prompts(2), custom_generate=callable_, mine=4, max_new_tokens=6)
    assert torch.equal(*results) and given[0] == given[1] and given[0][0] == 4


PROGRAM = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hfext":
            raise ModuleNotFoundError("hfext is blocked")
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
plain, repository, store, out = sys.argv[1:]
ids = torch.load(out + "/ids.pt")
model = AutoModelForCausalLM.from_pretrained(plain)
options = dict(num_drafts=3, max_new_tokens=8, ngram_store=store, return_dict_in_generate=True)
drafts = model.generate(ids, custom_generate=repository, trust_remote_code=True, **options)
own = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True).generate(input_ids=ids, **options)
assert "hfext" not in sys.modules and torch.equal(drafts.sequences, own.sequences)
torch.save((drafts.sequences, drafts.sequences_scores), out + "/drafts.pt")
"""


def test_the_hub_folder_works_without_the_library(models, store, tmp_path):
    models["llama"].save_pretrained(tmp_path / "plain")
    models["llama"].save_pretrained(tmp_path / "repository")
    export_superposed(tmp_path / "repository")
    store.save(tmp_path / "store")
    torch.save(prompts(2), tmp_path / "ids.pt")
    places = [str(tmp_path / name) for name in ("plain", "repository", "store")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *places, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = drafts_of(models["llama"], prompts(2), ngram_store=store)
    sequences, scores = torch.load(tmp_path / "drafts.pt")
    assert torch.equal(sequences, expected.sequences) and torch.equal(scores, expected.sequences_scores)


def test_the_hub_file_is_the_library_in_one_piece(tmp_path):
    import ast

    path = export_superposed(tmp_path)
    text = path.read_text()
    assert text == superposed_source() and (tmp_path / "custom_generate" / "requirements.txt").is_file()
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names)) and names[-1] == "generate" and "NGramStore" in names
    assert "METHOD" not in text and "compat" not in text and "from ." not in text
    card = (tmp_path / "README.md").read_text()
    assert "- custom_generate" in card and "license: apache-2.0" in card and "superposed_temperature" in card
    with pytest.raises(FileExistsError, match="README.md exists"):
        export_superposed(tmp_path)
    assert export_superposed(tmp_path, readme=False) == path


@pytest.mark.slow
@pytest.mark.real_model
def test_one_draft_is_greedy_decoding_on_smollm2():
    from hfext.experiments import _smollm2

    try:
        model, tokenizer = _smollm2.load()
    except ImportError as error:
        pytest.skip(str(error))
    tokenizer.padding_side = "left"
    texts = ["The capital of France is", "In 1969 two people walked on the Moon. The first of them was"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    greedy = model.generate(**inputs, max_new_tokens=12, do_sample=False, repetition_penalty=1.1)
    ours = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.1,
        custom_generate=superposed_generate,
        num_drafts=1,
    )
    assert torch.equal(greedy, ours)
    inputs = tokenizer(texts[:1], return_tensors="pt")
    stops = {"stop_strings": ["\n", "."], "tokenizer": tokenizer, "max_new_tokens": 12}
    greedy = model.generate(**inputs, **stops, do_sample=False)
    ours = SuperposedGenerationMixin.generate_superposed(model, **inputs, **stops, num_drafts=1)
    assert torch.equal(greedy, ours) and greedy.shape[1] < inputs["input_ids"].shape[1] + 12
    assert superposed.METHOD.name == "superposed"
