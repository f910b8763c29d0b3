"""ZO2 is MeZO bit for bit, whatever the model and however the update is split, with few blocks on the device."""

import threading

import pytest
import torch
import transformers
from optim_training import flat, gpt2, language_data, run_training
from torch import nn
from transformers import Trainer, TrainingArguments

from hfext.optim import ZO2, MeZO
from hfext.optim.zo2 import offload

OPTIONS = dict(learning_rate=1e-2, max_steps=4, weight_decay=0.1)


def both(tmp_path, make, options="eps=0.01", **settings):
    """The weights after the same training by MeZO and by ZO2, and the second Trainer."""
    settings = {**OPTIONS, **settings}
    mezo = run_training(make(), "mezo", options, tmp_path, **settings)
    zo2 = run_training(make(), "zo2", options, tmp_path, **settings)
    assert zo2.optimizer.optimizer.projected == mezo.optimizer.optimizer.projected
    return flat(mezo.model), flat(zo2.model), zo2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["eps=0.01", "directions=3", "restore=exact,directions=2"])
def test_weights_are_those_of_mezo_bit_for_bit(tmp_path, options, dtype):
    mezo, zo2, job = both(
        tmp_path, lambda: gpt2(0.1, dtype), options, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    assert torch.equal(mezo, zo2) and not torch.equal(mezo, flat(gpt2(0.1, dtype)))
    assert 1 <= job.optimizer.optimizer.offload.peak_blocks <= 3


MODELS = {
    "llama, tied": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
        ),
    ),
    "qwen3 with experts": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
            pad_token_id=0,
        ),
    ),
    "gemma3": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=4, pad_token_id=0,
        ),
    ),
    "opt": (
        transformers.OPTForCausalLM,
        transformers.OPTConfig(
            vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=32, pad_token_id=0,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_any_decoder_works_unchanged(tmp_path, name):
    kind, config = MODELS[name]

    def make():
        torch.manual_seed(0)
        return kind(config)

    mezo, zo2, job = both(tmp_path, make, max_steps=3)
    assert torch.equal(mezo, zo2)
    stream = job.optimizer.optimizer.offload
    assert len(stream.blocks) == config.num_hidden_layers and stream.peak_blocks <= 3


def test_an_encoder_with_a_classification_head_works(tmp_path):
    def make():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
        )
        return transformers.BertForSequenceClassification(config)

    rows = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(language_data())]
    mezo, zo2, _ = both(tmp_path, make, data=rows)
    assert torch.equal(mezo, zo2)


def test_lora_in_the_blocks_streams_the_frozen_weights_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    def make():
        torch.manual_seed(1)
        return get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))

    mezo, zo2, job = both(tmp_path, make)
    assert torch.equal(mezo, zo2)
    homes = job.optimizer.optimizer.offload.home
    frozen = job.model.base_model.model.transformer.h[0].mlp.c_fc.weight
    assert not frozen.requires_grad and id(frozen) in homes


def test_a_block_comes_up_once_in_an_update(tmp_path):
    _, _, job = both(tmp_path, gpt2, max_steps=4)
    # 4 updates of one micro-batch, and the flush at the end.
    assert job.optimizer.optimizer.offload.uploads == 2 * (4 + 1)


def test_put_off_moves_are_in_what_is_evaluated_and_saved(tmp_path):
    losses = {}
    for name in ("mezo", "zo2"):
        job = run_training(
            gpt2(), name, None, tmp_path / name, eval_dataset=language_data(8), eval_strategy="steps", eval_steps=1,
            save_strategy="steps", save_steps=2, **OPTIONS,
        )  # fmt: skip
        losses[name] = [line["eval_loss"] for line in job.state.log_history if "eval_loss" in line]
    assert losses["mezo"] == losses["zo2"] and len(set(losses["zo2"])) == 4
    saved = [transformers.GPT2LMHeadModel.from_pretrained(tmp_path / n / "checkpoint-2") for n in ("mezo", "zo2")]
    assert torch.equal(flat(saved[0]), flat(saved[1]))


def test_resume_is_bitwise_and_the_same_as_mezo(tmp_path):
    straight = run_training(gpt2(), "zo2", None, tmp_path / "a", save_strategy="steps", save_steps=2, **OPTIONS)
    again = gpt2()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    for name in ("zo2", "mezo"):
        resumed = run_training(again, name, None, tmp_path / name, resume=checkpoint, **OPTIONS)
        assert torch.equal(flat(straight.model), flat(resumed.model))
        again = gpt2()


