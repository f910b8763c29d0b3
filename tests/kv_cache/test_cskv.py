import copy

import pytest
import torch
import transformers
from kv_cache_cases import MODELS, data
from transformers import DynamicCache, TrainingArguments

from hfext import kv_cache
from hfext.kv_cache._channel_factors import factors, least_error, mean_error
from hfext.kv_cache._cskv_trainer import ChannelFactors, CSKVTrainer, passed_through
from hfext.kv_cache._quantize import dequantize_minmax, quantize_minmax
from hfext.kv_cache.cskv import CSKVConfig

PROMPT, PADS, WINDOW = 21, (0, 7), 8


def padded(tokens=PROMPT, pads=PADS, seed=9):
    ids = torch.randint(3, 128, (len(pads), tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count], ids[row, :count] = 0, 0
    return ids, mask


@torch.no_grad()
def feed(model, cache, ids, mask, calls, start=0):
    for count in calls:
        stop = start + count
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
        start = stop
    return cache


def matrices(seed=0, channels=12, hidden=20, tokens=300):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g) @ torch.randn(hidden, hidden, generator=g) * torch.logspace(0, 1, 20)
    return torch.randn(channels, hidden, generator=g), x


# -- the matrices


def test_the_three_inits_are_what_they_say():
    weight, x = matrices()
    moment, size = (x.T @ x / len(x)).double(), x.abs().mean(0)
    u, s, v = torch.linalg.svd(weight)
    down, up = factors(weight, 5, "svd")
    torch.testing.assert_close(up @ down, (u[:, :5] * s[:5]) @ v[:5], atol=1e-5, rtol=0)
    torch.testing.assert_close(up.T @ up, torch.diag(s[:5]), atol=1e-5, rtol=0)
    scale = size**0.5
    u, s, v = torch.linalg.svd(weight * scale)
    down, up = factors(weight, 5, "asvd", size)
    torch.testing.assert_close(up @ down, (u[:, :5] * s[:5]) @ v[:5] / scale, atol=1e-4, rtol=0)
    root = torch.linalg.cholesky(moment)
    u, s, v = torch.linalg.svd(weight.double() @ root)
    down, up = factors(weight, 5, "whitened", moment=moment)
    best = (u[:, :5] * s[:5]) @ v[:5] @ torch.linalg.inv(root)
    torch.testing.assert_close((up @ down).double(), best, atol=1e-4, rtol=0)
    assert least_error(weight, 5, moment) == pytest.approx(float(s[5:].square().sum() / 12))
    for init in ("svd", "asvd", "whitened"):
        pair = factors(weight, 5, init, size, moment)
        direct = float((x @ weight.T - x @ pair[0].T @ pair[1].T).square().mean())
        assert mean_error(weight, *pair, moment) == pytest.approx(direct, rel=1e-4)
        near = pytest.approx(least_error(weight, 5, moment), rel=1e-4)
        assert direct == near if init == "whitened" else direct > 1.01 * least_error(weight, 5, moment)


def test_calibration_sees_the_real_tokens_alone():
    model = MODELS["llama"]()
    ids, mask = padded()
    config = CSKVConfig(init="whitened").calibrate(model, {"input_ids": ids, "attention_mask": mask})
    assert config.calibration.tokens == int(mask.sum())
    inputs = []
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda m, a, kwargs: inputs.append(kwargs["hidden_states"][0]), with_kwargs=True
    )
    for row, pad in enumerate(PADS):
        with torch.no_grad():
            model(ids[row : row + 1, pad:])
    hook.remove()
    x = torch.cat(inputs)
    module = model.model.layers[1].self_attn
    for side in "kv":
        weight = getattr(module, f"{side}_proj").weight.detach()
        down, up = (config.calibration.layer(1, f"{side}_{part}") for part in ("down", "up"))
        moment = x.T @ x / len(x)
        error = float((x @ weight.T - x @ down.T @ up.T).square().mean())
        assert error == pytest.approx(least_error(weight, 8, moment), rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "olmo2", "phi3"])
