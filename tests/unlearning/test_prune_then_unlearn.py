"""Pruning: which entries, and that they stay zero through momentum, weight decay, accumulation and resume."""

import pytest
import torch
from unlearning_cases import flat, llama, trainer

from hfext.unlearning.prune_then_unlearn import prune_then_unlearn, smallest


def test_the_smallest_of_all_together():
    a, b = torch.tensor([[1.0, -5.0], [0.5, 2.0]]), torch.tensor([3.0, -0.1])
    assert [m.tolist() for m in smallest([a, b], 0.5)] == [[[False, True], [False, True]], [True, False]]
    assert [m.tolist() for m in smallest([torch.ones(4)], 0.5)] == [[False, False, True, True]]
    assert all(m.all() for m in smallest([a, b], 0.0))


def zeros(model, masks):
    own = dict(model.named_parameters())
    return all(not own[name][~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize("name", ["grad_diff", "ngdiff"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_zeros_stay(name, optim, tmp_path):
    model = llama()
    pruned = prune_then_unlearn(model, sparsity=0.8)
    assert not any("embed" in key or "norm" in key for key in pruned.masks)
    kept = sum(int(m.sum()) for m in pruned.masks.values()) / sum(m.numel() for m in pruned.masks.values())
    assert kept == pytest.approx(0.2, abs=1e-4)
    before = flat(model)
    options = dict(weight_decay=0.1, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1)
    if optim == "sgd":
        options["optim_args"] = "momentum=0.9"
    made = trainer(name, tmp_path, model=model, optim=optim, callbacks=[pruned], **options)
    made.train()
    assert zeros(model, pruned.masks) and not torch.equal(flat(model), before)
    again = llama()
    same = prune_then_unlearn(again, sparsity=0.8)
    made = trainer(name, tmp_path, model=again, optim=optim, callbacks=[same], **options)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(flat(again), flat(model))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="sparsity is 1.5"):
        prune_then_unlearn(llama(), 1.5)
    with pytest.raises(ValueError, match="leave no parameter"):
        prune_then_unlearn(llama(), 0.5, include="nothing")
