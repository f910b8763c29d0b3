"""Fewer experts: what is counted, what goes, and that plain transformers runs what is left."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import LLAMA, factory

from hfext.modules._experts import calibrate, count_routes, find_blocks
from hfext.modules.uncurl import (
    UncurlConfig,
    UncurlReport,
    averaged,
    highest,
    nearest_kept,
    prune_by_activation,
    reduced,
    uncurl,
)

SIZES = {k: v for k, v in LLAMA.items()}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
KINDS = {
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 6, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1, **MOE},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 6, "head_dim": 8, "norm_topk_prob": True, **MOE}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
            "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
            "n_shared_experts": 1, **MOE,
        },
    ),
}  # fmt: skip


def make(kind="mixtral", seed=0, **fields):
    name, options = KINDS[kind]
    classes = getattr(transformers, name + "ForCausalLM"), getattr(transformers, name + "Config")
    model = factory(*classes, **SIZES)(seed, **{**options, **fields})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # routers that choose, and biases that are not 0
        for block in find_blocks(model):
            for _, _, tensor in block.rows():
                if tensor.dim() < 3:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1 if tensor.dim() == 2 else 0.1))
    return model


def ids(rows=3, tokens=12, seed=3):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model, x, **more):
    with torch.no_grad():
        return model(input_ids=x, **more).logits


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()


def unchanged(model, before):
    tensors, config = before
    now = model.state_dict()
    return config == model.config.to_dict() and all(torch.equal(now[k], v) for k, v in tensors.items())


def with_unused(model):
    """Experts 1 and 4 are never among the top 2: of a and -a, and of b and -b, one is above their logit of 0."""
    for block in find_blocks(model):
        with torch.no_grad():
            weight = block.router.weight
            weight[[1, 4]] = 0
            weight[2], weight[5] = -weight[0], -weight[3]
    return model


def test_routes_counted_by_hand():
    """Two tokens, three experts, top 2."""
    l = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0]])  # noqa: E741
    found = count_routes(l, torch.tensor([[0.7, 0.3], [0.9, 0.1]]), torch.tensor([[1, 0], [0, 2]]))
    assert found.tokens == 2
    assert found.score("frequency").tolist() == [1.0, 0.5, 0.5]
    assert torch.allclose(found.score("gate_mass"), torch.tensor([0.6, 0.35, 0.05], dtype=torch.float64))
    assert torch.equal(found.gram, torch.tensor([[10.0, 2, 3], [2, 4, 0], [3, 0, 1]], dtype=torch.float64))


@pytest.mark.parametrize("kind", list(KINDS))
def test_counts_are_those_of_a_model_run_by_hand(kind):
    """Padding on either side does not count; the norms are those of each expert on its own."""
    model, x = make(kind), ids()
    mask = torch.ones_like(x)
    mask[0, :4] = mask[2, 9:] = 0
    blocks = find_blocks(model)
    found = calibrate(model, blocks, [{"input_ids": x, "attention_mask": mask, "labels": x}], norms=True)
    seen = {}
    handles = [b.experts.register_forward_pre_hook(lambda m, a, n=b.name: seen.update({n: a})) for b in blocks]
    logits(model, x, attention_mask=mask)
    for handle in handles:
        handle.remove()
    for block in blocks:
        hidden, chosen, gates = seen[block.name]
        frequency, mass, norm = torch.zeros(3, 6, dtype=torch.float64)
        for t in mask.flatten().nonzero().flatten().tolist():
            for e, g in zip(chosen[t].tolist(), gates[t].tolist(), strict=True):
                with torch.no_grad():
                    out = block.experts(hidden[t : t + 1], torch.tensor([[e]]), torch.ones(1, 1))
                frequency[e] += 1
                mass[e] += g
                norm[e] += g * out.double().norm()
        total = int(mask.sum())
        routing = found[block.name]
        assert routing.tokens == total
        assert torch.equal(routing.score("frequency"), frequency / total)
        assert torch.allclose(routing.score("gate_mass"), mass / total, rtol=1e-6)
        assert torch.allclose(routing.score("gate_output_norm"), norm / total, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("method", ["prune", "merge"])
def test_all_experts_kept_changes_nothing(kind, method):
    model = make(kind)
    before = state(model)
    report = uncurl(model, [ids()], keep=6, method=method)
    assert unchanged(model, before) and report.experts == (6, 6) and not any(report.merged.values())


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("method", ["prune", "merge"])
def test_it_saves_and_loads_and_runs_in_plain_transformers(kind, method, tmp_path):
    model, x = make(kind), ids()
    model.train()
    report = uncurl(model, [x], keep=3, method=method)
    assert model.training and report.experts == (6, 3) and report.parameters[1] < report.parameters[0]
    model.eval()
    for block in find_blocks(model):
        assert block.count == 3 and all(t.shape[0] == 3 for _, _, t in block.rows())
        assert report.kept[block.name] == sorted(report.kept[block.name])
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, x), logits(model, x))
    fresh = type(model)(model.config)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(again.generate(x, **options), model.generate(x, **options))


def test_a_new_process_without_hfext_runs_it(tmp_path):
    model, x = make("mixtral"), ids()
    uncurl(model, [x], keep=3)
    model.save_pretrained(tmp_path)
    torch.save({"x": x, "y": logits(model, x)}, tmp_path / "seen.pt")
    script = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"seen = torch.load({str(tmp_path / 'seen.pt')!r})\n"
        "with torch.no_grad():\n    out = model(seen['x'], output_router_logits=True, labels=seen['x'])\n"
        "assert torch.allclose(out.logits, seen['y'], atol=1e-6) and out.aux_loss.isfinite()\n"
        "assert out.router_logits[0].shape[-1] == 3 and 'hfext' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("kind", "exact"), [("mixtral", True), ("qwen3_moe", True), ("qwen2_moe", False)])
def test_unused_experts_go_unnoticed_only_where_gates_are_renormalised(kind, exact):
    """With gates of the softmax over all experts the ones that stay get the share of those that go."""
    model, x = with_unused(make(kind)), ids()
    before = logits(model, x)
    report = uncurl(model, [x], keep=4)
    assert all(kept == [0, 2, 3, 5] for kept in report.kept.values())
    change = (logits(model, x) - before).abs().max()
    assert change < 1e-6 if exact else change > 1e-4


def test_the_share_of_pruned_experts_goes_to_the_others():
    """Gates over all experts: what stays is divided by 1 - the softmax of what goes."""
    model, x = make("olmoe", num_hidden_layers=1), ids()
    block = find_blocks(model)[0]
    seen = []
    handle = block.router.register_forward_hook(lambda m, a, out: seen.append(out))
    logits(model, x)
    kept = uncurl(model, [x], keep=4).kept[block.name]
    logits(model, x)
    handle.remove()
    before, after = seen[0][0].softmax(-1), seen[-1][0].softmax(-1)
    assert torch.allclose(after, before[:, kept] / before[:, kept].sum(-1, keepdim=True), atol=1e-6)


def test_merging_equal_experts_is_exact():
    model, x = make("mixtral"), ids()
    with torch.no_grad():
        for block in find_blocks(model):
            for tensor in (block.experts.gate_up_proj, block.experts.down_proj):
                tensor.copy_(tensor[:1].expand_as(tensor).clone())
    before = logits(model, x)
    report = uncurl(model, [x], keep=2, method="merge")
    assert all(len(merged) == 4 for merged in report.merged.values())
    assert (logits(model, x) - before).abs().max() < 1e-6


def test_a_copy_of_an_expert_joins_it_and_changes_nothing():
    model, x = make("mixtral"), ids()
    blocks = find_blocks(model)
    with torch.no_grad():
        for block in blocks:
            for _, _, tensor in block.rows():
                tensor[5] = tensor[2]
    routings = calibrate(model, blocks, [x])
    for block in blocks:
        rows, merged = reduced(block, routings[block.name], torch.arange(5), "merge")
        assert merged == {5: 2}
        for module, name, new in rows:
            assert torch.equal(new, vars(module)["_parameters"][name][:5])


def test_merged_weights_by_hand():
    weights = torch.tensor([[1.0], [3.0], [10.0], [7.0]])
    kept, owner = torch.tensor([0, 2]), torch.tensor([0, 0, 2, 2])
    f = torch.tensor([0.3, 0.1, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(averaged(weights, kept, owner, f), torch.tensor([[1.5], [8.5]]))
    f = torch.tensor([0.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    assert torch.allclose(averaged(weights, kept, owner, f), torch.tensor([[2.0], [10.0]]))
    same = torch.full((3, 5), 0.1)
    assert torch.equal(averaged(same, torch.tensor([1]), torch.tensor([1, 1, 1]), f[:3] + 0.3), same[:1])


def test_who_joins_whom_by_hand():
    l = torch.tensor([[1.0, 2.0, -1.0, 0.5], [1.0, 2.1, 1.0, -0.5]], dtype=torch.float64)  # noqa: E741
    owner = nearest_kept(l.mT @ l, torch.tensor([0, 2]))
    assert owner.tolist() == [0, 0, 2, 0]
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert nearest_kept(zero, torch.tensor([1])).tolist() == [1, 1, 1]


def test_equal_scores_keep_the_lower_index():
    assert highest(torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0]), 2).tolist() == [1, 2]
    assert highest(torch.tensor([0.0, 2.0, 0.0]), 2).tolist() == [0, 1]


@pytest.mark.parametrize("method", ["prune", "merge"])
def test_the_order_of_experts_does_not_matter(method):
    model, x = make("mixtral"), ids()
    other = copy.deepcopy(model)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        for block in find_blocks(other):
            for _, _, tensor in block.rows():
                tensor.copy_(tensor[order].clone())
    assert (logits(other, x) - logits(model, x)).abs().max() < 1e-6
    a, b = uncurl(model, [x], keep=4, method=method), uncurl(other, [x], keep=4, method=method)
    for name, kept in a.kept.items():
        assert sorted(order[b.kept[name]].tolist()) == kept
    assert (logits(other, x) - logits(model, x)).abs().max() < 1e-6


def test_shared_experts_and_dense_layers_are_left_alone():
    model = make("qwen2_moe", mlp_only_layers=[0], num_hidden_layers=3)
    before = {k: v.clone() for k, v in model.state_dict().items() if "shared" in k or ".0.mlp" in k}
    report = uncurl(model, [ids()], keep=3)
    assert len(report.kept) == 2 and len(before) > 6
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_the_auxiliary_loss_knows_the_new_counts():
    model, x = make("mixtral", output_router_logits=True), ids()
    uncurl(model, [x], keep=3, top_k=1)
    assert model.num_experts == 3 and model.num_experts_per_tok == 1
    with torch.no_grad():
        out = model(x, labels=x)
    p = torch.cat(out.router_logits).softmax(-1)
    hits = torch.nn.functional.one_hot(p.argmax(-1), 3).float().mean(0)
    assert torch.allclose(out.aux_loss, 3 * (hits * p.mean(0)).sum(), atol=1e-5)
    model.train()(x, labels=x).loss.backward()


def test_fewer_active_experts(tmp_path):
    model, x = make("qwen3_moe"), ids()
    report = uncurl(model, [x], keep=1, top_k=1)
    assert report.top_k == (2, 1)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_experts_per_tok == 1 and torch.equal(logits(again, x), logits(model, x))


def test_bfloat16_keeps_its_type():
    model, x = make("mixtral").to(torch.bfloat16), ids()
    uncurl(model, [x], keep=3, method="merge", score="gate_output_norm")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and logits(model, x).isfinite().all()


def test_padding_and_batching_change_nothing():
    model, x = make("mixtral"), ids(4, 10)
    padded = torch.cat((torch.zeros(4, 5, dtype=torch.long), x), 1)
    mask = (padded != 0).long()
    options = [[x], [x[:1], x[1:]], [{"input_ids": padded, "attention_mask": mask}]]
    reports = [uncurl(copy.deepcopy(model), batches, keep=3) for batches in options]
    for report in reports[1:]:
        assert report.kept == reports[0].kept and report.tokens == 40
        for name, mass in report.gate_mass.items():
            assert mass == pytest.approx(reports[0].gate_mass[name], rel=1e-4)


def test_pruning_by_activation_keeps_what_the_busiest_layer_needs():
    model, x = with_unused(make("mixtral")), ids()
    report = prune_by_activation(model, [x], threshold=1e-9)
    needed = [sum(f > 0 for f in frequency) for frequency in report.frequency.values()]
    assert report.experts == (6, max(needed)) == (6, 4)
    low = prune_by_activation(make("mixtral"), [x], threshold=1.0)
    assert low.experts == (6, 2)
    before = make("mixtral")
    assert prune_by_activation(before, [x], threshold=0.0).experts == (6, 6)


def test_an_exception_leaves_the_model_as_it_was(monkeypatch):
    model, x = make("mixtral"), ids()
    model.train()
    before = state(model)

    def broken():
        yield x
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        uncurl(model, broken(), keep=3)
    assert unchanged(model, before) and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain = type(model.config).__setattr__

    def failing(config, name, value):
        if name == "num_experts_per_tok" and value == 1:
            raise RuntimeError("frozen")
        plain(config, name, value)

    monkeypatch.setattr(type(model.config), "__setattr__", failing)
    with pytest.raises(RuntimeError, match="frozen"):
        uncurl(model, [x], keep=3, top_k=1)
    assert unchanged(model, before) and model.num_experts == 6 and find_blocks(model)[0].experts.num_experts == 6
    model.eval()(x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 1}, "keep is 1 but 2 experts are active"),
        ({"keep": 7}, "keep is 7 but a layer has 6"),
        ({"keep": 0}, "keep is 0"),
        ({"keep": 2, "top_k": 3}, "top_k is 3"),
        ({"method": "drop"}, "method is 'drop'"),
        ({"score": "loss"}, "score is 'loss'"),
    ],
)
def test_bad_options(options, words):
    model = make("mixtral")
    before = state(model)
    with pytest.raises(ValueError, match=words):
        uncurl(model, [ids()], **options)
    assert unchanged(model, before)


def test_bad_models_and_data(tiny_llama):
    x = ids()
    with pytest.raises(ValueError, match="llama model has no experts"):
        uncurl(tiny_llama(), [x])
    with pytest.raises(ValueError, match="hold no tokens"):
        uncurl(make("mixtral"), [])
    with pytest.raises(ValueError, match="hold no tokens"):
        uncurl(make("mixtral"), [{"input_ids": x, "attention_mask": torch.zeros_like(x)}])
    with pytest.raises(NotImplementedError, match="groups"):
        find_blocks(make("deepseek_v3", n_group=2))
    config = transformers.JetMoeConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2,
                                       kv_channels=8, intermediate_size=16, num_local_experts=4)  # fmt: skip
    with pytest.raises(NotImplementedError, match="experts of jetmoe"):
        uncurl(transformers.JetMoeForCausalLM(config), [x])
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(make("mixtral"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="PEFT"):
        uncurl(wrapped, [x])
    with pytest.raises(NotImplementedError, match="offloaded or on meta"):
        uncurl(make("mixtral").to("meta"), [x])
    coded = make("mixtral")
    experts = find_blocks(coded)[1].experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.data.to(torch.uint8), requires_grad=False)
    with pytest.raises(NotImplementedError, match="dequantise"):
        uncurl(coded, [x])
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        uncurl(make("mixtral"), [{"input_ids": x, "attention_mask": torch.ones(3, 1, 12, 12)}])
    broken = make("mixtral")
    find_blocks(broken)[0].router.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        uncurl(broken, [x])


def test_batches_that_are_none_say_what_they_must_hold():
    x, model = ids(), make("mixtral")
    before = state(model)
    for batches, found in (
        ({"input_ids": x}, "is a dict .one batch"),
        (x, "is a Tensor .one batch"),
        ("text", "is a str .text: tokenize it"),
        (["text"], "holds a str .text: tokenize it"),
        ([[1, 2, 3]], "holds a list .neither"),
        (3, "is a int .not iterable"),
    ):
        words = f"calibration_batches {found}.* iterable of batches, each a dict .*input_ids"
        with pytest.raises(TypeError, match=words):
            uncurl(model, batches)
        with pytest.raises(TypeError, match="calibration_batches"):
            prune_by_activation(model, batches)
    assert unchanged(model, before)
    for keep in ("half", 2.5, True, None):
        with pytest.raises(ValueError, match=f"keep is {keep!r} but must be a number of experts, an integer"):
            uncurl(model, [x], keep=keep)


def test_the_report_prints_a_table():
    report = UncurlReport(
        experts=(4, 2), top_k=(2, 2), tokens=1234, kept={"layers.0.mlp": [0, 2], "layers.11.mlp": [1, 3]},
        merged={"layers.0.mlp": {}, "layers.11.mlp": {0: 3}}, parameters=(12345, 6789),
        frequency={"layers.0.mlp": [0.5] * 4, "layers.11.mlp": [0.5] * 4},
        gate_mass={"layers.0.mlp": [0.5, 0.125, 0.25, 0.125], "layers.11.mlp": [0.1, 1 / 3, 0.1, 7 / 15]},
    )  # fmt: skip
    assert str(report).splitlines() == [
        "4 -> 2 experts a layer, 2 active for a token, 12,345 -> 6,789 parameters, seen on 1,234 tokens",
        "layer          kept experts  gate mass kept  merged into",
        "layers.0.mlp   0 2           75.0%",
        "layers.11.mlp  1 3           80.0%           0->3",
    ]
    found = uncurl(make("mixtral"), [ids()], keep=3)
    assert "merged into" not in str(found) and max(map(len, str(found).splitlines())) < 120
    assert all(0.5 < share <= 1 for share in found.kept_mass().values())
    assert len(found.kept_mass()) == len(found.kept)


def test_defaults():
    assert UncurlConfig() == UncurlConfig(keep=4, method="prune", score="gate_mass", top_k=None)
