"""IGNITE: its Hessian-vector product, its multiplier, and the settings in which it is something known."""

import pytest
import torch
import transformers
from optim_training import flat, run_training

from hfext.optim import IGNITE, SharpnessAware, sam_step
from hfext.optim.ignite import penalised_gradient


def quadratic(optimizer_of, loss_weight=1.0, size=4):
    """L(w) = loss_weight * sum(w) and h(w) = w'Aw / 2: the weights before and after one update."""
    torch.manual_seed(0)
    a = torch.randn(size, size, dtype=torch.float64)
    a = a @ a.T
    w = torch.nn.Parameter(torch.randn(size, dtype=torch.float64))
    start, optimizer = w.detach().clone(), optimizer_of(torch.optim.SGD([w], lr=1.0))

    def closure():
        loss = loss_weight * w.sum()
        loss.backward()
        return loss

    def surrogate():
        h = 0.5 * w @ a @ w
        h.backward()
        return h

    sam_step(optimizer, closure, surrogate=surrogate)
    return a, start, w.detach(), optimizer


def test_added_term_is_the_gradient_of_the_penalty():
    lam, rho = 0.3, 0.7
    a, start, end, _ = quadratic(lambda base: IGNITE(base, lam=lam, rho=rho, r=0.05))
    w = start.clone().requires_grad_(True)
    penalty = lam * rho * torch.linalg.vector_norm(a @ w)
    (expected,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(start - end, torch.ones(4, dtype=torch.float64) + expected)


def test_linear_output_has_no_penalty():
    g = [torch.tensor([1.0, 2.0])]
    penalised_gradient(g, [torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.0])], 10.0)
    assert g[0].tolist() == [1.0, 2.0]


def test_multiplier_moves_by_the_violation_and_is_clamped():
    a, start, _, optimizer = quadratic(lambda base: IGNITE(base, lam=0.3, rho=0.7, lam_lr=0.5, epsilon=0.1))
    assert optimizer.lam == pytest.approx(0.3 + 0.5 * (0.7 * torch.linalg.vector_norm(a @ start).item() - 0.1))
    assert quadratic(lambda base: IGNITE(base, lam=0.3, lam_lr=1.0, epsilon=100.0))[3].lam == 0.0
    assert quadratic(lambda base: IGNITE(base, lam=0.3, lam_lr=1.0, epsilon=100.0, clamp=False))[3].lam < -90
    assert quadratic(lambda base: IGNITE(base, lam=0.3, learn_lam=False))[3].lam == 0.3


def test_no_slope_no_penalty():
    w = torch.nn.Parameter(torch.zeros(2))

    def closure():
        loss = w.sum()
        loss.backward()
        return loss

    def surrogate():
        h = (w**2).sum()
        h.backward()
        return h

    sam_step(IGNITE(torch.optim.SGD([w], lr=1.0), lam=1.0), closure, surrogate=surrogate)
    assert w.tolist() == [-1.0, -1.0]


def test_loss_as_target_with_unit_weight_is_sam(tmp_path, tiny_gpt2):
    sam = run_training(tiny_gpt2(), "sam", "rho=0.05,base=sgd", tmp_path)
    ignite = run_training(
        tiny_gpt2(), "ignite", "target=loss,lam=1,rho=0.05,r=0.05,learn_lam=false,base=sgd", tmp_path
    )
    assert (flat(sam.model) - flat(ignite.model)).abs().max() < 1e-7


@pytest.mark.parametrize("output", ["label", "max"])
def test_classifier_output(output, tmp_path, tiny_bert_classifier):
    data = [{"input_ids": torch.arange(4, 12) + i, "labels": i % 4} for i in range(8)]
    model = tiny_bert_classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = torch.stack([d["input_ids"] for d in data]), torch.tensor([d["labels"] for d in data])
    logits = model(batch[0]).logits
    h = logits.gather(1, batch[1][:, None]).mean() if output == "label" else logits.amax(1).mean()
    norm = torch.sqrt(
        sum((g**2).sum() for g in torch.autograd.grad(h, list(model.parameters()), allow_unused=True) if g is not None)
    )
    job = run_training(
        model,
        "ignite",
        f"output={output},base=sgd",
        tmp_path,
        data=data,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    assert job.state.log_history[0]["ignite/grad_norm_h"] == pytest.approx(norm.item(), rel=1e-5)


def test_regression_output(tmp_path, tiny_bert_classifier):
    data = [{"input_ids": torch.arange(4, 12) + i, "labels": float(i)} for i in range(8)]
    model = tiny_bert_classifier(num_labels=1)
    assert isinstance(model, transformers.PreTrainedModel)
    job = run_training(model, "ignite", "lam=0.1", tmp_path, data=data, learning_rate=1e-3)
    assert job.state.log_history[0]["ignite/grad_norm_h"] > 0


def test_multiplier_is_saved(tmp_path, tiny_gpt2):
    job = run_training(
        tiny_gpt2(), "ignite", "lam_lr=0.5", tmp_path, save_strategy="steps", save_steps=3, learning_rate=1e-3
    )
    state = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert state["hfext"]["lam"] == job.optimizer.optimizer.lam != 1e-3
    state["hfext"]["lam"] = float("nan")
    with pytest.raises(ValueError, match="hfext.lam is nan"):
        job.optimizer.optimizer.load_state_dict(state)


def test_needs_a_surrogate_in_raw_loops():
    w = torch.nn.Parameter(torch.ones(2))

    def closure():
        w.sum().backward()
        return w.sum()

    with pytest.raises(ValueError, match="surrogate=closure"):
        sam_step(IGNITE(torch.optim.SGD([w], lr=1.0)), closure)


@pytest.mark.parametrize(
    "options, message",
    [({"r": 0.0}, "r is 0.0"), ({"lam": -1.0}, "lam"), ({"target": "h"}, "target"), ({"scope": "micro"}, "scope")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        IGNITE(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), **options)


def test_radius_zero_is_plain_training():
    net = torch.nn.Linear(2, 2)
    assert not SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.0).begin()


def test_loss_scale_does_not_reach_the_multiplier():
    def run(scale):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = IGNITE(torch.optim.SGD([w], lr=0.1), lam=0.3, lam_lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, enabled=scale != 1)

        def closure():
            loss = w.sum()
            scaler.scale(loss).backward()
            return loss

        def surrogate():
            h = (w**3).sum()
            scaler.scale(h).backward()
            return h

        for _ in range(3):
            sam_step(optimizer, closure, surrogate=surrogate, scaler=scaler)
        return w.detach(), optimizer.lam

    (w, lam), (scaled_w, scaled_lam) = run(1), run(1024.0)
    torch.testing.assert_close(w, scaled_w)
    assert lam == pytest.approx(scaled_lam)
