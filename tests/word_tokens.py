"""A tokenizer whose words are w0, w1, end, w3 ... w127, split at blanks: text and ids are the same thing."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer():
    """`end`, the third token, ends a sequence; there is no pad token."""
    core = Tokenizer(models.WordLevel({"end" if i == 2 else f"w{i}": i for i in range(128)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="end", padding_side="right")


def text_of(ids):
    return " ".join(f"w{i}" for i in ids)
