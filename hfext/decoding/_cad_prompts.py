"""The two prompts of context-aware decoding, with the context and without it, from texts and a template."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def texts_of(name: str, value: Any) -> list[str]:
    """`value`, a string or several, as a list; `TypeError` with `name` for anything else."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a list of strings, not {value!r:.80}.")
    return list(texts)


def both_prompts(
    contexts: list[str], queries: list[str], template: Any, tokenizer: Any
) -> tuple[list[str], list[str]]:
    """The prompts with the context and those without, by a pair of templates or `"chat"`."""
    chat = template == "chat"
    if not chat and (isinstance(template, str) or len(template) != 2):
        raise ValueError(f"template is {template!r} but must be 'chat' or a pair (with context, without).")
    given, null = ("{context}\n\n{query}", "{query}") if chat else template
    if "{context}" not in given or "{query}" not in given or "{context}" in null:
        raise ValueError(
            f"template is {template!r} but its first part must name {{context}} and {{query}}, its second {{query}}."
        )
    pairs = list(zip(contexts, queries, strict=True))
    both = [given.format(context=c, query=q) for c, q in pairs], [null.format(query=q) for q in queries]
    if not chat:
        return both
    return tuple(
        [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
        for texts in both
    )


def tokens_of(texts: list[str], tokenizer: Any, side: str, special: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask [texts, longest], padded on `side`."""
    if len(texts) > 1 and tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token, which a batch needs: set tokenizer.pad_token.")
    batch = tokenizer(
        texts, padding=len(texts) > 1, padding_side=side, add_special_tokens=special, return_tensors="pt"
    )
    return batch["input_ids"], batch["attention_mask"]
