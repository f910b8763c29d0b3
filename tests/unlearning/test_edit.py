"""`Edit`: undone and redone bit for bit, stored, refused where it does not fit, and exported as LoRA."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hfext.unlearning._down_projections import down_projections
from hfext.unlearning._edit import Dense, Edit, Entries, LowRank, digest, low_rank_sum, refuse_quantized

DOWN = "model.layers.1.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def bits(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def three_changes(scale=1.0):
    return {
        DOWN: LowRank(scale * torch.randn(32, 2), torch.randn(2, 64)),
        UP: Entries(torch.tensor([5, 0, 700]), torch.tensor([1.0, 0.0, -3.0])),
        NORM: Dense(torch.randn(32)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_undo_and_redo_are_bitwise(tiny_llama, dtype):
    model = tiny_llama().to(dtype)
    before = bits(model)
    for scale in (1e-6, 0.1, 100.0):
        edit = Edit.make(model, three_changes(scale))
        after = bits(model)
        assert not same(model, before)
        edit.undo()
        assert same(model, before)
        edit.redo()
        assert same(model, after)
        edit.undo()
        assert same(model, before)


def test_the_change_is_the_one_asked_for(tiny_llama):
    model = tiny_llama()
    old, changes = model.state_dict()[DOWN].clone(), three_changes()
    edit = Edit.make(model, changes, {"method": "x"})
    torch.testing.assert_close(model.state_dict()[DOWN], old + changes[DOWN].left @ changes[DOWN].right)
    assert model.state_dict()[UP].view(-1)[[0, 5, 700]].tolist() == [0.0, 1.0, -3.0]
    rows = {row["name"]: row for row in edit.report["parameters"]}
    assert edit.report["method"] == "x" and rows[UP] == {
        "name": UP, "kind": "entries", "entries": 2048, "changed": 3, "share": 3 / 2048
    }  # fmt: skip
    assert rows[DOWN]["rank"] == 2 and rows[NORM]["share"] == 1.0
    # A low-rank change that is small beside the weights keeps far less than a copy; of a large one nothing is lost.
    for scale, keys in ((1e-4, {"left", "right", "index", "old"}), (10.0, {"left", "right", "difference"})):
        edit.undo()
        edit = Edit.make(model, {DOWN: LowRank(scale * changes[DOWN].left, changes[DOWN].right)})
        assert set(edit.kept[0].tensors) == keys and edit.kept[0].tensors["left"].shape == (32, 2)
        assert scale > 1 or edit.kept[0].tensors["old"].numel() < 2048 / 20


def test_twice_is_an_error_that_says_so_and_a_context_undoes(tiny_llama):
    model = tiny_llama()
    before = bits(model)
    with Edit.make(model, three_changes()) as edit:
        assert edit.applied and not same(model, before)
        with pytest.raises(RuntimeError, match="already: undo it first"):
            edit.redo()
    assert same(model, before) and not edit.applied
    with pytest.raises(RuntimeError, match="undone already"):
        edit.undo()
    with pytest.raises(KeyError), Edit.make(model, three_changes()):
        raise KeyError
    assert same(model, before)
    with Edit.make(model, three_changes()) as edit:
        edit.undo()
    assert same(model, before)


def test_a_later_change_is_not_overwritten(tiny_llama):
    model = tiny_llama()
    before = bits(model)
    first = Edit.make(model, three_changes())
    second = Edit.make(model, {NORM: Dense(torch.zeros(32))})
    state = bits(model)
    with pytest.raises(RuntimeError, match=f"{NORM} was changed by something else"):
        first.undo()
    assert same(model, state) and first.applied
    second.undo()
    first.undo()
    assert same(model, before)
    # Of single entries, only these must be as they were written.
    edit = Edit.make(model, {UP: Entries(torch.tensor([3]), torch.tensor([9.0]))})
    with torch.no_grad():
        model.get_parameter(UP).view(-1)[4] = 7
    edit.undo()
    assert model.get_parameter(UP).view(-1)[3] == before[UP].view(-1)[3] and model.get_parameter(UP).view(-1)[4] == 7
    edit.redo()
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="changed by something else"):
        edit.undo()


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(tiny_llama):
    model = tiny_llama()
    before = bits(model)

    def broken():
        yield from three_changes().items()
        raise ZeroDivisionError

    for changes, error in (
        (broken(), ZeroDivisionError),
        ({**three_changes(), "no.such": Dense(torch.ones(1))}, ValueError),
        ({UP: three_changes()[UP], NORM: Dense(torch.ones(3))}, ValueError),
        ({UP: three_changes()[UP], NORM: Dense(torch.full((32,), float("nan")))}, ValueError),
        ({UP: three_changes()[UP], NORM: LowRank(torch.ones(32, 1), torch.ones(1, 1))}, ValueError),
        ({NORM: three_changes()[NORM], UP: Entries(torch.tensor([1, 1]), torch.ones(2))}, ValueError),
    ):
        with pytest.raises(error):
            Edit.make(model, changes)
        assert same(model, before)


def test_tied_weights_are_changed_once_and_reported(tiny_gpt2):
    model = tiny_gpt2()
    edit = Edit.make(model, {"lm_head.weight": LowRank(torch.ones(128, 1), torch.ones(1, 32))})
    assert edit.report["parameters"][0]["tied"] == ["lm_head.weight"]
    assert edit.report["parameters"][0]["name"] == "transformer.wte.weight"
    assert model.lm_head.weight is model.transformer.wte.weight
    edit.undo()
    both = {name: Dense(torch.zeros(128, 32)) for name in ("lm_head.weight", "transformer.wte.weight")}
    with pytest.raises(ValueError, match="changed twice"):
        Edit.make(model, both)


def test_weights_that_are_not_contiguous(tiny_llama):
    module = nn.Linear(4, 3)
    module.weight = nn.Parameter(torch.randn(4, 3).T)
    before = module.weight.detach().clone()
    for change in (Entries(torch.tensor([0, 7]), torch.zeros(2)), LowRank(torch.ones(3, 1), torch.ones(1, 4))):
        with Edit.make(module, {"weight": change}):
            assert not torch.equal(module.weight, before)
            if isinstance(change, Entries):
                assert module.weight[0, 0] == module.weight[1, 3] == 0 and (module.weight == 0).sum() == 2
        assert torch.equal(module.weight, before)


@pytest.mark.parametrize("scale", [1e-4, 1.0])
@pytest.mark.parametrize("state", ["before", "after"])
def test_save_and_load(tiny_llama, tmp_path, state, scale):
    model, other = tiny_llama(), tiny_llama()
    before = bits(model)
    edit = Edit.make(model, three_changes(scale), {"alpha": 2.0})
    edit.save(tmp_path / "edit.safetensors")
    if state == "after":
        other.load_state_dict(model.state_dict())
    loaded = Edit.load(tmp_path / "edit.safetensors", other)
    assert loaded.applied and same(other, bits(model)) and loaded.report == edit.report
    loaded.undo()
    assert same(other, before)
    nothing = Edit.make(model, {})
    nothing.save(tmp_path / "empty.safetensors")
    assert Edit.load(tmp_path / "empty.safetensors", other).kept == []


def test_files_that_do_not_fit_are_refused(tiny_llama, tiny_gpt2, tmp_path):
    model = tiny_llama()
    edit = Edit.make(model, three_changes())
    path = tmp_path / "edit.safetensors"
    edit.save(path)
    edit.undo()
    before, data = bits(model), path.read_bytes()
    for other, message in ((tiny_llama(seed=1), "neither the weights before"), (tiny_gpt2(), "no parameter")):
        with pytest.raises(ValueError, match=message):
            Edit.load(path, other)
    with pytest.raises(ValueError, match="bfloat16"):
        Edit.load(path, copy.deepcopy(model).to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"\[32, 64\] in the file"):
        Edit.load(path, tiny_llama(intermediate_size=48))
    half = copy.deepcopy(model)
    Edit.make(half, {NORM: Dense(torch.zeros(32))})
    with pytest.raises(ValueError, match="seen: before, model.norm.weight"):
        Edit.load(path, half)
    renamed = data.replace(b'"entries', b'"entriez', 1), data.replace(b"hfext.edit.1", b"hfext.edit.9")
    for broken in (data[:-4], data[:40], b"", *renamed):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="holds no whole edit"):
            Edit.load(path, model)
    transformers.LlamaForCausalLM(model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no whole edit"):
        Edit.load(tmp_path / "model.safetensors", model)
    assert same(model, before)
    with pytest.raises(FileNotFoundError):
        Edit.load(tmp_path / "none.safetensors", model)


def rewritten(path, change):
    """The file with its header and tensors as `change(header, tensors)` leaves them."""
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["hfext_edit"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    change(header, tensors)
    save_file(tensors, path, metadata={"hfext_edit": json.dumps(header)})


def flipped(key):
    def change(header, tensors):
        raw = tensors[key].clone().contiguous().view(-1).view(torch.uint8)
        raw[-1] ^= 1
        tensors[key] = raw.view(tensors[key].dtype).view(tensors[key].shape)

    return change


@pytest.mark.parametrize("state", ["before", "after"])
@pytest.mark.parametrize(
    "scale, key",
    [(1e-4, "0.left"), (1e-4, "0.right"), (1e-4, "0.old"), (1e-4, "0.index"), (1.0, "0.right"), (1.0, "0.difference")]
    + [(1.0, "1.difference"), (1.0, "2.difference")],
)
def test_a_file_whose_payload_was_altered_is_refused(tiny_llama, tmp_path, scale, key, state):
    model, path = tiny_llama(), tmp_path / "edit.safetensors"
    edit = Edit.make(model, three_changes(scale))
    edit.save(path)
    if state == "before":
        edit.undo()
    held = bits(model)
    rewritten(path, lambda header, tensors: None)
    Edit.load(path, copy.deepcopy(model))
    rewritten(path, flipped(key))
    with pytest.raises(ValueError, match="does not lead|neither the weights before|positions"):
        Edit.load(path, model)
    assert same(model, held)


def test_an_edit_altered_in_memory_touches_nothing(tiny_llama):
    model = tiny_llama()
    edit = Edit.make(model, three_changes())
    held = bits(model)
    edit.kept[2].tensors["difference"][0] ^= 1
    with pytest.raises(RuntimeError, match=f"of {NORM} was altered"):
        edit.undo()
    assert same(model, held) and edit.applied


def test_crafted_files_are_refused(tiny_llama, tiny_gpt2, tmp_path):
    model, path = tiny_llama(), tmp_path / "edit.safetensors"
    edit = Edit.make(model, three_changes(1e-4))
    edit.save(path)
    edit.undo()
    before, data = bits(model), path.read_bytes()

    def to(key, dtype):
        return lambda header, tensors: tensors.update({key: tensors[key].to(dtype)})

    def twice(header, tensors):
        tensors["1.index"][0] = tensors["1.index"][1]

    def outside(header, tensors):
        tensors["1.index"][0] = 2048

    def shapeless(header, tensors):
        del header["tensors"][1]["shape"]

    def repeated(header, tensors):
        header["tensors"].append(header["tensors"][2])
        tensors["3.difference"] = tensors["2.difference"].clone()

    for change, message in (
        (to("1.index", torch.int32), "index is torch.int32"),
        (to("0.index", torch.int32), "index is torch.int32"),
        (to("0.left", torch.float32), "factors do not fit"),
        (to("0.right", torch.float32), "factors do not fit"),
        (to("0.old", torch.float64), "another type"),
        (to("1.difference", torch.int64), "another type"),
        (twice, "positions twice"),
        (outside, "positions outside it"),
        (shapeless, "holds no whole edit: 'shape'"),
        (repeated, f"changes one tensor twice: {NORM}"),
    ):
        path.write_bytes(data)
        rewritten(path, change)
        with pytest.raises(ValueError, match=message):
            Edit.load(path, model)
        assert same(model, before)

    # Two names of one tensor.
    tied = tiny_gpt2()
    edit = Edit.make(tied, {"lm_head.weight": Entries(torch.tensor([3]), torch.tensor([1.0]))})
    edit.save(path)
    edit.undo()

    def both(header, tensors):
        header["tensors"].append({**header["tensors"][0], "name": "lm_head.weight"})
        tensors |= {key.replace("0.", "1."): value.clone() for key, value in tensors.items()}

    rewritten(path, both)
    with pytest.raises(ValueError, match="changes one tensor twice: transformer.wte.weight = lm_head.weight"):
        Edit.load(path, tied)


@pytest.mark.parametrize("state", ["before", "after"])
def test_a_tensor_that_stayed_the_same_fits_both_states(tiny_llama, tmp_path, state):
    model = tiny_llama()
    before = bits(model)
    edit = Edit.make(model, {**three_changes(), "lm_head.weight": Dense(model.lm_head.weight.detach().clone())})
    after = bits(model)
    edit.save(tmp_path / "edit.safetensors")
    if state == "before":
        edit.undo()
    loaded = Edit.load(tmp_path / "edit.safetensors", model)
    assert loaded.applied and same(model, after)
    loaded.undo()
    assert same(model, before)


def test_redo_of_a_model_that_changed_is_refused(tiny_llama):
    model = tiny_llama()
    edit = Edit.make(model, three_changes())
    edit.undo()
    with torch.no_grad():
        model.get_parameter(NORM)[0] += 1
    held = bits(model)
    with pytest.raises(RuntimeError, match=f"{NORM} was changed by something else since this edit was undone"):
        edit.redo()
    assert same(model, held) and not edit.applied


def test_positions_of_other_types_and_ranges(tiny_llama, tmp_path):
    model = tiny_llama()
    before = bits(model)
    for wrong in ([-1], [2048], [0, -2048]):
        with pytest.raises(ValueError, match=r"positions must be in \[0, 2048\)"):
            Edit.make(model, {UP: Entries(torch.tensor(wrong), torch.ones(len(wrong)))})
    for wrong in (torch.tensor([True]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="must be integers"):
            Edit.make(model, {UP: Entries(wrong, torch.ones(1))})
    for dtype in (torch.int32, torch.uint8):
        edit = Edit.make(model, {UP: Entries(torch.tensor([7, 200], dtype=dtype), torch.ones(2))})
        assert model.get_parameter(UP).view(-1)[[7, 200]].tolist() == [1, 1]
        edit.save(tmp_path / "edit.safetensors")
        edit.undo()
        assert same(model, before)
        Edit.load(tmp_path / "edit.safetensors", model).undo()


def test_two_parameters_on_one_storage_are_one_tensor(tiny_llama):
    model = tiny_llama()
    weight = model.get_parameter(NORM)
    model.model.layers[0].input_layernorm.weight = nn.Parameter(weight.detach())
    other = "model.layers.0.input_layernorm.weight"
    assert model.get_parameter(other) is not weight
    before = bits(model)
    with pytest.raises(ValueError, match="changed twice"):
        Edit.make(model, {NORM: Dense(torch.zeros(32)), other: Dense(torch.ones(32))})
    assert same(model, before)
    with Edit.make(model, {NORM: Dense(torch.zeros(32))}) as edit:
        assert {edit.report["parameters"][0]["name"], *edit.report["parameters"][0]["tied"]} == {NORM, other}
    # Parts of one storage that do not meet, and empty tensors, are different ones.
    module = nn.Module()
    whole = torch.randn(6)
    module.a, module.b = nn.Parameter(whole[:3]), nn.Parameter(whole[3:])
    module.c, module.d = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
    edit = Edit.make(module, {n: Dense(torch.zeros(3 if n in "ab" else 0)) for n in "abcd"})
    assert len(edit.kept) == 4 and not whole.any()


def test_what_leads_back_does_not_depend_on_the_order_of_additions():
    left, right = torch.randn(50, 7), torch.randn(7, 40)
    expected = sum(left[:, k : k + 1].double() * right[k].double() for k in range(7))
    assert torch.equal(low_rank_sum(left, right), expected)
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "both ranks"])
def test_the_adapter_equals_the_edit(tiny_llama, tiny_gpt2, tmp_path, kind):
    model = tiny_gpt2() if kind == "gpt2" else tiny_llama()
    base, ids = copy.deepcopy(model), torch.randint(3, 128, (3, 9))
    rows = [(0, 2)] if kind != "both ranks" else [(0, 2), (1, 3)]
    parts = down_projections(model)
    changes = {}
    for layer, rank in rows:
        rows_, columns = parts[layer].module.weight.shape
        changes[parts[layer].weight] = LowRank(0.3 * torch.randn(rows_, rank), torch.randn(rank, columns))
    edit = Edit.make(model, changes)
    config, weights = edit.to_lora(tmp_path)
    rank = max(r for _, r in rows)
    assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (rank, rank, kind == "gpt2")
    adapted = PeftModel.from_pretrained(base, tmp_path)
    assert sum("lora_A" in n for n, _ in adapted.named_parameters()) == len(rows) == len(weights) // 2
    with torch.no_grad():
        edited = model(ids).logits
        assert (edited - base(ids).logits).abs().max() < 1e-5  # `base` carries the adapter's layers
        with adapted.disable_adapter():
            assert (edited - adapted(ids).logits).abs().max() > 1e-2
        assert (adapted.merge_and_unload()(ids).logits - edited).abs().max() < 1e-5


def test_no_adapter_for_what_has_no_low_rank(tiny_llama, tiny_gpt2):
    model = tiny_llama()
    for name, message in ((UP, "single entries"), (NORM, "all entries")):
        with Edit.make(model, {name: three_changes()[name]}) as edit, pytest.raises(ValueError, match=message):
            edit.to_lora()
    with Edit.make(model, {}) as edit, pytest.raises(ValueError, match="changed nothing"):
        edit.to_lora()
    gpt2 = tiny_gpt2()
    edit = Edit.make(gpt2, {"lm_head.weight": LowRank(torch.ones(128, 1), torch.ones(1, 32))})
    with pytest.raises(ValueError, match="no weight of a linear layer"):
        edit.to_lora()


def test_an_edit_of_the_base_of_a_peft_model(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["down_proj", "q_proj"]))
    part = down_projections(model)[1]
    assert part.name.endswith("layers.1.mlp.down_proj.base_layer")
    before = bits(model)
    edit = Edit.make(model, {part.weight: LowRank(torch.randn(32, 1), torch.randn(1, 64))})
    edit.to_lora(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    edit.undo()
    assert same(model, before)
    adapted = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-5)


def test_an_adapters_own_weights_are_not_exported(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["down_proj"]))
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"
    with Edit.make(model, {name: LowRank(torch.ones(32, 1), torch.ones(1, 8))}) as edit:
        with pytest.raises(ValueError, match="lora_B.default.weight belongs to an adapter"):
            edit.to_lora()


def test_quantised_weights_are_refused(tiny_llama):
    from hfext.quantization._linear import QuantLinear

    refuse_quantized(tiny_llama())
    refuse_quantized(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = QuantLinear.like(model.model.layers[0].mlp.up_proj, 4, 32, torch.float16)
    with pytest.raises(NotImplementedError, match=r"layers.0.mlp.up_proj.weight is no plain .* dequantise"):
        refuse_quantized(model)
    with pytest.raises(ValueError, match="no parameter"):
        Edit.make(model, {UP: three_changes()[UP]})
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(128, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(NotImplementedError, match="lm_head.weight .*dequantise"):
        refuse_quantized(model)
    with pytest.raises(NotImplementedError, match="dequantise"):
        Edit.make(model, {"lm_head.weight": Dense(torch.zeros(128, 32))})


def small(config, model, **fields):
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **fields)
    return model(config(**sizes))


def test_down_projections_are_found_by_their_place(tiny_llama, tiny_gpt2):
    opt = small(transformers.OPTConfig, transformers.OPTForCausalLM, ffn_dim=32, word_embed_proj_dim=16)
    neox = small(transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM, intermediate_size=32)
    square = small(transformers.LlamaConfig, transformers.LlamaForCausalLM, intermediate_size=16)
    for model, end in (
        (tiny_llama(), "mlp.down_proj"),
        (tiny_gpt2(), "mlp.c_proj"),
        (opt, "fc2"),
        (neox, "mlp.dense_4h_to_h"),
        (square, "mlp.down_proj"),
    ):
        found = down_projections(model)
        assert [part.layer for part in found] == [0, 1] and all(part.name.endswith(f".{end}") for part in found)
        width = model.config.hidden_size
        assert found[0].matrix().shape == (width, 64 if width == 32 else found[0].matrix().shape[1]) or width == 32
    assert down_projections(tiny_gpt2())[0].matrix().shape == (32, 128)


def test_an_ambiguous_model_lists_its_candidates(tiny_t5, tiny_llama):
    class Two(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.a, self.b = mlp, copy.deepcopy(mlp)

    model = tiny_llama()
    for block in model.model.layers:
        block.mlp = Two(block.mlp)
    with pytest.raises(ValueError, match=r"mlp.a.down_proj, model.layers.0.mlp.b.down_proj. Give `module`"):
        down_projections(model)
    assert [p.name for p in down_projections(model, r"b\.down_proj$")] == [
        "model.layers.0.mlp.b.down_proj", "model.layers.1.mlp.b.down_proj"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="by module='down_proj'"):
        down_projections(model, "down_proj")
    with pytest.raises(ValueError, match="none"):
        down_projections(model, "no_such_layer")
    with pytest.raises(ValueError, match="decoder"):
        down_projections(tiny_t5())
