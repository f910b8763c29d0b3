"""muP^2: SAM at the base width, its norm, its invariance, its slopes over width, and the Trainer by name."""

import copy
import importlib

import pytest
import torch
from optim_training import flat, language_data, run_training
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hfext.experiments import perturbation_scaling, width_transfer
from hfext.experiments._width import MLP, slope
from hfext.optim import mup, sam_step
from hfext.optim.mup import InfShape
from hfext.optim.mup_sam import MuPSAM, layer_factors, mup_direction
from hfext.optim.sam import SharpnessAware

X, Y = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10


def closure(model, x=X, y=Y, seen=None):
    def run():
        if seen is not None:
            seen.append([p.detach().clone() for p in model.parameters()])
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return run


def trained(model, optimizer, steps=5, x=X):
    return [float(sam_step(optimizer, closure(model, x))) for _ in range(steps)]


@pytest.mark.parametrize("options", [{}, {"denominator": "literal"}, {"perturbation": "global"}])
def test_at_the_base_width_it_is_sam_bit_for_bit(options):
    plain, ours = MLP(32), MLP(32)
    mup.apply(ours, MLP(32))
    a = trained(plain, SharpnessAware(torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9), rho=0.1))
    groups = mup.param_groups(ours, "sgd", lr=0.5)
    b = trained(ours, MuPSAM(torch.optim.SGD(groups, lr=0.5, momentum=0.9), rho=0.1, **options))
    assert a == b and torch.equal(flat(plain), flat(ours))
    assert not torch.equal(flat(plain), flat(MLP(32)))


def test_the_weighted_norm_of_the_perturbation_is_rho():
    model = MLP(64).double()
    shapes = list(mup.apply(model, MLP(16)).shapes.values())
    seen = []
    optimizer = MuPSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.3)
    sam_step(optimizer, closure(model, X.double(), seen=seen))
    e = [b - a for a, b in zip(*seen, strict=True)]
    assert sum(x.square().sum() / mup.perturbation_factor(s) for x, s in zip(e, shapes, strict=True)).sqrt() == (
        pytest.approx(0.3, rel=1e-9)
    )
    # Steepest ascent: no other vector of that norm has a larger product with the gradient.
    grads = torch.autograd.grad(F.cross_entropy(model(X.double()), Y), list(model.parameters()))
    product = sum(float((x * g).sum()) for x, g in zip(e, grads, strict=True))
    best = (
        0.3
        * sum(mup.perturbation_factor(s) * float(g.square().sum()) for g, s in zip(grads, shapes, strict=True)) ** 0.5
    )
    assert product == pytest.approx(best, rel=1e-9)


def test_the_formulas_against_brute_force():
    shapes = [
        InfShape(1, 1.0, 4.0),
        InfShape(2, 4.0, 4.0),
        InfShape(1, 4.0, 1.0, 0.25),
        InfShape(1, 4.0, 1.0),
        InfShape(),
    ]
    grads = [torch.randn(3, 2, dtype=torch.float64) for _ in shapes]
    # Everything in canonical weights W = a V, where the gradient is g / a and dV = dW / a.
    a = [s.multiplier for s in shapes]
    m = [s.fan_out / s.fan_in for s in shapes]
    w = [g / x for g, x in zip(grads, a, strict=True)]

    def norm(scales):
        return sum((s * g).square().sum() for s, g in zip(scales, w, strict=True)).sqrt()

    expected = {
        ("layerwise", "dual"): [x * g / norm([y**0.5 for y in m]) / z for x, g, z in zip(m, w, a, strict=True)],
        ("layerwise", "literal"): [2 * x * g / norm(m) / z for x, g, z in zip(m, w, a, strict=True)],
        ("global", "dual"): [g / norm([1.0] * 5) / z for g, z in zip(w, a, strict=True)],
    }
    for (perturbation, denominator), e in expected.items():
        ours = [g.clone() for g in grads]
        n = mup_direction(ours, *layer_factors(shapes, perturbation, denominator))
        for x, y in zip(ours, e, strict=True):
            assert torch.allclose(x / n, y, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"denominator": "literal"}, {"perturbation": "global"}])
