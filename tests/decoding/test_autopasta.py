"""AutoPASTA: sentences, their nearest one, and the steered answer composed of its parts by hand."""

import pytest
import torch
import transformers

from hfext.decoding.autopasta import autopasta_generate, mean_pooling_encoder, nearest, split_sentences
from hfext.decoding.pasta import span_to_tokens, steer_attention

WORDS = (
    "pad eos bos . : ? a b c d e f g h Question Answer Quote the one sentence of this text that answers question user"
)
CONTEXT = "a b c. d e f g. The h a b. c c d?"
HEADS = {0: [1, 2], 1: [0]}


@pytest.fixture
def tokenizer():
    """Begins texts with a token of its own, as most do; the chat template brings it along."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS.split())}, unk_token="pad"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="bos $A", special_tokens=[("bos", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="pad",
        eos_token="eos",
        bos_token="bos",
        unk_token="pad",
        chat_template="{{ bos_token }} {% for m in messages %}user : {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}Answer :{% endif %}",
    )


@pytest.fixture
def model(tiny_llama):
    model = tiny_llama(vocab_size=len(WORDS.split()))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(5.0)
    model.generation_config.eos_token_id = None
    return model


def by_letter(letter):
    """An encoder that puts the text with `letter` next to whatever comes last, the quote."""

    def encode(texts):
        assert len(texts) == 5
        return torch.tensor([[float(letter in t), float(letter not in t)] for t in texts[:-1]] + [[3.0, 0.1]])

    return encode


def test_sentences_are_character_ranges():
    text = 'One here. Two? "Three!" Four\nFive (v. 2).  Six'
    pieces = [text[a:b] for a, b in split_sentences(text)]
    assert pieces == ["One here.", "Two?", '"Three!"', "Four", "Five (v.", "2).", "Six"]
    assert split_sentences("  \n one \n\n") == [(4, 7)]
    assert split_sentences("3.14 is e.g.pi") == [(0, 14)]
    assert split_sentences("") == []


def test_nearest_is_the_highest_cosine():
    rows = torch.tensor([[10.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    assert nearest(torch.tensor([0.1, 0.11]), rows) == 1
    assert nearest(torch.tensor([5.0, 1.0], dtype=torch.bfloat16), rows) == 0


def test_mean_pooling_ignores_padding(model, tokenizer, tiny_bert_classifier):
    texts = ["a b", "c d e f", "h"]
    for encoder in (model.base_model, tiny_bert_classifier(vocab_size=len(WORDS.split())).base_model):
        batched = mean_pooling_encoder(encoder, tokenizer)(texts)
        for text, row in zip(texts, batched, strict=True):
            hidden = encoder(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
            torch.testing.assert_close(row, hidden[0].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean_pooling_encoder(encoder, tokenizer, batch_size=2)(texts), batched)
    tokenizer.pad_token = None
    torch.testing.assert_close(mean_pooling_encoder(encoder, tokenizer)(texts), batched, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_the_answer_is_that_of_the_steered_original_prompt(model, tokenizer, chat):
    out = autopasta_generate(
        model, tokenizer, CONTEXT, "d ?", HEADS, encoder=by_letter("h"), chat=chat, max_new_tokens=6, num_beams=2
    )
    assert out.sentence == "The h a b."
    prompt = f"{CONTEXT}\n\nQuestion: d ?\nAnswer:"
    if chat:
        prompt = f"user : {prompt} Answer :"
    # One token at the beginning, and not a second one behind that of the template.
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    assert ids["input_ids"][0].tolist().count(2) == 1 and ids["input_ids"][0, 0] == 2
    assert out.span == span_to_tokens(tokenizer, prompt, "The h a b.")
    plain = model.generate(**ids, max_new_tokens=6, num_beams=2)
    with steer_attention(model, [out.span], HEADS):
        steered = model.generate(**ids, max_new_tokens=6, num_beams=2)
    assert torch.equal(out.sequences, steered) and not torch.equal(steered, plain)
    assert out.answer == tokenizer.decode(steered[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert torch.equal(model.generate(**ids, max_new_tokens=6, num_beams=2), plain)


def test_the_quote_is_greedy_and_unsteered(model, tokenizer):
    torch.manual_seed(3)
    out = autopasta_generate(
        model, tokenizer, CONTEXT, "d", HEADS, quote_template="{context} Quote {question}:", quote_tokens=5,
        encoder=by_letter("f"), max_new_tokens=3, do_sample=True, num_return_sequences=2, return_dict_in_generate=True,
    )  # fmt: skip
    ids = tokenizer(f"{CONTEXT} Quote d:", return_tensors="pt", return_token_type_ids=False)
    greedy = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert out.quote == tokenizer.decode(greedy[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert out.sentence == "d e f g." and len(out.sequences.sequences) == 2
    model.generation_config.num_beams = 4
    beams = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert not torch.equal(beams, greedy), "the test would not see a quote by beam search"
    again = autopasta_generate(
        model, tokenizer, CONTEXT, "d", HEADS, quote_template="{context} Quote {question}:", quote_tokens=5,
        encoder=by_letter("f"), max_new_tokens=3,
    )  # fmt: skip
    assert again.quote == out.quote


def test_the_prompt_length_does_not_rest_on_the_loop_of_generate(model, tokenizer, monkeypatch):
    """A model may bring a `generate` of its own, here one that reads everything again for each token."""
    plain = type(model).generate

    def reread(self, input_ids, attention_mask, max_new_tokens, **kwargs):
        for _ in range(max_new_tokens):
            best = self(input_ids, use_cache=False).logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, best], 1)
        return input_ids

    ask = dict(context=CONTEXT, question="d", heads=HEADS, encoder=by_letter("f"), quote_tokens=8, max_new_tokens=4)
    expected = autopasta_generate(model, tokenizer, **ask)
    monkeypatch.setattr(type(model), "generate", reread)
    assert torch.equal(autopasta_generate(model, tokenizer, **ask).sequences, expected.sequences)
    monkeypatch.undo()
    assert type(model).generate is plain


def test_the_models_own_states_find_a_sentence_quoted_word_for_word(model, tokenizer, monkeypatch):
    quote = "c c d?"
    wanted = tokenizer(quote, add_special_tokens=False, return_tensors="pt")["input_ids"]
    generate, calls = type(model).generate, []

    def quoting(self, input_ids, **kwargs):
        calls.append(kwargs)
        if len(calls) == 1:
            return torch.cat([input_ids, wanted], 1)
        return generate(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "generate", quoting)
    out = autopasta_generate(model, tokenizer, CONTEXT, "d", HEADS, max_new_tokens=2)
    assert out.sentence == quote and calls[0]["do_sample"] is False


def test_bad_input_is_named(model, tokenizer):
    def ask(context=CONTEXT, question="d", heads=HEADS, **kwargs):
        return autopasta_generate(model, tokenizer, context, question, heads, max_new_tokens=2, **kwargs)

    with pytest.raises(ValueError, match="context is empty"):
        ask(context=" \n")
    with pytest.raises(ValueError, match="question is empty"):
        ask(question="")
    with pytest.raises(TypeError, match="context is a list"):
        ask(context=["a"])
    with pytest.raises(ValueError, match="answer_template"):
        ask(answer_template="{question}")
    with pytest.raises(ValueError, match="quote_template"):
        ask(quote_template="{context}{context}{question}")
    with pytest.raises(ValueError, match="quote_tokens is 0"):
        ask(quote_tokens=0)
    with pytest.raises(ValueError, match="alpha is 0"):
        ask(alpha=0)
    with pytest.raises(ValueError, match="layer 7"):
        ask(heads={7: [0]})
    with pytest.raises(ValueError, match=r"encoder must return a tensor \[5, dim\]"):
        ask(encoder=lambda texts: torch.zeros(2, 3))
    tokenizer.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(ValueError, match="chat template changes the text"):
        ask(chat=True)
