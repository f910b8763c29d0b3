"""Attention logits against the matrices that the models themselves make, and what the Trainer logs."""

import math

import pytest
import torch
import transformers
from optim_training import flat, language_data
from processes import run_two
from tiny_models import LLAMA, factory
from torch import nn
from transformers import Trainer, TrainingArguments

from hfext.training._attention_logits import AttentionLogits, max_attention_logit
from hfext.training.proxy_diagnostics import (
    ProxyDiagnostics,
    adam_update,
    extrapolated_logit,
    log_z_sums,
    lr_sensitivity,
    parameter_kinds,
)

# the product, block by block


def whole(query, key, scaling, allowed=None, softcap=None, bias=None):
    """The matrix of all logits in float64."""
    groups = query.shape[1] // key.shape[1]
    scores = query.double() @ key.double().repeat_interleave(groups, 1).mT * scaling
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores if bias is None else scores + bias
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize("limit", [1, 40, 10**6])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_blocks_find_the_largest_of_the_whole_matrix(limit, softcap):
    q, k = 3 * torch.randn(2, 6, 7, 5), torch.randn(2, 2, 9, 5)
    allowed = torch.rand(2, 1, 7, 9) < 0.5
    bias = torch.randn(1, 6, 7, 9)
    rows = torch.rand(2, 7) < 0.6
    expected = whole(q, k, 0.3, allowed & rows[:, None, :, None], softcap, bias).max().float()
    additive = torch.zeros(2, 1, 7, 9).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for mask in (allowed, additive):
        found = max_attention_logit(q, k, 0.3, mask, softcap=softcap, bias=bias, rows=rows, limit=limit)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_causal_and_window(window):
    q, k = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4)
    distance = torch.arange(8)[:, None] - torch.arange(8)
    allowed = (distance >= 0) & (distance < (window or 99))
    found = max_attention_logit(q, k, causal=True, window=window)
    torch.testing.assert_close(found, whole(q, k, 0.5, allowed).max().float())
    assert max_attention_logit(q, k, mask=torch.zeros(1, 1, 8, 8, dtype=torch.bool)) == -math.inf


def test_small_types_are_multiplied_in_float32():
    q, k = (20 * torch.randn(1, 2, 16, 8)).bfloat16(), torch.randn(1, 2, 16, 8).bfloat16()
    found = max_attention_logit(q, k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, max_attention_logit(q.float(), k.float()), rtol=0, atol=0)


def test_no_more_logits_exist_than_allowed(monkeypatch):
    sizes = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: sizes.append(matmul(a, b).numel()) or matmul(a, b))
    max_attention_logit(torch.randn(2, 4, 64, 8), torch.randn(2, 2, 64, 8), limit=1000)
    assert max(sizes) <= 1000 and sum(sizes) == 2 * 4 * 64 * 64


# models

CAUSAL = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, LLAMA),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, LLAMA | {"head_dim": 8}),
    "olmo2": (transformers.Olmo2ForCausalLM, transformers.Olmo2Config, LLAMA),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        LLAMA | {"head_dim": 8, "attn_logit_softcapping": 0.05, "sliding_window": 4, "query_pre_attn_scalar": 3},
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        dict(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0),
    ),
    "gptj": (
        transformers.GPTJForCausalLM,
        transformers.GPTJConfig,
        dict(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, pad_token_id=0),
    ),
    "bloom": (
        transformers.BloomForCausalLM,
        transformers.BloomConfig,
        dict(vocab_size=128, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
    ),
    "falcon": (
        transformers.FalconForCausalLM,
        transformers.FalconConfig,
        dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, pad_token_id=0),
    ),
}
ENCODERS = {
    "bert": (
        transformers.BertForMaskedLM,
        transformers.BertConfig,
        dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    ),
    "deberta": (
        transformers.DebertaV2ForMaskedLM,
        transformers.DebertaV2Config,
        dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    ),
}


def make(name, **fields):
    kind, config, defaults = (CAUSAL | ENCODERS)[name]
    return factory(kind, config, **defaults)(initializer_range=0.2, **fields)


