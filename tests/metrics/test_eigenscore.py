"""EigenScore: covariances and determinants written out, and hidden states of answers under padding and early ends."""

import math

import numpy as np
import pytest
import torch
import transformers

from hfext.metrics.eigenscore import answer_embeddings, answer_lengths, compute, eigenscore


@pytest.mark.parametrize("k, d", [(1, 5), (2, 2), (10, 64), (12, 5)])
def test_the_default_is_the_mean_log10_of_the_eigenvalues_of_a_covariance(k, d):
    z = np.random.default_rng(0).normal(size=(k, d)) * 3
    covariance = np.atleast_2d(np.cov(z)) + 1e-3 * np.eye(k)
    assert eigenscore(z).item() == pytest.approx(np.log10(np.linalg.eigvalsh(covariance)).mean(), rel=1e-9)


def test_the_form_of_the_paper_is_the_determinant_with_the_centring_matrix():
    z = torch.randn(6, 20, dtype=torch.float64)
    centring = torch.eye(20, dtype=torch.float64) - torch.ones(20, 20, dtype=torch.float64) / 20
    sigma = z @ centring @ z.T + 0.1 * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.slogdet(sigma).logabsdet / 6
    torch.testing.assert_close(eigenscore(z, alpha=0.1, base=math.e, ddof=None), expected)


def test_equal_answers_give_the_closed_form_of_rank_one():
    row = torch.randn(32, dtype=torch.float64)
    k, value = 7, 7 * row.var(correction=1).item()
    expected = (math.log10(value + 1e-3) + (k - 1) * math.log10(1e-3)) / k
    assert eigenscore(row.repeat(k, 1)).item() == pytest.approx(expected, rel=1e-9)


def test_scaling_permuting_and_shifting():
    z = torch.randn(8, 40, dtype=torch.float64)
    scaled = eigenscore(3 * z, alpha=9e-3) - eigenscore(z, alpha=1e-3)
    assert scaled.item() == pytest.approx(2 * math.log10(3), rel=1e-9)
    torch.testing.assert_close(eigenscore(z[torch.randperm(8)]), eigenscore(z))
    torch.testing.assert_close(eigenscore(z[:, torch.randperm(40)]), eigenscore(z))
    torch.testing.assert_close(eigenscore(z + torch.randn(8, 1, dtype=torch.float64)), eigenscore(z))


def test_more_different_answers_score_higher():
    common, own = torch.randn(64), torch.randn(10, 64)
    scores = [eigenscore(common + spread * own).item() for spread in (0.0, 0.1, 0.3, 1.0)]
    assert scores == sorted(scores) and scores[0] < scores[-1] - 1


def test_sets_in_a_batch_and_half_precision():
    z = torch.randn(3, 10, 64)
    torch.testing.assert_close(eigenscore(z), torch.stack([eigenscore(x) for x in z]))
    low = z.to(torch.bfloat16)
    assert eigenscore(low).dtype == torch.float64
    torch.testing.assert_close(eigenscore(low), eigenscore(low.float()))


def test_compute_returns_plain_numbers():
    z = torch.randn(3, 10, 16)
    found = compute(z)
    assert found["scores"] == [eigenscore(x).item() for x in z] and isinstance(found["eigenscore"], float)
    assert found["eigenscore"] == pytest.approx(sum(found["scores"]) / 3)
    assert compute(z[0].numpy())["scores"] == found["scores"][:1]
    assert len(compute([z[0].tolist(), z[1, :4].numpy()])["scores"]) == 2


@pytest.mark.parametrize(
    "z, options, message",
    [
        (torch.randn(4), {}, "shape"),
        (torch.randn(4, 1), {}, "features >= 2"),
        (torch.full((2, 3), math.nan), {}, "NaN"),
        (torch.randn(4, 3), {"alpha": 0.0}, "alpha is 0.0"),
        (torch.randn(4, 3), {"base": 1.0}, "base is 1.0"),
        (torch.randn(4, 3), {"ddof": 3}, r"ddof is 3 but must be None or in \[0, 3\)"),
    ],
)
def test_bad_input_is_named(z, options, message):
    with pytest.raises(ValueError, match=message):
        eigenscore(z, **options)
    with pytest.raises(ValueError, match="empty"):
        compute([])


def test_lengths_stop_at_the_first_end_and_before_padding():
    sequences = torch.tensor(
        [[9, 5, 2, 2, 0], [9, 2, 0, 0, 0], [9, 5, 6, 7, 8], [9, 5, 0, 6, 0], [9, 3, 5, 5, 0], [9, 0, 0, 0, 0]]
    )
    assert answer_lengths(sequences, 1, [2, 3], 0).tolist() == [1, 0, 4, 3, 0, 0]
    # pad = eos, and no end at all
    assert answer_lengths(sequences, 1, [0], 0).tolist() == [3, 1, 4, 1, 3, 0]
    assert answer_lengths(sequences, 1, [], None).tolist() == [4] * 6
    assert answer_lengths(sequences, 5, [2], 0).tolist() == [0] * 6


