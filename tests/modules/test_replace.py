"""`replace`: which layers, the same weights under the same names, and all of it undone."""

import copy
from functools import partial

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hfext.modules import GRKAN, DropIn, SparkFFN, WTACRSLinear, replace, replace_ffn, replace_mlp

TEMPLATE = WTACRSLinear(ratio=0.5)


def names(model):
    return {name for name, module in model.named_modules() if isinstance(module, WTACRSLinear)}


def ids(n=4, length=12):
    return torch.randint(3, 128, (n, length), generator=torch.Generator().manual_seed(0))


def lora(model, **options):
    torch.manual_seed(1)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


# which layers


def test_all_linear_is_all_but_the_output_layer(tiny_llama):
    model = tiny_llama()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    done = replace(model, TEMPLATE)
    assert names(model) == set(done.modules) == linear - {"lm_head"}


def test_conv1d_counts_as_linear(tiny_gpt2):
    model = tiny_gpt2()
    conv = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    replace(model, TEMPLATE)
    assert names(model) == conv and isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize(
    "targets, ends",
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["layers.0.mlp.up_proj"], {"up_proj"}),
        (r".*layers\.1\..*_proj", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["lm_head"], {"lm_head"}),
    ],
)
def test_targets_by_name_and_by_pattern(tiny_llama, targets, ends):
    model = tiny_llama()
    done = replace(model, TEMPLATE, target_modules=targets)
    assert {name.rpartition(".")[2] for name in done.modules} == ends
    if targets != ["q_proj", "v_proj"]:
        assert len(done.modules) == len(ends)


def test_some_can_be_left_out(tiny_llama):
    model = tiny_llama()
    done = replace(model, TEMPLATE, exclude_modules=["self_attn"])
    assert {name.split(".")[3] for name in done.modules} == {"mlp"}


def test_layers_of_adapters_and_below_them(tiny_llama):
    model = lora(tiny_llama())
    done = replace(model, TEMPLATE, target_modules=["q_proj"])
    parts = {name.partition("q_proj.")[2] for name in done.modules}
    assert parts == {"base_layer", "lora_A.default", "lora_B.default"} and len(done.modules) == 6
    done.undo()
    everything = replace(model, TEMPLATE).modules
    assert sum("lora_" in name for name in everything) == 8 and not any("lm_head" in name for name in everything)


# the same weights


