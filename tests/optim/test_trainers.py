"""The optimizers in the trainers people use: Seq2SeqTrainer, and TRL's SFTTrainer and DPOTrainer as they are."""

import pytest
import torch
from datasets import Dataset
from optim_training import flat, language_data, run_training
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments

import hfext  # noqa: F401

WORDS = "the sea is wide and cold but a ship may cross it in winter when wind blows from north".split()


@pytest.fixture
def tokenizer():
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentences(n, shift=0):
    return [" ".join(WORDS[(i + shift) % 5 : (i + shift) % 5 + 4 + i % 6]) for i in range(n)]


def config(kind, tmp_path, optim, **options):
    defaults = dict(
        output_dir=str(tmp_path),
        optim=optim,
        max_steps=2,
        learning_rate=0.1,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return kind(**{**defaults, **options})


def sft(tiny_llama, tokenizer, tmp_path, optim, optim_args, rows=8, accumulation=1, **options):
    from trl import SFTConfig, SFTTrainer

    args = config(
        SFTConfig,
        tmp_path,
        optim,
        optim_args=optim_args,
        max_length=16,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    job = SFTTrainer(
        tiny_llama(), args=args, train_dataset=Dataset.from_dict({"text": sentences(16)}), processing_class=tokenizer
    )
    job.train()
    return job


@pytest.mark.parametrize("optim", ["sam", "bisam", "sampa", "ignite"])
def test_sft_trainer(optim, tiny_llama, tokenizer, tmp_path):
    whole, parts = (sft(tiny_llama, tokenizer, tmp_path, optim, "base=sgd", 8 // n, n) for n in (1, 4))
    assert (flat(whole.model) - flat(parts.model)).abs().max() <= 1e-7
    assert (flat(whole.model) - flat(tiny_llama())).abs().max() > 1e-4


def test_sft_counts_its_tokens_once(tiny_llama, tokenizer, tmp_path):
    logs = [
        sft(tiny_llama, tokenizer, tmp_path, *spec).state.log_history for spec in [("sam", "base=sgd"), ("sgd", None)]
    ]
    for key in ("num_tokens", "mean_token_accuracy", "entropy", "loss"):
        assert logs[0][0][key] == logs[1][0][key], key
    assert logs[0][1]["num_tokens"] == logs[1][1]["num_tokens"]


def test_sft_identity_surrogate_is_sam(tiny_llama, tokenizer, tmp_path):
    """With phi the identity, Q is the cross entropy: BiSAM must follow SAM through TRL's own loss."""
    sam = sft(tiny_llama, tokenizer, tmp_path, "sam", "rho=0.5,base=sgd")
    bisam = sft(tiny_llama, tokenizer, tmp_path, "bisam", "rho=0.5,surrogate=identity,base=sgd")
    assert (flat(sam.model) - flat(bisam.model)).abs().max() < 1e-6
    assert bisam.state.log_history[0]["loss"] == pytest.approx(sam.state.log_history[0]["loss"], abs=1e-6)


@pytest.fixture
def dpo(tiny_llama, tokenizer, tmp_path):
    def run(optim, optim_args, rows, accumulation):
        from trl import DPOConfig, DPOTrainer

        args = config(
            DPOConfig,
            tmp_path,
            optim,
            optim_args=optim_args,
            max_length=24,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
        )
        data = Dataset.from_dict({"prompt": sentences(8), "chosen": sentences(8, 1), "rejected": sentences(8, 2)})
        job = DPOTrainer(
            tiny_llama(), ref_model=tiny_llama(seed=1), args=args, train_dataset=data, processing_class=tokenizer
        )
        job.train()
        return job

    return run


@pytest.mark.parametrize("optim", ["sam", "sampa"])
def test_dpo_trainer(optim, dpo, tiny_llama):
    whole, parts = dpo(optim, "base=sgd", 4, 1), dpo(optim, "base=sgd", 2, 2)
    assert (flat(whole.model) - flat(parts.model)).abs().max() <= 1e-6
    assert (flat(whole.model) - flat(tiny_llama())).abs().max() > 1e-5
    plain = dpo("sgd", None, 4, 1)
    assert whole.state.log_history[0]["rewards/margins"] == plain.state.log_history[0]["rewards/margins"]
    assert whole.state.log_history[1]["num_tokens"] == plain.state.log_history[1]["num_tokens"]


def test_dpo_has_no_zero_one_loss(dpo):
    with pytest.raises(ValueError, match="no `labels`.*Use optim='sam'"):
        dpo("bisam", None, 4, 1)


@pytest.mark.parametrize("optim", ["sam", "bisam"])
def test_seq2seq_trainer(optim, tiny_t5, tmp_path):
    def run(rows, accumulation):
        torch.manual_seed(0)
        args = config(
            Seq2SeqTrainingArguments,
            tmp_path,
            optim,
            optim_args="base=sgd",
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
        )
        # T5 takes the mean over each micro-batch whatever the update holds, so its rows must have labels alike.
        data = [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in language_data(16)]
        job = Seq2SeqTrainer(tiny_t5(dropout_rate=0.0).double(), args=args, train_dataset=data)
        job.train()
        return job.model

    assert (flat(run(8, 1)) - flat(run(2, 4))).abs().max() <= 1e-7


def test_label_smoothing_acts_on_the_second_gradient_alone(tmp_path, tiny_llama):
    smooth = run_training(tiny_llama(), "bisam", "rho=0.5,base=sgd", tmp_path, label_smoothing_factor=0.1, max_steps=1)
    plain = run_training(tiny_llama(), "bisam", "rho=0.5,base=sgd", tmp_path, max_steps=1)
    keys = ("sam/grad_norm_ascent", "sam/perturb_norm")
    assert [smooth.state.log_history[0][k] for k in keys] == pytest.approx(
        [plain.state.log_history[0][k] for k in keys], rel=1e-6
    )
    assert not torch.equal(flat(smooth.model), flat(plain.model))


@pytest.mark.parametrize(
    ("kind", "config", "shifts"),
    [
        ("GPT2LMHeadModel", dict(n_embd=16, n_layer=1, n_head=2, vocab_size=32), True),  # its class names no loss
        ("LlamaForCausalLM", dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  num_key_value_heads=1, vocab_size=32), True),
        ("BertForMaskedLM", dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 vocab_size=32), False),
        ("BertForTokenClassification", dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                            num_attention_heads=2, vocab_size=32), False),
        ("T5ForConditionalGeneration", dict(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=32,
                                            decoder_start_token_id=0), False),
    ],
)  # fmt: skip
def test_whether_labels_are_shifted_is_what_the_model_does(tmp_path, kind, config, shifts):
    import transformers

    from hfext.compat import loss_shifts_labels

    model = getattr(transformers, kind)
    model = model(model.config_class(**config)).eval()
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    assert loss_shifts_labels(transformers.Trainer(model, args)) == shifts
    ids = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids % model.config.num_labels if "Classification" in kind else ids
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
    logits, target = (out.logits[:, :-1], labels[:, 1:]) if shifts else (out.logits, labels)
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(logits.transpose(1, 2), target), atol=1e-5)
