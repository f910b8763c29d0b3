"""SAM-ON perturbs normalisation layers, found by kind of module, and nothing else."""

import pytest
import torch
from optim_training import flat, run_training
from torch import nn

from hfext.optim import SAMON, SharpnessAware, sam_step
from hfext.optim.sam_on import norm_parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gain, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.gain(self.first(x))))


def perturbed(make):
    net, seen = Net(), []
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    optimizer = make(net)

    def closure():
        seen.append({n: p.detach().clone() for n, p in net.named_parameters()})
        loss = net(x).pow(2).mean()
        loss.backward()
        return loss

    sam_step(optimizer, closure)
    return seen, net


def make(net, **options):
    return SAMON(torch.optim.SGD(net.parameters(), lr=0.1), model=net, **options)


def test_only_norm_layers_move_and_everything_trains():
    (before, after), net = perturbed(lambda net: make(net, rho=0.3))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"gain.weight", "gain.bias"}
    radius = torch.cat([after[n] - before[n] for n in sorted(moved)]).norm().item()
    assert radius == pytest.approx(0.3, rel=1e-5)
    assert all(not torch.equal(before[n], p) for n, p in net.named_parameters())


def test_no_norm_is_the_complement():
    (before, after), _ = perturbed(lambda net: make(net, rho=0.3, only="no_norm"))
    assert {n for n in before if torch.equal(before[n], after[n])} == {"gain.weight", "gain.bias"}


def test_all_parameters_is_sam():
    (_, ours), net = perturbed(lambda net: make(net, rho=0.3, only="all"))
    (_, sam), other = perturbed(lambda net: SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.3))
    assert all(torch.equal(ours[n], sam[n]) for n in ours) and torch.equal(flat(net), flat(other))


def test_freezing_the_others_gives_the_same_update_and_is_undone():
    _, frozen = perturbed(lambda net: make(net, rho=0.3, freeze_others=True))
    _, plain = perturbed(lambda net: make(net, rho=0.3))
    assert torch.equal(flat(frozen), flat(plain)) and all(p.requires_grad for p in frozen.parameters())


def test_freezing_is_undone_after_an_exception():
    net = Net()
    with pytest.raises(KeyError):
        sam_step(make(net, freeze_others=True), lambda: {}["missing"])
    assert all(p.requires_grad for p in net.parameters())


def test_elementwise_ball_is_asam_on_the_norms():
    (before, after), _ = perturbed(lambda net: make(net, rho=0.3, mode="elementwise", eta=0.0))
    e, w = after["gain.weight"] - before["gain.weight"], before["gain.weight"]
    assert torch.equal(after["gain.bias"], before["gain.bias"])  # biases are 0, and so is their ball
    assert (e / w).norm().item() == pytest.approx(0.3, rel=1e-5)


def test_norms_are_found_by_kind_in_every_architecture(tiny_llama, tiny_gpt2, tiny_bert_classifier, tiny_t5):
    counts = [len(norm_parameters(m())) for m in (tiny_llama, tiny_gpt2, tiny_bert_classifier, tiny_t5)]
    assert counts == [5, 10, 10, 12]  # RMSNorm has a gain alone, LayerNorm a bias too


def test_without_norm_layers_it_says_what_to_do():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="optim='sam'"):
        make(net)
    with pytest.raises(ValueError, match="needs model="):
        SAMON(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="freeze_others"):
        make(Net(), freeze_others=True, scope="micro")


def test_trainer(tiny_llama, tmp_path):
    job = run_training(tiny_llama(), "sam_on", "rho=0.4,base=sgd", tmp_path, max_steps=2)
    assert job.state.log_history[0]["sam/perturb_norm"] == pytest.approx(0.4)


def test_eta_widens_the_ball_of_every_norm_parameter():
    (before, after), _ = perturbed(lambda net: make(net, rho=0.3, mode="elementwise", eta=0.5))
    scaled = [
        (after[f"gain.{k}"] - before[f"gain.{k}"]) / (before[f"gain.{k}"].abs() + 0.5) for k in ("weight", "bias")
    ]
    assert torch.cat(scaled).norm().item() == pytest.approx(0.3, rel=1e-5) and scaled[1].abs().max() > 0
    (before, after), _ = perturbed(lambda net: make(net, rho=0.3, mode="layerwise", eta=0.5))
    scaled = [
        (after[f"gain.{k}"] - before[f"gain.{k}"]) / (before[f"gain.{k}"].norm() + 0.5) for k in ("weight", "bias")
    ]
    assert torch.cat(scaled).norm().item() == pytest.approx(0.3, rel=1e-5)
