import math

import pytest
import torch

from hfext.decoding.mirostat import MirostatLogitsProcessor, tokens_for, zipf_exponent


def kept(processor, ids, scores):
    return torch.isfinite(processor(ids, scores))


def zipf(vocab, s):
    return -s * torch.arange(1, vocab + 1, dtype=torch.float64).log()


@pytest.mark.parametrize("s", [1.0, 1.1, 1.5])
def test_zipf_exponent_is_exact_on_a_zipf_law(s):
    logits = zipf(500, s)[None]
    assert zipf_exponent(logits[:, :101]).item() == pytest.approx(s, abs=1e-6)
    assert zipf_exponent((logits - 3.25)[:, :30]).item() == pytest.approx(s, abs=1e-6)


@pytest.mark.parametrize("mu, s, vocab", [(4.0, 1.1, 50000), (6.0, 1.5, 49152), (3.0, 0.7, 1000), (9.0, 2.0, 128)])
def test_number_of_tokens_follows_the_formula(mu, s, vocab):
    e = s - 1
    k = (e * 2**mu / (1 - vocab**-e)) ** (1 / s)
    found = int(tokens_for(torch.tensor([mu], dtype=torch.float64), torch.tensor([s], dtype=torch.float64), vocab))
    assert found == min(vocab, max(1, round(k)))


def test_number_of_tokens_at_the_limits():
    def k(mu, s):
        return int(tokens_for(torch.tensor([mu], dtype=torch.float64), torch.tensor([s], dtype=torch.float64), 1000))

    assert k(5.0, 1.0) == round(2**5 / math.log(1000))
    assert abs(k(8.0, 1 + 1e-7) - k(8.0, 1.0)) <= 1
    assert k(0.0, 1.3) == 1 and k(1e4, 1.3) == 1000 and k(-50.0, 1.3) == 1
    assert k(9.0, 0.0) == 1 and k(11.0, 0.0) == 1000


def test_version_1_keeps_the_first_k_of_a_zipf_stream():
    scores = zipf(2000, 1.2)[None].float()
    count = int(kept(MirostatLogitsProcessor(3.0, version=1), torch.zeros(1, 1, dtype=torch.long), scores).sum())
    assert count == round((0.2 * 2**6 / (1 - 2000**-0.2)) ** (1 / 1.2))


def test_version_1_looks_beyond_the_ratios_it_fits_and_keeps_the_fewest():
    ids, scores = torch.zeros(1, 1, dtype=torch.long), zipf(2000, 1.2)[None].float()
    count = int(kept(MirostatLogitsProcessor(4.0, version=1, m=10), ids, scores).sum())
    assert count == round((0.2 * 2**8 / (1 - 2000**-0.2)) ** (1 / 1.2)) > 11
    for version in (1, 2):
        few = MirostatLogitsProcessor(0.01, version=version, min_tokens_to_keep=37)
        assert kept(few, ids, scores)[0].nonzero()[:, 0].tolist() == list(range(37))
    assert kept(MirostatLogitsProcessor(version=1), ids, torch.zeros(1, 1)).all()


