"""ROCR: the edit in closed form, keys at a subject's last token, the sweep over layers, export as LoRA."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hfext.unlearning._down_projections import down_projections
from hfext.unlearning.rocr import PREFIXES, last_token, redirect_factors, rocr, second_moment

TEXT = [*PREFIXES, "Ada Lovelace wrote the first program.", "Bob Stone is a baker, and the sea is blue."] * 3
D = dict(dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE of 128 tokens that puts <s> before and </s> behind a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    pieces = [piece for t in TEXT for piece, _ in raw.pre_tokenizer.pre_tokenize_str(t)]
    letters = sorted(set("".join(pieces)))
    raw.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=128, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=letters)
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def key(model, tokenizer, projection, subject):
    """The mean over prefixes of the projection's input at the subject's last token, one forward each."""
    found = []
    for prefix in PREFIXES:
        ids = tokenizer(prefix + subject)["input_ids"][:-1]
        hook = projection.module.register_forward_pre_hook(lambda _, args: found.append(args[0][0, -1].double()))
        with torch.no_grad():
            model(torch.tensor([ids]))
        hook.remove()
    return torch.stack(found).mean(0)


def test_the_closed_form():
    w, k, v = torch.randn(5, 8, **D), torch.randn(8, 1, **D), torch.randn(5, 1, **D)
    c = second_moment(torch.randn(40, 8), 1e-2)
    left, right = redirect_factors(w, k, v, c)
    whitened = torch.linalg.inv(c) @ k
    expected = w + (v - w @ k) @ whitened.T / (k.T @ whitened)
    torch.testing.assert_close(w + left @ right, expected)
    torch.testing.assert_close((w + left @ right) @ k, v)
    assert torch.linalg.matrix_rank(left @ right) == 1
    # A key that C holds apart from k is not moved; others by the given share.
    other = torch.randn(8, 1, **D)
    apart = other - k * (other.T @ whitened) / (k.T @ whitened)
    torch.testing.assert_close((w + left @ right) @ apart, w @ apart)
    moved = (v - w @ k) * (other.T @ whitened) / (k.T @ whitened)
    torch.testing.assert_close((w + left @ right) @ other, w @ other + moved)
    # No smaller change in the metric of C meets the constraint.
    size = torch.trace(left @ right @ c @ (left @ right).T)
    for _ in range(5):
        free = torch.randn(5, 8, **D)
        rival = left @ right + 0.1 * (free - free @ k @ k.T / (k.T @ k))
        torch.testing.assert_close((w + rival) @ k, v)
        assert torch.trace(rival @ c @ rival.T) > size


def test_several_pairs_and_the_least_squares_form():
    w, k, v = torch.randn(5, 8, **D), torch.randn(8, 3, **D), torch.randn(5, 3, **D)
    c = second_moment(torch.randn(40, 8), 1e-2)
    left, right = redirect_factors(w, k, v, c)
    torch.testing.assert_close((w + left @ right) @ k, v)
    assert torch.linalg.matrix_rank(left @ right) == 3
    left, right = redirect_factors(w, k, v, c, soft=1.0)
    torch.testing.assert_close(left @ right, (v - w @ k) @ k.T @ torch.linalg.inv(c + k @ k.T))
    with pytest.raises(ValueError, match="one key"):
        redirect_factors(w, k[:, [0, 0]], v[:, :2], c)
    redirect_factors(w, k[:, [0, 0]], v[:, :2], c, soft=10.0)


def test_the_last_token_of_a_subject(tokenizer):
    ids, at = last_token(tokenizer, "We met Ada Lovelace", 19)
    assert ids[-1] == 2 and at == len(ids) - 2
    whole = "We met Ada Lovelace in town"
    ids, at = last_token(tokenizer, whole, 19)
    a, b = tokenizer(whole, return_offsets_mapping=True)["offset_mapping"][at]
    assert a < 19 <= b
    slow = copy.deepcopy(tokenizer)
    type(slow).is_fast, stock = property(lambda _: False), type(slow).is_fast
    try:
        with pytest.raises(NotImplementedError, match="fast tokenizers"):
            last_token(slow, "x", 1)
    finally:
        type(slow).is_fast = stock


@pytest.mark.parametrize("factory", ["tiny_llama", "tiny_gpt2"])
def test_the_target_gets_the_value_of_the_redirect(factory, request, tokenizer, tmp_path):
    model = request.getfixturevalue(factory)(initializer_range=0.2)
    part = down_projections(model)[0]
    k_t, k_r = (key(model, tokenizer, part, subject) for subject in ("Ada Lovelace", "Bob Stone"))
    old, base = part.matrix().clone(), copy.deepcopy(model)
    edit = rocr(model.train(), tokenizer, "Ada Lovelace", "Bob Stone", layer=0, texts=TEXT)
    assert model.training
    model.eval()
    new = part.matrix()
    torch.testing.assert_close(new.double() @ k_t, old.double() @ k_r, rtol=1e-5, atol=1e-5)
    rank = torch.linalg.svdvals((new - old).double())
    assert rank[1] < 1e-5 * rank[0] and rank[0] > 1e-3
    ids = torch.tensor([tokenizer("Ada Lovelace wrote")["input_ids"]])
    edit.to_lora(tmp_path)
    adapted = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(adapted(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert adapted.peft_config["default"].r == 1
    edit.undo()
    assert torch.equal(part.matrix(), old)


def test_the_same_concept_changes_nothing(tiny_llama, tokenizer):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    rocr(model, tokenizer, "Ada", "Ada", layer=1)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_several_targets_batches_and_modules(tiny_llama, tokenizer):
    model = tiny_llama(initializer_range=0.2)
    part = down_projections(model)[1]
    keys = [key(model, tokenizer, part, s) for s in ("Ada Lovelace", "the sea", "Bob Stone")]
    old = part.matrix().double()
    matrices = []
    for size in (1, 7, 64):
        with rocr(model, tokenizer, ["Ada Lovelace", "the sea"], "Bob Stone", 1, texts=TEXT, batch_size=size) as edit:
            assert edit.report["parameters"][0]["rank"] == 2
            matrices.append(part.matrix().clone())
    for k in keys[:2]:
        torch.testing.assert_close(matrices[0].double() @ k, old @ keys[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(matrices[0], matrices[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(matrices[1], matrices[2], rtol=1e-3, atol=1e-4)
    with rocr(model, tokenizer, "Ada", "Bob", 0, module=r"o_proj$") as edit:
        assert edit.report["parameters"][0]["name"] == "model.layers.0.self_attn.o_proj.weight"
    with rocr(model.to(torch.bfloat16), tokenizer, "Ada", "Bob", 0) as edit:
        assert edit.report["parameters"][0]["changed"] > 0


def test_the_sweep_keeps_the_layer_with_the_least_divergence(tiny_llama, tokenizer):
    model = tiny_llama(initializer_range=0.3, num_hidden_layers=3)
    before = copy.deepcopy(model.state_dict())
    edit = rocr(model, tokenizer, "Ada Lovelace", "Bob Stone", texts=TEXT[:14])
    rows = edit.report["layers"]
    assert [row["layer"] for row in rows] == [0, 1, 2]
    best = min(rows, key=lambda row: row["to_redirect"] + row["drift"])
    assert edit.report["layer"] == best["layer"] and all(math.isfinite(row["drift"]) for row in rows)
    changed = [name for name, p in model.state_dict().items() if not torch.equal(p, before[name])]
    assert changed == [f"{best['name']}.weight"]
    # What was measured of a layer is what its edit does.
    edit.undo()
    ids = torch.tensor([tokenizer(TEXT[13])["input_ids"]])
    log_p = model(ids).logits[0, -1].detach().log_softmax(-1)
    with rocr(model, tokenizer, "Ada Lovelace", "Bob Stone", rows[1]["layer"], texts=[TEXT[13]]):
        log_q = model(ids).logits[0, -1].detach().log_softmax(-1)
    single = rocr(model, tokenizer, "Ada Lovelace", "Bob Stone", texts=[TEXT[13]]).report["layers"][1]
    assert single["drift"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), abs=1e-5)


def test_bad_input_is_named(tiny_llama, tokenizer):
    model = tiny_llama()
    for arguments, options, message in (
        (("Ada", ["Bob", "Eve"]), {}, "1 targets need as many redirects"),
        (("", "Bob"), {}, "none empty"),
        (("Ada", "Bob"), {"layer": 5}, "layer is 5 but the model has 2 blocks"),
        (("Ada", "Bob"), {"ridge": 0.0}, "ridge is 0.0"),
        (("Ada", "Bob"), {"weight": -1.0}, "weight is -1.0"),
        (("Ada", "Bob"), {"module": "nothing"}, "Candidates"),
        ((["Ada", "Ada"], "Bob"), {"layer": 0}, "same subject twice"),
    ):
        with pytest.raises(ValueError, match=message):
            rocr(model, tokenizer, *arguments, **options)
