"""RECE: both quadratics are stationary, limits, cumulative rounds, modules and matrices."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfext.unlearning._edit import Edit
from hfext.unlearning.rece import adversarial_embeddings, rece, target_values, uce_factors

D = dict(dtype=torch.float64)


def case(n=3, p=4, features=8, out=6):
    return torch.randn(out, features, **D), torch.randn(n, features, **D), torch.randn(p, features, **D)


def test_the_closed_form_is_stationary():
    w, c, k = case()
    v = torch.randn(3, 6, **D)
    left, right = uce_factors(w, c, v, k, 0.1, 1.0, 0.3)
    new = (w + left @ right).requires_grad_()
    loss = 0.1 * (new - w).square().sum() + (new @ c.T - v.T).square().sum()
    loss = loss + 0.3 * (new @ k.T - w @ k.T).square().sum()
    loss.backward()
    assert new.grad.abs().max() < 1e-10
    # The normal equations of the paper.
    metric = 0.1 * torch.eye(8, **D) + c.T @ c + 0.3 * k.T @ k
    expected = (0.1 * w + v.T @ c + 0.3 * (w @ k.T) @ k) @ torch.linalg.inv(metric)
    torch.testing.assert_close(new.detach(), expected, rtol=1e-9, atol=1e-9)


def test_the_adversarial_embedding_is_stationary():
    old = [torch.randn(6, 8, **D), torch.randn(3, 8, **D)]
    new, c = [w + torch.randn_like(w) for w in old], torch.randn(5, 8, **D)
    found = adversarial_embeddings(c, old, new, 0.1).requires_grad_()
    loss = 0.1 * found.square().sum()
    for before, after in zip(old, new, strict=True):
        loss = loss + (found @ after.T - c @ before.T).square().sum()
    loss.backward()
    assert found.grad.abs().max() < 1e-10
    # With untouched projections of full rank and rho -> 0 it is the embedding itself.
    torch.testing.assert_close(adversarial_embeddings(c, old, old, 1e-12), c, rtol=1e-6, atol=1e-6)


def test_identity_and_interpolation():
    w, c, k = case()
    target = torch.randn(3, 8, **D)
    assert torch.equal(rece([w], c, k, target, erase_scale=0.0, preserve_scale=0.0, rounds=0)[0], w)
    assert torch.equal(rece([w], c, k, target, erase_scale=0.0)[0], w)
    (new,) = rece([w], c, None, target, lam=1e-7, rounds=0)
    torch.testing.assert_close(new @ c.T, w @ target.T, rtol=1e-5, atol=1e-5)
    # A direction that neither is erased nor overlaps with what is stays.
    free = torch.linalg.qr(torch.cat([c, torch.randn(1, 8, **D)]).T)[0][:, -1]
    torch.testing.assert_close(new @ free, w @ free, rtol=1e-6, atol=1e-6)
    (zero,) = rece([w], c, lam=1e-12, rounds=0)
    assert (zero @ c.T).abs().max() < 1e-8
    # Erased and preserved at once with equal weight: half way.
    (half,) = rece([w], c, c, target, lam=1e-12, preserve_scale=1.0, rounds=0)
    torch.testing.assert_close(half @ c.T, (w @ c.T + w @ target.T) / 2, rtol=1e-8, atol=1e-8)
    (kept,) = rece([w], c[:1], k, lam=1e-9, preserve_scale=1.0, rounds=0)
    assert ((kept - w) @ k.T).norm() < 1e-3 and (kept @ c[0]).norm() < 1e-3 * (w @ c[0]).norm()


def test_rounds_are_uce_steps_on_what_is_left():
    (w, c, k), other, target = case(), torch.randn(4, 8, **D), torch.randn(1, 8, **D)
    old = [w, other]
    for rounds in range(3):
        now, erase = list(old), c
        for step in range(rounds + 1):
            erase = c if step == 0 else adversarial_embeddings(c, old, now, 0.1)
            steps = [uce_factors(m, erase, (m @ target.T).T.expand(3, -1), k, 0.1, 1.0, 0.1) for m in now]
            now = [m + a @ b for m, (a, b) in zip(now, steps, strict=True)]
        for found, expected in zip(rece(old, c, k, target, rounds=rounds), now, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_adversarial_embeddings_bring_less_back():
    w, c, _ = case(n=1, features=16)
    back = []
    for rounds in (0, 1, 3):
        (new,) = rece([w], c, rounds=rounds)
        found = adversarial_embeddings(c, [w], [new], 0.1)
        back.append(float((new @ found.T - w @ c.T).norm() / (w @ c.T).norm()))
    assert back[0] < back[1] < back[2]


def test_the_tensor_form_is_orthogonal_to_the_old_output():
    w, c = torch.randn(6, 8, **D), torch.randn(2, 5, 8, **D)
    target = torch.randn(2, 5, 8, **D)
    values = target_values(w, c, target, "tensor")
    for concept in range(2):
        old = c[concept] @ w.T
        assert abs((values[concept] * old).sum()) < 1e-10
        u = old / old.norm()
        plain = target[concept] @ w.T
        torch.testing.assert_close(values[concept], plain - (u * plain).sum() * u)
    a, b = (rece([w], c, target=target, how=how)[0] for how in ("replace", "tensor"))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_modules_are_edited_in_place_and_back(dtype):
    linear, conv = nn.Linear(64, 48).to(dtype), Conv1D(40, 64).to(dtype)
    before = linear.weight.detach().clone(), conv.weight.detach().clone()
    c, k = torch.randn(2, 64), torch.randn(5, 64)
    expected = rece([before[0], before[1].T], c, k, rounds=2)
    edit = rece([linear, conv], c, k, rounds=2)
    assert isinstance(edit, Edit) and [row["rank"] for row in edit.report["parameters"]] == [6, 6]
    close = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(linear.weight, expected[0], rtol=close, atol=close)
    torch.testing.assert_close(conv.weight.T, expected[1], rtol=close, atol=close)
    edit.undo()
    assert torch.equal(linear.weight, before[0]) and torch.equal(conv.weight, before[1])
    edit = rece(linear, torch.randn(30, 64))
    assert edit.report["parameters"][0]["kind"] == "dense"
    edit.undo()
    assert torch.equal(linear.weight, before[0])


def test_layers_of_a_model_and_their_adapter(tiny_llama):
    from peft import get_peft_model, set_peft_model_state_dict

    model, ids = tiny_llama(), torch.tensor([[5, 6, 7]])
    erase = model.get_input_embeddings().weight[[9]].detach()
    edit = rece(model, erase, targets=r"layers\.0.*\.[kv]_proj$", rounds=1)
    assert edit.report["layers"] == [f"model.layers.0.self_attn.{x}_proj" for x in "kv"]
    expected = model(ids).logits
    config, weights = edit.to_lora()
    adapted = get_peft_model(tiny_llama(), config)
    set_peft_model_state_dict(adapted, weights)
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-5)


def test_bad_input_is_named(tiny_llama):
    w, c, k = case()
    for options, message in (
        ({"lam": 0.0}, "lam is 0.0 but must be > 0"),
        ({"rho": 0.0}, "rho is 0.0"),
        ({"rounds": -1}, "rounds is -1"),
        ({"erase_scale": -1.0}, "erase_scale is -1.0"),
        ({"lam": float("inf")}, "lam is inf but must be > 0 and finite"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"erase_scale": float("inf")}, "erase_scale is inf"),
        ({"preserve_scale": float("nan")}, "preserve_scale is nan"),
        ({"rounds": float("inf")}, "rounds is inf"),
        ({"how": "mean"}, "how is 'mean'"),
        ({"target": torch.ones(2, 8)}, "target has the shape"),
        ({"preserve": torch.ones(2, 7)}, "preserve has 7 features"),
        ({"target": torch.full((1, 8), float("nan"))}, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            rece([w], c, **options)
    with pytest.raises(ValueError, match=r"matrix 1 is \[6, 7\] but must take 8 features"):
        rece([w, w[:, :7]], c)
    with pytest.raises(ValueError, match="erase has the shape"):
        rece([w], c[0])
    with pytest.raises(ValueError, match="matches none of the linear layers"):
        rece(tiny_llama(), torch.ones(1, 32))
    with pytest.raises(TypeError, match="hold a LayerNorm"):
        rece([nn.LayerNorm(8)], c)
    with pytest.raises(TypeError, match="must be linear layers"):
        rece([], c)