def test_full_density_is_exact_with_biases_key_norms_and_fused_projections(kind):
    if kind == "qwen2":
        model = tiny(transformers.Qwen2ForCausalLM, transformers.Qwen2Config)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.k_proj.bias)
            torch.nn.init.normal_(layer.self_attn.v_proj.bias)
    elif kind == "olmo2":
        model = tiny(transformers.Olmo2ForCausalLM, transformers.Olmo2Config)
    else:
        model = MODELS[kind]()
    ids, mask = padded()
    config = CSKVConfig(k_density=1.0, v_density=1.0, window=WINDOW, init="svd").calibrate(model)
    cache, plain = config.make_cache(model), DynamicCache(config=model.config)
    for one in (cache, plain):
        feed(model, one, ids, mask, (PROMPT - 4, 1, 1, 1, 1))
    assert cache.layers[0].stored == 16
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        for row, pad in enumerate(PADS):
            torch.testing.assert_close(ours.keys[row, :, pad:], theirs.keys[row, :, pad:], atol=1e-4, rtol=0)
            torch.testing.assert_close(ours.values[row, :, pad:], theirs.values[row, :, pad:], atol=1e-4, rtol=0)


def tiny(model_class, config_class):
    from kv_cache_cases import _build

    return _build(model_class, config_class)


def test_a_model_that_does_more_than_project_is_refused():
    model = MODELS["llama"]()
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, a, out: out.abs())
    with pytest.raises(NotImplementedError, match="values of LlamaAttention are not a projection"):
        CSKVConfig(init="svd").calibrate(model)


# -- the cache


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("calls", [(PROMPT,), (5, 13, 3), (1,) * PROMPT])
def test_stepwise_equals_one_recomputation_row_by_row(bits, calls):
    """Every call attends to finished windows through the matrices, and to later tokens as they are; from scratch."""
    model = MODELS["llama"]()
    config = CSKVConfig(window=WINDOW, bits=bits).calibrate(model, data())
    ids, mask = padded()
    inputs, attended, cache = [], [], config.make_cache(model)
    layer = cache.layers[1]
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda m, a, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    append = layer.append
    layer.append = lambda k, v: attended.append(append(k, v)) or attended[-1]
    feed(model, cache, ids, mask, calls)
    hook.remove()
    x, module = torch.cat(inputs, 1), model.model.layers[1].self_attn
    down = {side: config.calibration.layer(1, f"{side}_down") for side in "kv"}
    up = {side: config.calibration.layer(1, f"{side}_up") for side in "kv"}
    for row, pad in enumerate(PADS):
        own = x[row, pad:]
        stop = 0
        for call, count in enumerate(calls):
            before, stop = max(0, stop - pad) // WINDOW * WINDOW, stop + count
            n = stop - pad
            if n <= 0:
                continue
            found = {}
            for side in "kv":
                exact = own[:n] @ getattr(module, f"{side}_proj").weight.T
                feature = own[:before] @ down[side].T
                if bits < 16 and before:
                    group, dim = (WINDOW, -2) if side == "k" else (4, -1)
                    feature = dequantize_minmax(*quantize_minmax(feature, bits, group, dim), group, dim)
                found[side] = torch.cat([feature @ up[side].T, exact[before:]]).detach()
            angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
            k = found["k"].view(n, 2, 8).transpose(0, 1)
            k = k * angle.cos().repeat(1, 2) + torch.cat([-k[..., 4:], k[..., :4]], -1) * angle.sin().repeat(1, 2)
            torch.testing.assert_close(attended[call][0][row, :, pad:], k, atol=2e-5, rtol=0)
            torch.testing.assert_close(
                attended[call][1][row, :, pad:], found["v"].view(n, 2, 8).transpose(0, 1), atol=2e-5, rtol=0
            )


def test_finished_windows_leave_nothing_in_full_precision():
    model = MODELS["llama"]()
    config = CSKVConfig(window=WINDOW).calibrate(model, data())
    ids, mask = padded(tokens=24, pads=(0, 0))
    cache = feed(model, config.make_cache(model), ids, mask, (15, 1))
    assert all(layer.held["key_recent"].shape[2] == 0 and layer.stored == 16 for layer in cache.layers)
    feed(model, cache, ids, mask, (3,), start=16)
    assert cache.layers[0].held["key_recent"].shape[2] == 3
    wide = CSKVConfig(window=64).calibrate(model, data())
    plain, exact = DynamicCache(config=model.config), wide.make_cache(model)
    for one in (plain, exact):
        feed(model, one, ids, mask, (20, 1, 1))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(exact.layers, plain.layers, strict=True))


