"""FRUGAL: the settings in which it is AdamW, signSGD and GaLore, its parts, its bytes, its checkpoints."""

import copy
import importlib

import one_pass_cases as cases
import pytest
import torch
from one_pass_cases import net, train
from optim_training import flat, gpt2, run_training
from torch import nn

from hfext.optim import FRUGAL, _subspace
from hfext.optim.frugal import FRUGALConfig, projected_parameters, split_groups

frugal_module = importlib.import_module("hfext.optim.frugal")
PROJECTIONS = [
    dict(projection="block"),
    dict(projection="columns"),
    dict(projection="rows"),
    dict(projection="randk"),
    dict(projection="galore"),
    dict(projection="galore", basis="random"),
    dict(projection="galore", basis="permutation"),
]
every_projection = pytest.mark.parametrize("options", PROJECTIONS, ids=lambda o: "-".join(o.values()))
ROTATED = [o for o in PROJECTIONS if o.get("basis", "svd") != "permutation" and o["projection"] == "galore"]


def frugal(model, lr=1e-3, **options):
    return FRUGAL(model.parameters(), lr=lr, **options)


# degenerate settings


@pytest.mark.parametrize("options", [o for o in PROJECTIONS if o not in ROTATED], ids=lambda o: "-".join(o.values()))
def test_density_one_is_adamw(options):
    theirs, ours = net(), net()
    expected = train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.1), 13)
    optimizer = frugal(ours, weight_decay=0.1, density=1.0, update_gap=5, reset_statistics=False, **options)
    assert (train(ours, optimizer, 13) - expected).abs().max() <= 1e-7


@pytest.mark.parametrize("projection", ["block", "columns", "rows", "randk"])
def test_with_defaults_too_density_one_is_adamw_over_several_gaps(projection):
    """The part never becomes another, so the moments go on."""
    theirs, ours = net(), net()
    expected = train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.1), 13)
    optimizer = frugal(ours, weight_decay=0.1, density=1.0, update_gap=3, projection=projection)
    assert (train(ours, optimizer, 13) - expected).abs().max() <= 1e-7
    assert {s["step"] for s in optimizer.state.values()} == {13}


def test_a_window_that_comes_twice_keeps_its_moments():
    """There and back over 4 tensors: the last window is the first of the way back. Ascending, it is not."""
    for order, last in (("mirror", 4), ("ascending", 2)):
        w = [nn.Parameter(torch.randn(4, 4)) for _ in range(4)]
        optimizer = FRUGAL(w, density=0.5, update_gap=2, order=order)
        for _ in range(6):
            for p in w:
                p.grad = torch.randn(4, 4)
            optimizer.step()
        assert {s["step"] for s in optimizer.state.values()} == {last}, order


def test_tensors_of_two_windows_begin_anew_with_the_second():
    """3 tensors in windows of 2: the last window is filled up from the first."""
    w = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    optimizer = FRUGAL(w, density=0.67, update_gap=2, order="ascending")
    for _ in range(3):
        for p in w:
            p.grad = torch.randn(4, 4)
        optimizer.step()
    assert optimizer.state.keys() == {w[2], w[0]} and {s["step"] for s in optimizer.state.values()} == {1}


def test_density_zero_is_sign_descent_with_decoupled_decay():
    theirs, ours = net(), net()
    optimizer = frugal(ours, weight_decay=0.1, density=0.0, inactive_lr_scale=0.5)
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    adam = torch.optim.AdamW([p for p in theirs.parameters() if p.dim() == 1], lr=1e-3, weight_decay=0.1)
    for i in range(8):
        train(ours, optimizer, 1, i)
        train(theirs, adam, 1, i)
        with torch.no_grad():
            for p in matrices:
                p.mul_(1 - 1e-3 * 0.1).sub_(0.5e-3 * p.grad.sign())
                p.grad = None
    assert (flat(ours) - flat(theirs)).abs().max() <= 1e-7
    assert len(optimizer.state) == 2  # the biases


