"""Loss-normalised difference: the gradient of a difference of logarithms."""

import torch
from unlearning_cases import first_gradient, gradient_of, llama, nll_sums, part


def test_it_is_the_gradient_of_a_difference_of_logarithms(tmp_path):
    model = llama()
    found, pairs = first_gradient("loss_norm", tmp_path, model)
    (f, n_f), (r, n_r) = (nll_sums(model, part(pairs, name)) for name in ("forget", "retain"))
    retain, forget = r.sum() / n_r.sum(), f.sum() / n_f.sum()
    # Apart, since the model's norms round gradients to float32.
    wanted = gradient_of(retain, model) / retain - gradient_of(forget, model) / forget
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-12)
