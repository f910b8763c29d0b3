"""PASTA: selected attention heads attend to highlighted tokens of the prompt, because the others count alpha times.

    a'_ij = alpha^[j in G^-] a_ij / sum_k alpha^[k in G^-] a_ik,   G^- = prompt positions outside every span

so log(alpha) is added to the logits of the keys in G^-, for all queries. Generated tokens keep their weight. Under
`hfext_pasta` and `hfext_triton` attention the layers get one number for each key, and no mask is made; under `eager`
and `sdpa` an additive 4-D mask.

Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs, arXiv 2311.02262.
"""

import contextlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.utils import logging

from .. import compat
from ..registry import Method, Result
from ._active_steering import ACTIVE, BY_KEY, STEERING, announce_prompts, taken
from ._adapters import refuse_prompt_learning
from ._steering_input import heads_by_layer, span_rows

logger = logging.get_logger(__name__)

Heads = Mapping[int, Sequence[int]]
Span = tuple[int, int]


def steering_rows(
    spans: Sequence[Sequence[Span]],
    length: int,
    alpha: float,
    mode: str = "exclude",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What is added to the logit of each prompt position, [rows, length], in `dtype`.

    `exclude`: log(alpha) outside of the union of a row's spans. `include`: -log(alpha) inside.
    """
    inside = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, row_spans in zip(inside, spans, strict=True):
        for start, end in row_spans:
            row[start:end] = True
    log = math.log(alpha)
    zeros = torch.zeros(inside.shape, dtype=dtype)
    return zeros.masked_fill(~inside, log) if mode == "exclude" else zeros.masked_fill(inside, -log)


def steered_mask(mask: Tensor, bias: Tensor, heads: Sequence[int], num_heads: int) -> Tensor:
    """`mask` [batch or 1, heads or 1, queries, keys] plus `bias` [batch, keys] for the rows of `heads`.

    Returns [batch, num_heads, queries, keys] in the dtype of `bias`; a boolean mask (True attends) becomes additive.
    """
    least = torch.finfo(bias.dtype).min
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, least)
    per_head = bias.new_zeros(len(bias), num_heads, 1, bias.shape[1])
    per_head[:, list(heads)] = bias[:, None, None]
    return (mask.to(bias.dtype) + per_head).clamp(min=least)


def causal_mask(queries: int, query_offset: int, keys: int, key_offset: int, device: torch.device) -> Tensor:
    """True where a key is not after the query, bool [1, 1, queries, keys]; offsets are absolute positions."""
    q = torch.arange(queries, device=device) + query_offset
    k = torch.arange(keys, device=device) + key_offset
    return (k <= q[:, None])[None, None]


class AttentionSteering:
    """The handle that [`steer_attention`] returns. Active until `remove()` or the end of its `with` block."""

    def __init__(self, model: nn.Module, spans: Any, heads: Heads, alpha: float, mode: str, prompt_length: int | None):
        self.spans, self.alpha, self.mode, self.prompt_length = spans, alpha, mode, None
        self.num_heads = model.config.get_text_config().num_attention_heads
        self.by_key = compat.attention_implementation(model) in BY_KEY
        self._rows: Tensor | None = None
        self._given = prompt_length is not None
        self._generating = 0
        self._hooks = []
        self.modules: set[nn.Module] = set()
        self.suspensions = 0
        if prompt_length is not None:
            self._learn(prompt_length)
        if alpha == 1:
            return
        modules = attention_modules(model)
        for layer, chosen in heads.items():
            if chosen:
                hook = self._steer(layer, sorted(set(chosen)), inspect.signature(modules[layer].forward))
                self._hooks.append(modules[layer].register_forward_pre_hook(hook, with_kwargs=True))
                if self.by_key:
                    self._hooks.append(modules[layer].register_forward_hook(taken, always_call=True))
                self.modules.add(modules[layer])
        if self._hooks:
            announce_prompts()
            ACTIVE.add(self)

    def remove(self) -> None:
        """Take the hooks off; the model is then as it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        ACTIVE.discard(self)

    def __enter__(self) -> "AttentionSteering":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    @contextlib.contextmanager
    def generating(self, length: int | None) -> Iterator[None]:
        """Inside, `generate` runs with prompts of `length` columns; a draft by the same model runs its own inside."""
        if not self._generating and not self._given and length is not None:
            if self._rows is None:
                self._learn(length)
            self._check_prompt(length)
        self._generating += 1
        try:
            yield
        finally:
            self._generating -= 1

    def _check_prompt(self, length: int) -> None:
        if length != self.prompt_length:
            raise ValueError(
                f"The spans are of a prompt of {self.prompt_length} tokens but the model reads one of {length}: steer "
                "one prompt at a time, or give prompt_length if these are the same prompt and what follows it."
            )

    def _learn(self, length: int) -> None:
        for row, spans in enumerate(self.spans):
            for start, end in spans:
                if end > length:
                    raise ValueError(
                        f"spans: ({start}, {end}) of row {row} ends outside the prompt, which has {length} tokens."
                    )
        self.prompt_length = length
        self._rows = steering_rows(self.spans, length, self.alpha, self.mode, torch.float64)

    def _steer(self, layer: int, heads: list[int], signature: inspect.Signature) -> Callable:
        names = list(signature.parameters)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if self.suspensions:
                return None
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            hidden, mask = kwargs.get("hidden_states"), kwargs.get("attention_mask")
            batch, queries = hidden.shape[:2]
            # Models do not agree on its name.
            cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
            before, keys, key_offset = 0, queries, 0
            if cache is not None:
                before = int(cache.get_query_offset(layer))
                keys, key_offset = (int(n) for n in cache.get_mask_sizes(queries, layer))
            elif _reads_past(kwargs, mask, queries):
                raise NotImplementedError(
                    f"Layer {layer}, a {type(module).__name__}, attends to past tokens but is given no transformers "
                    "Cache: use a model that takes one, or run it with use_cache=False."
                )
            if self.by_key:
                keys = keys if mask is None else mask.shape[-1]
                bias = self._bias(batch, before, before + queries, keys, key_offset)
                kind = torch.promote_types(hidden.dtype, torch.float32)
                setattr(module, STEERING, (heads, bias.to(kind).to(hidden.device)))
                return None
            if mask is None:
                mask = causal_mask(queries, before, keys, key_offset, hidden.device)
            elif not isinstance(mask, Tensor) or mask.ndim != 4:
                raise NotImplementedError(
                    f"Steering needs a 4-D attention mask but layer {layer} gets a {type(mask).__name__}: "
                    'load the model with attn_implementation="sdpa" or "eager".'
                )
            bias = self._bias(batch, before, before + queries, mask.shape[-1], key_offset)
            kwargs["attention_mask"] = steered_mask(
                mask, bias.to(hidden.dtype).to(hidden.device), heads, self.num_heads
            )
            return (), kwargs

        return hook

    def _bias(self, batch: int, before: int, after: int, keys: int, key_offset: int) -> Tensor:
        """The rows for the keys from absolute position `key_offset`, expanded to the batch, [batch, keys]."""
        if self._rows is None:
            if before:
                raise ValueError("prompt_length must be given when steering begins after the prompt was read.")
            self._learn(after)
        if not before and not self._given and not self._generating:
            self._check_prompt(after)
        if batch % len(self.spans):
            raise ValueError(f"spans has {len(self.spans)} rows but the batch {batch}, which is no multiple.")
        window = self._rows[:, key_offset : key_offset + keys]
        window = nn.functional.pad(window, (0, keys - window.shape[1]))
        return window.repeat_interleave(batch // len(self.spans), 0)


def _reads_past(kwargs: dict[str, Any], mask: Any, queries: int) -> bool:
    """Whether arguments without a `Cache` speak of keys of earlier forwards."""
    past = any("past" in name and value is not None for name, value in kwargs.items())
    return past or (isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] > queries)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention module of each layer, by `layer_idx`."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        fields = vars(module)
        layer = fields.get("layer_idx")
        if type(module).__name__.endswith("Attention") and isinstance(layer, int):
            if fields.get("is_cross_attention"):
                continue
            if layer in found:
                raise NotImplementedError(f"{type(model).__name__} has two attention modules of layer {layer}.")
            found[layer] = module
    if not found:
        raise NotImplementedError(f"{type(model).__name__} has no attention modules that name their layer.")
    return found


def steer_attention(
    model: PreTrainedModel,
    spans: Sequence[Span] | Sequence[Sequence[Span]],
    heads: Heads,
    alpha: float = 0.01,
    mode: Literal["exclude", "include"] = "exclude",
    *,
    prompt_length: int | None = None,
) -> AttentionSteering:
    """Steer attention heads towards token ranges of the prompt: `with steer_attention(...): model.generate(...)`.

    All forwards of that prompt and what follows it are steered until the handle's `remove()`; another prompt needs
    another handle. The second stream of context-aware decoding is not steered. `eager` and `sdpa` materialise a mask
    [batch, heads, queries, keys] for each steered layer, `hfext_pasta` and `hfext_triton` none.

    Args:
        model (`PreTrainedModel`): Decoder-only, with `eager`, `sdpa`, `hfext_pasta` or `hfext_triton` attention.
        spans (`list[tuple[int, int]]` or one such list for each prompt): Token ranges (start, end), end excluded,
            counted from the first column of `input_ids`, left padding included. See [`span_to_tokens`]. With more
            rows than lists, as in beam search, each list serves rows that stand together.
        heads (`dict[int, list[int]]`): Query heads by layer. Empty: nothing changes.
        alpha (`float`, *optional*, defaults to 0.01): > 0. 1 changes nothing.
        mode (`str`, *optional*, defaults to `"exclude"`): `exclude` weighs prompt tokens outside the spans by alpha;
            `include` weighs those inside by 1 / alpha, which differs in what generated tokens keep.
        prompt_length (`int`, *optional*): Columns of the prompt. By default those of the prompt of `generate`, in
            every mode, or of the first forward outside of it; a loop of one's own that reads the prompt in parts,
            with drafted tokens or without a cache has to give it.

    Raises:
        ValueError: For values out of range, an unknown layer or head, empty or overlapping spans, and where the model
            reads a prompt of another length.
        TypeError: For spans or heads of a wrong kind.
        NotImplementedError: For attention without additive masks, encoder-decoder models, past keys that are no
            `Cache`, prompt tuning, prefix tuning and p-tuning.
    """
    alpha = alpha.item() if isinstance(alpha, Tensor) and alpha.ndim == 0 else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha is {alpha!r} but must be a number.")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha} but must be > 0 and finite.")
    if mode not in ("exclude", "include"):
        raise ValueError(f"mode is {mode!r} but must be one of exclude, include.")
    if model.config.is_encoder_decoder:
        raise NotImplementedError("Encoder-decoder models are not steered: use a decoder-only model.")
    refuse_prompt_learning(model, "Attention steering")
    name = compat.attention_implementation(model)
    if name not in ("eager", "sdpa", *BY_KEY):
        raise NotImplementedError(
            f"The attention {name!r} takes no additive mask: load the model with attn_implementation "
            "'hfext_pasta', 'sdpa' or 'eager'."
        )
    layers, count = attention_modules(model), model.config.get_text_config().num_attention_heads
    heads = heads_by_layer(heads, layers, count)
    return AttentionSteering(model, span_rows(spans), heads, float(alpha), mode, prompt_length)


