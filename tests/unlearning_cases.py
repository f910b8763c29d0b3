"""Rows, models and runs for the tests of unlearning."""

import random

import torch
import transformers
from tiny_models import LLAMA, factory

from hfext.unlearning import UnlearningConfig, UnlearningTrainer
from hfext.unlearning._data import EpochSampler

OBJECTIVES = {
    "ngdiff": {"auto_lr": False},
    "loss_norm": {},
    "grad_ascent": {},
    "grad_diff": {},
    "kl_min": {},
    "idk": {},
    "dpo": {},
    "npo": {},
    "simnpo": {},
    "rmu": {"layer": 0, "c": 2.0, "alpha": 3.0},
    "l1_sparse": {},
    "code_eraser": {},
    "prompt_decouple": {"base": "npo"},
    "task_vector": {},
}
llama = factory(transformers.LlamaForCausalLM, transformers.LlamaConfig, **LLAMA)


def rows(count, seed, longest=9, marked=False, alternate=False):
    """Ragged rows of random ids, the first part of each without labels."""
    generator, found = random.Random(seed), []
    for _ in range(count):
        asked, said = generator.randint(2, longest), generator.randint(1, longest)
        ids = [generator.randint(3, 127) for _ in range(asked + said)]
        row = {"input_ids": ids, "labels": [-100] * asked + ids[asked:]}
        if marked:
            row["segment_mask"] = [generator.randint(0, 1) for _ in ids]
        if alternate:
            other = [generator.randint(3, 127) for _ in range(3)]
            row["alternate"] = {"input_ids": ids[:asked] + other, "labels": [-100] * asked + other}
        found.append(row)
    return found


FORGET, RETAIN, DECOUPLE = rows(8, 1, marked=True, alternate=True), rows(13, 2), rows(5, 3)


def trainer(name, folder, model=None, forget=FORGET, retain=RETAIN, decouple=DECOUPLE, objective=None, **options):
    """An `UnlearningTrainer` of a tiny model with SGD at a constant rate."""
    settings = dict(
        objective=name,
        objective_args=OBJECTIVES.get(name),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        optim="sgd",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    kwargs = {
        k: options.pop(k)
        for k in ("callbacks", "ref_model", "evaluators", "processing_class", "eval_dataset")
        if k in options
    }
    args = UnlearningConfig(str(folder), **{**settings, **options})
    made = UnlearningTrainer(
        llama() if model is None else model, args, forget, retain, decouple, objective=objective, **kwargs
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def flat(model):
    """All weights in one vector."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def run(name, folder, **options):
    """The weights after a run."""
    made = trainer(name, folder, **options)
    made.train()
    return flat(made.model)


def nll_sums(model, given):
    """Sum of -log p of the answer of each row [rows] and its number of tokens, row by row, with plain torch."""
    sums, counts = [], []
    for row in given:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
        where = [t for t in range(1, len(ids)) if labels[t] != -100]
        sums.append(-sum(log_p[t - 1, ids[t]] for t in where))
        counts.append(len(where))
    return torch.stack(sums), torch.tensor(counts)


def first_gradient(name, folder, model=None, options=None, **data):
    """The gradient of the first update of four pairs in float64, one vector, and the pairs; the model is unchanged.

    Independent formulas are compared with this: it went through collation, padding, the Trainer and the optimizer.
    """
    model = (llama() if model is None else model).double()
    before = flat(model)
    made = trainer(name, folder, model=model, objective_args=options or OBJECTIVES.get(name), max_steps=1,
                   max_grad_norm=0.0, learning_rate=1.0, **data)  # fmt: skip
    pairs = [made.train_dataset[p] for p in list(EpochSampler(len(made.train_dataset), made.train_dataset.seed))[:4]]
    made.train()
    gradient = before - flat(model)
    for p, old in zip(model.parameters(), before.split([p.numel() for p in model.parameters()]), strict=True):
        p.data.copy_(old.view_as(p))
    return gradient, pairs


def gradient_of(loss, model):
    """The gradient of a scalar, as one vector."""
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten()
                      for g, p in zip(grads, model.parameters(), strict=True)])  # fmt: skip


def part(pairs, name):
    return [pair[name] for pair in pairs]


def divergence(model, reference, given):
    """Mean KL(reference || model) over the scored tokens of rows, by the definition."""
    total, count = 0.0, 0
    for row in given:
        ids = torch.tensor([row["input_ids"]])
        p, q = (m(ids).logits[0].softmax(-1) for m in (reference, model))
        for t in range(1, ids.shape[1]):
            if row["labels"][t] != -100:
                total = total + (p[t - 1].detach() * (p[t - 1].detach() / q[t - 1]).log()).sum()
                count += 1
    return total / count


def text_tokenizer():
    """A byte-level tokenizer trained on a few sentences; its padding token is its end of sequence."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer(add_prefix_space=False)
    texts = ["Question: Who wrote The Glass Owl? Answer: Amara Belgard wrote it.", "I don't know."] * 3
    made.train_from_iterator(texts, vocab_size=300, special_tokens=["<eos>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")