def test_without_learning_the_threshold_is_constant():
    processor = MirostatLogitsProcessor(tau=2.0, eta=0.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(2, 3, dtype=torch.long)
    for _ in range(4):
        scores = torch.randn(2, 300, generator=generator) * 2
        p = scores.double().softmax(-1)
        expected = (p >= 2**-4.0) | (p == p.amax(-1, keepdim=True))
        assert torch.equal(kept(processor, ids, scores), expected)
        ids = torch.cat([ids, torch.randint(300, (2, 1), generator=generator)], dim=1)


def replay(processor, tokens, streams):
    """mu before each token of `tokens` `[rows, length]`, under the scores `streams` `[length][rows, V]`."""
    mus = []
    for step, scores in enumerate(streams):
        ids = tokens[:, : step + 2]
        processor(ids, scores)
        mus.append(processor.mu(ids, scores.shape[1]))
    return torch.stack(mus)


@pytest.mark.parametrize("feedback", ["full", "truncated"])
@pytest.mark.parametrize("version", [1, 2])
def test_mu_follows_the_recurrence(version, feedback):
    generator = torch.Generator().manual_seed(3)
    tau, eta, vocab, steps = 2.5, 0.6, 200, 12
    streams = [torch.randn(1, vocab, generator=generator, dtype=torch.float64).float() * 2 for _ in range(steps)]
    processor = MirostatLogitsProcessor(tau, eta, version=version, feedback=feedback)
    ids, mu = torch.full((1, 2), 7), 2 * tau
    for scores in streams:
        mask = kept(processor, ids, scores)[0]
        assert processor.mu(ids, vocab).item() == pytest.approx(mu, abs=1e-5)
        p = scores[0].double().softmax(-1)
        if version == 2:
            assert torch.equal(mask, (-p.log2() <= mu) | (p == p.max()))
        token = int(torch.multinomial(p * mask, 1, generator=generator))
        share = p if feedback == "full" else p * mask / (p * mask).sum()
        mu -= eta * (-math.log2(share[token]) - tau)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_state_depends_on_the_tokens_only():
    """A batch, single rows, rows that change places and rows that are copied see the same thresholds."""
    generator = torch.Generator().manual_seed(1)
    rows, vocab, steps = 4, 60, 9
    tokens = torch.randint(vocab, (rows, steps + 2), generator=generator)
    streams = [torch.randn(rows, vocab, generator=generator) * 2 for _ in range(steps)]
    expected = replay(MirostatLogitsProcessor(2.0), tokens, streams)
    for row in range(rows):
        alone = replay(MirostatLogitsProcessor(2.0), tokens[row : row + 1], [s[row : row + 1] for s in streams])
        assert torch.equal(alone[:, 0], expected[:, row])
    moved = MirostatLogitsProcessor(2.0)
    for step, scores in enumerate(streams):
        order = torch.randint(rows, (6,), generator=generator)
        order[:rows] = torch.randperm(rows, generator=generator)
        ids = tokens[order, : step + 2]
        moved(ids, scores[order])
        assert torch.equal(moved.mu(ids, vocab), expected[step][order])


def test_rejected_drafts_leave_no_trace():
    generator = torch.Generator().manual_seed(5)
    vocab, steps = 50, 8
    tokens = torch.randint(vocab, (1, steps + 2), generator=generator)
    streams = [torch.randn(1, vocab, generator=generator) for _ in range(steps)]
    expected = replay(MirostatLogitsProcessor(2.0), tokens, streams)
    processor = MirostatLogitsProcessor(2.0)
    for step, scores in enumerate(streams):
        ids = tokens[:, : step + 2]
        # A draft model first asks about other continuations, with its own distribution.
        draft = ids
        for _ in range(4):
            processor(draft, torch.randn(1, vocab, generator=generator))
            draft = torch.cat([draft, torch.randint(vocab, (1, 1), generator=generator)], dim=1)
        processor(ids, scores)
        assert torch.equal(processor.mu(ids, vocab), expected[step])


def test_a_row_looks_first_at_its_own_place():
    """Rows 0 and 2 have one prefix; each goes on from what it had itself, not from the nearest of that prefix."""
    processor, start = MirostatLogitsProcessor(2.0), torch.tensor([[0], [1], [0]])
    scores = torch.stack([torch.linspace(0, 8, 40), torch.zeros(40), torch.linspace(0, 1, 40)])
    processor(start, scores)
    found = processor.mu(torch.cat([start, torch.full((3, 1), 5)], dim=1), 40)
    for row in range(3):
        single = MirostatLogitsProcessor(2.0)
        single(start[row : row + 1], scores[row : row + 1])
        assert single.mu(torch.tensor([[start[row, 0], 5]]), 40) == found[row]


def test_memory_is_bounded_and_forgets_what_was_overtaken():
    processor = MirostatLogitsProcessor(2.0)
    ids = torch.zeros(4, 1, dtype=torch.long)
    for _ in range(40):
        processor(ids, torch.zeros(4, 10))
        ids = torch.cat([ids, ids[:, :1]], dim=1)
    assert sorted(processor.memory.calls) == list(range(25, 41))
    processor(ids[:, :30], torch.zeros(4, 10))
    assert sorted(processor.memory.calls) == list(range(25, 31))
    processor.reset()
    assert not processor.memory.calls


def test_rows_of_an_encoder_decoder_batch_are_told_apart():
    """All rows begin with the same token, so the prefix alone does not say which row is meant."""
    start = torch.zeros(2, 1, dtype=torch.long)
    scores = torch.stack([torch.linspace(0, 8, 40), torch.linspace(0, 1, 40)])
    after = torch.cat([start, torch.full((2, 1), 5)], dim=1)
    batch = MirostatLogitsProcessor(2.0)
    batch(start, scores)
    alone = []
    for row in range(2):
        single = MirostatLogitsProcessor(2.0)
        single(start[:1], scores[row : row + 1])
        alone.append(single.mu(after[:1], 40))
    assert torch.equal(batch.mu(after, 40), torch.cat(alone)) and alone[0] != alone[1]
    # Two beams of each input; the second input's rows look among their own beams and not at the nearest row.
    beams = MirostatLogitsProcessor(2.0, rows_per_input=2)
    other = torch.full((4, 1), 9)
    other[[1, 3]] = 0
    beams(other, scores[[0, 0, 1, 1]])
    ids = torch.tensor([[0, 5], [9, 5], [0, 5], [9, 5]])
    found = beams.mu(ids, 40)
    assert found[0] == alone[0] and found[2] == alone[1]


def test_mu_is_held_where_the_target_cannot_be_reached():
    peaked = torch.tensor([[30.0, 0.0, 0.0, 0.0]])
    ids = torch.zeros(1, 1, dtype=torch.long)
    held, free = MirostatLogitsProcessor(3.0, 0.5, windup=8), MirostatLogitsProcessor(3.0, 0.5, windup=None)
    for _ in range(40):
        held(ids, peaked), free(ids, peaked)
        ids = torch.cat([ids, ids[:, :1]], dim=1)
    assert held.mu(ids, 4).item() == 2 + 8 * 0.5 * 3
    assert free.mu(ids, 4).item() == pytest.approx(6 + 40 * 1.5, abs=1e-3)
    # Below, where every token is more surprising than the target.
    flat, ids = torch.zeros(1, 1024), torch.zeros(1, 1, dtype=torch.long)
    low = MirostatLogitsProcessor(1.0, windup=5)
    for _ in range(10):
        low(ids, flat)
        ids = torch.cat([ids, ids[:, :1]], dim=1)
    assert low.mu(ids, 1024).item() == -5


def test_a_token_of_probability_zero_changes_nothing():
    scores = torch.tensor([[0.0, 1.0, -math.inf]])
    for feedback in ("full", "truncated"):
        processor = MirostatLogitsProcessor(1.0, feedback=feedback)
        processor(torch.tensor([[1]]), scores)
        assert processor.mu(torch.tensor([[1, 2]]), 3).item() == 2.0


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [3.0, 4.0, 5.0])
def test_mean_surprise_comes_to_the_target(tau, version):
    """On streams of changing Zipf exponents, whose likeliest tokens have 2.4 bits; 300 tokens, 8 seeds."""
    generator = torch.Generator().manual_seed(0)
    vocab, rows = 2000, 8
    processor = MirostatLogitsProcessor(tau, eta=0.3, version=version)
    ids, bits = torch.arange(rows)[:, None], []
    for _ in range(300):
        s = 0.9 + 0.5 * torch.rand(rows, 1, generator=generator)
        scores = (-s * torch.arange(1, vocab + 1).log())[:, torch.randperm(vocab, generator=generator)]
        p = processor(ids, scores).softmax(-1)
        token = torch.multinomial(p, 1, generator=generator)
        bits.append(-scores.log_softmax(-1).gather(1, token)[:, 0] / math.log(2))
        ids = torch.cat([ids, token], dim=1)
    assert float(torch.stack(bits)[30:].mean()) == pytest.approx(tau, abs=0.15)


