"""The synthetic corpus of the lookup benchmark, and its dictionary against the store."""

import numpy as np
import pytest
import torch

from hfext.decoding.ngram_store import NGramStore
from hfext.experiments.ngram_lookup import Config, Dictionary, corpus, microseconds, queries

LAMBDAS = (0.01, 0.04, 0.15, 0.18, 0.12)


def test_the_corpus_has_its_size_and_depends_on_the_seed_alone():
    one, same = list(corpus(1_500_000, 500, 200, 0)), list(corpus(1_500_000, 500, 200, 0))
    assert sum(map(len, one)) == 1_500_000 and all(np.array_equal(*pair) for pair in zip(one, same, strict=True))
    assert not np.array_equal(one[0], next(corpus(1_500_000, 500, 200, 1)))
    counts = np.sort(np.bincount(one[0], minlength=500))[::-1]
    assert counts[0] > 5 * counts[20] > 0 and one[0].min() >= 0


def test_dictionary_and_store_agree_and_half_of_the_contexts_are_found():
    ids = next(corpus(20_000, 49152, 300, 0))
    store, table = NGramStore.build([ids], vocab_size=49152), Dictionary(ids.tolist(), (2, 3, 4, 5, 6))
    batches = queries(ids, 4, 10, 5, np.random.default_rng(0))
    for contexts, candidates in batches:
        got = store.probabilities(contexts, candidates, LAMBDAS)
        torch.testing.assert_close(got, table.probabilities(contexts, candidates, LAMBDAS), rtol=1e-12, atol=0)
        assert (got[:2, 0] > 0).all(), "the token that follows in the corpus"
    assert microseconds(store, batches, LAMBDAS) > 0


@pytest.mark.parametrize("fields, message", [({"dict_tokens": 5}, "dict_tokens"), ({"num_drafts": ()}, "num_drafts")])
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)