def padded(side):
    ids = torch.randint(3, 120, (3, 10))
    mask = torch.ones_like(ids)
    for row, n in enumerate((0, 3, 6)):
        mask[row, slice(0, n) if side == "left" else slice(10 - n, 10)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def seen_by_softmax(name, batch, monkeypatch, **fields):
    """Largest input of every softmax of the eager model, in order, at the rows that are no padding."""
    found, softmax = [], nn.functional.softmax
    causal = torch.ones(10, 10, dtype=torch.bool).tril() if name in CAUSAL else torch.ones(10, 10, dtype=torch.bool)
    allowed = batch["attention_mask"].bool()

    def record(x, *args, **kwargs):
        full = x.detach().view(3, -1, 10, 10)
        seen = causal & allowed[:, None, None, :] & allowed[:, None, :, None]
        found.append(full.masked_fill(~seen, -torch.inf).max().float().item())
        return softmax(x, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "softmax", record)
        patch.setattr(torch, "softmax", record)
        make(name, attn_implementation="eager", **fields)(**batch)
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_every_layer_has_the_largest_logit_of_its_own_matrix(name, side, monkeypatch):
    """With grouped queries, q/k norms, soft cap and window, rotary positions, ALiBi, biases of relative position."""
    batch = padded(side)
    expected = seen_by_softmax(name, batch, monkeypatch)
    kinds = ("eager",) if name in ("gemma2", "deberta", "gptj", "bloom") else ("eager", "sdpa")
    for kind in kinds:
        model = make(name, attn_implementation=kind)
        logits = AttentionLogits(model)
        with logits.watch(batch), torch.no_grad():
            model(**batch)
        assert len(logits.largest) == 2 and all(name in dict(model.named_modules()) for name in logits.largest)
        assert [x.item() for x in logits.largest.values()] == pytest.approx(expected, rel=1e-5)


def test_without_padding_the_mask_is_left_to_the_function():
    """sdpa gets no mask then, and is causal by itself."""
    ids = torch.randint(3, 120, (2, 9))
    found = []
    for kind in ("eager", "sdpa"):
        model = make("llama", attn_implementation=kind)
        logits = AttentionLogits(model, limit=60)
        with logits.watch({}), torch.no_grad():
            model(ids)
        found.append([x.item() for x in logits.largest.values()])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    other = make("bert", attn_implementation="sdpa")
    with logits.watch({}), torch.no_grad():
        other(ids)
    assert len(logits.largest) == 2  # another model's attention does not count


def test_an_encoder_decoder_has_all_its_layers(tiny_t5):
    model = tiny_t5()
    logits = AttentionLogits(model)
    with logits.watch({}), torch.no_grad():
        model(input_ids=torch.randint(3, 99, (2, 7)), decoder_input_ids=torch.randint(3, 99, (2, 5)))
    assert sum("EncDec" in name for name in logits.largest) == 2 and len(logits.largest) == 6


def test_nothing_is_left_behind_after_an_error():
    model = make("llama")
    before = transformers.AttentionInterface.get_interface
    logits = AttentionLogits(model)
    with pytest.raises(RuntimeError), logits.watch({}):
        model(torch.randint(3, 99, (1, 5)))
        raise RuntimeError
    assert transformers.AttentionInterface.get_interface is before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# the other measures


def test_log_z_is_that_of_scored_tokens():
    z, labels = torch.randn(4, 5, 6), torch.randint(0, 6, (4, 5))
    labels[:, ::2] = -100
    expected = z.double()[labels != -100].exp().sum(-1).log()
    total, squares, count = log_z_sums(z, labels, chunk=3)
    assert count == (labels != -100).sum()
    torch.testing.assert_close(torch.stack([total, squares]), torch.stack([expected.sum(), expected.square().sum()]))
    assert log_z_sums(z, torch.full_like(labels, -100)).tolist() == [0, 0, 0]


def test_adam_update_is_what_torch_subtracts():
    p = nn.Parameter(torch.randn(50))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0, eps=1e-3)
    for _ in range(3):
        before = p.detach().clone()
        p.grad = 1e-3 * torch.randn(50)
        optimizer.step()
    state = optimizer.state[p]
    update, bare = adam_update(state["exp_avg"], state["exp_avg_sq"], float(state["step"]), (0.9, 0.999), 1e-3)
    torch.testing.assert_close(before - 0.1 * update, p.detach(), rtol=1e-5, atol=1e-6)
    assert bare.abs().mean() > 1.5 * update.abs().mean()


