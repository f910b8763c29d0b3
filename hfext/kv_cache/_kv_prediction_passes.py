"""Forward passes that give and take projections: what `k_proj` and `v_proj` return is read, replaced, or turned into a
cache by the model's own attention code."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from ..compat import replaced

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class _Enough(Exception):
    """Ends a forward pass from inside, once nothing more of it is needed."""


@contextlib.contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Inside, each module has its forward hook; afterwards none of them, whatever happened."""
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode and gets no gradient; afterwards every module and parameter is as before."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        model.eval()
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def attention_modules(model: nn.Module, role: str) -> list[nn.Module]:
    """The self-attention of each layer, or `NotImplementedError` for a layout whose keys cannot be read."""
    config = model.config.get_text_config(decoder=True)
    found = [m for m in model.modules() if set(PROJECTIONS) <= dict(m.named_children()).keys()]
    kinds = sorted(set(get_layer_types_and_kwargs(config)[0]) - {"full_attention", "sliding_attention"})
    if config.is_encoder_decoder or kinds or len(found) != config.num_hidden_layers:
        raise NotImplementedError(
            f"The {role} is a {type(model).__name__} with {config.num_hidden_layers} layers, of which {len(found)} "
            f"have {', '.join(PROJECTIONS)}{f'; some are {kinds}' if kinds else ''}. KV prediction supports decoders "
            "whose every layer is full or sliding attention with these three projections (as Llama, Mistral, Qwen2, "
            "Qwen3, GLM, OLMo 2, Phi-2): no fused qkv_proj, no chunked or linear attention, no encoder-decoder."
        )
    return found


def rotary_module(model: nn.Module) -> nn.Module:
    """The one rotary embedding of a model."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if len(found) != 1 or "layer_type" in inspect.signature(found[0].forward).parameters:
        raise NotImplementedError(
            f"The base is a {type(model).__name__} with {len(found)} rotary embeddings, but KV prediction supports "
            "models with one `rotary_emb` for all layers."
        )
    return found[0]


def read_projections(
    attention: Sequence[nn.Module], layers: Iterable[int], forward: Callable[[], Any], stop: bool
) -> tuple[Any, dict[int, tuple[Tensor, Tensor]]]:
    """What `forward` returns, and the outputs of `k_proj` and `v_proj` [batch, tokens, width] of each of `layers`.

    With `stop` the pass ends when all of these are there, and returns `None`.
    """
    layers, seen = set(layers), {}

    def keep(slot):
        def hook(module, args, output):
            seen[slot] = output
            if stop and len(seen) == 2 * len(layers):
                raise _Enough

        return hook

    with hooked((attention[i].get_submodule(name), keep((i, name))) for i in layers for name in PROJECTIONS[1:]):
        try:
            result = forward()
        except _Enough:
            result = None
    return result, {i: (seen[i, "k_proj"], seen[i, "v_proj"]) for i in layers}


def with_projections(attention: Sequence[nn.Module], given: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Inside, each layer's `k_proj` and `v_proj` return what is given, [batch, tokens, width], with its gradient."""

    def instead(value):
        return lambda module, args, output: value.to(output)

    return hooked(
        (module.get_submodule(name), instead(value))
        for module, pair in zip(attention, given, strict=True)
        for name, value in zip(PROJECTIONS[1:], pair, strict=True)
    )


def fill_cache(
    attention: Sequence[nn.Module],
    tables: tuple[Tensor, Tensor],
    given: Sequence[tuple[Tensor, Tensor]],
    cache: Cache,
    repeats: int = 1,
) -> None:
    """Write projections [batch, tokens, width] into `cache` as the model's attention writes its own.

    The attention is called with its three projections replaced and stopped at `Cache.update`, so that key norms and
    partial, interleaved or scaled rotary embeddings are the model's own. tables: cos and sin of the positions,
    [batch, tokens, rotated]. Rows are repeated as `generate` repeats them for beams.
    """
    update = cache.update

    def write(keys, values, *args, **kwargs):
        update(keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0), *args, **kwargs)
        raise _Enough

    for module, pair in zip(attention, given, strict=True):
        place = next(module.parameters()).device
        keys, values, cos, sin = (x.to(place) for x in (*pair, *tables))
        queries = keys.new_zeros(1, 1, 1).expand(*keys.shape[:2], module.q_proj.out_features)
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(cache, "update", write))
            for name, output in zip(PROJECTIONS, (queries, keys, values), strict=True):
                stack.enter_context(replaced(module.get_submodule(name), "forward", lambda x, _out=output: _out))
            try:
                # Of the hidden states only the shape is looked at: every projection of them is replaced.
                module(
                    hidden_states=keys[..., :0],
                    position_embeddings=(cos, sin),
                    attention_mask=None,
                    past_key_values=cache,
                )
            except _Enough:
                continue
        raise NotImplementedError(f"{type(module).__name__} does not write into the cache that it is given.")


def prune_layers(base: PreTrainedModel, keep: float = 0.5) -> tuple[PreTrainedModel, tuple[int, ...]]:
    """An auxiliary model of the same class with a share `keep` of the layers, evenly spread, and its layer map.

    Layer i of n is base layer floor(i L / n); a base layer is predicted from the last kept layer not behind it. The
    new model has its own copy of the weights and may be trained.
    """
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"base is a {type(base).__name__} but must be a PreTrainedModel; merge an adapter first.")
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep} but must be in (0, 1].")
    attention = attention_modules(base, "base")
    total = len(attention)
    number = max(1, round(keep * total))
    kept = [i * total // number for i in range(number)]
    first = next(name for name, module in base.named_modules() if module is attention[0])
    stem = first.rpartition(".0.")[0] + "."
    fields = base.config.to_dict()
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == total and "layer" in name:
            fields[name] = [value[i] for i in kept]
    config = type(base.config).from_dict({**fields, "num_hidden_layers": number})
    with torch.random.fork_rng():
        aux = type(base)(config).to(device=base.device, dtype=base.dtype)
    weights = {}
    for name, value in base.state_dict().items():
        index, _, rest = name.removeprefix(stem).partition(".")
        if not name.startswith(stem):
            weights[name] = value
        elif int(index) in kept:
            weights[f"{stem}{kept.index(int(index))}.{rest}"] = value
    aux.load_state_dict(weights)
    return aux.train(base.training), tuple(sum(k <= j for k in kept) - 1 for j in range(total))
