"""KV prediction: the loss against a Llama written out here, generation against the base's own, training, files."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from processes import run_two
from transformers import DynamicCache, TrainingArguments

from hfext.kv_cache._kv_prediction_trainer import KVPredictionTrainer
from hfext.kv_cache.kv_prediction import KVPredictionConfig, KVPredictor, even_map, prune_layers, target_mask

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def make(name="Llama", seed=0, **fields):
    """A tiny model of a family, with weights large enough that its attention is not flat."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for p in model.parameters():
            if p.ndim == 2:
                p.data.normal_(std=0.15)
    return model


def identity(base, aux=None):
    predictor = KVPredictor(copy.deepcopy(base) if aux is None else aux, base)
    for module in (*predictor.keys, *predictor.values):
        torch.nn.init.eye_(module.weight)
        torch.nn.init.zeros_(module.bias)
    return predictor


def prompts(batch=3, length=9, padding=(0, 4, 7)):
    ids = torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding[:batch]):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def answers(generate, inputs, **settings):
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **settings}
    out = generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


@pytest.fixture
def pair():
    """Base and a differently shaped auxiliary model: other head count, head size and depth, biased projections."""
    base = make(num_hidden_layers=4)
    aux = make("Qwen2", seed=1, hidden_size=24, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
    return KVPredictor(aux, base)


FAMILIES = [
    ("Llama", {}),
    ("Llama", {"attention_bias": True, "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}),
    ("Qwen3", {"head_dim": 12}),
    ("Glm", {"head_dim": 8}),
    ("Olmo2", {}),
    ("Phi", {"qk_layernorm": True}),
    ("StableLm", {"qk_layernorm": True}),
    ("Mistral", {"sliding_window": 4}),
    ("Gemma2", {"head_dim": 8, "sliding_window": 4}),
]


@pytest.mark.parametrize(("name", "fields"), FAMILIES, ids=lambda x: x if isinstance(x, str) else "")
def test_the_base_itself_with_identity_maps_changes_nothing(name, fields):
    base, inputs = make(name, **fields), prompts()
    predictor = identity(base)
    sequences, logits = answers(base.generate, inputs)
    for generate in (
        predictor.generate,
        lambda **kw: base.generate(**kw, custom_generate=predictor.decode),
        lambda **kw: base.generate(**kw, past_key_values=predictor.prefill(**inputs)),
    ):
        ours, our_logits = answers(generate, inputs)
        assert torch.equal(ours, sequences)
        torch.testing.assert_close(our_logits, logits, atol=1e-5, rtol=1e-5)
    own = DynamicCache(config=base.config)
    base(inputs["input_ids"][:1, :-1], past_key_values=own)
    cache = predictor.prefill(inputs["input_ids"][:1])
    for mine, theirs in zip(cache.layers, own.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "disable_compile": True, "num_beams": 2},
        {"prefill_chunk_size": 2},
        {"repetition_penalty": 1.5, "min_new_tokens": 3},
    ],
    ids=str,
)
def test_every_way_of_generating_is_the_base_s_with_identity_maps(settings):
    base, inputs = make(), prompts()
    results = []
    for generate in (base.generate, identity(base).generate):
        torch.manual_seed(3)
        results.append(answers(generate, inputs, **settings))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-5)


def test_a_batch_with_left_padding_is_its_single_rows(pair):
    inputs = prompts()
    sequences, logits = answers(pair.generate, inputs)
    for row, pad in enumerate((0, 4, 7)):
        alone, single = answers(pair.generate, {"input_ids": inputs["input_ids"][row : row + 1, pad:]})
        assert torch.equal(alone[0], sequences[row, pad:])
        torch.testing.assert_close(single[:, 0], logits[:, row], atol=1e-5, rtol=1e-5)
    repeated, _ = answers(pair.generate, inputs, num_beams=2, num_return_sequences=2)
    for row, pad in enumerate((0, 4, 7)):
        ids = inputs["input_ids"][row : row + 1, pad:]
        alone, _ = answers(pair.generate, {"input_ids": ids}, num_beams=2, num_return_sequences=2)
        assert torch.equal(alone, repeated[2 * row : 2 * row + 2, pad:])


