"""BiSAM: golden values, identities of Q, and every kind of labelled loss in the Trainer."""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_training import flat, language_data, run_training

from hfext.optim import BiSAM, sam_step
from hfext.optim.bisam import GAMMA, bisam_multilabel, bisam_rows

Z = torch.tensor([[2, -1, 0.5, 0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
Y = torch.tensor([0, 2])


def slow_q(z, y, surrogate, mu, alpha=0.1):
    """Q of one row, term by term from the paper."""
    total = 0.0
    for j in range(len(z)):
        x = z[j] - z[y]
        value = torch.tanh(alpha * x) if surrogate == "tanh" else 1 - torch.log(1 + torch.exp(GAMMA - x))
        total = total + torch.exp(mu * value)
    return torch.log(total) / mu


def gradient(z, y, **options):
    z = z.clone().requires_grad_(True)
    q = bisam_rows(z, y, **options)
    q.mean().backward()
    return q.detach(), z.grad


def test_golden_values():
    q, g = gradient(Z, Y, surrogate="tanh")
    torch.testing.assert_close(q, torch.tensor([0.03498622, 0.13425411], dtype=torch.float64), atol=1e-8, rtol=0)
    expected = torch.tensor([-0.01423136, 0.00175129, 0.00777485, 0.00470521], dtype=torch.float64)
    torch.testing.assert_close(g[0], expected, atol=1e-8, rtol=0)
    q, g = gradient(Z, Y, surrogate="log")
    torch.testing.assert_close(q, torch.tensor([0.46211454, 1.35555078], dtype=torch.float64), atol=1e-8, rtol=0)
    expected = torch.tensor([-0.16847222, 0.02343059, 0.08709394, 0.05794768], dtype=torch.float64)
    torch.testing.assert_close(g[0], expected, atol=1e-8, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 9), st.integers(1, 7), st.sampled_from(["tanh", "log"]), st.floats(0.3, 12), st.integers(0, 9999)
)
def test_equals_the_paper_term_by_term(classes, rows, surrogate, mu, seed):
    generator = torch.Generator().manual_seed(seed)
    z = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).requires_grad_(True)
    y = torch.randint(0, classes, (rows,), generator=generator)
    slow = torch.stack([slow_q(z[i], y[i], surrogate, mu) for i in range(rows)])
    (slow_grad,) = torch.autograd.grad(slow.sum(), z)
    fast = bisam_rows(z, y, surrogate, mu, chunk=3)
    (fast_grad,) = torch.autograd.grad(fast.sum(), z)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_grad, slow_grad)
    assert fast_grad.sum(dim=1).abs().max() < 1e-12  # adding a constant to a row changes nothing
    order = torch.randperm(classes, generator=generator)
    moved = bisam_rows(z[:, order], order.argsort()[y], surrogate, mu)
    torch.testing.assert_close(moved, fast)


def test_identity_surrogate_is_cross_entropy():
    q, g = gradient(Z, Y, surrogate="identity")
    z = Z.clone().requires_grad_(True)
    ce = torch.nn.functional.cross_entropy(z, Y, reduction="none")
    ce.mean().backward()
    torch.testing.assert_close(q, ce.detach())
    torch.testing.assert_close(g, z.grad)


def test_large_mu_tends_to_the_maximum():
    best = bisam_rows(Z, Y, "tanh", reduction="max")
    torch.testing.assert_close(bisam_rows(Z, Y, "tanh", mu=1e5), best, atol=1e-4, rtol=0)
    slack = bisam_rows(Z, Y, "tanh", mu=10.0) - best
    assert (slack >= 0).all() and (slack <= math.log(4) / 10).all()


def test_ignored_rows_get_nothing():
    q, g = gradient(Z, torch.tensor([0, -100]))
    assert q[1] == 0 and not g[1].any() and g[0].any()


def test_badly_wrong_samples_lose_weight_to_those_at_the_boundary():
    z = torch.tensor([[0.0, m] for m in (0.0, 5.0, 10.0, 20.0)], dtype=torch.float64)
    weight = {
        s: gradient(z, torch.zeros(4, dtype=torch.long), surrogate=s)[1][:, 1] * 4 for s in ("identity", "log", "tanh")
    }
    assert weight["identity"][-1] == pytest.approx(1.0)
    assert weight["log"][:3].tolist() == pytest.approx([0.316, 0.0083, 5.7e-5], rel=0.02)
    assert weight["tanh"].tolist() == pytest.approx([0.05, 0.078, 0.042, 0.0071], rel=0.02)