def span_to_tokens(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    substring: str | tuple[int, int],
    *,
    occurrence: int = 0,
    add_special_tokens: bool = True,
    padded_length: int | None = None,
) -> Span:
    """The tokens (start, end) of `text` that `substring`, a string or a character range, touches.

    `occurrence` counts from 0. `padded_length` is the width of the left-padded batch that the row stands in.
    """
    if not tokenizer.is_fast:
        raise NotImplementedError(f"{type(tokenizer).__name__} gives no character offsets: use a fast tokenizer.")
    if isinstance(substring, str):
        start = -1
        for _ in range(occurrence + 1):
            start = text.find(substring, start + 1) if substring else -1
            if start < 0:
                raise ValueError(f"The span {substring!r} is not found in the text (occurrence {occurrence}).")
        end = start + len(substring)
    else:
        start, end = substring
        if not 0 <= start < end <= len(text):
            raise ValueError(f"The characters ({start}, {end}) are not a range of the text, of length {len(text)}.")
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens)["offset_mapping"]
    touched = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    if not touched:
        raise ValueError(f"The span {substring!r} of the text belongs to no token.")
    shift = 0 if padded_length is None else padded_length - len(offsets)
    if shift < 0:
        raise ValueError(f"padded_length is {padded_length} but the text has {len(offsets)} tokens.")
    return touched[0] + shift, touched[-1] + 1 + shift


