import itertools
import math

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper
from transformers.generation.logits_process import TopHLogitsWarper

from hfext.decoding import top_h
from hfext.decoding._truncate import largest_first
from hfext.decoding.top_h import TopHLogitsProcessor


def kept(processor, scores):
    return torch.isfinite(processor(None, scores))


def entropy_of(p):
    return -math.fsum(x * math.log(x) for x in p if x > 0)


def longest_prefix(logits, alpha, temperature=1.0):
    """The paper's rule, one token at a time in float64: the set of kept tokens."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    chosen = order[:1]
    for token in order[1:]:
        mass = math.fsum(p[i] for i in [*chosen, token])
        if entropy_of([p[i] / mass for i in [*chosen, token]]) > alpha * entropy_of(p):
            break
        chosen.append(token)
    return set(chosen)


def rows(vocab, count, seed, scale=3.0):
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("vocab", [2, 31, 200, 701])
def test_keeps_the_longest_prefix_within_the_bound(vocab, temperature):
    scores = rows(vocab, 4, vocab)
    for alpha in (0.1, 0.4, 0.8):
        mask = kept(TopHLogitsProcessor(alpha, temperature=temperature), scores)
        for row, found in zip(scores, mask, strict=True):
            assert set(found.nonzero()[:, 0].tolist()) == longest_prefix(row, alpha, temperature)


@pytest.mark.parametrize("alpha", [0.55, 0.85])
def test_large_flat_vocabularies_equal_a_full_sort(alpha):
    # Nearly flat, so that thousands of tokens are kept, beside a peaked row in the same batch.
    scores = torch.cat([rows(20011, 2, 0, 0.3), rows(20011, 1, 1, 12.0)])
    log_p, order = scores.double().log_softmax(-1).sort(-1, descending=True)
    mass, times = log_p.exp().cumsum(-1), (log_p.exp() * log_p).cumsum(-1)
    count = (mass.log() - times / mass <= alpha * -times[:, -1:]).sum(-1)
    mask = kept(TopHLogitsProcessor(alpha), scores)
    assert mask.sum(-1).tolist() == count.tolist()
    assert count[0] > top_h.FIRST > count[2]
    for row, n in enumerate(count.tolist()):
        assert mask[row, order[row, :n]].all()


@pytest.mark.parametrize("vocab", [64, 4097, 9000])
def test_search_by_blocks_finds_the_largest(vocab):
    logits = rows(vocab, 3, 7)
    top, order = largest_first(logits, 40)
    assert torch.equal(top, logits.sort(-1, descending=True).values[:, :40])
    assert torch.equal(logits.gather(1, order), top)
    # The last tokens, which fill no block, and a whole block of large ones.
    logits[0, -1], logits[1, 32:64] = 50.0, torch.arange(50.0, 82.0)
    top, order = largest_first(logits, 20)
    assert order[0, 0] == vocab - 1 and order[1].tolist() == list(range(63, 43, -1))


@pytest.mark.parametrize("size, alpha", [(300, 0.4), (10, 0.3), (16, 0.5), (1000, 2 / 3), (50000, 0.4)])
def test_a_uniform_distribution_keeps_a_power_of_its_size(size, alpha):
    # (16, 0.5) and (1000, 2/3) are ties in exact arithmetic, which are kept.
    scores = torch.full((1, size + 5), -math.inf)
    scores[:, 3 : size + 3] = 1.25
    found = kept(TopHLogitsProcessor(alpha), scores)[0].nonzero()[:, 0].tolist()
    assert found == list(range(3, 3 + math.floor(size**alpha + 1e-9)))


@pytest.mark.parametrize("p", [0.5, 0.7, 0.999999, 1.0])
def test_two_tokens_keep_one(p):
    scores = torch.tensor([[p, 1 - p]]).log()
    assert kept(TopHLogitsProcessor(0.999), scores).tolist() == [[True, False]]


def test_alpha_one_is_the_identity_and_alpha_near_zero_is_greedy():
    scores = rows(500, 3, 0)
    assert torch.equal(TopHLogitsProcessor(1.0)(None, scores), scores)
    assert torch.equal(kept(TopHLogitsProcessor(1e-9), scores).int().argmax(-1), scores.argmax(-1))
    assert (kept(TopHLogitsProcessor(1e-9), scores).sum(-1) == 1).all()


def test_more_alpha_keeps_a_superset():
    scores = rows(3000, 4, 2, 2.0)
    masks = [kept(TopHLogitsProcessor(alpha), scores) for alpha in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert all((small <= large).all() and small.sum() < large.sum() for small, large in itertools.pairwise(masks))


def test_own_temperature_before_the_warper_equals_temperature_first():
    scores = rows(900, 4, 3)
    warper = TemperatureLogitsWarper(1.7)
    before = warper(None, TopHLogitsProcessor(0.4, temperature=1.7)(None, scores))
    after = TopHLogitsProcessor(0.4)(None, warper(None, scores))
    assert torch.equal(before, after)


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("vocab", [60, 100, 101, 5000])
def test_mode_transformers_equals_the_built_in_warper(vocab, scale):
    scores = rows(vocab, 4, vocab, scale)
    for alpha in (0.05 + 0.031 * i for i in range(30)):
        ours = TopHLogitsProcessor(alpha, mode="transformers")(None, scores)
        assert torch.equal(ours, TopHLogitsWarper(alpha)(None, scores)), alpha


def test_mode_reference_compares_sums_that_are_not_normalised():
    scores, alpha, temperature = rows(700, 3, 5, 1.0), 0.4, 1.5
    mask = kept(TopHLogitsProcessor(alpha, temperature=temperature, mode="reference"), scores)
    for row, found in zip(scores, mask, strict=True):
        p = sorted((row.double() / temperature).softmax(-1).tolist(), reverse=True)[:100]
        terms = [-x * math.log(x) for x in p]
        expected = sum(math.fsum(terms[: j + 1]) <= alpha * math.fsum(terms) for j in range(100))
        assert found.sum() == max(1, expected)
    # On 300 equal tokens the paper's rule keeps 300^0.405 = 10.07, the two others 0.405 * 100.
    flat = torch.zeros(1, 300)
    sizes = [int(kept(TopHLogitsProcessor(0.405, mode=mode), flat).sum()) for mode in top_h.MODES]
    assert sizes == [10, 40, 40]


def best_subset(p, alpha):
    """The exact optimum of the paper's problem by trying all subsets: the largest mass with H(q) <= alpha H(p)."""
    limit, best = alpha * entropy_of(p), 0.0
    for size in range(1, len(p) + 1):
        for subset in itertools.combinations(p, size):
            mass = math.fsum(subset)
            if mass > best and entropy_of([x / mass for x in subset]) <= limit * (1 + 1e-9):
                best = mass
    return best


