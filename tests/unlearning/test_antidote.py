"""Antidote: scores and marks by hand, one pass through the untouched model, LoRA and Conv1D, padding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hfext.unlearning._batches import pad_rows
from hfext.unlearning.antidote import antidote, largest_in_rows, squared_input_norms, target_layers, wanda_scores


def rows(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 128, (3 + i,), generator=g).tolist()} for i in range(n)]


def test_scores_and_marks_of_a_matrix_of_2_by_3():
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.5, 0.0]])
    scores = wanda_scores(weight, torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64))
    assert scores.tolist() == [[3.0, 4.0, 3.0], [12.0, 1.0, 0.0]]
    # int(3 * (1 - 0.5)) = 1 stays; of the two equal scores the first is sorted first.
    assert largest_in_rows(scores, 0.5).tolist() == [[False, True, True], [True, True, False]]
    assert largest_in_rows(scores, 0.34).tolist() == [[False, True, True], [True, True, False]]
    assert largest_in_rows(scores, 0.33).tolist() == [[False, True, False], [True, False, False]]
    assert not largest_in_rows(scores, 0.0).any() and largest_in_rows(scores, 1.0).all()
    assert torch.equal(wanda_scores(weight), weight.abs())


@pytest.mark.parametrize("rho", [0.0, 0.05, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("columns", [7, 10, 64])
def test_each_row_loses_in_minus_int(columns, rho):
    marks = largest_in_rows(torch.rand(5, columns), rho)
    assert (marks.sum(1) == columns - int(columns * (1 - rho))).all()


def test_norms_are_means_over_rows_of_sums_over_tokens(tiny_llama):
    model, data = tiny_llama(), rows()
    layer = model.model.layers[1].self_attn.q_proj
    expected = torch.zeros(32, dtype=torch.float64)
    for row in data:
        states = model.model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[1]
        expected += model.model.layers[1].input_layernorm(states)[0].double().square().sum(0) / len(data)
    for size in (1, 2, 5):
        found = squared_input_norms(model, {"q": layer}, data, batch_size=size)["q"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    swapped = squared_input_norms(model, {"q": layer}, data[::-1], batch_size=2)["q"]
    torch.testing.assert_close(swapped, expected, rtol=1e-4, atol=1e-6)
    # Padding as wide as one likes counts nothing.
    wide = {k: torch.nn.functional.pad(v, (0, 9)) for k, v in pad_rows(data).items()}
    found = squared_input_norms(model, {"q": layer}, [wide])["q"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factory", ["tiny_llama", "tiny_gpt2"])
def test_full_models_lose_weights_of_q_k_v_alone(factory, request):
    model, data = request.getfixturevalue(factory)().train(), rows()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norms = squared_input_norms(model, target_layers(model, None), data)
    edit = antidote(model, data, dense_ratio=0.1)
    ends = ("q_proj.weight", "k_proj.weight", "v_proj.weight") if factory == "tiny_llama" else ("c_attn.weight",)
    assert model.training and len(norms) == 2 * len(ends)
    for name, p in model.named_parameters():
        if not name.endswith(ends):
            assert torch.equal(p, before[name])
            continue
        # GPT-2 keeps [in, out].
        old, new = (x if factory == "tiny_llama" else x.T for x in (before[name], p.detach()))
        for a, b in zip(old, new, strict=True):
            order = sorted(range(32), key=lambda j: abs(a[j]).item() * norms[name[:-7]][j].sqrt().item())
            expected = a.clone()
            expected[order[int(32 * 0.9) :]] = 0
            assert torch.equal(b, expected) and (b == 0).sum() == 32 - 28
        assert edit.report["sparsity"][name[:-7]] == pytest.approx(4 / 32)
    edit.undo()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_lora_model_loses_weights_of_a_and_b_alone(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5))  # fmt: skip  # noqa: E501
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    edit = antidote(model.train(), rows(), dense_ratio=0.25)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_A" in name or "lora_B" in name} and len(changed) == 8
    zeros = {name: (model.get_parameter(name) == 0).sum(1).unique().tolist() for name in changed}
    assert all(count == [8 if "lora_A" in name else 2] for name, count in zeros.items())
    edit.undo()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all("base_layer" in name for name in target_layers(model, "q_proj.base_layer"))


def test_limits_and_no_data(tiny_llama):
    model = tiny_llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    old = weight.detach().clone()
    antidote(model, rows(), dense_ratio=0.0)
    assert torch.equal(weight, old)
    with antidote(model, None, dense_ratio=0.5, targets=r"layers\.0.*q_proj"):
        assert (weight == 0).sum() == 32 * 16
        assert torch.equal(weight.abs().amax(1), old.abs().sort(1).values[:, 15])
    with antidote(model, rows(), dense_ratio=1.0, targets="q_proj") as edit:
        assert not weight.any() and edit.report["sparsity"]["model.layers.0.self_attn.q_proj"] == 1
    assert torch.equal(weight, old)
    model.to(torch.bfloat16)
    with antidote(model, rows(), dense_ratio=0.1):
        assert ((weight == 0).sum(1) == 4).all()


def test_bad_input_is_named(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"dense_ratio is 1.5 but must be in \[0, 1\]"):
        antidote(model, rows(), 1.5)
    with pytest.raises(ValueError, match="no linear layer.*the layers are .*q_proj"):
        antidote(model, rows(), targets="nothing")
    with pytest.raises(ValueError, match="looks like q, k or v"):
        antidote(torch.nn.Sequential(torch.nn.Linear(2, 2)), None)
    with pytest.raises(ValueError, match="holds no rows"):
        antidote(model, [])


def test_rows_of_a_text_classifier(tiny_bert_classifier):
    model, data = tiny_bert_classifier(), rows()
    with antidote(model, data, 0.2, batch_size=2) as edit:
        expected = {name: p.clone() for name, p in model.named_parameters()}
    assert edit.kept
    for one in (int, torch.tensor):
        labelled = [{"input_ids": torch.tensor(row["input_ids"]), "labels": one(i % 4)} for i, row in enumerate(data)]
        with antidote(model, labelled, 0.2, batch_size=2):
            assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