def test_lr_sensitivity_by_hand():
    assert lr_sensitivity([2.0, 1.0, 7.0, math.nan, math.inf], 3.0) == pytest.approx((2 + 1 + 3 + 3 + 3) / 5 - 1)
    assert lr_sensitivity([1.5, 1.5], 3.0) == 0
    with pytest.raises(ValueError, match="one loss or more"):
        lr_sensitivity([], 3.0)


def test_the_forecast_is_exact_for_a_quadratic_in_the_logarithm():
    def logit(n):
        return math.exp(0.3 + 0.2 * math.log(n) + 0.01 * math.log(n) ** 2)

    sizes = [1e6, 1e7, 1e8, 4e8]
    assert extrapolated_logit(sizes, [logit(n) for n in sizes], 1e10) == pytest.approx(logit(1e10), rel=1e-8)
    # One run off the curve: least squares, as numpy fits it.
    import numpy as np

    values = [3.0, 8.0, 30.0, 90.0]
    fit = np.polyfit(np.log(sizes), np.log(values), 2)
    assert extrapolated_logit(sizes, values, 1e9) == pytest.approx(float(np.exp(np.polyval(fit, np.log(1e9)))))
    with pytest.raises(ValueError, match="three sizes"):
        extrapolated_logit([1, 1, 2], [1, 1, 1], 3)
    with pytest.raises(ValueError, match="above 0"):
        extrapolated_logit([1, 2, 3], [1, -1, 1], 3)


def test_kinds_of_parameters(tiny_llama, tiny_bert_classifier):
    kinds = parameter_kinds(tiny_llama(tie_word_embeddings=False))
    assert kinds["model.embed_tokens.weight"] == "embedding" and kinds["lm_head.weight"] == "head"
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "attention" and kinds["model.norm.weight"] == "norm"
    assert kinds["model.layers.1.mlp.up_proj.weight"] == "dense"
    assert set(parameter_kinds(tiny_llama(tie_word_embeddings=True)).values()) == {
        "embedding",
        "attention",
        "norm",
        "dense",
    }
    assert parameter_kinds(tiny_bert_classifier())["classifier.weight"] == "dense"


# the Trainer


def train(model, out, every=1, diagnostics=True, data=None, **options):
    own = {k: options.pop(k) for k in ("attention", "outputs", "gradients", "eps_margin") if k in options}
    own |= {k: options.pop(k) for k in ("attention_limit", "log_z_limit") if k in options}
    settings = dict(
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    args = TrainingArguments(str(out), **{**settings, **options})
    job = Trainer(model, args, train_dataset=language_data(24) if data is None else data)
    if diagnostics:
        job.add_callback(ProxyDiagnostics(job, every, **own))
    job.train()
    return job


def rows(job, key="attention_logit_max"):
    return {row["step"]: row[key] for row in job.state.log_history if key in row}


def values(job, step=1):
    kept = {}
    for row in job.state.log_history:
        if row["step"] == step and "attention_logit_max" in row:
            kept |= {k: v for k, v in row.items() if k not in ("epoch", "step")}
    return kept


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}])
def test_training_is_the_same_bit_for_bit(kind, options, tmp_path):
    found = []
    for diagnostics in (False, True):
        model = make("gpt2", attn_implementation=kind)  # with dropout 0.1
        found.append(flat(train(model, tmp_path, diagnostics=diagnostics, **options).model))
    assert torch.equal(*found)


