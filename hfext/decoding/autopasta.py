"""AutoPASTA: the model quotes the sentence that answers the question, and its attention is steered to that sentence.

1. Greedily quote the key sentence of the context for the question.
2. Of the context's sentences s take the one nearest to the quote q: argmax_s cos(f(s), f(q)), f a sentence encoder.
3. Answer the original prompt with selected heads steered to that sentence's tokens, as in PASTA.

Model Tells Itself Where to Attend: Faithfulness Meets Automatic Attention Steering, arXiv 2409.10790.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..registry import Method
from .pasta import Heads, span_to_tokens, steer_attention

QUOTE = "{context}\n\nQuote the one sentence of this text that answers the question.\nQuestion: {question}\nQuote:"
ANSWER = "{context}\n\nQuestion: {question}\nAnswer:"
# Closing quotes and brackets belong to the sentence that they end.
_END = re.compile(r"""(?<=[.!?。！？])["'”’)\]]*\s+|\n+""")

Encoder = Callable[[list[str]], Tensor]


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character ranges of the sentences, without the space around them; a line break ends a sentence too."""
    ends = [(match.start() + len(match.group().rstrip()), match.end()) for match in _END.finditer(text)]
    starts = [0, *(after for _, after in ends)]
    stops = [*(stop for stop, _ in ends), len(text)]
    found = []
    for start, stop in zip(starts, stops, strict=True):
        piece = text[start:stop]
        if piece.strip():
            found.append((start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())))
    return found


def nearest(query: Tensor, rows: Tensor) -> int:
    """Index of the row of `rows` [n, dim] with the highest cosine to `query` [dim]; the first of equals."""
    unit = torch.nn.functional.normalize(rows.float(), dim=-1)
    return int((unit @ torch.nn.functional.normalize(query.float(), dim=-1)).argmax())


def mean_pooling_encoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> Callable[[list[str]], Tensor]:
    """A sentence encoder `texts -> [n, dim]`: the mean of the last hidden states over the tokens of each text.

    Without a pad token each text is encoded alone.
    """
    size = batch_size if tokenizer.pad_token_id is not None else 1

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        out = []
        for i in range(0, len(texts), size):
            batch = tokenizer(
                texts[i : i + size], padding=size > 1, padding_side="right", truncation=True, return_tensors="pt"
            ).to(model.device)
            mask = batch["attention_mask"].unsqueeze(-1).float()
            hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            out.append((hidden.float() * mask).sum(1) / mask.sum(1).clamp(min=1))
        return torch.cat(out)

    return encode


@dataclass(frozen=True)
class AutoPastaOutput:
    """
    Args:
        answer: Text of the answer, the first one where several are returned.
        sentence: The sentence of the context that was highlighted.
        span: Its tokens (start, end) in the prompt.
        quote: What the model quoted.
        sequences: What `generate` returned for the steered prompt.
    """

    answer: str
    sentence: str
    span: tuple[int, int]
    quote: str
    sequences: Any


def autopasta_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    question: str,
    heads: Heads,
    *,
    encoder: Encoder | None = None,
    alpha: float = 0.01,
    chat: bool = False,
    quote_template: str = QUOTE,
    answer_template: str = ANSWER,
    quote_tokens: int = 64,
    **generate_kwargs: Any,
) -> AutoPastaOutput:
    """Answer a question about a context, with attention steered to the sentence that the model itself points out.

    Args:
        model (`PreTrainedModel`): Decoder-only, with attention that [`steer_attention`] takes.
        tokenizer (`PreTrainedTokenizerBase`): Its fast tokenizer.
        context, question (`str`): The text and what is asked about it.
        heads (`dict[int, list[int]]`): Query heads by layer, for example of [`profile_heads`].
        encoder (`Callable`, *optional*): From n texts to `[n, dim]`, see [`mean_pooling_encoder`]. By default the
            model's own last hidden states, mean-pooled: ours, the paper uses a small sentence encoder.
        alpha (`float`, *optional*, defaults to 0.01): Of [`steer_attention`].
        chat (`bool`, *optional*, defaults to `False`): Put both prompts into a user message of the chat template.
        quote_template, answer_template (`str`, *optional*): Prompts with `{context}` and `{question}`; ours, the
            paper's are not public.
        quote_tokens (`int`, *optional*, defaults to 64): Most tokens of the quote.
        **generate_kwargs: Of `generate`, for the answer.

    Raises:
        ValueError: For an empty context or question, a template without its fields, and as [`steer_attention`].
    """
    for name, text in (("context", context), ("question", question)):
        if not isinstance(text, str):
            raise TypeError(f"{name} is a {type(text).__name__} but must be a string.")
        if not text.strip():
            raise ValueError(f"{name} is empty.")
    for name, template in (("quote_template", quote_template), ("answer_template", answer_template)):
        if template.count("{context}") != 1 or "{question}" not in template:
            raise ValueError(f"{name} is {template!r} but must name {{context}} once and {{question}}.")
    if quote_tokens < 1:
        raise ValueError(f"quote_tokens is {quote_tokens} but must be >= 1.")
    prompt, at = _prompt(tokenizer, answer_template, context, question, chat)
    # What steering refuses is refused before anything is generated.
    steer_attention(model, [(0, 1)], heads, alpha).remove()

    quote_prompt, _ = _prompt(tokenizer, quote_template, context, question, chat)
    ids = _ids(tokenizer, quote_prompt, chat).to(model.device)
    quoted = model.generate(**ids, do_sample=False, num_beams=1, max_new_tokens=quote_tokens)
    quote = tokenizer.decode(quoted[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    sentences = split_sentences(context)
    start, end = sentences[_pick(model, tokenizer, encoder, [context[a:b] for a, b in sentences], quote)]
    span = span_to_tokens(tokenizer, prompt, (at + start, at + end), add_special_tokens=not chat)

    ids = _ids(tokenizer, prompt, chat).to(model.device)
    width = ids["input_ids"].shape[1]
    with steer_attention(model, [span], heads, alpha, prompt_length=width):
        out = model.generate(**ids, **generate_kwargs)
    sequences = out if isinstance(out, Tensor) else out.sequences
    answer = tokenizer.decode(sequences[0, width:], skip_special_tokens=True).strip()
    return AutoPastaOutput(answer, context[start:end], span, quote, out)


def _pick(model: Any, tokenizer: Any, encoder: Encoder | None, sentences: Sequence[str], quote: str) -> int:
    if not quote:
        raise ValueError("The model quoted nothing: try another quote_template, or chat=True for a chat model.")
    encode = mean_pooling_encoder(model.base_model, tokenizer) if encoder is None else encoder
    vectors = encode([*sentences, quote])
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != len(sentences) + 1:
        raise ValueError(f"encoder must return a tensor [{len(sentences) + 1}, dim] for as many texts.")
    return nearest(vectors[-1], vectors[:-1])


def _prompt(tokenizer: Any, template: str, context: str, question: str, chat: bool) -> tuple[str, int]:
    """The prompt and the character at which the context begins in it."""
    before, after = template.split("{context}")
    # The question may hold braces of its own, and the context may stand in the question too.
    head = before.replace("{question}", question)
    text, at = head + context + after.replace("{question}", question), len(head)
    if not chat:
        return text, at
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inside = rendered.find(text)
    if inside < 0:
        # Templates may trim messages.
        raise ValueError("The chat template changes the text of the prompt, so that no span can be found in it.")
    return rendered, inside + at


def _ids(tokenizer: Any, prompt: str, chat: bool) -> Any:
    batch = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")
    return type(batch)({name: batch[name] for name in ("input_ids", "attention_mask")})


METHOD = Method(
    name="autopasta",
    family="decoding",
    title="Model Tells Itself Where to Attend: Faithfulness Meets Automatic Attention Steering",
    authors="Zhang et al.",
    arxiv="2409.10790",
    year=2024,
    repo=None,
    status="abstract-only",
    difference="Built from the abstract and secondary descriptions. The prompts, the sentence splitter, the encoder "
    "by default (the model's own mean hidden states) and the head search (`profile_heads`) are ours: the authors' "
    "code and prompts are not public.",
    target="hfext.decoding.autopasta:autopasta_generate",
    usage="hfext.decoding.autopasta_generate(model, tokenizer, context, question, heads={5: [0, 3]}).answer",
    summary="Finds the key sentence of a context by the model's own quote and steers attention to it for the answer.",
    notes="No recipe of its own: the paper's tasks need larger models. The recipe of `pasta` answers some of its "
    "prompts with AutoPASTA too.",
)