def test_where_the_multiplier_is_kept_does_not_matter(options):
    stored = MLP(64).double()
    mup.apply(stored, MLP(16))
    folded = MLP(64).double()
    folded.load_state_dict(stored.state_dict())
    with torch.no_grad():
        folded.output.weight.mul_(1 / 4)
    mup.set_base_shapes(folded, MLP(16))
    curves = [
        trained(
            m, MuPSAM(torch.optim.SGD(mup.param_groups(m, "sgd", lr=0.1), lr=0.1), rho=0.2, **options), 8, X.double()
        )
        for m in (stored, folded)
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-10) and curves[0][-1] < curves[0][0]


def test_slopes_over_width(tmp_path):
    """Every layer of muP2 is flat; under SAM the input falls as n^-3/2 and the output grows as n^1/2, or faster."""
    config = perturbation_scaling.Config(widths=(64, 128, 256, 512), seeds=3, tokens=0)
    record = perturbation_scaling.run(config, tmp_path)
    rows = {row["parameter"]: row for row in next(iter(record["tables"].values()))}
    assert set(rows) == {f"{layer}.{kind}" for layer in ("input", "hidden", "output") for kind in ("weight", "bias")}
    for name, row in rows.items():
        assert abs(row["muP2"]) <= 0.1, name
    assert rows["input.weight"]["SAM in muP"] < -1 and rows["output.weight"]["SAM in muP"] > 0.4
    assert rows["input.weight"]["SAM"] < -0.6 and rows["output.weight"]["SAM"] > 0.3
    assert record["evidence"]["reproduced"]


@pytest.mark.slow
def test_slopes_of_every_layer_up_to_width_2048(tmp_path):
    """The recipe as committed. On narrower grids the query projection of a random Llama is still on its way to 0."""
    record = perturbation_scaling.run(perturbation_scaling.Config(), tmp_path)
    for row in next(iter(record["tables"].values())):
        assert abs(row["muP2"]) <= 0.1, row


def test_spectral_norm_by_power_iteration():
    x = torch.randn(30, 20)
    assert perturbation_scaling.spectral_norm(x, 200) == pytest.approx(float(torch.linalg.matrix_norm(x, 2)), rel=1e-4)
    assert slope([64, 128, 256], [8.0, 4.0, 2.0]) == pytest.approx(-1.0)


