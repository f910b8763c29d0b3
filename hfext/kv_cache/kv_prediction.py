"""KV Prediction: a small auxiliary model reads the prompt, linear maps turn its cache into the cache of the big one.

    K^_j = W^K_j flat(K_aux[m(j)]) + b^K_j,   V^_j = W^V_j flat(V_aux[m(j)]) + b^V_j        for each base layer j

m: non-decreasing map from base layers to auxiliary layers; flat: all key-value heads side by side. Keys are those that
`k_proj` returns, before any key norm and before the rotary embedding, on both sides. A prompt t_1..t_n: the auxiliary
model reads t_1..t_{n-1}, the base starts at t_n with the predicted cache, and nobody asks the auxiliary model again.

    loss = CE(base) + z(base) + lambda_aux (CE(aux) + z(aux)) + lambda_kv sum_j (mean|K^_j - K_j| + mean|V^_j - V_j|)
    z = z_loss mean(logsumexp(logits)^2)

The base is frozen and, in training, attends to nothing but predictions. Sums are taken in float32. Not in the paper:
the auxiliary model stops behind the last projection that is needed, since what follows cannot change the cache.

KV Prediction for Improved Time to First Token, arXiv 2410.08391.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.utils import ModelOutput

from ..registry import Method, Result
from ._kv_prediction_files import drop_twins, load, restore_twins, save
from ._kv_prediction_passes import (
    PROJECTIONS,
    attention_modules,
    fill_cache,
    frozen,
    prune_layers,
    read_projections,
    rotary_module,
    with_projections,
)

__all__ = ["METHOD", "KVPredictionConfig", "KVPredictionOutput", "KVPredictor", "even_map", "prune_layers"]

PARTS = ("loss_base", "loss_aux", "loss_z", "loss_kv")
MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


@dataclass(frozen=True, kw_only=True)
class KVPredictionConfig:
    """Options of [`KVPredictor`].

    Args:
        layer_map (`tuple[int, ...]`, *optional*): The auxiliary layer from which each base layer is predicted, one
            entry for each base layer, never decreasing. `None` is [`even_map`].
        lambda_aux (`float`, *optional*, defaults to 1.0): Weight of the auxiliary model's own loss, >= 0.
        lambda_kv (`float`, *optional*, defaults to 1.0): Weight of the distance to the true keys and values, >= 0.
        z_loss (`float`, *optional*, defaults to 1e-4): Weight of the squared log-partition, >= 0.
        base_id (`str`, *optional*, defaults to `""`): Name of the base; from its config when not given.
        aux_id (`str`, *optional*, defaults to `""`): Name of the auxiliary model, likewise.
    """

    layer_map: tuple[int, ...] | None = None
    lambda_aux: float = 1.0
    lambda_kv: float = 1.0
    z_loss: float = 1e-4
    base_id: str = ""
    aux_id: str = ""

    def __post_init__(self):
        for name in ("lambda_aux", "lambda_kv", "z_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"KVPredictionConfig: {name} is {getattr(self, name)} but must be >= 0 and finite.")
        if self.layer_map is not None:
            layers = tuple(self.layer_map)
            object.__setattr__(self, "layer_map", layers)
            if any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
                raise TypeError(f"KVPredictionConfig: layer_map is {layers} but must hold whole numbers.")
            if not layers or min(layers) < 0 or sorted(layers) != list(layers):
                raise ValueError(
                    f"KVPredictionConfig: layer_map is {layers} but must hold layers >= 0, never decreasing."
                )


def even_map(num_aux: int, num_base: int) -> tuple[int, ...]:
    """Each auxiliary layer serves num_base // num_aux base layers; the first num_base % num_aux serve one more."""
    if not 1 <= num_aux <= num_base:
        raise ValueError(f"num_aux is {num_aux} but must be in [1, num_base], which is [1, {num_base}].")
    share, more = divmod(num_base, num_aux)
    return tuple(i for i in range(num_aux) for _ in range(share + (i < more)))


def positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Positions [batch, tokens] as `generate` counts them: padding has none and stands at 0."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)