def profile_heads(
    model: PreTrainedModel,
    eval_fn: Callable[[dict[int, list[int]]], float],
    *,
    layers_top: int = 3,
    heads_top: int = 8,
) -> dict[int, list[int]]:
    """Heads worth steering, coarse to fine: whole layers first, then the single heads of the best layers.

    Args:
        model (`PreTrainedModel`): Its layers and heads are tried.
        eval_fn (`Callable`): From heads by layer to a score, higher is better; it steers with them.
        layers_top (`int`, *optional*, defaults to 3): Layers kept after the first pass.
        heads_top (`int`, *optional*, defaults to 8): Heads returned.
    """
    layers, count = sorted(attention_modules(model)), model.config.get_text_config().num_attention_heads
    for name, value, most in (("layers_top", layers_top, len(layers)), ("heads_top", heads_top, layers_top * count)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value} but must be between 1 and {most}.")
    coarse = {layer: eval_fn({layer: list(range(count))}) for layer in logging.tqdm(layers, desc="layers")}
    best = sorted(layers, key=lambda layer: -coarse[layer])[:layers_top]
    singles = [(layer, head) for layer in best for head in range(count)]
    fine = {single: eval_fn({single[0]: [single[1]]}) for single in logging.tqdm(singles, desc="heads")}
    chosen = sorted(singles, key=lambda single: -fine[single])[:heads_top]
    return {layer: sorted(h for k, h in chosen if k == layer) for layer in sorted({k for k, _ in chosen})}


