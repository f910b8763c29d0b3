"""A tiny language model with a chat template whose tokenizer knows the words of the made-up facts."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfext.experiments._facts import make_facts

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}: {% endif %}"


def save_tiny_chat(folder: Path, llama: Any, authors: int = 2) -> Path:
    """Write a random Llama, made by the fixture `tiny_llama`, and its tokenizer."""
    words = " ".join(" ".join((f.question, f.paraphrase, f.answer)) for f in make_facts(authors)).split()
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", ":", *sorted(set(words))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)
    tokenizer.save_pretrained(folder)
    # The frozen head must be large enough to be sure of a word.
    llama(vocab_size=len(tokenizer), initializer_range=0.3).save_pretrained(folder)
    return folder