@pytest.mark.parametrize(("bits", "least"), [(16, 0.22), (4, 0.07)])
def test_bytes_at_density_a_fifth(bits, least):
    with torch.random.fork_rng(devices=[]):
        model = MODELS["llama"](head_dim=128).to(torch.bfloat16)
    config = CSKVConfig(k_density=0.2, v_density=0.2, bits=bits, init="svd").calibrate(model)
    cache = config.make_cache(model)
    tokens = 4100
    layer = cache.layers[0]
    layer.lazy_initialization(torch.zeros(1, dtype=torch.bfloat16), None)
    layer.held = {
        name: torch.zeros(1, tokens, 50, dtype=torch.bfloat16)
        for name in ("recent_key_feature", "recent_value_feature")
    } | {name: torch.zeros(1, 2, tokens, 128, dtype=torch.bfloat16) for name in ("key_recent", "value_recent")}
    layer.seen = tokens
    layer._store()
    finished, rest = 4096, 4
    if bits == 16:
        closed = finished * 100 * 2
    else:
        closed = finished * (25 + 25) + finished // 32 * 50 * 4 + finished * 2 * 4
    assert layer.nbytes() == closed + rest * (100 + 2 * 256) * 2
    assert layer.nbytes() <= least * 2 * 2 * 256 * tokens
    parameters = sum(x.numel() for name, x in config.calibration.tensors.items() if "bias" not in name)
    assert parameters == 3 * 2 * (32 + 256) * 50


@pytest.mark.parametrize("pads", [(0, 0), PADS])
def test_tokens_are_taken_back_exactly(pads):
    model = MODELS["llama"]()
    config = CSKVConfig(window=WINDOW).calibrate(model, data())
    ids, mask = padded(pads=pads)
    for tokens in (1, 3, 5, 9, 14):
        cache = feed(model, config.make_cache(model), ids, mask, (PROMPT - 2, 1, 1))
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        cache.crop(-tokens)
        stay = PROMPT - tokens
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert layer.seen == stay
            for row, pad in enumerate(pads):
                for got, want in ((layer.keys, keys), (layer.values, values)):
                    torch.testing.assert_close(got[row, :, pad:], want[row, :, pad:stay], atol=1e-5, rtol=0)
        again = feed(model, cache, ids, mask, (tokens,), start=stay)
        assert again.get_seq_length() == PROMPT and again.layers[0].keys.shape[2] == PROMPT


def test_quantised_windows_leave_whole_or_not_at_all():
    model = MODELS["llama"]()
    config = CSKVConfig(window=WINDOW, bits=4).calibrate(model, data())
    ids, mask = padded(pads=(0, 0))
    cache = feed(model, config.make_cache(model), ids, mask, (PROMPT,))
    held = copy.deepcopy([layer.held for layer in cache.layers])
    with pytest.raises(NotImplementedError, match="windows of 8 tokens share scales"):
        cache.crop(-6)
    assert all(
        torch.equal(x, layer.held[n]) for old, layer in zip(held, cache.layers, strict=True) for n, x in old.items()
    )
    before = cache.layers[0].keys.clone()
    cache.crop(-(PROMPT - 8))
    assert torch.equal(cache.layers[0].keys, before[:, :, :8]) and cache.layers[0].stored == 8


# -- training


def rows(count=8, tokens=32):
    return [{"input_ids": row.tolist()} for row in data(rows=count, tokens=tokens)]