def test_the_cache_has_the_shape_of_the_base_and_grows_by_the_last_token(pair):
    ids = prompts(2)["input_ids"]
    cache = pair.prefill(ids)
    assert cache.get_seq_length() == 8 and len(cache.layers) == 4
    assert (
        {tuple(x.keys.shape) for x in cache.layers} == {tuple(x.values.shape) for x in cache.layers} == {(2, 2, 8, 8)}
    )
    pair.base.generate(ids, past_key_values=cache, max_new_tokens=1, pad_token_id=0)
    assert cache.get_seq_length() == 9


def test_a_prompt_of_one_token_needs_no_auxiliary_model(pair, monkeypatch):
    monkeypatch.setattr(pair.aux, "forward", lambda *args, **kwargs: pytest.fail("the auxiliary model was asked"))
    inputs = {"input_ids": torch.tensor([[7], [9]])}
    assert pair.prefill(**inputs).get_seq_length() == 0
    ours, theirs = answers(pair.generate, inputs), answers(pair.base.generate, inputs)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_the_base_reads_one_token_and_the_auxiliary_model_stops_early(pair):
    read = []
    pair.base.model.layers[0].register_forward_hook(
        lambda m, args, kwargs, out: read.append(args[0].shape[1]), with_kwargs=True
    )
    pair.aux.model.layers[1].mlp.register_forward_hook(lambda *args: pytest.fail("not needed for the cache"))
    pair.generate(**prompts(), max_new_tokens=3, eos_token_id=None)
    assert read == [1, 1, 1]


def test_hooks_and_projections_are_as_before_also_after_an_error(pair, monkeypatch):
    def state():
        modules = [*pair.base.modules(), *pair.aux.modules()]
        return [(len(m._forward_hooks), "forward" in vars(m), m.training) for m in modules] + [
            p.requires_grad for p in (*pair.base.parameters(), *pair.aux.parameters())
        ]

    pair.base.model.layers[1].train()
    pair.base.model.norm.weight.requires_grad_(False)
    before, inputs = state(), prompts()
    cache = pair.prefill(**inputs)
    assert "update" not in vars(cache)
    pair(**inputs, labels=inputs["input_ids"]).loss.backward()
    for owner in (pair.base.model.norm, pair.aux.model.norm, pair.base.model.rotary_emb):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "forward", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pair(**inputs, labels=inputs["input_ids"])
    assert state() == before


def test_a_streamer_sees_the_prompt_and_every_token(pair):
    class Streamer:
        seen, ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, ids = Streamer(), prompts(1)["input_ids"]
    out = pair.generate(ids, streamer=streamer, max_new_tokens=4, eos_token_id=None)
    assert streamer.seen == out[0].tolist() and streamer.ended


def test_bfloat16_and_a_base_of_another_type_keep_their_types(pair):
    full = pair.prefill(**prompts())
    pair.base.to(torch.bfloat16)
    for aux_type in (torch.float32, torch.bfloat16):
        cache = pair.to(aux_type).prefill(**prompts())
        for mine, exact in zip(cache.layers, full.layers, strict=True):
            assert mine.keys.dtype == mine.values.dtype == torch.bfloat16
            assert (mine.keys - exact.keys).norm() < 0.03 * exact.keys.norm()
        pair.generate(**prompts(), max_new_tokens=2)


