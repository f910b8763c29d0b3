"""RMU: its loss against plain torch, what is trained, and that later blocks do not run."""

import copy

import pytest
import torch
import transformers
from tiny_models import factory
from unlearning_cases import first_gradient, gradient_of, llama, part, trainer

from hfext.unlearning.rmu import RMU, direction, distance_rows, ending_at


def test_the_direction_is_a_unit_of_positive_entries():
    u = direction(500, 3)
    assert float(u.norm()) == pytest.approx(1) and (u >= 0).all() and torch.equal(u, direction(500, 3))
    assert float(u.mean() / u.std()) == pytest.approx(3**0.5, rel=0.1), "uniform, not normal"
    assert not torch.equal(u, direction(500, 4))


def test_distances_are_means_over_tokens_and_then_over_rows():
    h = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 5.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert distance_rows(h, torch.zeros(2), mask).tolist() == [(2.5 + 12.5) / 2, 25.0]


def test_the_gradient_is_that_of_the_formula(tmp_path):
    model, reference = llama(num_hidden_layers=3), llama(seed=4, num_hidden_layers=3).double()
    options = {"layer": 1, "c": 2.0, "gamma": 0.7, "alpha": 3.0}
    found, pairs = first_gradient("rmu", tmp_path, model, options, ref_model=reference)

    def states(of, row):
        out = of(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[2][0]
        return out[torch.tensor(row["labels"]) != -100]

    target = 2.0 * direction(32, 0)
    forget = torch.stack([(states(model, r) - target).square().mean() for r in part(pairs, "forget")]).mean()
    kept = [(states(model, r) - states(reference, r).detach()).square().mean() for r in part(pairs, "retain")]
    wanted = gradient_of(0.7 * forget + 3.0 * torch.stack(kept).mean(), model)
    trained = torch.cat([
        torch.full((p.numel(),), name in {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)})
        for name, p in model.named_parameters()
    ])  # fmt: skip
    # States are compared in float32.
    torch.testing.assert_close(found, wanted * trained, rtol=1e-4, atol=1e-6)
    assert not found[~trained].any() and found[trained].any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nothing_else_changes_and_later_blocks_do_not_run(kind, tmp_path):
    gpt2 = factory(
        transformers.GPT2LMHeadModel, transformers.GPT2Config, vocab_size=128, n_embd=32, n_layer=3, n_head=4
    )
    model = llama(num_hidden_layers=3) if kind == "llama" else gpt2()
    blocks = model.model.layers if kind == "llama" else model.transformer.h
    before = copy.deepcopy(model.state_dict())
    ran = []
    handle = blocks[2].mlp.register_forward_hook(lambda *a: ran.append(1))
    made = trainer("rmu", tmp_path, model=model, objective_args={"layer": 1, "c": 3.0, "alpha": 1.0}, weight_decay=0.1)
    made.train()
    handle.remove()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert changed == set(names if kind == "llama" else [f"transformer.h.{i}.mlp.c_proj.weight" for i in range(2)])
    assert all(p.requires_grad for p in model.parameters()), "what was trainable is trainable again"
    assert not ran and "forward" not in vars(blocks[2])


def test_states_are_those_of_a_whole_forward():
    model = llama(num_hidden_layers=3)
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = model(ids, output_hidden_states=True).hidden_states
    with ending_at(model.model.layers, 0) as seen:
        short = model(ids)
    assert torch.equal(seen[0], whole[1]) and not torch.equal(short.logits, model(ids).logits)


def test_without_a_target_activations_shrink(tmp_path):
    model = llama()
    made = trainer("rmu", tmp_path, model=model, objective_args={"layer": 1, "c": 0.0, "alpha": 0.0},
                   num_train_epochs=10, learning_rate=1.0)  # fmt: skip
    made.train()
    losses = [h["unlearn/forget_loss"] for h in made.state.log_history if "loss" in h]
    assert losses[-1] < losses[0]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="layer is 7 but must be below 2"):
        trainer("rmu", tmp_path, objective_args={})
    with pytest.raises(ValueError, match="parameters is 'none' but must match"):
        trainer("rmu", tmp_path, objective_args={"layer": 0, "parameters": "none"})
    with pytest.raises(ValueError, match="layer is -1"):
        RMU(layer=-1)
