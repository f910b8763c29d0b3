"""EigenScore: how far apart several sampled answers to one question lie inside the model; high means doubtful.

    Z [K, d]   one hidden state per answer, from the middle layer
    Sigma = Z J Z^T / (d - 1),  J = I - 11^T / d          (each row is centred over its features)
    EigenScore = (1/K) log10 det(Sigma + alpha I)

That is the authors' code: a covariance with ddof 1 and decimal logarithms. The paper writes no division and natural
logarithms: `ddof=None, base=math.e`. With the singular values s of the centred Z no K x K and no d x d matrix is
formed: log det = sum log(s^2 / (d - 1) + alpha), and log alpha for every answer beyond the rank.

INSIDE: LLMs' Internal States Retain the Power of Hallucination Detection, arXiv 2402.03744, with K = 10
answers at temperature 0.5, top-p 0.99, top-k 10.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..registry import Method, Result

Embeddings = Tensor | np.ndarray | Sequence[Sequence[float]]


def answers(embeddings: Embeddings) -> Tensor:
    """Checked `[..., K, d]` in float64; `ValueError` for NaN, infinities and fewer than two features."""
    z = torch.as_tensor(np.asarray(embeddings) if isinstance(embeddings, list | tuple) else embeddings).detach()
    if z.ndim < 2 or z.shape[-2] < 1 or z.shape[-1] < 2:
        raise ValueError(f"embeddings have the shape {list(z.shape)} but must be [answers >= 1, features >= 2].")
    z = z.to(torch.float64)
    if not z.isfinite().all():
        raise ValueError("embeddings hold NaN or infinity.")
    return z


def check_convention(alpha: float, base: float, ddof: int | None, features: int) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha is {alpha} but must be > 0: it keeps the determinant of equal answers above 0.")
    if not (base > 1 and math.isfinite(base)):
        raise ValueError(f"base is {base} but must be > 1.")
    if ddof is not None and not 0 <= ddof < features:
        raise ValueError(f"ddof is {ddof} but must be None or in [0, {features}), the number of features.")


def eigenscore(embeddings: Embeddings, alpha: float = 1e-3, base: float = 10, ddof: int | None = 1) -> Tensor:
    """The score of each set of answers.

    Args:
        embeddings (`torch.Tensor` or array of shape `[..., K, d]`): One vector per answer; see [`answer_embeddings`].
        alpha (`float`, *optional*, defaults to 1e-3): Added to every eigenvalue, > 0.
        base (`float`, *optional*, defaults to 10): Of the logarithm; `math.e` in the paper.
        ddof (`int`, *optional*, defaults to 1): Sigma is divided by d - ddof; `None` for no division, as in the paper.

    Returns:
        `torch.Tensor` of shape `[...]`, float64.
    """
    z = answers(embeddings)
    k, d = z.shape[-2:]
    check_convention(alpha, base, ddof, d)
    values = torch.linalg.svdvals(z - z.mean(-1, keepdim=True)).square() / (1 if ddof is None else d - ddof)
    logs = (values + alpha).log().sum(-1) + max(0, k - d) * math.log(alpha)
    return logs / k / math.log(base)


def answer_lengths(sequences: Tensor, prompt_length: int, eos: list[int], pad: int | None) -> Tensor:
    """[rows]: generated tokens before the first end of sequence, or before the padding of an answer without one."""
    new = sequences[:, prompt_length:]
    stop = torch.isin(new, torch.tensor(eos, device=new.device, dtype=new.dtype)) if eos else torch.zeros_like(new) > 0
    if pad is not None and pad not in eos:
        # A pad token is real inside an answer, so only those at its end count.
        stop |= (new == pad).flip(1).long().cummin(1).values.flip(1).bool()
    return torch.where(stop.any(1), stop.long().argmax(1) if new.shape[1] else 0, new.shape[1])


@torch.no_grad()
def answer_embeddings(
    model: PreTrainedModel,
    output: ModelOutput | Tensor,
    prompt_length: int,
    prompt_mask: Tensor | None = None,
    *,
    layer: int | None = None,
    token: Literal["last", "before_last", "mean"] = "last",
    batch_size: int = 16,
) -> Tensor:
    """One hidden state per generated answer.

    Args:
        model (`PreTrainedModel`): The decoder-only model that generated.
        output (`ModelOutput` or `torch.LongTensor` of shape `[rows, prompt + answer]`): Sequences, or the output of
            `generate(..., return_dict_in_generate=True)`. With `output_hidden_states=True` and without beams its
            states are used; what it lacks, as the last token of an answer that was cut off, is made by a forward.
        prompt_length (`int`): Tokens of the prompts, with their padding.
        prompt_mask (`torch.LongTensor` of shape `[rows, prompt]`, *optional*): 0 where prompts are padded on the left.
        layer (`int`, *optional*): Index among the hidden states, 0 being the embeddings; by default half their number.
        token (`str`, *optional*, defaults to `"last"`): `"last"` token of the answer; `"before_last"`, whose state
            gave the last one and which the authors' code takes; `"mean"` over the answer's tokens.
        batch_size (`int`, *optional*, defaults to 16): Rows of a forward.

    Returns:
        `torch.Tensor` of shape `[rows, d]` in the model's dtype. End of sequence and what follows do not count; an
        answer without any token is represented by the last token of its prompt, as is `"before_last"` of one token.
    """
    if model.config.is_encoder_decoder:
        raise NotImplementedError("answer_embeddings is for decoder-only models: give eigenscore decoder states.")
    if token not in ("last", "before_last", "mean"):
        raise ValueError(f"token is {token!r} but must be one of last, before_last, mean.")
    sequences = output if isinstance(output, Tensor) else output["sequences"]
    if sequences.ndim != 2 or not 1 <= prompt_length <= sequences.shape[1]:
        raise ValueError(f"prompt_length is {prompt_length} for sequences of shape {list(sequences.shape)}.")
    rows = len(sequences)
    mask = sequences.new_ones(rows, prompt_length) if prompt_mask is None else prompt_mask
    if mask.shape != (rows, prompt_length) or not mask[:, -1].all():
        raise ValueError(
            f"prompt_mask has the shape {list(mask.shape)} but must be [{rows}, {prompt_length}], padded on the left."
        )
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    count = answer_lengths(sequences, prompt_length, ends, model.generation_config.pad_token_id)
    first = torch.where(count > 0, 0, -1) if token == "mean" else (count - (1 if token == "last" else 2)).clamp(min=-1)
    last = count - 1 if token == "mean" else first
    states = None if isinstance(output, Tensor) else _generated_states(output, layer, int(last.max()), rows)
    if states is None:
        states = torch.cat(
            [
                _forward_states(model, sequences[i], prompt_length, mask[i], count[i], layer)
                for i in torch.arange(rows, device=sequences.device).split(batch_size)
            ]
        )
    # states[:, j] belongs to token j - 1 of the answer, states[:, 0] to the last token of the prompt.
    at = torch.arange(-1, states.shape[1] - 1, device=states.device)
    chosen = (at >= first.to(at.device)[:, None]) & (at <= last.to(at.device)[:, None])
    total = states.masked_fill(~chosen[..., None], 0).float().sum(1)
    return (total / chosen.sum(1, keepdim=True)).to(states.dtype)


def _middle(states: Sequence[Tensor], layer: int | None) -> Tensor:
    index = len(states) // 2 if layer is None else layer
    if not -len(states) <= index < len(states):
        raise ValueError(f"layer is {layer} but the model has {len(states)} hidden states, the embeddings among them.")
    return states[index]


def _generated_states(output: ModelOutput, layer: int | None, last: int, rows: int) -> Tensor | None:
    """[rows, tokens, d] from the steps of `generate`, or `None` where they do not reach token `last` of the answer."""
    steps = output.get("hidden_states")
    if steps is None or output.get("beam_indices") is not None or len(steps) < last + 2:
        return None
    if any(len(step[0]) != rows for step in steps) or any(step[0].shape[1] != 1 for step in steps[1:]):
        return None
    return torch.stack([_middle(step, layer)[:, -1] for step in steps], dim=1)


def _forward_states(
    model: PreTrainedModel, sequences: Tensor, prompt_length: int, mask: Tensor, count: Tensor, layer: int | None
) -> Tensor:
    """[rows, tokens, d] of the last prompt token and the answer, by one forward with the padding masked."""
    answer = torch.arange(sequences.shape[1] - prompt_length, device=sequences.device) < count[:, None]
    mask = torch.cat([mask, answer.to(mask.dtype)], dim=1)
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"attention_mask": mask, "output_hidden_states": True, "use_cache": False}
    if "position_ids" in accepted:
        options["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    return _middle(model(sequences, **options).hidden_states, layer)[:, prompt_length - 1 :]


def compute(
    embeddings: Embeddings | Sequence[Embeddings], alpha: float = 1e-3, base: float = 10, ddof: int | None = 1
) -> dict[str, Any]:
    """`{"eigenscore": mean, "scores": one per question}` of `[K, d]`, `[questions, K, d]` or a list of `[K_i, d]`."""
    sets = [embeddings] if getattr(embeddings, "ndim", None) == 2 else list(embeddings)
    if not sets:
        raise ValueError("embeddings are empty: give at least one set of answers.")
    scores = [float(eigenscore(e, alpha, base, ddof)) for e in sets]
    return {"eigenscore": sum(scores) / len(scores), "scores": scores}


METHOD = Method(
    name="eigenscore",
    family="metrics",
    title="INSIDE: LLMs' Internal States Retain the Power of Hallucination Detection",
    authors="Chen et al.",
    arxiv="2402.03744",
    year=2024,
    repo="alibaba/eigenscore",
    status="faithful",
    target="hfext.metrics.eigenscore:eigenscore",
    usage="hfext.metrics.eigenscore.eigenscore(hfext.metrics.answer_embeddings(model, sequences, prompt_length))",
    summary="Log-determinant of the covariance of sampled answers' hidden states: high where they disagree.",
    claim="Answers that contradict each other have a higher EigenScore than answers that agree.",
    headline=Result(
        metric="AUROC of detecting wrong answers",
        setting="CoQA, SQuAD, NQ, TriviaQA; LLaMA and OPT models",
        value="above perplexity, entropy and lexical similarity in the paper's tables (figures not re-checked)",
    ),
    notes=(
        "`sequences` are about 10 answers to one question: generate(do_sample=True, temperature=0.5, top_p=0.99, "
        "top_k=10, num_return_sequences=10). Default = the authors' code: division by d - 1, decimal logarithm, alpha "
        "1e-3; ddof=None, base=math.e is the paper's formula. The token is the last of the answer; their code takes "
        "the one before it (token='before_last') or the mean. No recipe: a claim about wrong answers needs a model "
        "that knows some."
    ),
)