def test_own_temperature_equals_tempered_scores():
    generator = torch.Generator().manual_seed(2)
    own, after = MirostatLogitsProcessor(2.0, temperature=1.5), MirostatLogitsProcessor(2.0)
    ids = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(5):
        scores = torch.randn(2, 100, generator=generator) * 3
        out = own(ids, scores)
        torch.testing.assert_close(out / 1.5, after(ids, scores / 1.5))
        ids = torch.cat([ids, torch.randint(100, (2, 1), generator=generator)], dim=1)


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(inputs, do_sample=True, top_k=0, max_new_tokens=15, **options)


def test_generate_in_a_batch_with_beams_and_again(tiny_llama):
    model = tiny_llama()
    inputs = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(0))
    processor = MirostatLogitsProcessor(3.0)
    first = generate(model, inputs, logits_processor=[processor])
    assert torch.equal(first, generate(model, inputs, logits_processor=[processor]))
    assert torch.equal(first, generate(model, inputs, logits_processor=[MirostatLogitsProcessor(3.0)]))
    wide = MirostatLogitsProcessor(1.0, min_tokens_to_keep=2)
    beams = generate(model, inputs, logits_processor=[wide], num_beams=3, num_return_sequences=2)
    assert beams.shape[0] == 4
    again = MirostatLogitsProcessor(1.0, min_tokens_to_keep=2)
    assert torch.equal(beams, generate(model, inputs, logits_processor=[again], num_beams=3, num_return_sequences=2))


