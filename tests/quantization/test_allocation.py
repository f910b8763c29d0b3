"""Bit allocation: the integer program against brute force, the metric "loss", and the call with all its inputs."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
import transformers

from hfext.quantization import RTNConfig, dequantize, quantize
from hfext.quantization._allocation import Allocation, allocate, loss_rises
from hfext.quantization._bit_program import choose, falling, frontier
from hfext.quantization._modules import quantizable
from hfext.quantization._sensitivity import layers_of, quantizer

IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))
FAST = {
    "hawq2": {"max_draws": 3, "batch_size": 3},
    "loss": {"batch_size": 3, "bits": (2, 4)},
    "mixdq": {"batch_size": 3, "bits": (2, 4), "budgets": 2, "ratios": (0.8, 1.0), "window": 0.1},
}
METRICS = list(FAST)


def problem(seed, layers=6, options=3, unit=1):
    rng = np.random.default_rng(seed)
    losses = -np.sort(-rng.exponential(size=(layers, options)), axis=1)
    costs = np.outer(rng.integers(1, 9, layers) * unit, np.arange(2, 2 + options))
    return losses, costs


def brute(losses, costs, budget, ordered=False):
    """(loss, cost, options) of least loss, and among these of least cost."""
    best = None
    for options in itertools.product(range(losses.shape[1]), repeat=len(losses)):
        if ordered and any(a < b for a, b in itertools.pairwise(options)):
            continue
        cost = sum(costs[i, p] for i, p in enumerate(options))
        if cost <= budget:
            found = (round(sum(losses[i, p] for i, p in enumerate(options)), 12), cost, list(options))
            best = found if best is None else min(best, found)
    return best


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_dynamic_programming_and_branch_and_bound_are_brute_force(seed, ordered):
    losses, costs = problem(seed, layers=3 + seed % 4)
    least, most = costs.min(1).sum(), costs.max(1).sum()
    for budget in np.linspace(least, most, 5).astype(int):
        loss, cost, options = brute(losses, costs, budget, ordered)
        for solver in ("dp", "milp"):
            found = choose(losses, costs, int(budget), ordered, solver)
            assert found.options == options and found.cost == cost
            assert found.loss == pytest.approx(loss, rel=1e-9)


def test_of_equal_losses_the_cheaper_is_taken():
    losses = np.array([[1.0, 0.5, 0.5], [0.0, 0.0, 0.0], [2.0, 2.0, 1.0]])
    costs = np.outer([3, 5, 7], [2, 3, 4])
    for solver in ("dp", "milp"):
        assert choose(losses, costs, 1000, solver=solver).options == [1, 0, 2]
        assert choose(losses * 0, costs, 1000, solver=solver).options == [0, 0, 0]


def test_costs_without_a_common_divisor_go_to_branch_and_bound():
    losses, _ = problem(3, layers=5)
    costs = np.outer([100_003, 200_029, 900_007, 31, 70_001], [2, 3, 8])
    budget = int(3.3 * costs[:, 0].sum() / 2)
    with pytest.raises(ValueError, match="cells"):
        choose(losses, costs * 10_007 + np.arange(3), budget * 10_007, solver="dp")
    found = choose(losses, costs * 10_007 + np.arange(3), budget * 10_007)
    assert found.options == brute(losses, costs * 10_007 + np.arange(3), budget * 10_007)[2]


def test_a_smaller_budget_never_loses_less_and_one_below_the_least_is_refused():
    losses, costs = problem(1)
    seen = [choose(losses, costs, int(b)).loss for b in range(costs.min(1).sum(), costs.max(1).sum() + 1)]
    assert all(a >= b for a, b in itertools.pairwise(seen))
    with pytest.raises(ValueError, match=f"at least {costs.min(1).sum()}"):
        choose(losses, costs, int(costs.min(1).sum()) - 1)


@pytest.mark.parametrize("ordered", [False, True])
def test_the_front_falls_strictly_and_holds_the_best_of_every_budget(ordered):
    losses, costs = problem(2, layers=5)
    front = frontier(losses, costs, ordered, points=10_000)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(front))
    for budget in range(costs.min(1).sum(), costs.max(1).sum() + 1):
        loss, cost, _ = brute(losses, costs, budget, ordered)
        at = max(point for point in front if point[0] <= budget)
        assert at == (cost, pytest.approx(loss))
    few = frontier(losses, costs, ordered, points=4)
    assert len(few) == 4 and few[0] == front[0] and few[-1] == front[-1]
    for cost, loss in frontier(losses, costs, ordered, 5, "milp"):
        assert loss == pytest.approx(brute(losses, costs, cost, ordered)[0])


def test_points_that_another_beats_are_not_on_the_front():
    assert falling([(2, 1.0), (1, 3.0), (3, 1.0), (2, 2.0), (4, 0.5)]) == [(1, 3.0), (2, 1.0), (4, 0.5)]


def test_a_separable_loss_is_allocated_as_by_trying_all(tiny_llama):
    """Six weights that add up: the program on one-at-a-time rises finds the best of all 3^6 measured losses."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 8, generator=generator) for _ in range(6)]
    curvature = [10.0**k for k in (-2, -1, 0, 1, 0, -1)]
    of = quantizer(None, 8)
    layers = layers_of({f"l{i}": linear(w) for i, w in enumerate(weights)})
    values = [[of(layer, b) for b in (2, 3, 4)] for layer in layers]

    def loss(options):
        return sum(
            c * (values[i][p] - weights[i]).square().sum().item()
            for i, (c, p) in enumerate(zip(curvature, options, strict=True))
        )

    base = loss([2] * 6)
    rises = np.array([[loss([p if j == i else 2 for j in range(6)]) - base for p in range(3)] for i in range(6)])
    costs = np.tile([2 * 32, 3 * 32, 4 * 32], (6, 1))
    every = itertools.product(range(3), repeat=6)
    best = min((o for o in every if sum(o) <= 6), key=loss)
    assert choose(rises, costs, 3 * 32 * 6).options == list(best)


