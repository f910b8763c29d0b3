"""AdamR: its rule by brute force, Adam without the pull, where theta_0 comes from, and what a resumed run is told."""

import copy

import one_pass_cases as cases
import pytest
import torch
from one_pass_cases import net, train
from optim_training import flat, gpt2, language_data, run_training
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hfext.optim import AdamR
from hfext.optim._theta0 import fingerprint, origins, stored_tensors
from hfext.optim.adamr import AdamRConfig, global_scale, pull


def adamr(model, lr=1e-3, **options):
    return AdamR(model.parameters(), lr=lr, **options)


def brute_force(start, gradients, lr, lam, norm, amsgrad=False):
    """The rule over one flat vector of all entries, so that V is global by construction."""
    theta0 = torch.cat([x.flatten() for x in start])
    theta, m, v, largest = theta0.clone(), *(torch.zeros_like(theta0) for _ in range(3))
    for t, grads in enumerate(gradients, 1):
        g = torch.cat([x.flatten() for x in grads])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        largest = torch.maximum(largest, v)
        v_hat = (largest if amsgrad else v) / (1 - 0.999**t)
        c = lr * lam / v_hat.mean().sqrt()
        d = theta - theta0
        theta = theta - c * d if norm == "l2" else theta - d.sign() * torch.minimum(d.abs(), c)
        theta = theta - lr * (m / (1 - 0.9**t)) / (v_hat.sqrt() + 1e-8)
    return theta


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_two_tensors_by_brute_force(norm, amsgrad):
    """Gradients of very different sizes: a scale of each tensor's own would fail."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=generator).double(), torch.randn(5, generator=generator).double()]
    sizes = (10.0, 0.1)
    gradients = [
        [s * torch.randn(x.shape, generator=generator).double() for s, x in zip(sizes, start, strict=True)]
        for _ in range(9)
    ]
    params = [nn.Parameter(x.clone()) for x in start]
    optimizer = AdamR(params, lr=0.01, lam=30.0, norm=norm, amsgrad=amsgrad)
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    found = torch.cat([p.detach().flatten() for p in params])
    torch.testing.assert_close(found, brute_force(start, gradients, 0.01, 30.0, norm, amsgrad), rtol=0, atol=1e-12)
    assert (found - brute_force(start, gradients, 0.01, 0.0, norm, amsgrad)).abs().max() > 1e-3


@pytest.mark.parametrize("amsgrad", [False, True])
def test_without_the_pull_it_is_adam(amsgrad):
    theirs, ours = net(), net()
    expected = train(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-3, amsgrad=amsgrad), 12)
    assert (train(ours, adamr(ours, lam=0.0, amsgrad=amsgrad), 12) - expected).abs().max() <= 1e-7


def test_from_zero_it_is_stable_weight_decay():
    """theta_0 = 0: AdamS, whose decay is divided by the root of the mean second moment."""
    p, q = (nn.Parameter(torch.zeros(6, dtype=torch.float64)) for _ in range(2))
    ours, v, m = AdamR([p], lr=0.1, lam=0.5), torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for t in range(1, 8):
        g = torch.randn(6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        p.grad = g.clone()
        ours.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        v_hat = v / (1 - 0.999**t)
        with torch.no_grad():
            q.mul_(1 - 0.1 * 0.5 / v_hat.mean().sqrt()).sub_(0.1 * m / (1 - 0.9**t) / (v_hat.sqrt() + 1e-8))
    torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_the_distance_falls_with_the_strength():
    def distance(lam, norm):
        model = net()
        return (train(model, adamr(model, 1e-2, lam=lam, norm=norm), 40) - flat(net())).norm().item()

    for norm in ("l2", "l1"):
        found = [distance(lam, norm) for lam in (0.0, 0.03, 0.1, 0.3, 1.0)]
        assert found == sorted(found, reverse=True) and found[-1] < 0.8 * found[0], norm
        # As strong as can be: every update begins again at theta_0.
        assert distance(1e9, norm) < 0.011 * len(flat(net())) ** 0.5


def test_the_pull_never_passes_the_start():
    d = torch.tensor([-2.0, 0.5, 0.0, 3.0])
    assert torch.equal(pull(d, 7.0, "l2"), d) and torch.equal(pull(d, 0.5, "l2"), d / 2)
    assert pull(d, 1.0, "l1").tolist() == [-1.0, 0.5, 0.0, 1.0]


def test_the_scale_is_one_without_gradients():
    assert global_scale([torch.zeros(3), torch.zeros(2)], [1, 1], [0.9, 0.9]) == 1.0
    v = [torch.full((2,), 0.1), torch.full((6,), 0.3)]
    assert global_scale(v, [1, 1], [0.9, 0.9]) == pytest.approx(((2 * 1.0 + 6 * 3.0) / 8) ** 0.5)
    model = net()
    optimizer = adamr(model, lam=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(flat(model), flat(net()))


# theta_0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_resume_is_bitwise(norm, dtype):
    cases.check_resume(lambda m: adamr(m, 1e-2, lam=0.3, norm=norm), dtype, 5, 6)


def test_the_checkpoint_has_hashes_and_not_the_weights():
    model = net()
    optimizer = adamr(model, amsgrad=True)
    before = cases.through_a_file(optimizer.state_dict())["hfext_one_pass"]["theta0"]
    train(model, optimizer, 2)
    saved = cases.through_a_file(optimizer.state_dict())
    assert saved["hfext_one_pass"]["theta0"] == before == [fingerprint(p) for p in net().parameters()]
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} for s in saved["state"].values())
    assert set(saved) == {"state", "param_groups", "hfext_one_pass"}


def test_a_fingerprint_knows_values_dtype_and_shape():
    x = torch.arange(6.0).view(2, 3)
    others = [x + 1, x.view(3, 2), x.bfloat16(), x.double(), -x]
    assert fingerprint(x) == fingerprint(x.clone()) and len({fingerprint(y) for y in (x, *others)}) == 6
    assert fingerprint(x.T.contiguous().T) == fingerprint(x)


def test_the_trainer_resumes_with_the_first_weights(tmp_path):
    """The Trainer loads the checkpoint before it makes the optimizer; theta_0 is nevertheless the model's own."""
    straight = cases.check_trainer_resume("adamr", "lambda=0.5", tmp_path)
    ours = straight.optimizer.optimizer
    assert ours.hashes() == [fingerprint(p) for g in groups_of(gpt2(0.1), ours) for p in g]
    assert [g["weight_decay"] for g in ours.param_groups] == [0.5, 0.0]
    cases.check_trainer_resume("adamr", "lambda=0.5,norm=l1", tmp_path / "bf16", torch.bfloat16)