def generated(model, **options):
    """Two left-padded prompts, three answers each, of different lengths."""
    prompts = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (prompts != 0).long()
    torch.manual_seed(0)
    output = model.generate(
        prompts,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=8,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_hidden_states=True,
        **options,
    )
    return output, mask.repeat_interleave(3, 0)


@pytest.mark.parametrize("factory", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("token", ["last", "before_last", "mean"])
def test_states_are_those_of_each_answer_alone(factory, token, request):
    model = request.getfixturevalue(factory)()
    model.generation_config.eos_token_id = list(range(2, 25))
    output, mask = generated(model)
    found = answer_embeddings(model, output.sequences, 4, mask, token=token, batch_size=4)
    lengths = answer_lengths(output.sequences, 4, list(range(2, 25)), 0).tolist()
    assert len(set(lengths)) > 2
    for row, n in enumerate(lengths):
        bare = output.sequences[row, :4][mask[row].bool()]
        alone = torch.cat([bare, output.sequences[row, 4 : 4 + n]])
        states = model(alone[None], output_hidden_states=True).hidden_states
        answer = states[len(states) // 2][0, len(bare) - 1 :]
        expected = {
            "last": answer[n],
            "before_last": answer[max(n - 1, 0)],
            "mean": answer[1:].mean(0) if n else answer[0],
        }[token]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("token", ["last", "before_last", "mean"])
def test_states_of_generate_equal_those_of_a_forward(tiny_llama, token):
    model = tiny_llama()
    for ends in ([2], list(range(2, 60))):
        model.generation_config.eos_token_id = ends
        output, mask = generated(model)
        by_forward = answer_embeddings(model, output.sequences, 4, mask, token=token)
        by_output = answer_embeddings(model, output, 4, mask, token=token)
        torch.testing.assert_close(by_output, by_forward, rtol=1e-4, atol=1e-5)


def test_states_of_generate_are_used_where_they_reach(tiny_llama, monkeypatch):
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(2, 60))
    output, mask = generated(model)
    assert answer_lengths(output.sequences, 4, list(range(2, 60)), 0).max() < len(output.hidden_states)
    expected = answer_embeddings(model, output.sequences, 4, mask)
    monkeypatch.setattr(model, "forward", None)
    torch.testing.assert_close(answer_embeddings(model, output, 4, mask), expected, rtol=1e-4, atol=1e-5)


def test_layers_and_beams(tiny_llama):
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7, 8]])
    states = model(ids, output_hidden_states=True).hidden_states
    for layer in (0, 1, 2, -1):
        torch.testing.assert_close(answer_embeddings(model, ids, 2, layer=layer)[0], states[layer][0, -1])
    torch.testing.assert_close(answer_embeddings(model, ids, 2)[0], states[1][0, -1])
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "max_new_tokens": 4}
    beams = model.generate(ids, num_beams=3, num_return_sequences=2, **options)
    torch.testing.assert_close(
        answer_embeddings(model, beams, 4), answer_embeddings(model, beams.sequences, 4), rtol=1e-5, atol=1e-6
    )


def test_calls_that_cannot_be_right_are_refused(tiny_llama, tiny_t5):
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(ValueError, match="token is 'first'"):
        answer_embeddings(model, ids, 2, token="first")
    with pytest.raises(ValueError, match="prompt_length is 5"):
        answer_embeddings(model, ids, 5)
    with pytest.raises(ValueError, match="padded on the left"):
        answer_embeddings(model, ids, 2, torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match="layer is 9 but the model has 3 hidden states"):
        answer_embeddings(model, ids, 2, layer=9)
    with pytest.raises(NotImplementedError, match="decoder-only"):
        answer_embeddings(tiny_t5(), ids, 2)


def test_colder_answers_score_lower_from_generate_to_score(tiny_llama):
    model, ids = tiny_llama(initializer_range=0.3), torch.tensor([[5, 6, 7, 8]])
    scores = []
    for temperature in (0.05, 3.0):
        transformers.set_seed(0)
        out = model.generate(
            ids,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            num_return_sequences=10,
            max_new_tokens=6,
            return_dict_in_generate=True,
            output_hidden_states=True,
        )
        scores.append(eigenscore(answer_embeddings(model, out, 4)).item())
    assert scores[0] < scores[1]


@pytest.mark.slow
@pytest.mark.real_model
def test_a_model_that_knows_scores_lower_than_one_that_invents():
    from hfext.experiments._smollm2 import load

    try:
        model, tokenizer = load()
    except ImportError as missing:
        pytest.skip(str(missing))
    scores = []
    for question in ("What is the capital of France? One word only.", "Name a random street in an invented town."):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        torch.manual_seed(0)
        options = {"do_sample": True, "temperature": 0.5, "top_p": 0.99, "top_k": 10, "max_new_tokens": 10}
        out = model.generate(**inputs, **options, num_return_sequences=10)
        embeddings = answer_embeddings(model, out, inputs["input_ids"].shape[1])
        assert embeddings.shape == (10, model.config.hidden_size)
        scores.append(compute(embeddings)["eigenscore"])
    assert scores[0] < scores[1] - 0.5
