"""ZO2 is MeZO bit for bit, whatever the model and however the update is split, with few blocks on the device."""

import contextvars
import copy
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
    for blocks in ([], [nn.Linear(2, 2)]):
        with pytest.raises(ValueError, match="must be modules of the model"):
            offload(gpt2(), blocks=blocks)
    with pytest.raises(NotImplementedError, match="load it in that dtype"):
        TrainingArguments(str(tmp_path), optim="zo2", bf16_full_eval=True, use_cpu=True)


class Noisy(Trainer):
    """A loss with random numbers of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        outputs = model(**inputs)
        loss = outputs.loss + torch.rand(()) * outputs.logits.std()
        return (loss, outputs) if return_outputs else loss


def test_both_sides_see_the_same_random_numbers(tmp_path):
    mezo, zo2, job = both(tmp_path, gpt2, trainer=Noisy, gradient_accumulation_steps=2)
    assert torch.equal(mezo, zo2)
    # With numbers of their own on each side the estimate would be of the order of 1 / eps.
    assert max(abs(g) for found in job.optimizer.optimizer.projected for g in found) < 10


def test_random_numbers_of_a_raw_loop_are_the_same_too():
    model, other = gpt2().eval(), gpt2().eval()
    ids = torch.arange(6)[None]
    optimizers = [MeZO(model.parameters(), eps=0.01), ZO2(other.parameters(), eps=0.01, streamed=other)]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        torch.manual_seed(5)
        for _ in range(2):
            optimizer.step(lambda m=m: m(ids, labels=ids).loss + torch.rand(()))
    assert optimizers[0].projected == optimizers[1].projected
    assert max(abs(found[0]) for found in optimizers[0].projected) < 20


class StopAt(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


def test_moves_that_wait_do_not_reach_the_best_model(tmp_path):
    job = run_training(
        gpt2(), "zo2", None, tmp_path, eval_dataset=language_data(8), eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=3, load_best_model_at_end=True, learning_rate=0.1, max_steps=9,
        callbacks=[StopAt()],
    )  # fmt: skip
    best = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-3")
    assert job.state.global_step == 4 and torch.equal(flat(job.model), flat(best))


def test_weights_that_are_loaded_are_not_moved_by_what_waited():
    model, optimizer = raw(True)
    wanted = {name: value.clone() for name, value in gpt2().state_dict().items()}
    assert any(optimizer.offload.waiting)
    model.load_state_dict(wanted)
    optimizer.flush()
    assert torch.equal(flat(model), flat(gpt2()))


def test_state_of_a_part_has_the_moves_and_a_copy_is_refused():
    (plain, _), (model, _) = raw(False), raw(True)
    part = model.transformer.state_dict()
    assert all(torch.equal(value, part[name]) for name, value in plain.transformer.state_dict().items())
    with pytest.raises(NotImplementedError, match="call .remove"):
        copy.deepcopy(model)


def test_after_remove_the_optimizer_goes_on_as_mezo():
    (plain, mezo), (model, zo2) = raw(False), raw(True)
    zo2.offload.remove()
    ids = torch.arange(6)[None]
    for m, optimizer in ((plain, mezo), (model, zo2)):
        optimizer.step(lambda m=m: m(ids, labels=ids).loss)
    assert torch.equal(flat(plain), flat(model))


def test_settings_of_the_caller_hold_on_both_sides():
    """Autocast and inference mode around the whole step, and a context variable."""
    seen, flag = [], contextvars.ContextVar("flag", default=0)
    results = []
    for streamed in (False, True):
        model = gpt2().eval()
        kwargs = {"streamed": model} if streamed else {}
        optimizer = (ZO2 if streamed else MeZO)(model.parameters(), lr=1e-2, eps=0.1, **kwargs)
        ids = torch.arange(6)[None]

        def loss(model=model, ids=ids):
            seen.append((flag.get(), torch.is_autocast_enabled("cpu")))
            return model(ids, labels=ids).loss

        flag.set(7)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                optimizer.step(loss)
        results.append((optimizer.projected, flat(model)))
    assert seen == [(7, True)] * 8
    assert results[0][0] == results[1][0] and abs(results[0][0][0][0]) > 0.01


def test_buffers_change_as_without_streaming():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.linear(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Counts(), Counts()])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    torch.manual_seed(0)
    net = Net()
    optimizer = ZO2(net.parameters(), streamed=net)
    for _ in range(3):
        optimizer.step(lambda: net(torch.ones(2, 4)).sum())
    assert [float(layer.calls) for layer in net.layers] == [6, 6]
    assert optimizer.offload.uploads == 3 * 2


def test_weights_shared_by_blocks_or_with_the_outside_stay_on_the_device():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.layers[1].weight = self.layers[0].weight
            self.head = nn.Linear(4, 4)
            self.head.bias = self.layers[2].bias

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).tanh()
            return self.head(x)

    finals = []
    for streamed in (False, True):
        torch.manual_seed(0)
        net = Net()
        kwargs = {"streamed": net} if streamed else {}
        optimizer = (ZO2 if streamed else MeZO)(net.parameters(), lr=0.1, **kwargs)
        for _ in range(3):
            optimizer.step(lambda net=net: net(torch.ones(2, 4)).square().sum())
        optimizer.flush()
        finals.append(flat(net))
        if streamed:
            shared = {id(net.layers[0].weight), id(net.head.bias)}
            assert not shared & set(optimizer.offload.home) and id(net.layers[2].weight) in optimizer.offload.home
    assert torch.equal(*finals)


def test_an_evaluation_before_training_and_an_optimizer_that_is_given_leave_the_blocks_alone(tmp_path):
    model = gpt2()
    optimizer = ZO2(model.parameters(), lr=1e-2, streamed=model)
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    job = Trainer(model, args, train_dataset=language_data(8), eval_dataset=language_data(4),
                  optimizers=(optimizer, None))  # fmt: skip
    moved = []
    to = model.to
    model.to = lambda *args, **kwargs: moved.append(args) or to(*args, **kwargs)
    job.evaluate()
    job.train()
    assert moved == [] and optimizer.updates == 2