def save_heads(heads: Heads, path: str | Path) -> None:
    """Write heads by layer as JSON."""
    Path(path).write_text(json.dumps({str(k): [int(h) for h in v] for k, v in heads.items()}) + "\n", encoding="utf-8")


def load_heads(path: str | Path) -> dict[int, list[int]]:
    """Read what [`save_heads`] wrote."""
    return {int(k): v for k, v in json.loads(Path(path).read_text(encoding="utf-8")).items()}


METHOD = Method(
    name="pasta",
    family="decoding",
    title="Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs",
    authors="Zhang et al.",
    arxiv="2311.02262",
    year=2023,
    repo="QingruZhang/PASTA",
    status="variant",
    difference="With several spans the tokens outside of their union are weighed once; the authors' code adds the "
    "penalty once for each span, highlighted tokens included. `include` weighs the highlighted tokens by 1/alpha and "
    "nothing else; theirs, with alpha < 1, ends with the rest of the prompt weighed by 1/alpha.",
    target="hfext.decoding.pasta:steer_attention",
    usage="with hfext.decoding.steer_attention(model, spans, heads): model.generate(**inputs)",
    summary="Makes chosen attention heads look at chosen parts of the prompt, without training.",
    claim="Steering the attention of profiled heads to a part of the prompt makes the model use it.",
    headline=Result(
        metric="accuracy, average of four tasks",
        setting="LLaMA-7B",
        value="+22 % (abstract)",
        baseline="prompting",
    ),
    recipe="decoding/pasta-smollm2-planted_fact.yaml",
    notes="`span_to_tokens(tokenizer, prompt, phrase)` gives spans, `profile_heads(model, evaluate)` the heads that "
    "help a model, for `save_heads` and `load_heads`; heads that were not profiled can do harm. Needs `eager`, "
    "`sdpa`, `hfext_pasta` or `hfext_triton` attention; the latter two make no mask. One handle serves one prompt and "
    "what is generated from it; the first handle wraps `GenerationMixin.generate`, which then tells handles how long "
    "the prompt is.",
)
