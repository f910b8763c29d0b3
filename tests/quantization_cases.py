"""One list of quantisers of weights; every test of `test_contract.py` runs over it, so a method is tested by a line.

A case makes a config from `bits` and further options; calibrated methods get rows of ids as their data.
"""

from collections.abc import Callable

import torch
import transformers
from tiny_models import LLAMA, factory

from hfext import quantization as q


def data(rows=6, tokens=40, vocabulary=128, seed=7):
    return torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def plain(config: type, **fixed) -> Callable:
    return lambda **options: config(**{"group_size": 16, **fixed, **options})


def calibrated(config: type, **fixed) -> Callable:
    return plain(config, **{"dataset": data(), "sequence_length": 40, **fixed})


CASES: dict[str, Callable] = {
    "rtn": plain(q.RTNConfig),
    "hqq": plain(q.HQQConfig),
    "lorc": lambda **o: q.LoRCConfig(quantizer=plain(q.RTNConfig)(**o), rank=4),
    "awq": calibrated(q.AWQConfig),
    "gptq": calibrated(q.GPTQConfig),
    "decoupleq": calibrated(q.DecoupleQConfig, block_epochs=1),
    "ofa": lambda **o: q.OFAConfig(quantizer=plain(q.RTNConfig)(**o), choices=(2, 3, 4, 8), rank=2),
    "sketchtune": calibrated(q.SketchTuneConfig),
    "adaquant": calibrated(q.AdaQuantConfig, iterations=5, rows=64, clip_search=False),
    # Plain inputs: what is said of weights here holds for the config inside. test_bos_aware.py has the rest.
    "bos_aware": lambda **o: q.BOSAwareConfig(
        quantizer=calibrated(q.GPTQConfig)(**o), activation_bits=None, sequence_length=40
    ),
}


def _factor_bits(layer):
    rows, columns = layer.out_features, layer.in_features
    return 8 * 4 * (rows + columns) + 16 * (rows + 4)


# Bits that a layer holds for each weight, where that is not a code with 32 bits of grid for a group.
SIZES: dict[str, Callable] = {
    "ofa": lambda layer: (
        sum(layer.choices)
        + 4 * 32 / layer.group_size
        + 4 * 32 * layer.rank * (1 / layer.in_features + 1 / layer.out_features)
    ),
    "lorc": lambda layer: layer.bits + 1 + _factor_bits(layer) / (layer.in_features * layer.out_features),
    "sketchtune": lambda layer: layer.bits + 16 * 2**layer.bits / layer.group_size,
}


def tiny(model_class, config_class, seed=0, **fields):
    return factory(model_class, config_class, **LLAMA)(seed, **fields)


def llama(**fields):
    return tiny(transformers.LlamaForCausalLM, transformers.LlamaConfig, **fields)


MODELS = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "gemma3": lambda: tiny(
        transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, head_dim=8, sliding_window=8
    ),
    "opt": lambda: tiny(transformers.OPTForCausalLM, transformers.OPTConfig, ffn_dim=64, word_embed_proj_dim=32),
    "mixtral": lambda: tiny(transformers.MixtralForCausalLM, transformers.MixtralConfig, num_local_experts=4),
    "gpt_oss": lambda: tiny(
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        max_position_embeddings=131072,
    ),
    "qwen3_moe": lambda: tiny(
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        head_dim=8,
    ),
}