def linear(weight):
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight.clone()
    return made


def token_loss(model, ids):
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def test_rises_are_those_of_models_with_one_layer_changed(tiny_llama):
    model = tiny_llama()
    names = list(quantizable(model))
    rises = loss_rises(model, layers_of(quantizable(model)), list(IDS[:, None]), (2, 3, 8), quantizer(None, 16), 1e-6)

    def loss(**changed):
        bits = {name: 8 for name in names} | changed
        rounded = quantize(copy.deepcopy(model), RTNConfig(bits=bits, group_size=16, scale_dtype="float32"))
        return token_loss(dequantize(rounded), IDS)

    for i in (0, 6, 13):
        for k, b in enumerate((2, 3)):
            assert rises[i, k] == pytest.approx(max(loss(**{names[i]: b}) - loss(), 1e-6), abs=2e-6)
    assert (rises[:, 2] == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_every_quantiser_takes_the_result_and_the_budget_is_kept(tiny_llama, metric):
    model = tiny_llama()
    found = allocate(model, IDS, metric, 3.0, group_size=16, **FAST[metric])
    assert list(found) == list(quantizable(model)) and set(found.values()) <= {2, 3, 4, 8}
    size = {name: layer.weight.numel() for name, layer in quantizable(model).items()}
    assert found.sizes == size
    assert found.average_bits == pytest.approx(sum(found[n] * size[n] for n in size) / sum(size.values()))
    assert 2 <= found.average_bits <= 3.0
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(found.pareto))
    config = RTNConfig(bits=found, group_size=16)
    rounded = quantize(copy.deepcopy(model), config)
    assert {n: m.bits for n, m in rounded.named_modules() if n in found} == dict(found)


