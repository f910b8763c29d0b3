"""RotateKV's rotation of the values, put into the weights."""

import dataclasses

import torch
from torch import nn

from ._geometry import attention_modules, decoder, geometry, unwrapped
from ._hadamard import rotate, rotation_block
from .rotatekv import RotateKVConfig


def fuse_values(model: nn.Module, config: RotateKVConfig) -> RotateKVConfig:
    """Put the rotation of the values into the weights, where it costs nothing: v_proj gives v M, o_proj takes it back.

    The model computes what it computed, to rounding, with any cache and without hfext. Only `nn.Linear` projections in
    floating point can be changed. Keys cannot be fused: the rotary embedding stands between the weights and the cache.

    Returns the config with `fused_values=True`, to be used with this model from now on.
    """
    if config.fused_values:
        raise ValueError("fused_values is True: the weights already hold the rotation.")
    shape = geometry(unwrapped(model))
    pairs = []
    for index in shape.layers:
        module = attention_modules(model)[index]
        pair = (getattr(module, "v_proj", None), getattr(module, "o_proj", None))
        if not all(type(part) is nn.Linear for part in pair) or hasattr(module, "v_norm"):
            raise NotImplementedError(
                f"{type(module).__name__} of layer {index} has no plain v_proj and o_proj to rotate; use "
                "fused_values=False, which rotates while it runs."
            )
        pairs.append(pair)
    block = rotation_block(1, shape.head_dim, 1)
    before = _probe(model)
    kept = [[x.detach().clone() for part in pair for x in part.parameters()] for pair in pairs]
    with torch.no_grad():
        for v_proj, o_proj in pairs:
            v_proj.weight.copy_(rotate(v_proj.weight.T, block).T)
            if v_proj.bias is not None:
                v_proj.bias.copy_(rotate(v_proj.bias, block))
            o_proj.weight.copy_(rotate(o_proj.weight, block))
        off, size = (_probe(model) - before).abs().max(), before.abs().max()
        # Something between attention and o_proj, such as a norm or a gate, does not let the rotation pass.
        if not off <= size * (1e-3 if before.dtype == torch.float32 else 0.1):
            for pair, old in zip(pairs, kept, strict=True):
                for x, value in zip((x for part in pair for x in part.parameters()), old, strict=True):
                    x.copy_(value)
            raise NotImplementedError(
                f"{type(unwrapped(model)).__name__} is another function with rotated values (its outputs change by "
                f"{off / size:.1%}), so nothing was changed; use fused_values=False, which rotates while it runs."
            )
    return dataclasses.replace(config, fused_values=True)


@torch.no_grad()
def _probe(model: nn.Module) -> torch.Tensor:
    """What the decoder makes of a few tokens, [1, 8, hidden]."""
    stack = decoder(model)
    vocabulary = unwrapped(model).config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(8, device=next(stack.parameters()).device)[None] * 7 % vocabulary
    training = stack.training
    try:
        return stack.eval()(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        stack.train(training)
