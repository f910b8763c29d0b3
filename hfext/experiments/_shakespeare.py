"""Tiny Shakespeare by characters, and small Llamas that read it."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ._data import shared_data


def read_characters(data_dir: str | None = None) -> tuple[Tensor, Tensor, int]:
    """Ids of the first nine tenths of the text and of the last, and how many characters there are."""
    folder = shared_data("tinyshakespeare", data_dir)
    if folder is None:
        raise FileNotFoundError("tinyshakespeare (input.txt) was not found: set data_dir or HFEXT_DATA.")
    text = (folder / "input.txt").read_text(encoding="utf-8")
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[c] for c in text])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], len(known)


def rows_of(ids: Tensor, length: int) -> list[dict[str, Tensor]]:
    """Windows of `length` tokens, one behind the other."""
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // length * length].view(-1, length)]


def make_llama(seed: int, vocab: int, hidden: int, layers: int, length: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and heads of 32, in float32."""
    size = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(size)


def quiet_trainer(kind: type[Trainer], model: torch.nn.Module, data: list, folder: str, **arguments) -> Trainer:
    """A Trainer of `kind` that shows nothing and keeps every loss; what `kind` takes for itself goes to it."""
    own = {k: arguments.pop(k) for k in ("teacher", "topkld") if k in arguments}
    args = TrainingArguments(
        folder,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = kind(model, args, train_dataset=data, **own)
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, ids: Tensor, length: int, rows: int = 64) -> float:
    """Cross-entropy, in nats a character, of the first `rows` windows."""
    model.eval()
    batch = ids[: rows * length].view(-1, length)
    return sum(model(x, labels=x).loss.item() * len(x) for x in batch.split(16)) / len(batch)
