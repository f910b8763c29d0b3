"""Task vectors: limits, buffers, ties, and the adapter that equals the dense form."""

import copy

import pytest
import torch
import unlearning_cases as cases
from peft import LoraConfig, get_peft_model
from torch import nn

from hfext.unlearning.task_vector import negate, task_vector

IDS = torch.tensor([[5, 6, 7, 8]])


def test_the_formula_and_its_limits():
    start = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    end = {"w": torch.tensor([2.0, 0.0]), "n": torch.tensor(9)}
    found = negate(start, end, 0.5)
    assert found["w"].tolist() == [0.5, 3.0] and found["n"] == 3 and start["w"].tolist() == [1.0, 2.0]
    assert found["n"] is not start["n"]
    a, b = torch.randn(1000), torch.randn(1000)
    assert torch.equal(negate({"w": a}, {"w": b}, 0.0)["w"], a)
    torch.testing.assert_close(negate({"w": a}, {"w": b}, -1.0)["w"], b, rtol=0, atol=0)
    half = negate({"w": a.bfloat16()}, {"w": b.bfloat16()}, 16.0)["w"]
    expected = a.bfloat16().double() - 16 * (b.bfloat16().double() - a.bfloat16().double())
    assert half.dtype == torch.bfloat16 and torch.equal(half, expected.bfloat16())


def test_bad_input_is_named():
    w = {"w": torch.ones(2)}
    with pytest.raises(KeyError, match="x is in one of the two"):
        negate(w, {**w, "x": torch.ones(1)}, 1.0)
    with pytest.raises(KeyError, match="x is in one of the two"):
        negate({**w, "x": torch.ones(1)}, w, 1.0)
    with pytest.raises(ValueError, match="task vector is zero"):
        negate(w, {"w": torch.ones(2)}, 1.0)
    with pytest.raises(ValueError, match=r"w is \[2\] and \[3\]"):
        negate(w, {"w": torch.ones(3)}, 1.0)
    with pytest.raises(ValueError, match="alpha is nan"):
        negate(w, {"w": torch.zeros(2)}, float("nan"))


@pytest.mark.parametrize("factory", ["tiny_llama", "tiny_gpt2"])
def test_on_models(factory, request):
    make = request.getfixturevalue(factory)
    model, reinforced = make(), make(seed=1)
    before = copy.deepcopy(model.state_dict())
    expected = negate(before, reinforced.state_dict(), 0.7)
    with task_vector(model, reinforced, 0.7) as edit:
        assert all(torch.equal(p, expected[name]) for name, p in model.state_dict().items())
        assert len(edit.report["parameters"]) == len(list(model.parameters()))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with task_vector(model, reinforced.state_dict(), -1.0):
        torch.testing.assert_close(model(IDS).logits, reinforced(IDS).logits)
    with pytest.raises(ValueError, match="zero"):
        task_vector(model, make(), 1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_float_buffers_move_and_integers_stay():
    a, b = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    b(torch.randn(5, 3))
    task_vector(a, b, 1.0)
    torch.testing.assert_close(a[1].running_mean, -b[1].running_mean)
    assert a[1].num_batches_tracked == 0


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 4.0])
def test_the_scaled_adapter_is_the_dense_form(tiny_llama, alpha):
    options = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "lora_alpha": 5, "init_lora_weights": False}
    model = get_peft_model(tiny_llama(), LoraConfig(**options), adapter_name="forget")
    merged = copy.deepcopy(model).merge_and_unload()
    dense = tiny_llama()
    task_vector(dense, merged, alpha)
    before = copy.deepcopy(model.state_dict())
    edit = task_vector(model, "forget", alpha)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-5)
    assert (dense(IDS).logits - tiny_llama()(IDS).logits).abs().max() > 1e-3 or alpha == 0
    edit.undo()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_adapters_that_cannot_be_scaled(tiny_llama):
    with pytest.raises(ValueError, match="no PeftModel"):
        task_vector(tiny_llama(), "default")
    fresh = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="never trained"):
        task_vector(fresh, "default")
    with pytest.raises(ValueError, match="no adapter 'other' .it has default"):
        task_vector(fresh, "other")
    for options in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}):
        more = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], **options))
        with pytest.raises(NotImplementedError, match="more than a plain LoRA"):
            task_vector(more, "default")
    merged = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge it first"):
        task_vector(merged, "default")


# ---- the objective ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.5, -1.0, 0.0])
def test_the_trainer_negates_what_it_trained(alpha, tmp_path):
    start = cases.flat(cases.llama())
    reinforced = cases.run("task_vector", tmp_path, objective_args={"alpha": -1.0})
    plain = cases.run("l1_sparse", tmp_path, retain=cases.FORGET, objective_args={"gamma": 0.0})
    torch.testing.assert_close(reinforced, plain, rtol=0, atol=1e-6)
    found = cases.run("task_vector", tmp_path, objective_args={"alpha": alpha})
    torch.testing.assert_close(found, start - alpha * (reinforced - start), rtol=0, atol=1e-6)


def test_the_trainer_negates_a_fresh_adapter_and_refuses_others(tmp_path):
    from peft import LoraConfig, get_peft_model

    def lora(**options):
        torch.manual_seed(0)
        settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
        return get_peft_model(cases.llama(), settings)

    found = {}
    for alpha in (-1.0, 0.5):
        model = lora()
        cases.trainer("task_vector", tmp_path, model=model, objective_args={"alpha": alpha}, learning_rate=0.5).train()
        found[alpha] = model.merge_and_unload().state_dict()
    base = cases.llama().state_dict()
    for name, value in base.items():
        wanted = value - 0.5 * (found[-1.0][name] - value)
        torch.testing.assert_close(found[0.5][name], wanted, rtol=0, atol=1e-6)
    assert any(not torch.equal(found[-1.0][name], value) for name, value in base.items())
    for options in ({"modules_to_save": ["lm_head"]}, {"use_dora": True}):
        with pytest.raises(NotImplementedError, match="beside LoRA's A and B"):
            cases.trainer("task_vector", tmp_path, model=lora(**options))
    trained = lora()
    for key, p in trained.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.1)
    with pytest.raises(ValueError, match="needs a fresh adapter"):
        cases.trainer("task_vector", tmp_path, model=trained)