@pytest.mark.parametrize("size, accumulation", [(8, 1), (2, 4)])
def test_the_first_measure_is_that_of_the_untrained_model(size, accumulation, tmp_path):
    data = language_data(8)
    model, job = (make("llama") for _ in range(2))
    job = train(
        job,
        tmp_path,
        every=2,
        data=data,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
    )
    assert list(rows(job)) == [1, 3]
    batch = {k: torch.stack([row[k] for row in data]) for k in data[0]}
    logits = AttentionLogits(model)
    with logits.watch(batch):
        out = model(**batch)
    found, labels = values(job), batch["labels"][:, 1:]
    log_z = out.logits[:, :-1][labels != -100].logsumexp(-1)
    layers = {f"attention_logit_max/{name}": x.item() for name, x in logits.largest.items()}
    assert len(layers) == 2 and {k: v for k, v in found.items() if "max/" in k} == pytest.approx(layers, rel=1e-5)
    assert found["attention_logit_max"] == max(v for k, v in found.items() if "max/" in k)
    assert found["output_log_z"] == pytest.approx(log_z.mean().item(), rel=1e-5)
    assert found["output_z_loss"] == pytest.approx(1e-4 * log_z.square().mean().item(), rel=1e-5)
    out.loss.backward()
    kinds = parameter_kinds(model)
    for kind in ("attention", "norm", "dense", "embedding", "head"):
        grads = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if kinds[n] == kind])
        assert found[f"grad_rms/{kind}"] == pytest.approx(grads.square().mean().sqrt().item(), rel=1e-4)
        # The first update of Adam is a sign, but where the gradient is near eps.
        assert 0.9 < found[f"update_rms/{kind}"] / grads.ne(0).float().mean().sqrt() <= 1.0001
        assert 0.9 < found[f"update_kept/{kind}"] <= 1
    assert "compute_loss" not in vars(job)


def test_padding_of_the_trainer_does_not_matter(tmp_path):
    """Short texts in one padded batch, against one by one."""
    texts = [{"input_ids": x, "labels": x} for x in (torch.randint(3, 120, (n,)) for n in (4, 9, 6))]

    def collate(items):
        longest = max(len(x["input_ids"]) for x in items)
        fill = [longest - len(x["input_ids"]) for x in items]
        ids, labels, mask = (
            torch.stack([nn.functional.pad(x, (0, n), value=v) for x, n in zip(xs, fill, strict=True)])
            for v, xs in (
                (7, [x["input_ids"] for x in items]),
                (-100, [x["labels"] for x in items]),
                (0, [torch.ones_like(x["labels"]) for x in items]),
            )
        )
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    found = []
    for size in (3, 1):
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=3 // size, max_steps=1,
            report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        job = Trainer(make("llama"), args, collate, texts)
        job.add_callback(ProxyDiagnostics(job))
        job.train()
        found.append(values(job))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert {k: v for k, v in found[0].items() if "max" in k} == pytest.approx(
        {k: v for k, v in found[1].items() if "max" in k}, rel=1e-5
    )


