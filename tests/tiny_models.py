"""Small models from their configs, the same for a seed on every machine."""

import torch


def factory(model_class, config_class, **defaults):
    """`make(seed=0, **config fields) -> model` in float32, eval mode, with weights that depend on the seed alone."""

    def make(seed=0, **fields):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model_class(config_class(**{**defaults, **fields})).eval()

    return make


LLAMA = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
