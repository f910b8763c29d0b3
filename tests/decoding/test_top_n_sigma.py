import math
import statistics

import pytest
import torch
from transformers import TemperatureLogitsWarper

from hfext.decoding.top_n_sigma import TopNSigmaLogitsProcessor


def kept(processor, scores):
    return torch.isfinite(processor(None, scores))


def rows(vocab, count=3, seed=0, scale=3.0):
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("n", [0.3, 1.0, 2.5])
def test_threshold_is_n_population_deviations_below_the_largest(n):
    scores = rows(400)
    scores[1, :250] = -math.inf
    for row, found in zip(scores.tolist(), kept(TopNSigmaLogitsProcessor(n), scores).tolist(), strict=True):
        finite = [x for x in row if x > -math.inf]
        limit = max(finite) - n * statistics.pstdev(finite)
        assert found == [x >= limit for x in row]


@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0, 10.0])
def test_kept_set_does_not_depend_on_the_temperature(temperature):
    scores = rows(2000)
    tempered = TemperatureLogitsWarper(temperature)(None, scores)
    assert torch.equal(kept(TopNSigmaLogitsProcessor(), tempered), kept(TopNSigmaLogitsProcessor(), scores))
    assert torch.equal(
        kept(TopNSigmaLogitsProcessor(), scores.log_softmax(-1)), kept(TopNSigmaLogitsProcessor(), scores)
    )


def test_a_wide_n_keeps_everything_and_a_narrow_one_the_largest():
    scores = rows(300)
    assert torch.equal(TopNSigmaLogitsProcessor(1e6)(None, scores), scores)
    narrow = kept(TopNSigmaLogitsProcessor(1e-6), scores)
    assert (narrow.sum(-1) == 1).all() and torch.equal(narrow.int().argmax(-1), scores.argmax(-1))
    single = torch.full((1, 5), -math.inf)
    single[0, 3] = 2.0
    assert kept(TopNSigmaLogitsProcessor(), single).tolist() == [[False, False, False, True, False]]


def test_fewest_tokens_are_kept_where_the_row_has_them():
    scores = torch.tensor([[5.0, 0.0, -3.0, -math.inf]])
    assert kept(TopNSigmaLogitsProcessor(0.1, min_tokens_to_keep=2), scores).tolist() == [[True, True, False, False]]
    assert kept(TopNSigmaLogitsProcessor(0.1, min_tokens_to_keep=9), scores).tolist() == [[True, True, True, False]]


def test_generate_samples_from_the_kept_tokens(tiny_llama):
    model = tiny_llama()
    inputs = torch.randint(3, 128, (2, 4), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    out = model.generate(
        inputs,
        do_sample=True,
        top_k=0,
        max_new_tokens=8,
        logits_processor=[TopNSigmaLogitsProcessor(1.0)],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        limit = logits.amax(-1, keepdim=True) - logits.std(-1, correction=0, keepdim=True)
        assert torch.equal(torch.isfinite(scores), logits >= limit)
        assert torch.isfinite(scores.gather(1, out.sequences[:, 4 + step, None])).all()


@pytest.mark.parametrize("options", [{"n": 0}, {"n": -1.0}, {"n": math.nan}, {"min_tokens_to_keep": 0}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TopNSigmaLogitsProcessor(**options)