def groups_of(model, optimizer):
    """The parameters of another model, in the optimizer's order, which has no names: vectors are not pulled."""
    params = list(model.parameters())
    matrices = [p for p in params if p.dim() > 1]
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(matrices), len(params) - len(matrices)]
    return matrices, [p for p in params if p.dim() == 1]


def test_resuming_with_other_first_weights_is_refused(tmp_path):
    run_training(gpt2(), "adamr", None, tmp_path, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    trained = copy.deepcopy(gpt2())
    trained.load_state_dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), strict=False)
    with pytest.raises(ValueError, match="theta_0 of .* parameters is not the one of the checkpoint"):
        run_training(trained, "adamr", None, tmp_path / "b", resume=str(tmp_path / "checkpoint-2"))


def test_adapters_have_their_first_values(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted(seed=0):
        base = gpt2()
        torch.manual_seed(seed)
        return get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))

    job = cases.check_lora("adamr", "lambda=0.1", tmp_path)
    assert len(job.optimizer.optimizer.hashes()) == 4
    kwargs = dict(learning_rate=1e-2, max_steps=4)
    straight = run_training(
        adapted(), "adamr", "lambda=1", tmp_path / "a", save_strategy="steps", save_steps=2, **kwargs
    )
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    resumed = run_training(adapted(), "adamr", "lambda=1", tmp_path / "b", resume=checkpoint, **kwargs)
    assert torch.equal(flat(straight.model), flat(resumed.model))
    with pytest.raises(ValueError, match="theta_0 of 2 of 4 parameters.*seed before"):  # the two random halves
        run_training(adapted(1), "adamr", "lambda=1", tmp_path / "c", resume=checkpoint, **kwargs)
    # Saved before training, they are found again whatever the new adapters are.
    adapted().save_pretrained(tmp_path / "first")
    found = run_training(
        adapted(1), "adamr", f"lambda=1,theta0={tmp_path / 'first'}", tmp_path / "d", resume=checkpoint, **kwargs
    )
    assert torch.equal(flat(straight.model), flat(found.model))


@pytest.mark.parametrize("shards", ["1GB", "40KB"])
def test_reloaded_first_weights_give_the_same_run(shards, tmp_path):
    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path / "base", max_shard_size=shards)
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() == (shards == "40KB")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    kwargs = dict(learning_rate=1e-2, max_steps=4)
    copied = run_training(base(), "adamr", "lambda=1", tmp_path / "a", **kwargs)
    read = run_training(
        base(), "adamr", "lambda=1,theta0=reload", tmp_path / "b", save_strategy="steps", save_steps=2, **kwargs
    )
    assert torch.equal(flat(copied.model), flat(read.model))
    assert not any(torch.is_tensor(x) for x in read.optimizer.optimizer._theta0)
    assert read.optimizer.optimizer.hashes() == copied.optimizer.optimizer.hashes()
    resumed = run_training(
        base(),
        "adamr",
        "lambda=1,theta0=reload",
        tmp_path / "c",
        resume=str(tmp_path / "b" / "checkpoint-2"),
        **kwargs,
    )
    assert torch.equal(flat(resumed.model), flat(read.model))