def test_the_best_model_is_loaded_without_moves_of_a_later_one(tmp_path):
    jobs = [
        run_training(
            gpt2(), name, None, tmp_path / name, eval_dataset=language_data(8), eval_strategy="steps", eval_steps=1,
            save_strategy="steps", save_steps=1, load_best_model_at_end=True, learning_rate=0.1, max_steps=4,
        )
        for name in ("mezo", "zo2")
    ]  # fmt: skip
    assert torch.equal(flat(jobs[0].model), flat(jobs[1].model))


def raw(streamed):
    """Three updates of a raw loop; the model and the optimizer."""
    model = gpt2().eval()
    data = language_data(4)
    batch = {key: torch.stack([row[key] for row in data]) for key in ("input_ids", "labels")}
    kwargs = {"streamed": model} if streamed else {}
    optimizer = (ZO2 if streamed else MeZO)(model.parameters(), lr=1e-2, **kwargs)
    for _ in range(3):
        optimizer.step(lambda: model(**batch).loss)
    return model, optimizer


def test_a_raw_loop_needs_no_flush_to_save_or_evaluate():
    (first, _), (second, optimizer) = raw(False), raw(True)
    assert any(optimizer.offload.waiting)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)
    second, optimizer = raw(True)
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert not any(optimizer.offload.waiting)


def test_flush_twice_is_flush_once_and_remove_gives_a_plain_model():
    model, optimizer = raw(True)
    optimizer.flush()
    before = flat(model)
    optimizer.flush()
    assert torch.equal(flat(model), before)
    optimizer.offload.remove()
    ids = torch.arange(6)[None]
    assert "hfext_offload" not in vars(model) and not model.transformer.h[0]._forward_pre_hooks
    assert torch.equal(model(ids).logits, raw(False)[0](ids).logits)


def test_an_offloaded_model_generates():
    model, optimizer = raw(True)
    plain, _ = raw(False)
    ids = torch.arange(3, 7)[None]
    kwargs = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **kwargs), plain.generate(ids, **kwargs))
    assert optimizer.offload.peak_blocks <= 3


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("where", ["first block", "last block", "loss"])
def test_an_exception_on_either_side_leaves_the_weights_and_no_thread(side, where):
    model, optimizer = raw(True)
    model.state_dict()
    before, threads = flat(model), threading.active_count()
    ids = torch.arange(6)[None]

    class Stop(Exception):
        pass

    def fail(*args):
        on_second = threading.current_thread() is not threading.main_thread()
        if on_second == bool(side):
            raise Stop

    def loss():
        value = model(ids, labels=ids).loss
        if where == "loss":
            fail()
        return value

    layer = model.transformer.h[0 if where == "first block" else -1]
    hook = layer.mlp.register_forward_hook(fail) if where != "loss" else None
    with pytest.raises(Stop):
        optimizer.step(loss)
    if hook is not None:
        hook.remove()
    assert threading.active_count() == threads and not optimizer.is_perturbed
    assert (flat(model) - before).abs().max() < 1e-6
    blocks = torch.cat([p.detach().flatten().double() for p in model.transformer.h.parameters()])
    assert torch.isin(blocks, before).all()  # the host's copies were never touched
    optimizer.step(lambda: model(ids, labels=ids).loss)
    assert optimizer.updates == 4


def test_a_subclass_of_the_trainer_with_its_own_loss_works(tmp_path):
    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
            outputs = model(**inputs)
            loss = outputs.logits.logsumexp(-1).mean() + outputs.loss
            return (loss, outputs) if return_outputs else loss

    mezo, zo2, _ = both(tmp_path, gpt2, trainer=Weighted, gradient_accumulation_steps=2)
    assert torch.equal(mezo, zo2)


def test_autocast_reaches_both_sides(tmp_path):
    mezo, zo2, _ = both(tmp_path, gpt2, bf16=True)
    assert torch.equal(mezo, zo2)


def test_models_without_layers_and_compiled_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Pass blocks="):
        offload(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(NotImplementedError, match="optim='mezo'"):
        TrainingArguments(str(tmp_path), optim="zo2", torch_compile=True)
    model, _ = raw(True)
    with pytest.raises(ValueError, match="in host memory already"):
        offload(model)