class GaLore:
    """Written from the paper: Adam on P'G or GP, P of the SVD of the gradient every `gap` steps, moments kept."""

    def __init__(self, matrices, lr, rank_share, gap, decay):
        self.matrices, self.lr, self.share, self.gap, self.decay, self.t = matrices, lr, rank_share, gap, decay, 0
        self.moments = [None] * len(matrices)
        self.bases = [None] * len(matrices)

    @torch.no_grad()
    def step(self):
        for i, w in enumerate(self.matrices):
            tall = w.shape[0] >= w.shape[1]
            if self.t % self.gap == 0:
                # The signs of singular vectors are those of this call: kept moments depend on them.
                u, _, vh = torch.linalg.svd(w.grad, full_matrices=False)
                rank = round(self.share * min(w.shape))
                self.bases[i] = vh.T[:, :rank] if tall else u[:, :rank]
            p = self.bases[i]
            low = w.grad @ p if tall else p.T @ w.grad
            m, v = self.moments[i] or (torch.zeros_like(low), torch.zeros_like(low))
            m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
            self.moments[i] = m, v
            n = (m / (1 - 0.9 ** (self.t + 1))) / ((v / (1 - 0.999 ** (self.t + 1))).sqrt() + 1e-8)
            w -= self.lr * self.decay * w
            w -= self.lr * (n @ p.T if tall else p @ n)
        self.t += 1


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_without_a_rule_for_the_rest_galore_is_galore(density):
    theirs, ours = net(torch.float64), net(torch.float64)
    options = dict(projection="galore", inactive="none", reset_statistics=False, density=density, update_gap=4)
    optimizer = frugal(ours, weight_decay=0.1, **options)
    adam = torch.optim.AdamW([p for p in theirs.parameters() if p.dim() == 1], lr=1e-3, weight_decay=0.1)
    galore = GaLore([p for p in theirs.parameters() if p.dim() == 2], 1e-3, density, 4, 0.1)
    for i in range(11):
        train(ours, optimizer, 1, i)
        train(theirs, adam, 1, i)
        galore.step()
        for p in galore.matrices:
            p.grad = None
    assert (flat(ours) - flat(theirs)).abs().max() <= 1e-7


def test_without_a_rule_for_the_rest_only_the_block_moves():
    model = net()
    before = copy.deepcopy(model)
    optimizer = frugal(model, density=0.5, update_gap=2, inactive="none", order="ascending")
    train(model, optimizer, 2)
    assert not torch.equal(model[0].weight, before[0].weight) and torch.equal(model[2].weight, before[2].weight)
    middle = copy.deepcopy(model)
    train(model, optimizer, 2, 2)
    assert torch.equal(model[0].weight, middle[0].weight) and not torch.equal(model[2].weight, middle[2].weight)


def test_one_step_by_hand():
    """Columns 0 and 2 of 4 have moments, the others a sign; scales of both rates."""
    w = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2))
    optimizer = FRUGAL([w], lr=0.1, density=0.5, projection="columns", proj_lr_scale=0.5, inactive_lr_scale=0.2)
    g = torch.tensor([[0.3, -0.2, 0.0, 5.0], [-1.0, 2.0, 3.0, 0.0]])
    w.grad = g.clone()
    optimizer.step()
    kept = optimizer.state[w]["basis"].tolist()
    moved = torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(kept), True)
    rate = torch.where(moved, 0.05, 0.01)  # Adam's first step is a sign too
    torch.testing.assert_close(w.detach(), torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2) - rate * g.sign())
    assert torch.equal(optimizer.state[w]["exp_avg"], 0.1 * g[:, kept]) and len(kept) == 2
    w.grad = torch.ones_like(w)
    FRUGAL([w], lr=0.1, density=0.0, inactive="sgd").step()
    torch.testing.assert_close(w.detach(), torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2) - rate * g.sign() - 0.1)


def test_the_rule_of_the_rest_holds_where_a_tensor_has_no_part():
    """Plain gradients with `sgd`, whatever their size; in density 0 and in a tensor that is not active."""
    g = torch.tensor([[0.3, -2.0], [0.0, 7.0]])
    for density in (0.0, 0.5):
        w = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
        optimizer = FRUGAL(w, lr=0.1, density=density, inactive="sgd", inactive_lr_scale=0.5, order="descending")
        for p in w:
            p.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(w[0].detach(), 1 - 0.1 * 0.5 * g)
        assert (w[1] not in optimizer.state) == (density == 0)


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_the_scale_of_the_projected_rate_leaves_the_decay_alone(density):
    w = nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = FRUGAL([w], lr=0.1, weight_decay=0.3, density=density, projection="columns", proj_lr_scale=0.25)
    w.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((4, 4), 2.0 * (1 - 0.1 * 0.3)))