def test_a_base_in_an_adapter_is_served_with_the_adapter():
    import peft

    config = peft.LoraConfig(
        target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    base, inputs = make(), prompts()
    plain, _ = answers(base.generate, inputs)
    aux = copy.deepcopy(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(base, config).eval()
    aux.load_state_dict(copy.deepcopy(wrapped).merge_and_unload().state_dict())
    sequences, logits = answers(wrapped.generate, inputs)
    ours, our_logits = answers(identity(wrapped, aux).generate, inputs)
    assert torch.equal(ours, sequences) and not torch.equal(sequences, plain)
    torch.testing.assert_close(our_logits, logits, atol=1e-5, rtol=1e-5)


# ---- the loss, against a Llama written out -------------------------------------------------------------------------


def llama_by_hand(model, ids, given=None):
    """Logits [n, vocab] of one unpadded row and each layer's projections, one position and one head at a time."""
    config, weights = model.config, dict(model.named_parameters())
    heads, shared, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name + ".weight"]

    def rotate(x, position):
        z = torch.complex(x[: size // 2], x[size // 2 :])
        z = z * torch.exp(1j * position * theta ** (-torch.arange(0, size, 2) / size))
        return torch.cat([z.real, z.imag])

    x, read = weights["model.embed_tokens.weight"][ids], []
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (h @ weights[f"{at}self_attn.{p}_proj.weight"].T for p in "qkv")
        read.append((k, v))
        k, v = (k, v) if given is None else given[i]
        rows = []
        for t in range(len(ids)):
            row = []
            for head in range(heads):
                part = slice(size * (head * shared // heads), size * (head * shared // heads + 1))
                query = rotate(q[t, size * head : size * (head + 1)], t)
                score = torch.stack([query @ rotate(k[s, part], s) for s in range(t + 1)]) / size**0.5
                row.append(score.softmax(0) @ v[: t + 1, part])
            rows.append(torch.cat(row))
        x = x + torch.stack(rows) @ weights[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm")
        gate, up = (h @ weights[f"{at}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ weights[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ weights["lm_head.weight"].T, read


def loss_by_hand(predictor, rows, labels):
    """The four parts over unpadded rows, summed token by token."""
    sums, targets, tokens = [0, 0, 0, 0], 0, 0
    for ids, wanted in zip(rows, labels, strict=True):
        aux_logits, read = llama_by_hand(predictor.aux, ids)
        given = []
        for j, source in enumerate(predictor.options.layer_map):
            maps = predictor.keys[j], predictor.values[j]
            given.append([x @ m.weight.T + m.bias for m, x in zip(maps, read[source], strict=True)])
        logits, _ = llama_by_hand(predictor.base, ids, given)
        _, true = llama_by_hand(predictor.base, ids)
        for t in range(len(ids) - 1):
            if wanted[t + 1] == -100:
                continue
            targets += 1
            for slot, scores in ((0, logits[t]), (1, aux_logits[t])):
                z = scores.exp().sum().log()
                sums[slot] = sums[slot] + z - scores[wanted[t + 1]]
                weight = 1 if slot == 0 else predictor.options.lambda_aux
                sums[2] = sums[2] + predictor.options.z_loss * weight * z**2
        tokens += len(ids)
        for mine, theirs in zip(given, true, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                sums[3] = sums[3] + (a - b).abs().sum() / a.shape[1]
    return torch.stack([sums[0] / targets, sums[1] / targets, sums[2] / targets, sums[3] / tokens])


def padded(rows, labels, side):
    length = max(map(len, rows))
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, wanted in zip(rows, labels, strict=True):
        gap = length - len(ids)
        parts = {"input_ids": (ids, 0), "attention_mask": (torch.ones_like(ids), 0), "labels": (wanted, 3)}
        for name, (value, filler) in parts.items():
            fill = torch.full((gap,), filler)
            batch[name].append(torch.cat([fill, value] if side == "left" else [value, fill]))
    return {name: torch.stack(values) for name, values in batch.items()}


@pytest.fixture
def written():
    """A predictor of Llamas, rows of several lengths and their labels, some of which do not count."""
    predictor = KVPredictor(
        make(seed=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2),
        make(hidden_size=24, num_attention_heads=2, num_key_value_heads=1),
        layer_map=(0, 1, 1),
        lambda_aux=0.7,
        lambda_kv=0.4,
        z_loss=0.01,
    )
    random = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (n,), generator=random) for n in (7, 4)]
    labels = [row.clone() for row in rows]
    labels[0][2:4] = -100
    return predictor, rows, labels


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_and_its_gradient_are_those_written_out(written, side):
    predictor, rows, labels = written
    parts = loss_by_hand(predictor, rows, labels)
    expected = parts @ torch.tensor([1.0, 0.7, 1.0, 0.4])
    frozen = [p.requires_grad_(False) for p in predictor.base.parameters()]
    wanted = torch.autograd.grad(expected, list(predictor.parameters()))
    for p in frozen:
        p.requires_grad_(True)
    out = predictor(**padded(rows, labels, side))
    torch.testing.assert_close(out.parts, parts.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, expected.detach(), atol=1e-5, rtol=1e-5, check_stride=False)
    out.loss.backward()
    for (name, p), g in zip(predictor.named_parameters(), wanted, strict=True):
        assert p.grad.abs().sum() > 0, name
        torch.testing.assert_close(p.grad, g, atol=2e-5, rtol=1e-4, msg=name)
    assert all(p.grad is None and p.requires_grad for p in predictor.base.parameters())


def test_weights_of_zero_leave_their_part_out(written):
    predictor, rows, labels = written
    batch = padded(rows, labels, "left")
    plain = KVPredictor(predictor.aux, predictor.base, (0, 1, 1), lambda_aux=0, lambda_kv=0, z_loss=0)
    plain.load_state_dict(predictor.state_dict())
    assert plain(**batch).loss.item() == pytest.approx(predictor(**batch).parts[0].item(), abs=1e-6)
    predictor.eval()
    logits = predictor(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(logits, predictor(**batch).logits)


def test_counted_labels_are_real_predictions_of_real_tokens():
    labels = torch.tensor([[1, 2, 3, 4, -100, 6]])
    assert target_mask(labels, None).tolist() == [[True, True, True, False, True]]
    assert target_mask(labels, torch.tensor([[0, 0, 1, 1, 1, 1]])).tolist() == [[False, False, True, False, True]]
    assert target_mask(labels, torch.tensor([[1, 1, 1, 0, 0, 0]])).tolist() == [[True, True, False, False, False]]


# ---- training ------------------------------------------------------------------------------------------------------


def data(rows=8):
    random = torch.Generator().manual_seed(2)
    found = []
    for i in range(rows):
        ids = torch.randint(3, 64, (8,), generator=random)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[: i % 4], labels[: 2 * (i % 4)] = 0, -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def trained(tmp_path, steps=4, batch=4, resume=None, base=None, **settings):
    base = make(num_hidden_layers=2, attention_dropout=0.5) if base is None else base
    aux = make(seed=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        predictor = KVPredictor(aux, base)
    settings = {"max_steps": steps, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, **settings}
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=batch,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        weight_decay=0.1,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = KVPredictionTrainer(predictor, args, train_dataset=data())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_training_learns_without_touching_the_base_and_logs_the_parts(tmp_path):
    base = make(num_hidden_layers=2, attention_dropout=0.5).train()
    before = copy.deepcopy(base.state_dict())
    trainer = trained(tmp_path, steps=8, base=base)
    assert all(torch.equal(x, before[n]) for n, x in base.state_dict().items())
    assert base.training and all(p.requires_grad and p.grad is None for p in base.parameters())
    logs = [row for row in trainer.state.log_history if "loss_kv" in row]
    assert len(logs) == 8 and logs[-1]["loss"] < logs[0]["loss"]
    for row in logs:
        total = row["loss_base"] + row["loss_aux"] + row["loss_z"] + row["loss_kv"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, p in trainer.model.named_parameters():
        assert (id(p) in decayed) == (p.ndim == 2), name
    metrics = trainer.evaluate(data(4))
    assert metrics["eval_loss"] > 0 and "eval_loss_kv" not in metrics


def test_accumulated_batches_are_one_batch(tmp_path):
    whole, split = (trained(tmp_path, steps=2, batch=b, gradient_accumulation_steps=8 // b) for b in (8, 2))
    torch.testing.assert_close(weights(whole), weights(split), atol=1e-5, rtol=1e-4)
    for a, b in zip(whole.state.log_history, split.state.log_history, strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-3) for k in a if k.startswith(("loss", "grad_norm")))


def test_a_resumed_run_is_the_straight_one(tmp_path):
    straight = trained(tmp_path, steps=3, save_strategy="steps", save_steps=2)
    folder = tmp_path / "checkpoint-2"
    resumed = trained(tmp_path, steps=3, resume=str(folder))
    assert torch.equal(weights(straight), weights(resumed))
    held = sum(p.numel() for p in straight.model.parameters())
    saved = transformers.trainer.safetensors.torch.load_file(folder / "model.safetensors")
    assert sum(x.numel() for x in saved.values()) == held
    again = KVPredictor.from_pretrained(folder, straight.model.base)
    assert not torch.equal(weights(straight), torch.cat([p.detach().flatten() for p in again.parameters()]))


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}, {root!r}]
from test_kv_prediction import trained, weights
trainer = trained(Path({folder!r}), steps=3, batch=4)
if trainer.is_world_process_zero():
    torch.save((weights(trainer), trainer.state.log_history), {folder!r} + "/two.pt")
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_are_one_with_the_same_rows(tmp_path):
    here = Path(__file__).resolve()
    script = TWO_PROCESSES.format(tests=str(here.parent), root=str(here.parents[2]), folder=str(tmp_path))
    run_two(script)
    found, log = torch.load(tmp_path / "two.pt")
    one = trained(tmp_path / "one", steps=3, batch=8)
    torch.testing.assert_close(found, weights(one), rtol=0, atol=1e-6)
    for a, b in zip(log[:3], one.state.log_history[:3], strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-5) for k in a if k.startswith(("loss", "grad_norm")))


def test_checkpointed_activations_give_the_same_gradient(written):
    predictor, rows, labels = written
    batch = padded(rows, labels, "left")
    predictor(**batch).loss.backward()
    plain = [p.grad.clone() for p in predictor.parameters()]
    predictor.zero_grad()
    predictor.activation_checkpointing_enable()
    predictor.aux.train()
    predictor(**batch).loss.backward()
    for p, g in zip(predictor.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_trainer_refuses_what_it_cannot_do(tmp_path):
    base = make()
    with pytest.raises(TypeError, match="KVPredictor"):
        KVPredictionTrainer(base)
    with pytest.raises(ValueError, match="share parameters"):
        KVPredictionTrainer(KVPredictor(base, base))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in data()]
    with pytest.raises(ValueError, match="labels"):
        KVPredictionTrainer(KVPredictor(copy.deepcopy(base), base), args, train_dataset=rows).train()
    predictor = KVPredictor(copy.deepcopy(base).requires_grad_(False), base)
    ids = prompts()["input_ids"]
    with pytest.raises(NotImplementedError, match="no gradient"):
        predictor(ids, labels=ids)


# ---- maps and pruning ----------------------------------------------------------------------------------------------


def test_the_maps_are_the_papers():
    assert even_map(14, 28) == tuple(i // 2 for i in range(28))
    assert even_map(20, 28) == (*(i // 2 for i in range(16)), *range(8, 20))
    assert even_map(5, 5) == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="num_aux is 6"):
        even_map(6, 5)


def test_pruning_keeps_evenly_spread_layers_and_copies_them():
    base = make("Qwen3", num_hidden_layers=6, head_dim=8, tie_word_embeddings=True)
    state = torch.random.get_rng_state()
    aux, layer_map = prune_layers(base, 0.5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert layer_map == (0, 0, 1, 1, 2, 2) and type(aux) is type(base) and aux.config.num_hidden_layers == 3
    assert len(aux.config.layer_types) == 3 and base.config.num_hidden_layers == 6
    expected = copy.deepcopy(base)
    expected.model.layers = expected.model.layers[::2]
    expected.config.num_hidden_layers = 3
    ids = prompts()["input_ids"]
    torch.testing.assert_close(aux(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)
    assert not {p.data_ptr() for p in aux.parameters()} & {p.data_ptr() for p in base.parameters()}
    assert prune_layers(base, 2 / 3)[1] == (0, 1, 1, 2, 3, 3)
    assert prune_layers(base, 0.01)[1] == (0,) * 6
    whole, layer_map = prune_layers(base, 1.0)
    assert layer_map == tuple(range(6))
    assert all(torch.equal(x, base.state_dict()[n]) for n, x in whole.state_dict().items())
    with pytest.raises(ValueError, match="keep is 0"):
        prune_layers(base, 0)
    with pytest.raises(TypeError, match="Linear"):
        prune_layers(torch.nn.Linear(2, 2))


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    base = make(num_hidden_layers=2)
    aux = make("Qwen2", seed=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True)
    predictor = KVPredictor(aux, base, z_loss=0.5)
    predictor.save_pretrained(tmp_path / "p")
    return predictor, tmp_path / "p"


def test_a_saved_predictor_comes_back_bit_for_bit(saved):
    predictor, folder = saved
    predictor.save_pretrained(folder)
    again = KVPredictor.from_pretrained(folder, predictor.base).eval()
    assert sorted(p.name for p in folder.iterdir()) == ["auxiliary", "kv_prediction.json", "kv_prediction.safetensors"]
    assert again.options == predictor.options and again.options.z_loss == 0.5
    mine, theirs = predictor.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert torch.equal(answers(predictor.generate, prompts())[1], answers(again.generate, prompts())[1])
    record = json.loads((folder / "kv_prediction.json").read_text())
    assert record["hfext_version"] and record["options"]["layer_map"] == [0, 0]
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder / "auxiliary")
    assert torch.equal(alone.state_dict()["lm_head.weight"], predictor.aux.lm_head.weight)


def test_tied_weights_are_named_once_and_come_back(saved):
    predictor, _ = saved
    state = predictor.state_dict()
    assert "aux.model.embed_tokens.weight" in state and "aux.lm_head.weight" not in state
    other = copy.deepcopy(predictor)
    with torch.no_grad():
        other.aux.lm_head.weight.zero_()
    assert not other.load_state_dict(state).missing_keys
    assert torch.equal(other.aux.lm_head.weight, predictor.aux.lm_head.weight)


@pytest.mark.parametrize("name", ["kv_prediction.safetensors", "kv_prediction.json", "auxiliary/model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_folder_is_refused(saved, name, damage):
    predictor, folder = saved
    path = folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        KVPredictor.from_pretrained(folder, predictor.base)


def test_maps_of_another_shape_and_another_base_are_refused(saved, tmp_path):
    predictor, folder = saved
    with pytest.raises(ValueError, match="num_hidden_layers is 2 there, 3 here"):
        KVPredictor.from_pretrained(folder, make())
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    with pytest.raises(ValueError, match="rope_parameters"):
        KVPredictor.from_pretrained(folder, make(num_hidden_layers=2, **rope))
    other = KVPredictor(make(seed=1, hidden_size=24, num_hidden_layers=1), predictor.base)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "kv_prediction.safetensors").replace(folder / "kv_prediction.safetensors")
    with pytest.raises(ValueError, match="does not fit its record"):
        KVPredictor.from_pretrained(folder, predictor.base)


def test_a_save_that_fails_leaves_the_old_one(saved, monkeypatch):
    predictor, folder = saved
    monkeypatch.setattr(predictor.aux, "save_pretrained", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predictor.save_pretrained(folder)
    monkeypatch.undo()
    KVPredictor.from_pretrained(folder, predictor.base)
    assert len(list(folder.iterdir())) == 3


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="lambda_kv is -1"):
        KVPredictionConfig(lambda_kv=-1)
    with pytest.raises(ValueError, match="z_loss is nan"):
        KVPredictionConfig(z_loss=float("nan"))
    with pytest.raises(ValueError, match="never decreasing"):
        KVPredictionConfig(layer_map=(1, 0))
    with pytest.raises(TypeError, match="whole numbers"):
        KVPredictionConfig(layer_map=(0, 0.5))
    base = make()
    for layer_map in ((0, 1), (0, 1, 3), (0, 0, 0, 0)):
        with pytest.raises(ValueError, match="layer_map"):
            KVPredictor(base, base, layer_map)
    with pytest.raises(ValueError, match="layer_map"):
        KVPredictor(base, base, (2, 1, 0))
    with pytest.raises(ValueError, match="vocab_size is 70"):
        KVPredictor(make(vocab_size=70), base)
    with pytest.raises(TypeError, match="lambda"):
        KVPredictor(base, base, lambda_=1)


@pytest.mark.parametrize("name", ["Phi3", "GPTNeoX", "OPT", "Gemma3Text"])
def test_models_whose_keys_cannot_be_read_or_finished_are_refused(name):
    names = {"Gemma3Text": ("Gemma3ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]})}
    cls, fields = names.get(name, (f"{name}ForCausalLM", {}))
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "num_hidden_layers": 2, **fields})
    base = getattr(transformers, cls)(config)
    with pytest.raises(NotImplementedError, match="KV prediction supports"):
        KVPredictor(make(), base)


def test_wrong_calls_are_named(pair):
    inputs, ids = prompts(), prompts()["input_ids"]
    with pytest.raises(ValueError, match="pad on the left"):
        pair.prefill(ids, inputs["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="shape"):
        pair.prefill(ids[0])
    with pytest.raises(ValueError, match="must be empty"):
        pair.generate(ids, past_key_values=pair.prefill(ids))
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        pair.generate(ids, use_cache=False)
    with pytest.raises(NotImplementedError, match="not assisted_generation"):
        pair.generate(ids[:1], prompt_lookup_num_tokens=3)
    with pytest.raises(NotImplementedError, match="assistant_model"):
        pair.generate(ids[:1], assistant_model=make())
    with pytest.raises(NotImplementedError, match="predictor.generate"):
        pair.base.generate(ids[:1], custom_generate=pair.decode, streamer=transformers.TextStreamer(None))
    with pytest.raises(ValueError, match="beams"):
        pair.generate(ids[:1], num_beams=2, streamer=transformers.TextStreamer(None))
    with pytest.raises(ValueError, match="not the base"):
        make().generate(ids, custom_generate=pair.decode)


@pytest.mark.slow
def test_the_experiment_returns_what_verify_needs(tmp_path):
    from hfext.experiments import kv_prediction_ttft

    (tmp_path / "wikitext2").mkdir()
    for name in ("valid.txt", "test.txt"):
        (tmp_path / "wikitext2" / name).write_text("the cat sat on the mat and the dog saw it . " * 200)
    small = {"base_steps": 3, "steps": 2, "texts": 4, "seeds": 2, "prompts": (16, 32), "repeats": 2}
    config = kv_prediction_ttft.Config(**small, data_dir=str(tmp_path))
    result = kv_prediction_ttft.run(config, tmp_path)
    assert len(result["tables"]) == 3 and result["evidence"]["n"] == 2
    with pytest.raises(FileNotFoundError, match="data_dir"):
        kv_prediction_ttft.run(kv_prediction_ttft.Config(data_dir=str(tmp_path / "none")), tmp_path)
    with pytest.raises(ValueError, match="prompt is 200"):
        kv_prediction_ttft.Config(prompt=200)


@pytest.mark.slow
@pytest.mark.real_model
def test_a_real_model_is_unchanged_by_identity_maps():
    from hfext.experiments import _smollm2

    try:
        model, tokenizer = _smollm2.load()
    except ImportError as error:
        pytest.skip(str(error))
    texts = ["The capital of France is", "Once upon a time there was a small"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    plain, logits = answers(model.generate, inputs, max_new_tokens=8)
    ours, our_logits = answers(identity(model, model).generate, inputs, max_new_tokens=8)
    assert torch.equal(ours, plain)
    torch.testing.assert_close(our_logits, logits, atol=1e-3, rtol=1e-4)
