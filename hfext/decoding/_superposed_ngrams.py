"""The n-gram store as superposed decoding uses it: opened, checked, and asked for the candidates of every draft."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ngram_store import NGramStore


def check_store(store: Any) -> Any:
    """`TypeError` for what is no store."""
    if not callable(getattr(store, "probabilities", None)):
        raise TypeError(f"ngram_store is a {type(store).__name__} but must be an NGramStore or the path of one.")
    return store


def opened_store(store: Any, model: Any, lambdas: Sequence[float]) -> Any:
    """A store or what is at its path, if it fits the model and the weights; `None` for `None`."""
    if store is None:
        return None
    if isinstance(store, str | os.PathLike):
        store = NGramStore.load(store)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if check_store(store).vocab_size > vocabulary:
        raise ValueError(
            f"The n-gram store has {store.vocab_size} tokens but the model {vocabulary}: it is of another vocabulary."
        )
    if len(lambdas) + 1 < store.orders[-1]:
        raise ValueError(f"lambdas has {len(lambdas)} weights, too few for the orders {store.orders}.")
    return store


def draft_ngrams(store: Any, heads: Tensor, ids: Tensor, lengths: Tensor, lambdas: Sequence[float]) -> Tensor:
    """p_ng [B, r, c] of the candidates `ids` after the heads [B, r, L]; their last `lengths` [B] tokens count."""
    reach = min(heads.shape[-1], store.orders[-1] - 1)
    lengths = lengths.clamp(max=reach).repeat_interleave(heads.shape[1])
    p_ng = store.probabilities(heads[..., -reach:].flatten(0, 1), ids.flatten(0, 1), lambdas, lengths)
    return p_ng.to(ids.device, torch.float32).view(ids.shape)
