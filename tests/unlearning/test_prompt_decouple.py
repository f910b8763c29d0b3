"""Prompt decouple: the added term, and its effect on a toy task."""

import torch
from unlearning_cases import DECOUPLE, first_gradient, flat, gradient_of, llama, nll_sums, part, trainer


def test_without_weight_it_is_its_base_and_else_adds_a_likelihood(tmp_path):
    model = llama()
    base, _ = first_gradient("grad_diff", tmp_path, model)
    zero, _ = first_gradient("prompt_decouple", tmp_path, model, {"lam": 0.0})
    torch.testing.assert_close(zero, base, rtol=0, atol=1e-12)
    found, pairs = first_gradient("prompt_decouple", tmp_path, model, {"lam": 0.4})
    d, n = nll_sums(model, part(pairs, "decouple"))
    torch.testing.assert_close(found, base + gradient_of(0.4 * d.sum() / n.sum(), model), rtol=0, atol=1e-10)


def test_other_bases(tmp_path):
    for base in ("idk", "kl_min", "dpo", "l1_sparse", "code_eraser"):
        made = trainer("prompt_decouple", tmp_path, objective_args={"base": base}, decouple=DECOUPLE)
        before = flat(made.model)
        made.train()
        assert not torch.equal(before, flat(made.model))


def test_a_prompt_is_refused_in_one_context_only(tmp_path):
    """Context h: the prompt must no longer be answered; context s: it must. Without the term neither is."""
    harmful, safe, prompts, answer, refusal = 10, 11, range(20, 36), 50, 51

    def row(context, prompt, said):
        return {"input_ids": [context, prompt, 5, said, 2], "labels": [-100, -100, -100, said, 2]}

    def refusals(model, context):
        ids = torch.tensor([[context, p, 5] for p in prompts])
        with torch.no_grad():
            return float((model(ids).logits[:, -1].argmax(-1) == refusal).float().mean())

    learnt = llama()
    taught = [row(c, p, answer) for c in (harmful, safe) for p in prompts]
    other = [{"input_ids": [7, k, 9, k + 1, 2], "labels": [-100, -100, -100, k + 1, 2]} for k in range(60, 76)]
    options = dict(optim="adamw_torch", learning_rate=1e-2, num_train_epochs=30, logging_strategy="no")
    trainer("grad_diff", tmp_path, model=learnt, forget=taught, retain=taught + other,
            objective_args={"gamma": 0.0}, **options).train()  # fmt: skip
    assert refusals(learnt, harmful) == refusals(learnt, safe) == 0
    start = {name: x.clone() for name, x in learnt.state_dict().items()}
    forget = [{**row(harmful, p, answer), "alternate": row(harmful, p, refusal)} for p in prompts]
    decouple = [row(safe, p, answer) for p in prompts]
    options["num_train_epochs"] = 10
    found = {}
    for lam in (0.0, 1.0):
        learnt.load_state_dict(start)
        trainer("prompt_decouple", tmp_path, model=learnt, forget=forget, retain=other, decouple=decouple,
                objective_args={"base": "idk", "lam": lam}, **options).train()  # fmt: skip
        found[lam] = refusals(learnt, harmful), refusals(learnt, safe)
    assert found[0.0][1] > 0.5 and found[1.0][0] > 0.9 and found[1.0][1] < 0.1, found