def test_files_of_a_bare_model_serve_one_with_a_new_head(tmp_path):
    gpt2().transformer.save_pretrained(tmp_path)
    model = gpt2()
    model.config.name_or_path = str(tmp_path)
    model.extra = nn.Linear(2, 2)
    found = origins(model, "reload", {"extra.weight": torch.ones(2, 2)})
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p, where in found.items() if torch.is_tensor(where)} == {"extra.weight"}
    assert set(names.values()) - {names[p] for p in found} == {"extra.bias"}  # copied when the optimizer is made
    optimizer = AdamR(model.parameters(), theta0="reload", source=model)
    assert optimizer.hashes() == [fingerprint(p) for p in model.parameters()]


def test_files_that_do_not_fit_are_named(tmp_path):
    model = gpt2()
    with pytest.raises(ValueError, match="needs source=model"):
        AdamR(model.parameters(), theta0="reload")
    with pytest.raises(ValueError, match="loaded with from_pretrained"):
        AdamR(net().parameters(), theta0="reload", source=net())
    with pytest.raises(ValueError, match="no safetensors were found"):
        stored_tensors(str(tmp_path))
    save_file({"transformer.wte.weight": torch.zeros(3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="transformer.wte.weight has shape \\(128, 32\\) but \\(3, 3\\)"):
        origins(model, str(tmp_path), {})
    save_file({"transformer.wte.weight": torch.zeros(128, 32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="transformer.wpe.weight is not in"):
        origins(model, str(tmp_path), {})
    with pytest.raises(ValueError, match="theta0 is 'nowhere' but must be snapshot, reload, or a folder"):
        AdamRConfig(theta0="nowhere")


def test_later_groups_begin_where_they_are():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 5.0))
    optimizer = AdamR([a], lr=1.0, lam=1e9)
    optimizer.add_param_group({"params": [b]})
    with torch.no_grad():
        b.fill_(9.0)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(b.detach(), torch.full((2,), 4.0))


# in the library


def test_accumulation_changes_nothing(tmp_path):
    cases.check_accumulation("adamr", "lambda=0.3", tmp_path)


def test_bfloat16_weights():
    cases.check_bfloat16(lambda m: adamr(m, 1e-2, lam=0.1))


def test_it_is_a_base_of_sam(tmp_path):
    """Which resumes too: theta_0 is noted for it as well."""
    cases.check_base_of_sam("adamr", {"lambda": 0.5}, tmp_path)


def test_gradient_that_is_not_finite_reaches_nothing(caplog):
    cases.check_not_finite(lambda m: adamr(m, lam=0.1), caplog)


def test_groups_of_mup_keep_their_rates_and_strengths():
    cases.check_width_groups(lambda groups, model: AdamR(groups, lam=0.0), exact=lambda optimizer: True)
    w = nn.Parameter(torch.ones(3))
    optimizer = AdamR([{"params": [w], "weight_decay": 0.25}, {"params": [nn.Parameter(torch.ones(1))]}], lam=0.5)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.25, 0.5]


def test_a_copy_of_the_optimizer_goes_on():
    model = net()
    optimizer = adamr(model, 1e-2, lam=0.5)
    train(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    assert torch.equal(train(model, optimizer, 3, 3), train(twin, other, 3, 3))


def test_stock_training_is_left_alone(tmp_path):
    job = run_training(gpt2(), "adamw_torch", None, tmp_path, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    again = run_training(
        gpt2(), "adamw_torch", None, tmp_path, resume=str(tmp_path / "checkpoint-2"), learning_rate=1e-3
    )
    assert torch.equal(flat(job.model), flat(again.model))
    assert not any("theta0" in name for name in vars(again.model))
    assert len(language_data()) == 20


def test_bad_options_are_named(tmp_path):
    cases.check_refusals(
        "adamr",
        tmp_path,
        [
            ("lambda=-1", "lam is -1"),
            ("norm=l3", "norm"),
            ("theta0=nowhere", "theta0 is 'nowhere'"),
            ("lamda=1", "Did you mean 'lam"),
            ("weight_decay=0.1", "Use weight_decay="),
        ],
    )
    with pytest.raises(ValueError, match="weight_decay is 0.1 but must be 0 with AdamR"):
        run_training(gpt2(), "adamr", None, tmp_path, weight_decay=0.1)
    with pytest.raises(ValueError, match="weight_decay is 0.1 but must be 0 with AdamR"):
        run_training(gpt2(), "sam", "base=adamr", tmp_path, weight_decay=0.1)