@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_greedy_mass_is_at_most_the_exact_optimum_and_skipping_comes_nearer(alpha):
    ratios = {"prefix": [], "skip": []}
    for seed in range(12):
        scores = rows(10, 1, seed, 1.0)
        p = scores[0].double().softmax(-1)
        best = best_subset(p.tolist(), alpha)
        for solver, seen in ratios.items():
            mask = kept(TopHLogitsProcessor(alpha, solver=solver), scores)[0]
            q = p[mask] / p[mask].sum()
            assert entropy_of(q.tolist()) <= alpha * entropy_of(p.tolist()) * (1 + 1e-6)
            seen.append(float(p[mask].sum()) / best)
            assert seen[-1] <= 1 + 1e-9
        assert ratios["skip"][-1] >= ratios["prefix"][-1] - 1e-9
    assert sum(ratios["skip"]) > sum(ratios["prefix"])


def test_skipping_tries_every_token_in_order():
    scores, alpha = rows(80, 3, 11, 2.0), 0.4
    for row, found in zip(scores, kept(TopHLogitsProcessor(alpha, solver="skip"), scores), strict=True):
        p = row.double().softmax(-1).tolist()
        chosen = []
        for token in sorted(range(len(p)), key=lambda i: -p[i]):
            mass = math.fsum(p[i] for i in [*chosen, token])
            if entropy_of([p[i] / mass for i in [*chosen, token]]) <= alpha * entropy_of(p) * (1 + top_h.TOLERANCE):
                chosen.append(token)
        assert set(found.nonzero()[:, 0].tolist()) == set(chosen)


def test_ties_at_the_cut_go_to_the_lower_token():
    scores = torch.tensor([[1.0, 3.0, 1.0, 1.0, 1.0, -2.0, 1.0]])
    counts = set()
    for alpha in (0.5, 0.7, 0.8, 0.9):
        mask = kept(TopHLogitsProcessor(alpha), scores)[0]
        n = int(mask.sum())
        counts.add(n)
        assert mask.nonzero()[:, 0].tolist() == sorted([1, 0, 2, 3, 4, 6][:n])
    assert len(counts) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_decide_in_float32_and_return_their_own(dtype):
    scores = rows(2000, 3, 4).to(dtype)
    out = TopHLogitsProcessor(0.4)(None, scores)
    assert out.dtype == dtype
    assert torch.equal(torch.isfinite(out), kept(TopHLogitsProcessor(0.4), scores.float()))
    assert torch.equal(out[torch.isfinite(out)], scores[torch.isfinite(out)])


