"""How much attention each key gets, from queries and keys alone, in blocks of queries; no [tokens, tokens] is made.

    P[h, i, t] = softmax_t(s q_i . k_t),  t visible to i       mass[h, t] = sum_i P[h, i, t]

With grouped queries the mass of a key is the mean over the query heads that share it. Everything is float32.
"""

import torch
from torch import Tensor, nn

NUMBERS = 2**24  # in one block of probabilities


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None = None,
    block: int | None = None,
) -> Tensor:
    """Sums of causal attention probabilities over the queries: [batch, heads, keys], float32.

    `queries` [batch, heads, n, dim] are those of the last n of the `keys` [batch, kv_heads, keys, dim]. Keys that are
    not `visible`, bool [batch, 1 or kv_heads, keys], get nothing, and their own queries give nothing. `block` queries
    are done at a time.
    """
    batch, heads, new, dim = queries.shape
    kv_heads, total = keys.shape[1:3]
    grouped = queries.float().reshape(batch, kv_heads, heads // kv_heads, new, dim) * scale
    columns = keys.float().unsqueeze(2).transpose(-1, -2)
    seen = visible[:, :, None, None]
    asked = visible[:, :, None, total - new :, None]
    place = torch.arange(total, device=keys.device)
    mass = torch.zeros(batch, kv_heads, heads // kv_heads, total, device=keys.device)
    size = block or max(1, min(256, NUMBERS // (batch * heads * total)))
    for start in range(0, new, size):
        stop = min(start + size, new)
        width = total - new + stop
        logits = grouped[..., start:stop, :] @ columns[..., :width]
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        causal = place[:width] <= place[total - new + start : width, None]
        hidden = torch.finfo(logits.dtype).min  # finite: a query that sees nothing must not become NaN
        share = logits.masked_fill(~(seen[..., :width] & causal), hidden).softmax(-1)
        mass[..., :width] += (share * asked[..., start:stop, :]).sum(-2)
    return mass.flatten(1, 2)


def group_mean(x: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads of a group: [batch, heads, ...] to [batch, kv_heads, ...]."""
    return x.unflatten(1, (kv_heads, -1)).mean(2)


def logit_options(module: nn.Module, head_dim: int) -> tuple[float, float | None]:
    """The scale of the logits of an attention module and the bound of their soft cap, if it has one."""
    return getattr(module, "scaling", head_dim**-0.5), getattr(module, "attn_logit_softcapping", None)
