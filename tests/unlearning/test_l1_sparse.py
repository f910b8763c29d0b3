"""l1-sparse: the schedule, the penalty and its gradient."""

import pytest
import torch
from unlearning_cases import RETAIN, first_gradient, flat, gradient_of, llama, nll_sums, part, run, trainer

from hfext.unlearning.l1_sparse import L1Sparse, l1_norm, weight_at


def test_the_weight_fades():
    assert [weight_at(e, 4, 2.0, 0) for e in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert [weight_at(e, 4, 2.0, 2) for e in range(4)] == [2.0, 1.0, 0.0, 0.0]
    assert [weight_at(e, 4, 2.0, 4) for e in range(4)] == [2.0] * 4


def test_the_gradient_is_that_of_the_formula(tmp_path):
    model = llama()
    signs = torch.cat([p.detach().double().sign().flatten() for p in model.parameters()])
    found, pairs = first_gradient("l1_sparse", tmp_path, model, {"gamma": 1e-2})
    r, n = nll_sums(model, part(pairs, "retain"))
    torch.testing.assert_close(found, gradient_of(r.sum() / n.sum(), model) + 1e-2 * signs, rtol=0, atol=1e-9)


def test_weights_shrink_with_the_penalty_and_forget_rows_are_not_seen(tmp_path):
    plain, pressed = (run("l1_sparse", tmp_path, objective_args={"gamma": g}) for g in (0.0, 1e-2))
    assert pressed.abs().sum() < plain.abs().sum()
    assert torch.equal(pressed, run("l1_sparse", tmp_path, objective_args={"gamma": 1e-2}, forget=None))
    # gamma = 0: the stock Trainer's loss on retain rows
    made = trainer("l1_sparse", tmp_path, objective_args={"gamma": 0.0})
    assert made.train_dataset.anchor == "retain" and len(made.train_dataset) == len(RETAIN)


@pytest.mark.parametrize("options", [{"num_train_epochs": 4}, {"num_train_epochs": 9, "max_steps": 16}])
def test_the_weight_fades_in_the_trainer(options, tmp_path):
    """13 retain rows are 4 updates an epoch; 16 updates are 4 epochs, whatever num_train_epochs says."""
    made = trainer("l1_sparse", tmp_path, objective_args={"gamma": 1e-3}, learning_rate=1e-12, **options)
    made.train()
    entries = [h for h in made.state.log_history if "loss" in h]
    seen = [(h["loss"] - h["unlearn/retain_loss"]) / h["unlearn/l1_loss"] for h in entries]
    assert seen == pytest.approx([1e-3 * (1 - e / 4) for e in range(4) for _ in range(4)], rel=1e-3)


def test_some_parameters_can_be_left_out():
    model = llama()
    made = L1Sparse(exclude="embed|norm|lm_head")
    made.prepare(model, None)
    assert float(l1_norm(made.penalised)) < float(flat(model).abs().sum())
    with pytest.raises(ValueError, match="leaves no parameter"):
        L1Sparse(exclude=".").prepare(model, None)
    with pytest.raises(ValueError, match="exclude is '\\[' but must be a regular expression"):
        L1Sparse(exclude="[")