def test_topk_lets_the_nearest_classes_compete():
    q = bisam_rows(Z, Y, "tanh", topk=2)
    kept = [Z[0, [0, 2]], Z[1, [2, 3]]]
    torch.testing.assert_close(q, torch.stack([slow_q(kept[0], 0, "tanh", 10.0), slow_q(kept[1], 0, "tanh", 10.0)]))
    torch.testing.assert_close(bisam_rows(Z, Y, "tanh", topk=4), bisam_rows(Z, Y, "tanh"))


def test_multilabel_is_the_two_class_case():
    generator = torch.Generator().manual_seed(0)
    z, y = (
        torch.randn(5, 3, generator=generator, dtype=torch.float64),
        torch.randint(0, 2, (5, 3), generator=generator),
    )
    pairs = torch.stack([torch.zeros_like(z), z], dim=-1).flatten(0, 1)
    for surrogate in ("tanh", "log", "identity"):
        torch.testing.assert_close(
            bisam_multilabel(z, y.double(), surrogate).flatten(), bisam_rows(pairs, y.flatten(), surrogate)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_float32_margin_of_all_tokens_exists(dtype):
    """Beyond the logits and their gradient, what is alive at any time is a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    biggest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.shape != z.shape:
                    biggest[0] = max(biggest[0], x.numel())
                elif isinstance(x, torch.Tensor) and x.shape == z.shape:
                    assert x.dtype == dtype
            return out

    z = torch.randn(4096, 64, dtype=dtype)
    with Watch():
        leaf = z.detach().requires_grad_(True)
        bisam_rows(leaf, torch.zeros(4096, dtype=torch.long), chunk=256).sum().backward()
    assert biggest[0] <= max(256 * 64, 4096)


def test_bfloat16_gradient_is_close_to_float32():
    z = torch.randn(64, 50)
    y = torch.randint(0, 50, (64,))
    _, full = gradient(z, y)
    _, low = gradient(z.bfloat16(), y)
    assert torch.nn.functional.cosine_similarity(full.flatten(), low.float().flatten(), dim=0) > 0.999


# ---- the Trainer ----------------------------------------------------------------------------------------------------


def bert(cls, labels=3, **fields):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=labels,
        initializer_range=0.3,
        **fields,
    )
    return getattr(transformers, f"BertFor{cls}")(config)


def rows(make, n=16):
    generator = torch.Generator().manual_seed(0)
    return [make(i, torch.randint(3, 128, (8,), generator=generator)) for i in range(n)]


TASKS = {
    "sequence": (lambda: bert("SequenceClassification"), rows(lambda i, x: {"input_ids": x, "labels": i % 3})),
    "token": (
        lambda: bert("TokenClassification"),
        rows(lambda i, x: {"input_ids": x, "labels": torch.where(x % 4 == 0, -100, x % 3)}),
    ),
    "masked_lm": (
        lambda: bert("MaskedLM"),
        rows(lambda i, x: {"input_ids": x, "labels": torch.where(x % 3 == 0, x, -100)}),
    ),
    "multiple_choice": (
        lambda: bert("MultipleChoice"),
        rows(lambda i, x: {"input_ids": x.view(4, 2), "labels": i % 4}),
    ),
    "question_answering": (
        lambda: bert("QuestionAnswering", 2),
        rows(lambda i, x: {"input_ids": x, "start_positions": i % 8, "end_positions": i % 9}),
    ),
    "multi_label": (
        lambda: bert("SequenceClassification", problem_type="multi_label_classification"),
        rows(lambda i, x: {"input_ids": x, "labels": torch.tensor([i % 2, i % 3 == 0, 1.0]).float()}),
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_identity_surrogate_is_sam_in_every_task(task, tmp_path):
    """The strong check: through labels, shifts, masks and means, Q with the identity is the model's own loss."""
    build, data = TASKS[task]
    # No accumulation: BERT's losses take the mean over each micro-batch, Q takes it over the items of the update.
    kwargs = dict(data=data, max_steps=3, per_device_train_batch_size=8)
    sam = run_training(build(), "sam", "rho=0.5,base=sgd", tmp_path, **kwargs)
    bisam = run_training(build(), "bisam", "rho=0.5,surrogate=identity,base=sgd", tmp_path, **kwargs)
    tanh = run_training(build(), "bisam", "rho=0.5,base=sgd", tmp_path, **kwargs)
    assert (flat(sam.model) - flat(bisam.model)).abs().max() < 2e-6
    assert (flat(sam.model) - flat(tanh.model)).abs().max() > 1e-5
    assert bisam.state.log_history[0]["sam/grad_norm_ascent"] == pytest.approx(
        sam.state.log_history[0]["sam/grad_norm_ascent"], rel=1e-4
    )
    assert tanh.state.log_history[0]["loss"] == pytest.approx(sam.state.log_history[0]["loss"], abs=1e-6)


def test_causal_lm_identity_is_sam(tiny_llama, tmp_path):
    kwargs = dict(gradient_accumulation_steps=2, per_device_train_batch_size=4)
    sam = run_training(tiny_llama(), "sam", "rho=0.5,base=sgd", tmp_path, **kwargs)
    bisam = run_training(tiny_llama(), "bisam", "rho=0.5,surrogate=identity,base=sgd", tmp_path, **kwargs)
    assert (flat(sam.model) - flat(bisam.model)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "model, data",
    [
        (lambda: bert("SequenceClassification", 1), rows(lambda i, x: {"input_ids": x, "labels": float(i)})),
        (
            lambda: bert("SequenceClassification", problem_type="regression"),
            rows(lambda i, x: {"input_ids": x, "labels": torch.randn(3)}),
        ),
    ],
)
def test_regression_has_no_zero_one_loss(model, data, tmp_path):
    with pytest.raises(ValueError, match="regression has no 0-1 loss. Use optim='sam'"):
        run_training(model(), "bisam", None, tmp_path, data=data)


def test_outputs_without_logits_are_explained(tmp_path, tiny_llama):
    class Fused(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            outputs["logits"] = None
            return (loss, {"loss": loss}) if return_outputs else loss

    with pytest.raises(ValueError, match="no `logits`.*use_liger_kernel=False"):
        run_training(tiny_llama(), "bisam", None, tmp_path, trainer=Fused)


def test_own_rows_for_another_loss(tmp_path, tiny_llama):
    model = tiny_llama()

    def q_of_first_token(outputs, inputs):
        q = bisam_rows(outputs["logits"][:, 0], inputs["input_ids"][:, 1])
        return q, torch.ones_like(q, dtype=torch.bool)

    optimizer = BiSAM(torch.optim.SGD(model.parameters(), lr=0.1), rows=q_of_first_token)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    transformers.Trainer(model, args, train_dataset=language_data(), optimizers=(optimizer, None)).train()
    assert not torch.equal(flat(model), flat(tiny_llama()))


def test_adaptive_uses_the_ball_of_asam(tmp_path, tiny_llama):
    asam = run_training(tiny_llama(), "asam", "rho=0.5,base=sgd", tmp_path)
    bisam = run_training(tiny_llama(), "bisam", "rho=0.5,adaptive=true,surrogate=identity,base=sgd", tmp_path)
    assert (flat(asam.model) - flat(bisam.model)).abs().max() < 1e-6


def test_raw_loop_needs_a_surrogate():
    net = torch.nn.Linear(3, 4)
    optimizer = BiSAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1)
    x, y = torch.randn(6, 3), torch.arange(6) % 4

    def closure():
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    def surrogate():
        logits = net(x)
        bisam_rows(logits, y).mean().backward()
        return torch.nn.functional.cross_entropy(logits, y)

    with pytest.raises(ValueError, match="surrogate=closure"):
        sam_step(optimizer, closure)
    loss = torch.nn.functional.cross_entropy(net(x), y).item()
    assert sam_step(optimizer, closure, surrogate=surrogate).item() == pytest.approx(loss)


@pytest.mark.parametrize(
    "options, message",
    [({"mu": 0.0}, "mu"), ({"alpha": -1.0}, "alpha"), ({"topk": -1}, "topk"), ({"surrogate": "relu"}, "surrogate")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        BiSAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), **options)


def test_mu_scales_with_the_number_of_classes_when_asked():
    def optimizer(**options):
        return BiSAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), **options)

    assert optimizer()._mu(1000) == 10.0 and optimizer(surrogate="log")._mu(1000) == 1.0
    assert optimizer(scale_mu=True)._mu(1000) == pytest.approx(30.0)  # log 1000 / log 10 = 3
    assert optimizer(scale_mu=True, mu=2.0)._mu(10) == pytest.approx(2.0)


def test_own_loss_function_is_weighed_over_the_update(tmp_path, tiny_bert_classifier):
    """With `compute_loss_func` the Trainer divides nothing: Q must take its share of the update itself."""

    def loss_func(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    data = TASKS["sequence"][1]
    kwargs = dict(data=data, max_steps=2, trainer=lambda **k: transformers.Trainer(**k, compute_loss_func=loss_func))
    runs = [
        run_training(
            TASKS["sequence"][0](), "bisam", "rho=0.5,base=sgd", tmp_path, per_device_train_batch_size=8 // ga,
            gradient_accumulation_steps=ga, **kwargs,
        )
        for ga in (1, 4)
    ]  # fmt: skip
    assert (flat(runs[0].model) - flat(runs[1].model)).abs().max() < 1e-6
    norms = [r.state.log_history[0]["sam/grad_norm_ascent"] for r in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