def test_adapters_bfloat16_and_a_second_pass(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted():
        return get_peft_model(make("llama").bfloat16(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))

    found = values(train(adapted(), tmp_path, max_steps=1))
    assert "attention_logit_max/model.layers.0.self_attn" in found
    assert {k for k in found if k.startswith("grad_rms")} == {"grad_rms/attention", "grad_rms/dense"}
    plain = train(make("llama"), tmp_path, max_steps=1)
    sam = train(make("llama"), tmp_path, max_steps=1, optim="sam", optim_args="rho=5")
    for key in ("attention_logit_max", "output_log_z"):  # at the weights themselves, not at the perturbed ones
        assert values(sam)[key] == values(plain)[key]


@pytest.mark.parametrize("options", [{"optim": "soap"}, {"optim": "sam", "optim_args": "rho=0.01,base=soap"}])
def test_an_update_that_moves_nothing_has_no_size(options, tmp_path):
    """The first call of SOAP only builds its bases."""
    job = train(make("llama"), tmp_path, max_steps=2, **options)
    first, second = values(job, 1), values(job, 2)
    assert not any("update" in key for key in first) and any("update_rms" in key for key in second)
    assert all(math.isfinite(x) for x in (*first.values(), *second.values()))


def test_a_classifier_has_a_log_z_too(tiny_bert_classifier, tmp_path):
    data = [{"input_ids": torch.randint(3, 120, (6,)), "labels": torch.tensor(i % 4)} for i in range(8)]
    model = tiny_bert_classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.no_grad():
        expected = model(torch.stack([x["input_ids"] for x in data])).logits.logsumexp(-1).mean().item()
    job = train(model, tmp_path, data=data, max_steps=1, per_device_train_batch_size=8)
    assert values(job)["output_log_z"] == pytest.approx(expected, rel=1e-5)


def test_limits_are_warned_of_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hfext.training.proxy_diagnostics.logger.warning", said.append)
    train(make("llama"), tmp_path, attention_limit=1e-3, log_z_limit=0.1, eps_margin=1.0, adam_epsilon=1.0)
    assert len(said) == 2 + 5
    assert any("model.layers." in x and "Qwen3" in x for x in said) and any("ZLossMixin" in x for x in said)
    assert any("head parameters" in x and "adam_epsilon, such as 1e-04" in x for x in said)
    said.clear()
    train(make("llama"), tmp_path)
    assert not said


def test_a_model_without_attention_is_told_of(tmp_path, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(128, 8), nn.Linear(8, 128)

        def forward(self, input_ids, labels=None):
            logits = self.head(self.embed(input_ids))
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    said = []
    monkeypatch.setattr("hfext.training.proxy_diagnostics.logger.warning", said.append)
    job = train(Net(), tmp_path)
    assert len(said) == 1 and "saw no attention in Net" in said[0]
    assert len(rows(job, "output_log_z")) == 3 and not rows(job)


def test_parts_can_be_left_out(tmp_path):
    job = train(make("llama"), tmp_path, outputs=False, gradients=False, max_steps=1)
    assert {k.partition("/")[0] for k in values(job)} == {"attention_logit_max"}
    job = train(make("llama"), tmp_path, attention=False, optim="sgd", max_steps=1)
    logged = {k.partition("/")[0] for row in job.state.log_history for k in row}
    assert {"output_log_z", "grad_rms"} <= logged and not {"update_rms", "attention_logit_max"} & logged


def test_what_cannot_work_is_refused(tmp_path):
    class Fused(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            return {"loss": super().forward(input_ids, labels=labels, **kwargs).loss}

    config = make("llama").config
    with pytest.raises(ValueError, match="outputs=False"):
        train(Fused(config), tmp_path)
    job = train(Fused(config), tmp_path, outputs=False)
    assert len(rows(job)) == 3
    with pytest.raises(TypeError, match="must be the Trainer"):
        ProxyDiagnostics(100)
    with pytest.raises(ValueError, match="every is 0"):
        ProxyDiagnostics(job, every=0)
    with pytest.raises(ValueError, match="attention_limit is -1"):
        ProxyDiagnostics(job, attention_limit=-1)
    job.args.torch_compile = True
    with pytest.raises(NotImplementedError, match="attention=False"):
        ProxyDiagnostics(job)


TWO = """
import json, sys
sys.path.insert(0, FOLDER)
from test_proxy_diagnostics import make, train, values
job = train(make("llama"), OUT, max_steps=1, per_device_train_batch_size=4)
if job.args.process_index == 0:
    open(OUT + "/two.json", "w").write(json.dumps(values(job)))
import torch
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_log_what_one_does(tmp_path):
    """The rows of one process have fewer tokens than those of the other."""
    import json

    run_two(f"FOLDER, OUT = {str(__file__).rpartition('/')[0]!r}, {str(tmp_path)!r}\n" + TWO)
    one = train(make("llama"), tmp_path, max_steps=1, per_device_train_batch_size=8)
    assert json.loads((tmp_path / "two.json").read_text()) == pytest.approx(values(one), rel=1e-4)