def test_weights_keys_flags_and_outputs_are_what_they_were(tiny_llama):
    model = tiny_llama().to(torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.requires_grad = False
    before = {name: p for name, p in model.named_parameters()}
    state, logits = model.state_dict(), model(ids()).logits
    replace(model, TEMPLATE)
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert list(state) == list(model.state_dict())
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert torch.equal(model(ids()).logits, logits)
    # A later change of dtype reaches the new modules, and the old ones behind them.
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_saved_models_load_in_plain_transformers(tmp_path, kind, request):
    model = request.getfixturevalue(kind)()
    logits = model(ids()).logits
    replace(model, TEMPLATE)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not names(loaded) and torch.equal(loaded(ids()).logits, logits)


def test_ties_stay(tiny_gpt2):
    model = tiny_gpt2()
    replace(model, TEMPLATE, target_modules=["lm_head"])
    assert model.lm_head.weight is model.transformer.wte.weight
    model.tie_weights()
    model.resize_token_embeddings(130)
    assert model.lm_head.weight is model.transformer.wte.weight and model(ids()).logits.shape[-1] == 130


def test_a_layer_under_two_names_is_replaced_once():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    replace(model, TEMPLATE)
    assert model["a"] is model["b"][0] and isinstance(model["a"], WTACRSLinear)


def test_hooks_stay_and_can_still_be_removed():
    model, seen = nn.Sequential(nn.Linear(8, 8)), []
    hook = model[0].register_forward_hook(lambda *args: seen.append(1))
    replace(model, TEMPLATE)
    model(torch.zeros(2, 8))
    hook.remove()
    model(torch.zeros(2, 8))
    assert seen == [1]


def test_merging_an_adapter_works(tiny_llama):
    plain, model = lora(tiny_llama()), lora(tiny_llama())
    replace(model, TEMPLATE)
    merged = model.merge_and_unload()
    assert torch.equal(merged(ids()).logits, plain.merge_and_unload()(ids()).logits)


def test_a_deep_copy_trains_alone(tiny_llama):
    model = tiny_llama()
    replace(model, TEMPLATE)
    twin = copy.deepcopy(model).train()
    twin(ids(), labels=ids()).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert next(iter(model.modules())) is model
    own = model.model.layers[0].mlp.up_proj.sampler
    other = {id(module.sampler) for module in twin.modules() if isinstance(module, WTACRSLinear)}
    assert len(other) == 1 and id(own) not in other and own.counter == 0


@pytest.mark.parametrize("kind", ["accelerate", "patched"])
def test_a_layer_with_a_forward_of_its_own_is_refused_and_taken_without_it(tiny_llama, kind):
    """It would run instead of the new module's, silently."""
    model = tiny_llama()
    dense = model.model.layers[1].mlp.up_proj
    if kind == "accelerate":
        add_hook_to_module(dense, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    else:
        dense.forward = partial(nn.functional.linear, weight=dense.weight)
    with pytest.raises(
        NotImplementedError, match=r"layers.1.mlp.up_proj has a forward of its own.* or leave the layer"
    ):
        replace(model, TEMPLATE)
    assert not names(model)
    assert len(replace(model, TEMPLATE, exclude_modules=["layers.1.mlp.up_proj"]).modules) == 13
    if kind == "accelerate":
        remove_hook_from_module(model, recurse=True)
        module = replace(model, TEMPLATE, target_modules=["layers.1.mlp.up_proj"]).modules.popitem()[1]
        x = torch.randn(20, 32, requires_grad=True)
        assert "SampledLinear" in type(module.train()(x).grad_fn.next_functions[0][0]).__name__


# undo


def test_undo_brings_the_layers_back_with_their_new_weights(tiny_llama):
    model = tiny_llama()
    before = dict(model.named_modules())
    hooks = len(model._forward_pre_hooks)
    done = replace(model, TEMPLATE)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.train()
    done.undo()
    done.undo()
    after = dict(model.named_modules())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert not before["model.layers.0.mlp.up_proj"].weight.any() and before["model.layers.0.mlp.up_proj"].training
    assert len(model._forward_pre_hooks) == hooks


def test_as_a_context_manager(tiny_llama):
    model = tiny_llama()
    with replace(model, TEMPLATE) as done:
        assert names(model) == set(done.modules)
    assert not names(model)


# bad input


@pytest.mark.parametrize(
    "targets, message",
    [
        (["query"], r"target_modules is \['query'\] but no linear layer matches. Known: down_proj, gate_proj"),
        ("q_prj", "no linear layer matches. Did you mean 'q_proj'"),
        (["input_layernorm"], "no linear layer matches"),
        ([], "no linear layer matches"),
    ],
)
def test_no_match_is_an_error(tiny_llama, targets, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny_llama(), TEMPLATE, target_modules=targets)


def test_targets_that_are_no_names_are_named(tiny_llama):
    for fields in ({"target_modules": None}, {"exclude_modules": [3]}):
        with pytest.raises(TypeError, match=rf"{next(iter(fields))} is .* but must be names"):
            replace(tiny_llama(), TEMPLATE, **fields)


def test_replacing_twice_says_what_to_do(tiny_llama):
    model = tiny_llama()
    replace(model, TEMPLATE)
    with pytest.raises(ValueError, match="14 layers were replaced before: undo that first"):
        replace(model, TEMPLATE, target_modules=["q_proj"])


def test_a_wrong_template_is_refused(tiny_llama):
    for template in (nn.Linear(2, 2), TEMPLATE.from_dense(nn.Linear(2, 2)), WTACRSLinear):
        with pytest.raises(TypeError, match="must be made with options alone"):
            replace(tiny_llama(), template)
    with pytest.raises(TypeError, match="dense is a Embedding but must be one of Linear, Conv1D"):
        TEMPLATE.from_dense(nn.Embedding(3, 3))
    with pytest.raises(RuntimeError, match="has no weights: give it to hfext.modules.replace"):
        TEMPLATE(torch.zeros(3, 3))


def test_a_template_for_mlps_names_the_call_that_takes_it(tiny_llama):
    with pytest.raises(TypeError, match=r"GRKAN takes the place of an MLP.*: replace_mlp\(model, GRKAN\("):
        replace(tiny_llama(), GRKAN())
    model = tiny_llama()
    done = replace_mlp(model, GRKAN(groups=4))
    with pytest.raises(ValueError, match=r"Found: none .* 2 MLPs are already replaced, by GRKAN: call undo\(\)"):
        replace_mlp(model, GRKAN(groups=4))
    done.undo()
    replace_ffn(model, SparkFFN())
    with pytest.raises(ValueError, match="2 MLPs are already replaced, by SparkFFN"):
        replace_ffn(model, SparkFFN())


def test_another_module_needs_no_more_than_from_dense():
    class Doubled(DropIn):
        """Twice the dense layer."""

        def own(self):
            return {}

        def forward(self, x):
            return 2 * nn.functional.linear(x, self.weight, self.bias)

    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(5, 4)
    first = 2 * model[0](x)
    done = replace(model, Doubled(), target_modules=["0"])
    assert torch.equal(model[0](x), first) and list(done.modules) == ["0"]