def tiny(kind, tied, width=32):
    torch.manual_seed(0)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied, vocab_size=128)
    if kind == "gpt2":
        off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        config = GPT2Config(n_embd=width, n_layer=1, n_head=4, n_positions=32, **off, **ids)
        return GPT2LMHeadModel(config), GPT2Config(**{**config.to_dict(), "n_embd": 16})
    configs = [
        LlamaConfig(hidden_size=n, intermediate_size=2 * n, num_hidden_layers=1, num_attention_heads=n // 8, **ids)
        for n in (width, 16)
    ]
    return LlamaForCausalLM(configs[0]), configs[1]


@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_by_name_in_the_trainer(kind, tied, base, tmp_path):
    """The Trainer's run is a hand-written one: muP groups, clipping of the descent gradient, matrices alone decay."""
    model, base_config = tiny(kind, tied)
    # In float64, since Adam turns the rounding of a vanishing gradient into a step.
    model.double()
    mup.apply(model, base_config)
    by_hand = copy.deepcopy(model)
    lr, data = 0.01, language_data(4)
    job = run_training(
        model, "mup_sam", f"rho=0.05,base={base}", tmp_path, data=data, max_steps=2, learning_rate=lr,
        weight_decay=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    no_decay = {n for n, _ in model.named_parameters()} - set(job.get_decay_parameter_names(model))
    kind_of = "sgd" if base == "sgd" else "adam"
    groups = mup.param_groups(by_hand, kind_of, lr=lr, weight_decay=0.1, no_decay=no_decay)
    assert [g["lr"] for g in job.optimizer.param_groups] == [g["lr"] for g in groups]
    assert any(g["weight_decay"] > 0 for g in groups) and any(g["weight_decay"] == 0 for g in groups)
    inner = torch.optim.SGD(groups, lr=lr) if base == "sgd" else torch.optim.AdamW(groups, lr=lr)
    optimizer = MuPSAM(inner, model=by_hand, rho=0.05)
    batch = {k: torch.stack([row[k] for row in data]) for k in ("input_ids", "labels")}

    def both():
        loss = by_hand(**batch).loss
        loss.backward()
        return loss

    by_hand.train()
    for _ in range(2):
        sam_step(optimizer, both, before_step=lambda: nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5))
    assert (flat(model) - flat(by_hand)).abs().max() < 1e-6
    assert (flat(model) - flat(tiny(kind, tied)[0])).abs().max() > 1e-3


def test_resume_is_bitwise_in_mup(tmp_path):
    def run(out, resume=None, **options):
        model, base_config = tiny("llama", True)
        mup.apply(model, base_config)
        return run_training(
            model, "mup_sam", "rho=0.05", tmp_path / out, max_steps=4, learning_rate=0.01, resume=resume, **options
        ).model

    straight = run("a", save_strategy="steps", save_steps=2)
    assert torch.equal(flat(straight), flat(run("b", resume=str(tmp_path / "a" / "checkpoint-2"))))


def test_a_copied_model_finds_its_shapes():
    model = MLP(32)
    mup.apply(model, MLP(16))
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="No base shapes"):
        MuPSAM(torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1))
    assert trained(twin, MuPSAM(torch.optim.SGD(twin.parameters(), lr=0.1), model=twin)) == trained(
        model, MuPSAM(torch.optim.SGD(model.parameters(), lr=0.1))
    )


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="No base shapes are known for a parameter of shape"):
        MuPSAM(torch.optim.SGD(MLP(16).parameters(), lr=0.1))
    model = MLP(16)
    mup.apply(model, MLP(16))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="denominator is 'both' but must be one of dual, literal"):
        MuPSAM(base, denominator="both")
    with pytest.raises(ValueError, match="perturbation is 'local' but must be one of layerwise, global"):
        MuPSAM(base, perturbation="local")
    with pytest.raises(ValueError, match="rho is -1"):
        MuPSAM(base, rho=-1)
    with pytest.raises(ValueError, match="No base shapes are known for transformer.wte.weight"):
        run_training(tiny("gpt2", True)[0], "mup_sam", "rho=0.1", tmp_path)


@pytest.mark.parametrize("module", ["width_transfer", "perturbation_scaling", "coordinate_check"])
def test_experiments_refuse_bad_fields(module):
    config = importlib.import_module(f"hfext.experiments.{module}").Config
    with pytest.raises(ValueError, match="widths"):
        config(widths=(64,))
    with pytest.raises(ValueError, match="base_width"):
        config(base_width=-3)
    with pytest.raises(ValueError, match="seeds|widths"):
        config(seeds=(0, 1, 1) if module == "width_transfer" else 0)


def test_the_transfer_experiment_runs_and_grows_its_grid(tmp_path):
    config = width_transfer.Config(
        widths=(16, 32), base_width=16, lr_octaves=(-5, -4), rho_octaves=(-4, -3), seeds=(1, 1), grow=1, steps=3
    )
    record = width_transfer.run(config, tmp_path)
    rows = record["tables"]["optimum over width"]
    assert [(r["method"], r["width"]) for r in rows] == [(m, w) for m in width_transfer.METHODS for w in (16, 32)]
    assert len({r["best accuracy"] for r in rows if r["width"] == 16}) == 1
    assert len(record["grids"]["SP + SAM, width 16"]) > 4
    assert (tmp_path / "width-transfer.png").stat().st_size > 1000
    ridge = {(0, 0): [0.5], (1, 0): [0.9], (2, 1): [0.89], (3, 3): [0.2]}
    assert width_transfer.optimum(ridge, 0.02) == (1.5, 0.5) and width_transfer.best(ridge) == (1, 0)
