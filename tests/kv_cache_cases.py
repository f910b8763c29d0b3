"""One list of configured caches; every test of `test_contract.py` runs over it, so a new method is tested by one line.

A case gives a config at its lossless limit, where the cache must equal a plain one, and one that loses something. Both
are made for a model, since some are calibrated on it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

from hfext import kv_cache


@dataclass(frozen=True)
class Case:
    """A method in two settings; `evicts` when it forgets tokens, `waits` when it compresses at the prompt's end."""

    lossless: Callable
    lossy: Callable
    evicts: bool = False
    waits: bool = False


def data(vocabulary=128, rows=4, tokens=48):
    return torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(7))


CASES = {
    "kivi": Case(
        lambda model: kv_cache.KIVIConfig(bits=16, group_size=4, residual_length=8),
        lambda model: kv_cache.KIVIConfig(bits=2, group_size=4, residual_length=8),
    ),
    "turboquant": Case(
        lambda model: kv_cache.TurboQuantConfig(bits=16, residual_length=3),
        lambda model: kv_cache.TurboQuantConfig(bits=3, residual_length=3),
    ),
    "rotatekv": Case(
        lambda model: kv_cache.RotateKVConfig(bits=16, group_size=8),
        lambda model: kv_cache.RotateKVConfig(bits=2, group_size=8, sink_topk=2, residual_length=3).calibrate(
            model, data()
        ),
    ),
    "rotatekv_uncalibrated": Case(
        lambda model: kv_cache.RotateKVConfig(bits=16, subtract_mean=True, reorder="before"),
        lambda model: kv_cache.RotateKVConfig(bits=3, subtract_mean=True),
    ),
    "a2ats": Case(
        lambda model: kv_cache.A2ATSConfig(topk=1.0, window=3, n_sink=2, codebook_size=8).calibrate(model, data()),
        lambda model: kv_cache.A2ATSConfig(topk=0.1, window=4, n_sink=2, codebook_size=16).calibrate(model, data()),
    ),
    "a2ats_storage": Case(
        lambda model: kv_cache.A2ATSConfig(
            topk=1.0, window=3, codebook_size=4, storage=kv_cache.RotateKVConfig(bits=16)
        ).calibrate(model, data(rows=1)),
        lambda model: kv_cache.A2ATSConfig(
            topk=0.1,
            window=4,
            n_sink=2,
            codebook_size=8,
            offload=True,
            storage=kv_cache.RotateKVConfig(bits=4, sink_topk=2, residual_length=3).calibrate(model, data(rows=1)),
        ).calibrate(model, data(rows=1)),
    ),
    "prefixkv": Case(
        lambda model: kv_cache.PrefixKVConfig(ratio=0.0),
        lambda model: kv_cache.PrefixKVConfig(ratio=0.5, distance=-5),
        evicts=True,
        waits=True,
    ),
    "prefixkv_offline": Case(
        lambda model: kv_cache.PrefixKVConfig(ratio=0.0).calibrate(model, data(), ratios=[0.25, 0.5]),
        lambda model: kv_cache.PrefixKVConfig(ratio=0.4, distance=-5).calibrate(model, data(), ratios=[0.25, 0.5]),
        evicts=True,
        waits=True,
    ),
    "snapkv": Case(
        lambda model: kv_cache.SnapKVConfig(capacity=1.0, window=4),
        lambda model: kv_cache.SnapKVConfig(capacity=0.5, window=4),
        evicts=True,
        waits=True,
    ),
    "h2o": Case(
        lambda model: kv_cache.H2OConfig(heavy=0.5, recent=0.5),
        lambda model: kv_cache.H2OConfig(heavy=8, recent=6),
        evicts=True,
        waits=True,
    ),
    "streamingllm": Case(
        lambda model: kv_cache.StreamingLLMConfig(window=1.0),
        lambda model: kv_cache.StreamingLLMConfig(window=12, sinks=3),
        evicts=True,
        waits=True,
    ),
    "think": Case(
        lambda model: kv_cache.ThinKConfig(ratio=0.0),
        lambda model: kv_cache.ThinKConfig(ratio=0.4, window=6),
        waits=True,
    ),
    "xkv": Case(
        lambda model: kv_cache.XKVConfig(layer_group_size=2, rank_k=1.0, rank_v=1.0, always=True),
        lambda model: kv_cache.XKVConfig(layer_group_size=2, rank_k=4, rank_v=6),
        waits=True,
    ),
    "minicache": Case(
        lambda model: kv_cache.MiniCacheConfig(start=0.0, retention=1.0),
        lambda model: kv_cache.MiniCacheConfig(start=0.0),
        waits=True,
    ),
    "cskv": Case(
        lambda model: kv_cache.CSKVConfig(k_density=1.0, v_density=1.0, window=8, init="svd").calibrate(model),
        lambda model: kv_cache.CSKVConfig(window=8, bits=4).calibrate(model, data()),
    ),
}

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def _build(model_class, config_class, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**{**SIZES, **fields})).eval()


MODELS = {
    "llama": lambda **f: _build(transformers.LlamaForCausalLM, transformers.LlamaConfig, **f),
    "qwen3": lambda **f: _build(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, head_dim=8, **f),
    "gemma3": lambda **f: _build(
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        **{
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            **f,
        },
    ),
    "stablelm": lambda **f: _build(transformers.StableLmForCausalLM, transformers.StableLmConfig, **f),
    "glm": lambda **f: _build(transformers.GlmForCausalLM, transformers.GlmConfig, head_dim=8, **f),
    "phi3": lambda **f: _build(transformers.Phi3ForCausalLM, transformers.Phi3Config, **f),
    "yarn": lambda **f: _build(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        **f,
    ),
}
