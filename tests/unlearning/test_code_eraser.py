"""CodeEraser: its gradient against plain torch, and the settings in which it is something known."""

import pytest
import torch
from unlearning_cases import FORGET, divergence, first_gradient, gradient_of, llama, nll_sums, part, rows, trainer


def parts_of(model, reference, given):
    """Sums of nll and of KL(reference || model) in and outside of segments, and the counts, token by token."""
    found = {"in": [], "out": [], "kl in": [], "kl out": []}
    for row in given:
        ids = torch.tensor([row["input_ids"]])
        q, p = (m(ids).logits[0].log_softmax(-1) for m in (model, reference))
        for t in range(1, ids.shape[1]):
            if row["labels"][t] != -100:
                where = "in" if row["segment_mask"][t] else "out"
                found[where].append(-q[t - 1, ids[0, t]])
                found[f"kl {where}"].append((p[t - 1].exp().detach() * (p[t - 1].detach() - q[t - 1])).sum())
    return {key: torch.stack(values).mean() for key, values in found.items()}


@pytest.mark.parametrize("kl_on", ["context", "segment", "retain"])
def test_the_gradient_is_that_of_the_formula(kl_on, tmp_path):
    model, reference = llama(), llama(seed=4).double()
    options = {"gamma": 0.7, "alpha": 1.3, "lam": 2.0, "kl_on": kl_on}
    found, pairs = first_gradient("code_eraser", tmp_path, model, options, ref_model=reference)
    seen = parts_of(model, reference, part(pairs, "forget"))
    if kl_on == "retain":
        kl = divergence(model, reference, part(pairs, "retain"))
    else:
        kl = seen["kl out" if kl_on == "context" else "kl in"]
    loss = -0.7 * seen["in"] + 1.3 * seen["out"] + 2 * kl
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=0, atol=1e-9)


def test_everything_marked_is_gradient_ascent_and_nothing_marked_is_fine_tuning(tmp_path):
    options = {"alpha": 0.0, "lam": 0.0}
    marked = [{**row, "segment_mask": [1] * len(row["input_ids"])} for row in FORGET]
    one, _ = first_gradient("code_eraser", tmp_path, options=options, forget=marked, retain=None)
    other, _ = first_gradient("grad_ascent", tmp_path)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    model = llama()
    bare = [{**row, "segment_mask": [0] * len(row["input_ids"])} for row in FORGET]
    found, pairs = first_gradient("code_eraser", tmp_path, model, {"lam": 0.0}, forget=bare, retain=None)
    sums, counts = nll_sums(model, part(pairs, "forget"))
    torch.testing.assert_close(found, gradient_of(sums.sum() / counts.sum(), model), rtol=0, atol=1e-10)


def test_rows_without_segments_are_context_and_none_at_all_is_an_error(tmp_path):
    mixed = [*FORGET[:4], *rows(4, 7)]
    trainer("code_eraser", tmp_path, forget=mixed).train()
    bare = {**rows(1, 9)[0], "segment_mask": None}
    trainer("code_eraser", tmp_path, forget=[FORGET[0], bare], per_device_train_batch_size=1).train()
    with pytest.raises(ValueError, match="no forget row has `segments`"):
        trainer("code_eraser", tmp_path, forget=rows(8, 7)).train()