def target_mask(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """bool [batch, tokens-1]: where a real token predicts a label that counts (neither -100 nor padding)."""
    counted = labels[:, 1:] != -100
    if attention_mask is not None:
        counted = counted & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    return counted


def cross_entropy_and_z(logits: Tensor, labels: Tensor, counted: Tensor, items: Tensor | int) -> tuple[Tensor, Tensor]:
    """Sums over the counted next tokens, / items: cross-entropy and logsumexp^2. logits [batch, tokens, vocab]."""
    logits, targets = logits[:, :-1][counted].float(), labels[:, 1:][counted]
    z = logits.logsumexp(-1)
    return (z - logits.gather(1, targets[:, None])[:, 0]).sum() / items, z.square().sum() / items


def mean_distance(predicted: Tensor, true: Tensor, real: Tensor, tokens: Tensor | int) -> Tensor:
    """Sum of |predicted - true| [batch, tokens, width] over real tokens, / (tokens * width)."""
    return (predicted.float() - true.to(predicted.device).float()).abs().mean(-1).mul(real).sum() / tokens


@dataclass
class KVPredictionOutput(ModelOutput):
    """`logits` of the base [batch, tokens, vocab]; with labels also the `loss` and its `parts` [4]: cross-entropy of
    base and auxiliary model, both z-losses as weighted, and the distance of keys and values."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    parts: Tensor | None = None


class KVPredictor(nn.Module):
    """An auxiliary model and linear maps that predict the key-value cache of `base` for a prompt.

    `predictor.generate(**inputs)` and `base.generate(**inputs, custom_generate=predictor.decode)` answer from the
    predicted cache; so does `base.generate(**inputs, past_key_values=predictor.prefill(**inputs))`, where the cache of
    a beam search must first be repeated with `cache.batch_repeat_interleave(num_beams)`. A prompt of one token needs
    no prediction. Assisted and prompt-lookup decoding of transformers 5.23 read the prompt again behind a filled
    cache, so they go with none of these. Parameters, `state_dict`, `.to()` and `.train()` are those of the auxiliary
    model and the maps: the base is only referred to. While a cache is filled the base's projections are replaced, so
    one base does not serve several threads at once.

    Args:
        aux (`PreTrainedModel`): The auxiliary language model. Training changes it.
        base (`PreTrainedModel`): The language model to serve, also in a PEFT wrapper. Same tokenizer.
        layer_map (`Sequence[int]`, *optional*): Field of [`KVPredictionConfig`].
        **options: Other fields of [`KVPredictionConfig`].
    """

    accepts_loss_kwargs = True

    def __init__(self, aux: nn.Module, base: nn.Module, layer_map: Sequence[int] | None = None, **options: Any):
        super().__init__()
        if not (isinstance(aux, nn.Module) and isinstance(base, nn.Module)):
            raise TypeError(
                f"KVPredictor takes two models, not {type(aux).__name__} and {type(base).__name__}: "
                "`aux, layer_map = prune_layers(base); KVPredictor(aux, base, layer_map)`."
            )
        if isinstance(layer_map, KVPredictionConfig):
            raise TypeError("layer_map is a KVPredictionConfig but must be its field: `layer_map=config.layer_map`.")
        object.__setattr__(self, "base", base)
        self._base_attention = attention_modules(base, "base")
        self._aux_attention = attention_modules(aux, "auxiliary model")
        self._rotary = (rotary_module(base),)
        theirs, mine = len(self._base_attention), len(self._aux_attention)
        layer_map = even_map(mine, theirs) if layer_map is None else layer_map
        options = {"base_id": base.config.name_or_path, "aux_id": aux.config.name_or_path, **options}
        self.options = KVPredictionConfig(layer_map=layer_map, **options)
        layers = self.options.layer_map
        if len(layers) != theirs or layers[-1] >= mine:
            raise ValueError(
                f"layer_map is {layers} but must hold {theirs} layers, one for each of the base, in [0, {mine - 1}]."
            )
        sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (aux, base)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"vocab_size is {sizes[0]} in the auxiliary model and {sizes[1]} in the base: not one.")
        self.aux = aux
        self.keys, self.values = (self._maps(name) for name in PROJECTIONS[1:])
        self.register_state_dict_post_hook(drop_twins)
        self.register_load_state_dict_pre_hook(restore_twins)

    def _maps(self, name: str) -> nn.ModuleList:
        width = [
            (self._aux_attention[m].get_submodule(name).out_features, theirs.get_submodule(name).out_features)
            for m, theirs in zip(self.options.layer_map, self._base_attention, strict=True)
        ]
        return nn.ModuleList(nn.Linear(*sizes, dtype=self.aux.dtype, device=self.aux.device) for sizes in width)

    def predict(self, read: dict[int, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [batch, tokens, base width] of each base layer, before norm and rotary embedding."""
        sources = (read[i] for i in self.options.layer_map)
        return [(k(a), v(b)) for k, v, (a, b) in zip(self.keys, self.values, sources, strict=True)]

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        repeats: int = 1,
    ) -> Cache:
        """The predicted cache of the base for all but the last token.

        Args:
            input_ids (`Tensor`): [batch, n], padded on the left.
            attention_mask (`Tensor`, *optional*): [batch, n], 0 at padding.
            position_ids (`Tensor`, *optional*): [batch, n]; counted from the mask when not given.
            cache (`Cache`, *optional*): An empty cache of the base to fill. `None` is a new `DynamicCache`.
            repeats (`int`, *optional*, defaults to 1): Rows of the cache for each row of the prompt, for beams.

        Returns:
            `Cache`: Of length n-1.
        """
        cache = DynamicCache(config=self.base.config) if cache is None else cache
        if cache.get_seq_length():
            raise ValueError(f"cache holds {cache.get_seq_length()} tokens but must be empty: all of it is predicted.")
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            raise ValueError(f"input_ids has the shape {tuple(input_ids.shape)} but must be [batch, n] with n >= 1.")
        mask = attention_mask
        if mask is not None and (mask.shape != input_ids.shape or (mask[:, -1] == 0).any()):
            raise ValueError("attention_mask must have the shape of input_ids and be 1 at the end: pad on the left.")
        if input_ids.shape[1] == 1:
            return cache
        place = self.keys[0].weight.device
        input_ids = input_ids.to(place)
        mask = None if mask is None else mask.to(place)
        position_ids = positions(input_ids, mask) if position_ids is None else position_ids.to(place)
        inputs = {"input_ids": input_ids[:, :-1], "position_ids": position_ids[:, :-1]}
        inputs["attention_mask"] = None if mask is None else mask[:, :-1]
        _, read = read_projections(
            self._aux_attention, self.options.layer_map, lambda: self.aux(**inputs, use_cache=False), stop=True
        )
        dtype = self.base.dtype
        given = [(k.to(dtype), v.to(dtype)) for k, v in self.predict(read)]
        # Rotary embeddings that scale with the length look at the whole prompt, as in the base's own pass over it.
        like = torch.empty(0, dtype=dtype, device=self.base.device)
        tables = [x[:, :-1] for x in self._rotary[0](like, position_ids.to(self.base.device))]
        fill_cache(self._base_attention, tables, given, cache, repeats)
        return cache

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """`base.generate` with these arguments, its first token from the predicted cache."""
        _before_generate(None, kwargs.get("assistant_model"))
        return self.base.generate(*args, **kwargs, custom_generate=functools.partial(self.decode, streamer=streamer))

    def decode(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """For `base.generate(custom_generate=predictor.decode)`: greedy search, sampling and beam search."""
        if not any(module is self._base_attention[0] for module in model.modules()):
            raise ValueError(f"decode was given a {type(model).__name__} that is not the base of this predictor.")
        mode = generation_config.get_generation_mode()
        cache = model_kwargs.get("past_key_values")
        if mode.value not in MODES or cache is None:
            raise NotImplementedError(
                f"KV prediction does greedy search, sampling and beam search with a cache, not {mode.value} with "
                f"use_cache={generation_config.use_cache}."
            )
        if streamer is not None and generation_config.num_beams > 1:
            raise ValueError("streamer is given but num_beams is above 1: beams cannot be streamed.")
        # `generate` has repeated the rows already; one of each is read by the auxiliary model.
        repeats = max(generation_config.num_beams, generation_config.num_return_sequences or 1)
        rows = {name: model_kwargs.get(name) for name in ("attention_mask", "position_ids")}
        rows = {name: value if value is None else value[::repeats] for name, value in rows.items()}
        self.prefill(input_ids[::repeats], **rows, cache=cache, repeats=repeats)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        return getattr(type(model), GENERATION_MODES_MAPPING[mode])(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **{} if streamer is None else {"streamer": streamer},
            **model_kwargs,
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
    ) -> KVPredictionOutput:
        """The base over a text with predicted keys and values only, as in training.

        Args:
            input_ids, attention_mask, position_ids (`Tensor`): [batch, tokens].
            labels (`Tensor`, *optional*): [batch, tokens], not shifted, -100 where nothing counts.
            num_items_in_batch (`int`, *optional*): Labels over which to average; those of this batch by default.
            num_tokens_in_batch (`int`, *optional*): Tokens over which to average the distance; likewise.
        """
        options = self.options
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        inputs["position_ids"] = positions(input_ids, attention_mask) if position_ids is None else position_ids
        alone = labels is not None and options.lambda_aux > 0
        own, read = read_projections(
            self._aux_attention, options.layer_map, lambda: self.aux(**inputs), stop=not alone
        )
        if torch.is_grad_enabled() and labels is not None and not all(k.requires_grad for k, _ in read.values()):
            raise NotImplementedError(
                "The keys of the auxiliary model carry no gradient: it is frozen, or checkpointed with "
                "use_reentrant=True. Unfreeze it, or set use_reentrant=False."
            )
        given = self.predict(read)
        with frozen(self.base):
            with with_projections(self._base_attention, given):
                logits = self.base(**inputs).logits
            if labels is None:
                return KVPredictionOutput(logits=logits)
            kv = logits.new_zeros((), dtype=torch.float32)
            if options.lambda_kv > 0:
                with torch.no_grad():
                    every = range(len(given))
                    _, true = read_projections(self._base_attention, every, lambda: self.base(**inputs), stop=True)
                real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                tokens = real.sum().clamp(min=1) if num_tokens_in_batch is None else num_tokens_in_batch
                pairs = [(p, t) for j in every for p, t in zip(given[j], true[j], strict=True)]
                kv = sum(mean_distance(p, t, real, tokens) for p, t in pairs)
        counted = target_mask(labels, attention_mask)
        items = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        base, z = cross_entropy_and_z(logits, labels, counted, items)
        aux, aux_z = cross_entropy_and_z(own.logits, labels, counted, items) if alone else (0 * base, 0 * z)
        z = options.z_loss * (z + options.lambda_aux * aux_z)
        loss = base + z + options.lambda_aux * aux + options.lambda_kv * kv
        return KVPredictionOutput(loss=loss, logits=logits, parts=torch.stack([base, aux, z, kv]).detach())

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """That of the auxiliary model; `Trainer` calls it."""
        self.aux.activation_checkpointing_enable(**kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the maps, the options and, in `auxiliary/`, the auxiliary model by its own `save_pretrained`."""
        save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: nn.Module, **kwargs: Any) -> "KVPredictor":
        """What `save_pretrained` wrote, for the same `base`; `kwargs` are for the auxiliary `from_pretrained`."""
        return load(cls, Path(folder), base, **kwargs)


def _before_generate(streamer: Any, assistant_model: Any, **kwargs: Any) -> None:
    if assistant_model is not None:
        raise NotImplementedError(
            "assistant_model is given, but assisted generation cannot begin with a filled cache."
        )
    if streamer is not None:
        raise NotImplementedError("`generate` keeps the streamer from a `custom_generate`: call predictor.generate.")


KVPredictor.decode.hfext_before_generate = _before_generate


METHOD = Method(
    name="kv_prediction",
    family="kv_cache",
    title="KV Prediction for Improved Time to First Token",
    authors="Horton et al.",
    arxiv="2410.08391",
    year=2024,
    repo="apple/corenet",
    status="faithful",
    target="hfext.kv_cache.kv_prediction:KVPredictor",
    config=KVPredictionConfig,
    usage="hfext.kv_cache.KVPredictor(aux, base).generate(**inputs)",
    summary="A small model reads the prompt and linear maps predict the big model's cache from its own, so that the "
    "first token comes sooner.",
    claim="With a predicted cache the base continues a prompt better than the auxiliary model does alone, and its "
    "first token comes sooner than after its own reading of the prompt.",
    headline=Result(
        metric="relative gain in TriviaQA accuracy at equal operations until the first token, %",
        setting="OpenELM, smaller or layer-pruned auxiliary model, against token pruning and smaller models",
        value="15 to 50",
    ),
    recipe="kv_cache/kv_prediction-llama-wikitext2.yaml",
    notes="Needs training: `KVPredictionTrainer`. The paper trains with AdamW (betas 0.9 and 0.95, weight decay 0.1), "
    "cosine from 1.2e-3 to 1.2e-4 with 5k steps of warm-up, 70k steps of 2M tokens, gradient clipping at 1. Decoders "
    "with separate q_proj, k_proj and v_proj, one rotary embedding, and full or sliding-window attention.",
)