# parts


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
@every_projection
def test_part_and_complement_make_the_gradient(options, shape):
    g = torch.randn(shape, dtype=torch.float64)
    by = options.get("basis", "svd")
    kind = "all" if options["projection"] == "block" else _subspace.kind_of(options["projection"], shape, by)
    size = _subspace.size_of(kind, shape, 0.3)
    basis = None if kind == "all" else _subspace.draw(kind, g, size, by, _subspace.generator(0))
    part = _subspace.down(g, kind, basis)
    back = _subspace.up(part, kind, basis, shape)
    rest = _subspace.complement(g, part, kind, basis)
    torch.testing.assert_close(back + rest, g, rtol=0, atol=1e-12)
    torch.testing.assert_close(_subspace.down(back, kind, basis), part, rtol=0, atol=1e-12)  # a projection
    torch.testing.assert_close(_subspace.down(rest, kind, basis), torch.zeros_like(part), rtol=0, atol=1e-12)
    if kind in ("left", "right"):
        torch.testing.assert_close(basis.T @ basis, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    side = {"columns": shape[1], "rows": shape[0], "entries": g.numel()}.get(kind, min(shape))
    assert part.numel() / g.numel() == pytest.approx(1 if kind == "all" else 0.3, abs=1 / side)


def test_the_svd_part_is_the_best_of_its_rank():
    g = torch.randn(9, 5, dtype=torch.float64)
    basis = _subspace.draw("right", g, 2, "svd", _subspace.generator(0))
    rest = _subspace.complement(g, g @ basis, "right", basis)
    assert rest.norm() == pytest.approx(torch.linalg.svdvals(g)[2:].norm().item(), rel=1e-9)


def test_rounding_beside_the_part_makes_no_step():
    """A gradient of rank 2 lies in a part of rank 3: nothing is left, so no sign of noise may move the weights."""
    torch.manual_seed(0)
    for rows, columns in ((40, 24), (24, 40)):
        w = nn.Parameter(torch.zeros(rows, columns))
        w.grad = torch.randn(rows, 2) @ torch.randn(2, columns)
        optimizer = FRUGAL([w], lr=1.0, projection="galore", density=0.125)
        optimizer.step()
        adam_only = nn.Parameter(torch.zeros(rows, columns))
        adam_only.grad = w.grad.clone()
        FRUGAL([adam_only], lr=1.0, projection="galore", density=0.125, inactive="none").step()
        assert torch.equal(w, adam_only) and w.norm() > 0


@pytest.mark.parametrize("order", _subspace.ORDERS)
@pytest.mark.parametrize("count, density", [(14, 0.25), (7, 0.5), (5, 1.0), (3, 0.01)])
def test_every_pass_meets_every_tensor(order, count, density):
    size = max(1, round(density * count))
    passes = -(-count // size)
    for turn in range(3):
        windows = [_subspace.active_blocks(count, density, order, turn * passes + i, seed=0) for i in range(passes)]
        assert all(len(w) == size for w in windows) and set().union(*windows) == set(range(count))


def test_orders_of_blocks():
    def windows(order, n=4, seed=0):
        return [sorted(_subspace.active_blocks(4, 0.5, order, i, seed)) for i in range(n)]

    assert windows("ascending") == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert windows("descending") == [[2, 3], [0, 1], [2, 3], [0, 1]]
    assert windows("mirror") == [[0, 1], [2, 3], [2, 3], [0, 1]]
    assert windows("random", 40) != windows("random", 40, seed=1)
    assert windows("random", 40) == windows("random", 40) and len({str(w) for w in windows("random", 40)}) == 6
    assert _subspace.active_blocks(4, 0.0, "random", 3, 0) == set()


def test_what_is_drawn_depends_on_its_key_alone():
    g = torch.zeros(40, 30)

    def drawn(*key):
        return _subspace.draw("columns", g, 6, "svd", _subspace.generator(*key)).tolist()

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert drawn(0, 1, 2) == drawn(0, 1, 2) == sorted(drawn(0, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert len({str(drawn(*key)) for key in ((0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 12, ""))}) == 5


@pytest.mark.parametrize("options", [o for o in PROJECTIONS if o["projection"] != "block" and o.get("basis") != "svd"],
                         ids=lambda o: "-".join(o.values()))  # fmt: skip
def test_tensors_of_one_shape_have_parts_of_their_own(options):
    options = {"basis": "random", **options}
    w = [nn.Parameter(torch.randn(32, 32)) for _ in range(3)]
    optimizer = FRUGAL(w, density=0.5, **options)
    for p in w:
        p.grad = w[0].detach().clone()
    optimizer.step()
    first, *others = (optimizer.state[p]["basis"] for p in w)
    assert not any(torch.equal(first, other) for other in others) and not torch.equal(*others)


# state


@pytest.mark.parametrize(
    "options", [o for o in PROJECTIONS if o["projection"] != "block"], ids=lambda o: "-".join(o.values())
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_eight_bytes_of_each_weight_in_the_part(options, dtype):
    w = nn.Parameter(torch.randn(64, 48).to(dtype))
    b = nn.Parameter(torch.randn(48).to(dtype))
    optimizer = FRUGAL([w, b], density=0.25, **options)
    w.grad, b.grad = torch.randn(64, 48).to(dtype), torch.randn(48).to(dtype)
    optimizer.step()
    state = cases.through_a_file(optimizer.state_dict())["state"]
    assert sum(state[0][k].nbytes for k in ("exp_avg", "exp_avg_sq")) == 8 * 0.25 * w.numel()
    assert sum(x.nbytes for x in state[1].values() if torch.is_tensor(x)) == 8 * b.numel()
    indices = {"columns": 4 * 12, "rows": 4 * 16, "randk": 4 * w.numel() // 4, "galore": 4 * 48 * 12}
    if options.get("basis") == "permutation":
        indices["galore"] = indices["columns"]
    assert state[0]["basis"].nbytes == indices[options["projection"]]
    assert set(state[0]) == {"basis", "refresh", "step", "exp_avg", "exp_avg_sq"}


def test_blocks_have_moments_while_they_are_active_and_none_otherwise():
    w = [nn.Parameter(torch.randn(16, 16)) for _ in range(8)]
    optimizer = FRUGAL(w, density=0.25, update_gap=2, order="descending")
    for i in range(8):
        for p in w:
            p.grad = torch.randn(16, 16)
        optimizer.step()
        state = optimizer.state_dict()["state"]
        first = 6 - 2 * (i // 2)
        assert sorted(state) == [first, first + 1]
        assert sum(x.nbytes for s in state.values() for x in s.values() if torch.is_tensor(x)) == 8 * 0.25 * 8 * 256
        assert {s["step"] for s in state.values()} == {i % 2 + 1}


@pytest.mark.parametrize(
    "options", [o for o in PROJECTIONS if o["projection"] != "block"], ids=lambda o: "-".join(o.values())
)
def test_a_new_part_starts_with_new_moments(options):
    model = net()
    optimizer = frugal(model, density=0.4, update_gap=3, **options)
    train(model, optimizer, 3)
    old = copy.deepcopy(optimizer.state[model[0].weight])
    train(model, optimizer, 1, 3)
    new, g = optimizer.state[model[0].weight], model[0].weight.grad
    assert (old["step"], new["step"], old["refresh"], new["refresh"]) == (3, 1, 0, 1)
    assert not torch.equal(old["basis"], new["basis"])
    kind = _subspace.kind_of(options["projection"], g.shape, options.get("basis", "svd"))
    torch.testing.assert_close(new["exp_avg"], 0.1 * _subspace.down(g, kind, new["basis"]))
    torch.testing.assert_close(new["exp_avg_sq"], 0.001 * _subspace.down(g, kind, new["basis"]) ** 2)
    assert optimizer.state[model[0].bias]["step"] == 4


def test_kept_statistics_go_on_counting():
    model = net()
    optimizer = frugal(model, density=0.4, update_gap=2, projection="galore", reset_statistics=False)
    train(model, optimizer, 5)
    assert optimizer.state[model[0].weight]["step"] == 5 and optimizer.state[model[0].weight]["refresh"] == 2


def test_a_tensor_without_gradient_is_left_and_draws_when_it_gets_one():
    model = net()
    optimizer = frugal(model, density=0.4, update_gap=2, projection="columns", weight_decay=0.1)
    w = model[0].weight
    train(model, optimizer, 1)
    before = copy.deepcopy(w.detach())
    for _ in range(3):
        w.grad = None
        optimizer.step()
    assert torch.equal(w, before) and optimizer.state[w]["refresh"] == 0
    train(model, optimizer, 1)
    assert optimizer.state[w]["refresh"] == 2 and optimizer.state[w]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_projection
def test_resume_is_bitwise_in_the_middle_of_a_gap(options, dtype):
    cases.check_resume(lambda m: frugal(m, 1e-2, density=0.4, update_gap=4, **options), dtype, 6, 5)


def test_resume_in_the_trainer_is_bitwise(tmp_path):
    cases.check_trainer_resume("frugal", "density=0.3,update_gap=2,projection=randk", tmp_path / "32")
    straight = cases.check_trainer_resume(
        "frugal", "density=0.3,update_gap=2,projection=galore", tmp_path / "16", torch.bfloat16
    )
    kinds = {x.dtype for s in straight.optimizer.state.values() for x in s.values() if torch.is_tensor(x)}
    assert kinds == {torch.float32}


def test_state_that_does_not_fit_is_named():
    model = net()
    optimizer = frugal(model, density=0.4, projection="columns")
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match="saved with density=0.4 but density is 0.5"):
        frugal(net(), density=0.5, projection="columns").load_state_dict(optimizer.state_dict())
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, 1)
    with pytest.raises(ValueError, match="saved by another optimizer"):
        frugal(net()).load_state_dict(adamw.state_dict())


# which weights


def names_of(model, target_modules=None):
    found = {id(p) for p in projected_parameters(model, target_modules)}
    return [name.removesuffix(".weight") for name, p in model.named_parameters() if id(p) in found]


def test_all_linear_layers_but_the_output_are_projected(tiny_llama, tiny_gpt2, tiny_bert_classifier):
    llama = tiny_llama(tie_word_embeddings=False)
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    assert names_of(llama) == names_of(llama, "all-linear") == names_of(tiny_llama()) == expected
    parts = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names_of(tiny_gpt2()) == [f"transformer.h.{i}.{part}" for i in range(2) for part in parts]
    assert not any("embeddings" in name for name in names_of(tiny_bert_classifier()))
    for p in llama.model.layers[0].parameters():
        p.requires_grad = False
    assert names_of(llama) == expected[7:]


def test_target_modules_are_honoured(tiny_llama, tmp_path):
    llama = tiny_llama(tie_word_embeddings=False)
    assert names_of(llama, ["v_proj"]) == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    assert names_of(llama, r".*layers\.1\.mlp\..*") == [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert names_of(llama, ["lm_head"]) == ["lm_head"]
    with pytest.raises(ValueError, match="optim_target_modules=\\['ffn'\\] has no trained linear layer"):
        projected_parameters(llama, ["ffn"])
    with pytest.raises(TypeError, match="optim_target_modules is a tuple"):
        projected_parameters(llama, ("v_proj",))
    job = run_training(gpt2(), "frugal", "density=0", tmp_path, optim_target_modules=["c_fc"], weight_decay=0.1)
    projected = [g for g in job.optimizer.param_groups if g["projected"]]
    assert [(len(g["params"]), g["weight_decay"]) for g in projected] == [(2, 0.1)]
    rest = {g["weight_decay"]: len(g["params"]) for g in job.optimizer.param_groups if not g["projected"]}
    assert rest == {0.1: 2 + 6, 0.0: 2 * 8 + 2}
    assert len(job.optimizer.state) == sum(rest.values())


def test_a_target_that_is_no_linear_layer_is_reported(tiny_llama, monkeypatch):
    said = []
    monkeypatch.setattr(frugal_module.logger, "warning", said.append)
    assert len(projected_parameters(tiny_llama(), ["q_proj", "embed_tokens"])) == 2
    assert said == ["model.embed_tokens is a Embedding: FRUGAL projects linear layers alone."]


def test_groups_are_split_and_keep_their_settings():
    model = net()
    w, b = model[0].weight, model[0].bias
    groups = split_groups([{"params": [w, b], "lr": 3.0}, {"params": [model[2].weight], "projected": False}])
    assert [(g["projected"], g.get("lr"), len(g["params"])) for g in groups] == [
        (True, 3.0, 1),
        (False, 3.0, 1),
        (False, None, 1),
    ]
    named = split_groups(model.named_parameters(), [model[2].weight])
    assert [[name for name, _ in g["params"]] for g in named] == [["2.weight"], ["0.weight", "0.bias", "2.bias"]]


def test_a_group_that_comes_later_is_split_like_the_first():
    model, late = net(), [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    optimizer = frugal(model, density=0.5, projection="columns")
    optimizer.add_param_group({"params": late, "lr": 0.5})
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(3, 3)), "projected": False})
    found = [(g["projected"], len(g["params"]), g["lr"]) for g in optimizer.param_groups]
    assert found == [(True, 2, 1e-3), (False, 2, 1e-3), (True, 1, 0.5), (False, 1, 0.5), (False, 1, 1e-3)]
    for p in late:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert "basis" in optimizer.state[late[0]] and "basis" not in optimizer.state[late[1]]


# in the library


@pytest.mark.parametrize("options", ["block", "columns", "galore"])
def test_accumulation_changes_nothing(options, tmp_path):
    cases.check_accumulation("frugal", f"density=0.3,update_gap=2,projection={options}", tmp_path)


def test_lora_adapters_are_projected(tmp_path):
    job = cases.check_lora("frugal", "density=0.5,projection=columns", tmp_path)
    assert [g["projected"] for g in job.optimizer.param_groups] == [True]
    assert all("basis" in s for s in job.optimizer.state.values())


def test_bfloat16_weights_have_float32_moments():
    cases.check_bfloat16(lambda m: frugal(m, 1e-2, density=0.4, projection="columns"))


def test_it_is_a_base_of_sam(tmp_path):
    cases.check_base_of_sam("frugal", {"density": 0.5, "projection": "columns", "update_gap": 2}, tmp_path)


def test_gradient_that_is_not_finite_reaches_nothing(caplog):
    cases.check_not_finite(lambda m: frugal(m, density=0.4, projection="galore"), caplog)


def test_groups_of_mup_keep_their_rates():
    cases.check_width_groups(
        lambda groups, model: FRUGAL(groups, projected=projected_parameters(model), projection="columns"),
        exact=lambda optimizer: True,
    )


def test_a_step_without_any_gradient_changes_nothing():
    model = net()
    optimizer = frugal(model, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(flat(model), flat(net())) and optimizer.updates == 0 and not optimizer.state
    empty = nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    FRUGAL([empty], density=0.5).step()


def test_a_copy_of_the_optimizer_goes_on():
    model = net()
    optimizer = frugal(model, density=0.4, update_gap=2)
    train(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    assert torch.equal(train(model, optimizer, 3, 3), train(twin, other, 3, 3))


def test_bad_options_are_named(tmp_path):
    cases.check_refusals(
        "frugal",
        tmp_path,
        [
            ("density=1.5", "density is 1.5 but must be in \\[0, 1\\]"),
            ("update_gap=0", "update_gap is 0"),
            ("projection=column", "projection"),
            ("order=down", "order"),
            ("inactive=sgn", "inactive"),
            ("densty=0.2", "unknown key 'densty'. Did you mean 'density'"),
            ("lr=0.1", "Use learning_rate="),
        ],
    )
    for options, message in (
        ({"inactive_lr_scale": -1.0}, "inactive_lr_scale is -1.0"),
        ({"basis": "qr"}, "basis is 'qr'"),
        ({"density": "x"}, "FRUGALConfig: density is 'x' but must be float"),
        ({"density": None}, "density is None"),
        ({"update_gap": 2.5}, "update_gap is 2.5 but must be int"),
        ({"seed": None}, "seed is None but must be int"),
        ({"reset_statistics": 1}, "reset_statistics is 1 but must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            FRUGALConfig(**options)
    for options, message in (
        ({"lr": -1}, "lr is -1"),
        ({"lr": "x"}, "FRUGAL: lr is 'x' but must be a number >= 0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"betas": (0.9,)}, "betas is"),
        ({"betas": 0.9}, "betas is 0.9 but must be two numbers"),
        ({"eps": -1}, "eps is -1"),
        ({"weight_decay": None}, "weight_decay is None"),
    ):
        with pytest.raises(ValueError, match=message):
            FRUGAL(net().parameters(), **options)
    with pytest.raises(ValueError, match="no trained linear layer"):
        projected_parameters(nn.Embedding(3, 4))