def test_assisted_decoding_keeps_the_thresholds_of_plain_decoding(tiny_llama):
    """Greedy, so that both ways see the same sequence; the thresholds along it must agree."""
    model, draft = tiny_llama(), tiny_llama(seed=1)
    inputs = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(0))
    plain, assisted = MirostatLogitsProcessor(2.0), MirostatLogitsProcessor(2.0)
    options = dict(do_sample=False, max_new_tokens=12)
    a = model.generate(inputs, logits_processor=[plain], **options)
    b = model.generate(inputs, logits_processor=[assisted], assistant_model=draft, **options)
    assert torch.equal(a, b)
    assert torch.allclose(plain.mu(a[:, :-1], 128), assisted.mu(a[:, :-1], 128), atol=1e-5)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"tau": 0}, ValueError, "tau"),
        ({"tau": -1.0}, ValueError, "tau"),
        ({"tau": math.nan}, ValueError, "tau"),
        ({"eta": -0.1}, ValueError, "eta"),
        ({"eta": 1.5}, ValueError, "eta"),
        ({"version": 3}, ValueError, "version"),
        ({"feedback": "ful"}, ValueError, "Did you mean 'full'"),
        ({"m": 0}, ValueError, "m is 0"),
        ({"windup": 0}, ValueError, "windup"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"rows_per_input": 0}, ValueError, "rows_per_input"),
    ],
)
def test_bad_options_are_named(options, error, text):
    with pytest.raises(error, match=text):
        MirostatLogitsProcessor(**options)


def test_scores_that_cannot_be_sampled_are_named():
    processor = MirostatLogitsProcessor()
    with pytest.raises(ValueError, match=r"scores\[0\]"):
        processor(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 4), math.nan))
    with pytest.raises(NotImplementedError, match="Continuous batching"):
        processor(torch.zeros(3, dtype=torch.long), torch.zeros(3, 4))