def test_fewest_and_most_tokens_are_honoured():
    scores = torch.tensor([[9.0, 0.0, -1.0, -math.inf], [0.0, 0.0, 0.0, 0.0]])
    assert kept(TopHLogitsProcessor(0.4, min_tokens_to_keep=2), scores).tolist()[0] == [True, True, False, False]
    assert kept(TopHLogitsProcessor(0.4, min_tokens_to_keep=4), scores).tolist()[0] == [True, True, True, False]
    wide = rows(3000, 2, 0, 0.5)
    assert kept(TopHLogitsProcessor(0.9, max_candidates=7), wide).sum(-1).tolist() == [7, 7]
    assert kept(TopHLogitsProcessor(1.0, max_candidates=7), wide).sum(-1).tolist() == [7, 7]
    assert kept(TopHLogitsProcessor(0.1, min_tokens_to_keep=600), wide).sum(-1).tolist() == [600, 600]
    for options in ({"mode": "reference"}, {"mode": "transformers"}):
        assert kept(TopHLogitsProcessor(0.1, min_tokens_to_keep=600, **options), wide).sum(-1).tolist() == [600, 600]
    likeliest = torch.zeros_like(wide, dtype=torch.bool).scatter_(1, wide.topk(600).indices, True)
    assert kept(TopHLogitsProcessor(0.1, min_tokens_to_keep=600, solver="skip"), wide)[likeliest].all()
    assert kept(TopHLogitsProcessor(0.9, solver="skip", max_candidates=7), wide).sum(-1).tolist() == [7, 7]
    # A real second token is kept before one that is masked, however unlikely it is.
    far = torch.tensor([[-math.inf, -math.inf, 0.0, -500.0, -math.inf]])
    assert kept(TopHLogitsProcessor(0.4, min_tokens_to_keep=2), far).tolist() == [[False, False, True, True, False]]


def test_prefix_entropies_are_exact():
    logits = rows(4000, 1, 9, 0.5).sort(-1, descending=True).values
    logits -= logits[:, :1].clone()
    found = top_h.prefix_entropies(logits)[0]
    weights = [math.exp(x) for x in logits[0].tolist()]
    for j in (1, 2, 57, 4000):
        total = math.fsum(weights[:j])
        assert found[j - 1].item() == pytest.approx(entropy_of([w / total for w in weights[:j]]), abs=1e-12)


def test_compiled_without_branches_on_values():
    scores = torch.cat([rows(300, 3, 0), torch.zeros(1, 300)])
    for options in ({}, {"mode": "transformers"}, {"min_tokens_to_keep": 3}):
        processor = TopHLogitsProcessor(0.4, **options)
        compiled = torch.compile(lambda x, f=processor: f(None, x), fullgraph=True, backend="eager")
        assert torch.equal(compiled(scores), processor(None, scores))


def test_every_sampled_token_was_kept(tiny_llama):
    model = tiny_llama()
    inputs = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(0))
    seen = []

    class Watch(TopHLogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((scores, super().__call__(input_ids, scores)))
            return seen[-1][1]

    torch.manual_seed(0)
    out = model.generate(
        inputs,
        do_sample=True,
        top_k=0,
        temperature=1.5,
        max_new_tokens=12,
        logits_processor=[Watch(0.6, temperature=1.5)],
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len(seen) == 12
    for step, (before, after) in enumerate(seen):
        chosen = out.sequences[:, 5 + step]
        assert torch.isfinite(after).gather(1, chosen[:, None]).all()
        torch.testing.assert_close(out.scores[step], after / 1.5)
        assert 1 < torch.isfinite(after).sum(-1).max() < before.shape[1]


@pytest.mark.parametrize("scores", [torch.full((1, 4), math.nan), torch.full((1, 4), -math.inf)])
def test_rows_that_cannot_be_sampled_are_named(scores):
    for shape in ((4,), (1, 2, 4)):
        with pytest.raises(ValueError, match="must be \\[batch, vocab\\]"):
            TopHLogitsProcessor()(None, torch.zeros(shape))
    scores = torch.cat([torch.zeros(2, 4), scores])
    with pytest.raises(ValueError, match=r"scores\[2\] cannot be sampled"):
        TopHLogitsProcessor()(None, scores)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"alpha": 0}, ValueError, "alpha is 0 but must be in \\(0, 1\\]"),
        ({"alpha": 1.01}, ValueError, "alpha"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"alpha": "0.4"}, TypeError, "alpha"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"mode": "papr"}, ValueError, "Did you mean 'paper'"),
        ({"solver": "greedy"}, ValueError, "solver"),
        ({"solver": "skip", "mode": "reference"}, ValueError, "skip"),
        ({"max_candidates": 0}, ValueError, "max_candidates"),
        ({"min_tokens_to_keep": 1.5}, TypeError, "min_tokens_to_keep"),
    ],
)
def test_bad_options_are_named(options, error, text):
    with pytest.raises(error, match=text):
        TopHLogitsProcessor(**options)


def test_numbers_of_numpy_are_numbers():
    processor = TopHLogitsProcessor(np.float32(0.5), temperature=np.float64(2.0), min_tokens_to_keep=np.int64(2))
    assert (processor.alpha, processor.temperature, processor.min_tokens_to_keep) == (0.5, 2.0, 2)
