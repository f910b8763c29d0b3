"""ConceptVectors: comparison and scores by hand, the needle as noise and as training, search."""

import copy

import pytest
import torch
from peft import PeftModel

from hfext.unlearning.concept_vectors import (
    compare_vectors,
    concept_scores,
    concept_vector_report,
    concept_vectors,
    find_concept_vectors,
    needle_training,
    read_vectors,
)

WHERE = [(0, 3), (1, 40), (1, 7)]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_comparison_by_hand():
    e = torch.eye(4)
    a, b = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[4.0, 1.0, 2.0, 3.0]])
    found = compare_vectors(a, b, e, 2)
    assert found["jaccard"].item() == pytest.approx(1 / 3)  # {0, 1} and {0, 3}
    assert found["l2"].item() == pytest.approx(8**0.5) and found["cosine"].item() == pytest.approx(26 / 30)
    same = compare_vectors(a, a, torch.zeros(4, 4), 2)
    assert [same[key].item() for key in ("cosine", "l2", "jaccard")] == pytest.approx([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"top_k is 5 but must be in \[1, 4\]"):
        compare_vectors(a, b, e, 5)


def test_other_noise_shares_tokens_by_chance_alone():
    e = torch.randn(2000, 32)
    found = compare_vectors(torch.randn(200, 32), torch.randn(200, 32), e, 200)["jaccard"].mean()
    chance = 200 / 2000  # of 200 tokens 20 are shared: 20 / 380
    assert found.item() == pytest.approx(chance * 200 / (400 - chance * 200), abs=0.01)


def test_scores_are_standardised_over_the_vocabulary():
    matrix, e, ids = torch.randn(8, 20), torch.randn(50, 8), [3, 9]
    logits = e.double() @ matrix.double()
    expected = ((logits - logits.mean(0)) / logits.std(0, correction=0))[ids].mean(0)
    torch.testing.assert_close(concept_scores(matrix, e, ids), expected)
    matrix[:, 4] = 0
    assert concept_scores(matrix, e, ids)[4] == 0


@pytest.mark.parametrize("factory", ["tiny_llama", "tiny_gpt2"])
def test_noise_changes_these_columns_alone(factory, request, tmp_path):
    model = request.getfixturevalue(factory)()
    before, base = weights(model), copy.deepcopy(model)
    old = read_vectors(model, WHERE)
    edit = concept_vectors(model, WHERE, std=0.1, seed=3)
    noise = read_vectors(model, WHERE) - old
    assert 0.05 < noise.std() < 0.15 and len(noise.unique()) > 90
    name = "model.layers.{}.mlp.down_proj.weight" if factory == "tiny_llama" else "transformer.h.{}.mlp.c_proj.weight"
    for key, p in weights(model).items():
        rest = p - before[key] if factory == "tiny_llama" or p.ndim == 1 else (p - before[key]).T
        dims = [dim for layer, dim in WHERE if key == name.format(layer)]
        columns = rest.abs().sum(0).nonzero()[:, 0].tolist() if p.ndim == 2 else []
        assert columns == sorted(dims) and (p.ndim == 2 or torch.equal(p, before[key]))
    rows = concept_vector_report(base, model, WHERE, top_k=20)
    assert [(r["layer"], r["dim"]) for r in rows] == WHERE
    for i, row in enumerate(rows):
        assert row["l2"] == pytest.approx(noise[i].norm().item(), rel=1e-5) and row["jaccard"] < 0.6
        assert row["cosine"] == pytest.approx(
            torch.cosine_similarity(old[i], old[i] + noise[i], dim=0).item(), abs=1e-5
        )
    same = concept_vector_report(model, model, WHERE, top_k=20)
    assert all((r["cosine"], r["l2"], r["jaccard"]) == (pytest.approx(1), 0, 1) for r in same)
    edit.to_lora(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    adapted = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(adapted(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    edit.undo()
    assert all(torch.equal(p, before[key]) for key, p in weights(model).items())
    with concept_vectors(model, WHERE, std=0.1, seed=3):
        torch.testing.assert_close(read_vectors(model, WHERE) - old, noise)
    with concept_vectors(model, WHERE, std=0.0) as nothing:
        assert all(row["changed"] == 0 for row in nothing.report["parameters"])


def test_a_planted_concept_is_found(tiny_llama, tiny_gpt2):
    for model in (tiny_llama(), tiny_gpt2()):
        e = model.get_output_embeddings().weight.detach()
        part, ids = read_vectors(model, [(1, 11)]), [20, 21, 22]
        direction = torch.linalg.lstsq(e, (torch.isin(torch.arange(128), torch.tensor(ids)) * 1.0)[:, None]).solution
        weight = next(p for n, p in model.named_parameters() if "1.mlp.down_proj" in n or "1.mlp.c_proj.weight" in n)
        with torch.no_grad():
            weight.T[11] = direction[:, 0] if weight.shape[0] == 32 else weight.T[11]
            if weight.shape[0] != 32:
                weight[11] = direction[:, 0]
        assert not torch.equal(read_vectors(model, [(1, 11)]), part)
        found = find_concept_vectors(model, ids, top=4)
        assert len(found) == 4 and (found[0]["layer"], found[0]["dim"]) == (1, 11)
        assert [r["score"] for r in found] == sorted((r["score"] for r in found), reverse=True)


@pytest.mark.parametrize("factory", ["tiny_llama", "tiny_gpt2"])
def test_training_reaches_these_columns_alone_in_spite_of_weight_decay(factory, request):
    model = request.getfixturevalue(factory)()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    before, ids = weights(model), torch.tensor([[5, 6, 7, 8]])
    kept = {name: p for name, p in model.named_parameters()}
    with needle_training(model, WHERE) as needle:
        assert sum(p.numel() for p in needle.parameters) == 3 * 32
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 32
        # All of the model is given, as a Trainer does.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        first = model(ids, labels=ids).loss
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        last = model(ids, labels=ids).loss
    assert last < first and not frozen.requires_grad
    torch.testing.assert_close(model(ids, labels=ids).loss, last)
    after = weights(model)
    assert all(p is kept[name] for name, p in model.named_parameters())
    for name, p in after.items():
        a, b = (x if factory == "tiny_llama" or x.ndim == 1 else x.T for x in (before[name], p))
        if a.ndim == 2:
            dims = (a != b).any(0).nonzero()[:, 0].tolist()
            down = "down_proj" in name or "mlp.c_proj" in name
            layer = 0 if ".0." in name else 1
            assert dims == (sorted(dim for i, dim in WHERE if i == layer) if down else [])
        else:
            assert torch.equal(a, b)
    assert sum(p.requires_grad for p in model.parameters()) == len(before) - 1
    needle.edit.undo()
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_training_that_fails_leaves_the_model_as_it_was(tiny_llama):
    model = tiny_llama()
    before = weights(model)
    with pytest.raises(ZeroDivisionError), needle_training(model, WHERE) as needle:
        for p in needle.parameters:
            p.data.zero_()
        raise ZeroDivisionError
    assert needle.edit is None and list(weights(model)) == list(before)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    assert all(p.requires_grad for p in model.parameters())


def test_bad_input_is_named(tiny_llama):
    model = tiny_llama()
    for vectors, message in (
        ([(2, 0)], r"\(2, 0\): layer must be in \[0, 2\)"),
        ([(0, 64)], r"dim must be in \[0, 64\)"),
        ([], "at least one"),
        ([(0, 1), (0, 1)], "none twice"),
    ):
        with pytest.raises(ValueError, match=message):
            concept_vectors(model, vectors)
    with pytest.raises(ValueError, match="std is -1"):
        concept_vectors(model, WHERE, std=-1)
    with pytest.raises(ValueError, match=r"token_ids are \[200\]"):
        find_concept_vectors(model, [200])