@pytest.mark.parametrize("metric", METRICS)
def test_the_model_and_the_random_state_are_left_as_found(tiny_gpt2_like, metric):
    model = tiny_gpt2_like
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    storage = {n: p.data_ptr() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    with torch.no_grad():
        allocate(model, IDS, metric, 3.0, group_size=16, **FAST[metric])
    assert all(torch.equal(t, state[n]) and t.dtype == state[n].dtype for n, t in model.state_dict().items())
    assert storage == {n: p.data_ptr() for n, p in model.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert modes == [m.training for m in model.modules()]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert torch.equal(random, torch.get_rng_state()) and not any(m._forward_pre_hooks for m in model.modules())


@pytest.fixture
def tiny_gpt2_like(tiny_llama):
    """A Llama with dropout in its attention, in bfloat16."""
    return tiny_llama(attention_dropout=0.3).bfloat16()


@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_is_measured_in_float32(tiny_gpt2_like, metric):
    model = tiny_gpt2_like
    half = allocate(model, IDS, metric, 3.0, group_size=16, **FAST[metric])
    full = allocate(copy.deepcopy(model).float(), IDS, metric, 3.0, group_size=16, **FAST[metric])
    assert half.to_dict() == full.to_dict()


@pytest.mark.parametrize("metric", METRICS)
def test_padding_and_batches_change_nothing(tiny_llama, metric):
    model = tiny_llama()
    rows = [IDS[0], IDS[1, :7], IDS[2, :7]]
    padded = {
        "input_ids": torch.stack([torch.cat([torch.zeros(12 - len(r)).long(), r]) for r in rows]),
        "attention_mask": torch.stack(
            [torch.cat([torch.zeros(12 - len(r)), torch.ones(len(r))]).long() for r in rows]
        ),
    }
    options = {"group_size": 16, **FAST[metric], "bits": (2, 4), "batch_size": 1}
    alone = allocate(model, rows, metric, 3.0, **options)
    for data, size in ((padded, 1), ([r.tolist() for r in rows], 2), ([{"input_ids": r} for r in rows], 3)):
        other = allocate(model, data, metric, 3.0, **{**options, "batch_size": size})
        assert other == alone
        for name, row in alone.sensitivities.items():
            # What is left after subtracting two losses in float32.
            assert other.sensitivities[name] == pytest.approx(row, rel=1e-3, abs=2e-6)


def test_modules_with_one_weight_count_once_and_have_the_same_bits(tiny_llama):
    model = tiny_llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    found = allocate(model, IDS, "loss", 2.5, bits=(2, 3), group_size=16, batch_size=3)
    names = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    assert found[names[0]] == found[names[1]] and list(found) == list(quantizable(model))
    assert names[1] not in found.sizes and sum(found.sizes.values()) == sum(
        {id(m.weight): m.weight.numel() for m in quantizable(model).values()}.values()
    )


def test_the_program_is_solved_on_the_sensitivities_that_are_returned(tiny_llama):
    found = allocate(tiny_llama(), IDS, "loss", 2.6, bits=(2, 3), group_size=16, batch_size=3)
    names, bits = list(found.sizes), (2, 3)
    losses = np.array([[found.sensitivities[n][b] for b in bits] for n in names])
    costs = np.array([[found.sizes[n] * b for b in bits] for n in names])
    budget = int(2.6 * sum(found.sizes.values()))
    loss = min(
        losses[range(14), o].sum()
        for o in map(list, itertools.product(range(2), repeat=14))
        if costs[range(14), o].sum() <= budget
    )
    assert found.objective == pytest.approx(loss)


def test_more_candidates_are_measured_and_the_best_is_kept(tiny_llama):
    model, options = tiny_llama(), {"bits": (2, 3), "group_size": 16}
    best = allocate(model, IDS, "loss", 2.5, batch_size=3, candidates=4, noise=1.0, **options)
    plain = allocate(model, IDS, "loss", 2.5, batch_size=3, **options)

    def measured(bits):
        config = RTNConfig(bits=dict(bits), group_size=16, scale_dtype="float32")
        return token_loss(dequantize(quantize(copy.deepcopy(model), config)), IDS)

    assert best.objective == pytest.approx(measured(best), abs=1e-5)
    assert measured(best) <= measured(plain) + 1e-6
    assert best == allocate(model, IDS, "loss", 2.5, batch_size=3, candidates=4, noise=1.0, **options)


def test_sixteen_bits_keep_a_layer_and_other_quantisers_can_measure(tiny_llama):
    model = tiny_llama()
    found = allocate(model, IDS, "hawq2", 9.0, bits=(2, 16), group_size=16, max_draws=2, batch_size=3)
    assert set(found.values()) == {2, 16}
    assert all(row[16] == 0 for row in found.sensitivities.values())
    config = RTNConfig(bits=4, group_size=16, clip_search=True)
    a = allocate(model, IDS, "hawq2", 3.0, bits=(2, 4), group_size=16, max_draws=2, batch_size=3, quantize=config)
    b = allocate(
        model,
        IDS,
        "hawq2",
        3.0,
        bits=(2, 4),
        group_size=16,
        max_draws=2,
        batch_size=3,
        quantize=config.quantize_weight,
    )
    plain = allocate(model, IDS, "hawq2", 3.0, bits=(2, 4), group_size=16, max_draws=2, batch_size=3)
    assert a.to_dict() == b.to_dict() != plain.to_dict()


def test_modules_left_out_are_not_in_the_result(tiny_llama):
    model = tiny_llama()
    found = allocate(
        model, IDS, "loss", 3.0, bits=(2, 4), group_size=16, batch_size=3, modules_to_not_convert=["down_proj"]
    )
    assert not any("down_proj" in name for name in found) and len(found) == 12
    RTNConfig(bits=found, group_size=16, modules_to_not_convert=["down_proj"]).layers(model)


def test_the_result_survives_json_and_copies_and_is_drawn(tiny_llama, tmp_path):
    found = allocate(tiny_llama(), IDS, "hawq2", 3.0, group_size=16, max_draws=2, batch_size=3)
    again = Allocation.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found and again.to_dict() == found.to_dict() and copy.deepcopy(found).to_dict() == found.to_dict()
    assert json.loads(json.dumps(found)) == dict(found)
    path = found.plot(tmp_path / "new" / "pareto.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"metric": "hawq"}, ValueError, "Did you mean 'hawq2'"),
        ({"average_bits": 1.5}, ValueError, "average_bits is 1.5 but attainable are 2 to 8"),
        ({"average_bits": 9}, ValueError, "attainable are 2 to 8"),
        ({"bits": (2, 5)}, ValueError, "bits is 5"),
        ({"bits": ()}, ValueError, "bits is empty"),
        ({"group_size": 24}, ValueError, "q_proj: group_size is 24 but must divide the 32"),
        ({"max_drafts": 3}, TypeError, "no option 'max_drafts'. Did you mean 'max_draws'"),
        ({"max_draws": 0}, ValueError, "max_draws is 0 but must be >= 1"),
        ({"metric": "loss", "candidates": 0}, ValueError, "candidates is 0"),
        ({"metric": "loss", "floor": 0.0}, ValueError, "floor is 0.0"),
        ({"metric": "loss", "noise": -1.0}, ValueError, "noise is -1.0"),
        ({"quantize": 3}, TypeError, "quantize is int"),
        ({"quantize": RTNConfig(group_size=32)}, ValueError, "group_size is 16 but 32 in the config"),
        ({"data": IDS[:, :1]}, ValueError, "no token to predict"),
        ({"data": None}, ValueError, "No calibration data"),
        ({"data": IDS + 1000}, ValueError, "knows 128 tokens"),
    ],
)
def test_bad_input_is_named(tiny_llama, change, error, words):
    with pytest.raises(error, match=words):
        allocate(tiny_llama(), **{"data": IDS, "group_size": 16, **change})


@pytest.mark.parametrize("metric", METRICS)
def test_nan_is_found_and_the_model_restored(tiny_llama, metric):
    model = tiny_llama()
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        allocate(model, IDS, metric, group_size=16, **FAST[metric])
    model = tiny_llama()
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.1.self_attn.k_proj"):
        allocate(model, IDS, metric, group_size=16, **FAST[metric])
    assert all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_be_allocated_say_so(tiny_llama, tiny_t5):
    with pytest.raises(NotImplementedError, match="no causal language model"):
        allocate(tiny_t5(), IDS, group_size=8)
    rounded = quantize(tiny_llama(), RTNConfig(bits=4, group_size=16))
    with pytest.raises(ValueError, match="before a model is quantised|no list of blocks|no float weight"):
        allocate(rounded, IDS, group_size=16)
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="stacked experts"):
        allocate(transformers.MixtralForCausalLM(config), IDS, group_size=16)