def trained(folder, model, config, steps=40, lr=1e-2, **options):
    args = TrainingArguments(
        output_dir=folder,
        report_to=[],
        max_steps=steps,
        learning_rate=lr,
        seed=0,
        disable_tqdm=True,
        use_cpu=True,
        **{"per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 10**6, **options},
    )
    return CSKVTrainer(model, config, args, train_dataset=rows())


def bound(model, config, texts):
    """Mean loss of the closed form on these texts, and that of the matrices."""
    ids = torch.tensor([row["input_ids"] for row in texts])
    best = CSKVConfig(k_density=config.k_density, v_density=config.v_density, init="whitened").calibrate(model, ids)
    return tuple(ChannelFactors(model, c)(ids).loss.item() for c in (best, config))


def test_training_comes_within_two_percent_of_the_closed_form_and_never_below(tmp_path):
    model = MODELS["llama"](num_hidden_layers=2)
    model.model.embed_tokens.weight.data *= torch.logspace(0, 1, 32)  # channels of different sizes
    config = CSKVConfig(init="asvd").calibrate(model, torch.tensor([row["input_ids"] for row in rows()]))
    before = copy.deepcopy(model.state_dict())
    trainer = trained(tmp_path, model, config, steps=100, lr=2e-2, per_device_train_batch_size=8)
    trainer.train()
    best, first = bound(model, config, rows())
    _, last = bound(model, trainer.config, rows())
    assert best * (1 - 1e-5) <= last <= 1.02 * best < first
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert {name.rpartition(".")[2] for name, _ in trainer.model.named_parameters()} == {
        f"{side}_{part}" for side in "kv" for part in ("down", "up")
    }
    assert sum(p.numel() for p in trainer.model.parameters()) == 2 * 2 * (32 + 16) * 8
    kv_cache.apply(model, trainer.config)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, eos_token_id=None).shape == (1, 7)


def test_loss_is_that_of_the_formula(tmp_path):
    model = MODELS["llama"]()
    config = CSKVConfig(init="svd").calibrate(model)
    ids, mask = padded()
    want, found = 0.0, []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, kwargs, to=found: to.append((m, kwargs["hidden_states"])), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    for index, (module, hidden) in enumerate(found):
        x = hidden[mask.bool()]
        for side in "kv":
            down, up = (config.calibration.layer(index, f"{side}_{part}") for part in ("down", "up"))
            want += (getattr(module, f"{side}_proj")(x) - x @ down.T @ up.T).square().mean().item()
    assert ChannelFactors(model, config)(ids, mask).loss.item() == pytest.approx(want, rel=1e-4)


def test_accumulation_and_resuming_change_nothing(tmp_path):
    model = MODELS["llama"](num_hidden_layers=2)
    config = CSKVConfig(bits=4, window=8, init="svd").calibrate(model)
    whole = trained(tmp_path / "a", model, config, steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    split = trained(
        tmp_path / "b", model, config, steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    split.train()
    resumed = trained(tmp_path / "c", model, config, steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    want = whole.config.calibration.tensors
    assert any((x - config.calibration.tensors[name]).abs().max() > 1e-3 for name, x in want.items())
    for other in (split, resumed):
        for name, x in other.config.calibration.tensors.items():
            torch.testing.assert_close(x, want[name], atol=1e-4, rtol=1e-3)
    loaded = kv_cache.KVCacheConfig.from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert loaded == whole.config and loaded.calibration.digest == whole.config.calibration.digest


def test_features_pass_the_quantiser_of_the_cache_with_the_gradient_of_the_identity():
    x = torch.randn(2, 21, 8, requires_grad=True)
    keys, values = passed_through(x, "k", 2, 8, 2), passed_through(x, "v", 2, 8, 2)
    want = dequantize_minmax(*quantize_minmax(x[:, :16], 2, 8, -2), 8, -2)
    torch.testing.assert_close(keys[:, :16], want)
    assert torch.equal(keys[:, 16:], x[:, 16:])
    torch.testing.assert_close(values, dequantize_minmax(*quantize_minmax(x, 2, 4), 4))
    (keys.sum() + values.sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_density": 0.0}, "k_density is 0.0"),
        ({"v_density": 1.2}, "v_density is 1.2"),
        ({"window": 0}, "window is 0"),
        ({"bits": 5}, "bits is 5"),
        ({"init": "random"}, "init is 'random'"),
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"k_density": 0.1}, "leave a channel of the 8"),
        ({}, "needs data"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CSKVConfig(**options).calibrate(MODELS["llama"]())


def test_training_needs_a_calibrated_config(tmp_path):
    with pytest.raises(ValueError, match="not calibrated"):
        trained(tmp_path, MODELS["llama"](), CSKVConfig())
    with pytest.raises(TypeError, match="KIVIConfig but must be a CSKVConfig"):
        trained(tmp_path, MODELS["llama"](), kv_cache.KIVIConfig())
