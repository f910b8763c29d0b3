"""A layer that stores each token as a code, once: what quantisers share.

Tokens lie in two stretches, `[coded | recent]`. New tokens enter `recent` in full precision and take part in the
attention of their own call exactly; afterwards the oldest are coded, so that `residual` stay recent. A code never
changes. While tokens may be taken back (assisted decoding) coding waits for `crop`, so that a rejected draft leaves no
trace. A call may ask for some tokens alone (`wanted`); then only these are decoded.
"""

import math
from abc import abstractmethod
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ._cache import CompressedLayer
from ._state import Shared

READERS = ("hfext_triton", "hfext_pasta")  # attentions that read codes
PIECE = 2**19  # numbers that are decoded at once


class CodecLayer(CompressedLayer):
    """Keys and values are coded alone: a method gives the two codecs.

    Every coded tensor is [batch, tokens / rate, ...], the rate being 1 unless `rates` names the tensor.

    Attributes:
        residual (`int`): Recent tokens kept in full precision at least, and at most 15 more or twice as many.
        rates (`dict[str, int]`): Tokens that share one row of a coded tensor, by name (`key_scale`).
        wanted (`Tensor` or `None`): Tokens that the next `append` returns, int64 [batch, kv_heads, n] with -1 for
            none, the last one new; by default all. Not with `rates`.
        home (`torch.device` or `None`): Where codes lie; by default where the keys come from.
    """

    numbers = ("seen",)
    rates: dict[str, int] = {}
    wanted: Tensor | None = None
    home: torch.device | None = None

    def __init__(self, shared: Shared, layer_idx: int, residual: int = 0):
        super().__init__(shared, layer_idx)
        self.residual = residual

    @abstractmethod
    def encode(self, side: str, x: Tensor, start: int) -> dict[str, Tensor]:
        """Codes of the keys or values (`side` is "key" or "value") x [batch, kv_heads, tokens, head_dim].

        Keys come as the model gave them, rotated; `start` is the index of the first token.
        """

    @abstractmethod
    def decode(self, side: str, codes: dict[str, Tensor], start: int | Tensor) -> Tensor:
        """The inverse: [batch, kv_heads, tokens, head_dim] in the model's dtype, keys rotated.

        Without `rates`, `start` may be the index of every token instead, int64 [batch, tokens].
        """

    def due(self, side: str, recent: int) -> int:
        """How many of the `recent` tokens are to be coded now, the oldest first.

        With a residual they wait for one another, as coding one token costs as much as coding 16.
        """
        more = recent - self.residual
        return more if more >= min(16, max(1, self.residual)) else 0

    def unrotated(self, keys: Tensor, start: int) -> Tensor:
        """Keys [batch, kv_heads, tokens, head_dim] before the rotary embedding, float32."""
        rotary = self.shared.geometry.rotary_of(self.layer_idx)
        if rotary is None:
            return keys.float()
        return rotary.unrotate(keys.float(), *self.shared.tables(start, start + keys.shape[2]))

    def rotated(self, keys: Tensor, start: int | Tensor) -> Tensor:
        """The inverse of `unrotated`; `start` may be the index of every token, int64 [batch, tokens]."""
        rotary = self.shared.geometry.rotary_of(self.layer_idx)
        if rotary is None:
            return keys
        if isinstance(start, int):
            return rotary.rotate(keys, *self.shared.tables(start, start + keys.shape[2]))
        whole = self.shared.tables(0, self.shared.positions.shape[1])
        rows = (x.expand(len(start), -1, -1) for x in whole)
        return rotary.rotate(keys, *(x.gather(1, start.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for x in rows))

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        whole = []
        for side, new in (("key", keys), ("value", values)):
            recent = self.held.get(f"{side}_recent")
            recent = new if recent is None else torch.cat([recent, new], dim=2)
            whole.append(self._given(side, recent) if self.wanted is None else self._some(side, recent, self.wanted))
            self.held[f"{side}_recent"] = recent
        self.seen += keys.shape[2]
        self.wanted = None
        if not self.record_past:
            self.code()
        return whole[0], whole[1]

    def code(self) -> None:
        """Code what is due."""
        for side in ("key", "value"):
            recent = self.held[f"{side}_recent"]
            count = self.due(side, recent.shape[2])
            if count == 0:
                continue
            codes = self.encode(side, recent[:, :, :count], self.seen - recent.shape[2])
            for name, tensor in codes.items():
                old = self.held.get(f"{side}_{name}")
                tensor = tensor if self.home is None else tensor.to(self.home)
                self.held[f"{side}_{name}"] = tensor if old is None else torch.cat([old, tensor], dim=1)
            self.held[f"{side}_recent"] = recent[:, :, count:].clone()

    def coded(self, side: str) -> dict[str, Tensor]:
        """The coded tensors of a side, without its prefix."""
        return {
            name.removeprefix(f"{side}_"): tensor
            for name, tensor in self.held.items()
            if name.startswith(f"{side}_") and name != f"{side}_recent"
        }

    def num_coded(self, side: str) -> int:
        recent = self.held.get(f"{side}_recent")
        return self.seen - (0 if recent is None else recent.shape[2])

    def grid(self, side: str) -> dict[str, Any] | None:
        """How an attention kernel reads a side's `codes`, `scale` and `zero`: `bits`, `group` and `along`, as
        `hfext_attention.PackedStates` has them. None when only `decode` can read them."""
        return None

    def _given(self, side: str, recent: Tensor) -> Tensor:
        """A side for the attention: made whole, or as it is stored where a kernel reads that."""
        count, codes = self.num_coded(side), self.coded(side)
        grid = self.grid(side) if self.shared.attention in READERS and count else None
        if grid is None or torch.is_grad_enabled() or self.home is not None or not reads_codes(recent):
            return self._whole(side, recent)
        from hfext_attention import PackedStates

        def whole() -> Tensor:
            return self._decoded(side, recent, count, codes, reuse=False)

        return PackedStates(recent, whole, codes["codes"], codes["scale"], codes["zero"], **grid)

    def _whole(self, side: str, recent: Tensor, reuse: bool = True) -> Tensor:
        """Coded and recent tokens of a side."""
        return self._decoded(side, recent, self.num_coded(side), self.coded(side), reuse)

    def _decoded(self, side: str, recent: Tensor, count: int, codes: dict[str, Tensor], reuse: bool) -> Tensor:
        """Tokens decoded piece by piece into memory that the next layer uses again, and the recent ones."""
        if count == 0:
            return recent
        batch, heads, new, dim = recent.shape
        shape = (batch, heads, count + new, dim)
        out = self.shared.scratch(side, shape, recent) if reuse else recent.new_empty(shape)
        # Pieces that stay in a processor's cache; a multiple of every rate.
        unit = math.lcm(*self.rates.values()) if self.rates else 1
        piece = max(unit, PIECE // (batch * heads * dim) // unit * unit)
        for start in range(0, count, piece):
            stop = min(count, start + piece)
            part = {}
            for name, tensor in codes.items():
                rate = self.rates.get(f"{side}_{name}", 1)
                part[name] = tensor[:, start // rate : stop // rate].to(recent.device)
            out[:, :, start:stop] = self.decode(side, part, start)
        out[:, :, count:] = recent
        return out

    def _some(self, side: str, recent: Tensor, index: Tensor) -> Tensor:
        """Tokens of a side by their index [batch, kv_heads, n]; -1 gives any."""
        count = self.num_coded(side)
        wide = (index - count).clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, recent.shape[-1])
        late = recent.gather(2, wide)
        if count == 0:
            return late
        early = self.decode_some(side, index.clamp(0, count - 1))
        return torch.where((index < count).unsqueeze(-1), early, late)

    def decode_some(self, side: str, index: Tensor) -> Tensor:
        """Coded tokens by their index [batch, kv_heads, n], in any order: [batch, kv_heads, n, head_dim].

        A token that any head wants is decoded once, for all of them.
        """
        marks = torch.zeros(len(index), self.num_coded(side), dtype=torch.bool, device=index.device)
        tokens = marked(marks.scatter_(1, index.flatten(1), True)).clamp(min=0)
        codes = {}
        for name, tensor in self.coded(side).items():
            rows = (torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * tensor.shape[1] + tokens).flatten()
            taken = tensor.flatten(0, 1).index_select(0, rows.to(tensor.device))
            codes[name] = taken.unflatten(0, tokens.shape).to(index.device)
        whole = self.decode(side, codes, tokens)
        place = (marks.cumsum(1) - 1).gather(1, index.flatten(1)).view(index.shape)
        return whole.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, whole.shape[-1]))

    def decompressed(self) -> tuple[Tensor, Tensor]:
        return tuple(self._whole(side, self.held[f"{side}_recent"], reuse=False) for side in ("key", "value"))

    def drop_last(self, tokens: int) -> None:
        """Exact: recent tokens go first, then whole rows of codes."""
        cuts = {}
        for side in ("key", "value"):
            recent = self.held[f"{side}_recent"]
            beyond = max(0, tokens - recent.shape[2])
            cuts[f"{side}_recent"] = recent[:, :, : max(0, recent.shape[2] - tokens)]
            for name, tensor in self.coded(side).items() if beyond else ():
                rate = self.rates.get(f"{side}_{name}", 1)
                if beyond % rate:
                    raise NotImplementedError(
                        f"{tokens} tokens cannot be taken back: {rate} tokens share one code and only "
                        f"{recent.shape[2]} recent ones are uncoded. Make `residual_length` larger."
                    )
                cuts[f"{side}_{name}"] = tensor[:, : tensor.shape[1] - beyond // rate]
        self.held.update({name: tensor.clone() for name, tensor in cuts.items()})
        self.seen -= tokens

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.record_past and self.is_initialized:
            self.code()


def reads_codes(x: Tensor) -> bool:
    """Whether attention to x would run in kernels that read codes."""
    try:
        from hfext_attention._launch import runs_kernel
    except ImportError:
        return False
    return runs_kernel(x) and find_spec("triton") is not None


def marked(marks: Tensor) -> Tensor:
    """Places of the marks, bool [..., tokens], in ascending order: int64 [..., most marks], -1 behind the last."""
    flat = marks.flatten(0, -2)
    row, place = flat.nonzero(as_tuple=True)
    count = flat.sum(-1)
    out = torch.full((len(flat), int(count.max())), -1, dtype=torch.long, device=marks.device)
    out[row, torch.arange(len(row), device=marks.device) - (count.cumsum(0) - count)[row]] = place
    return out.unflatten(0, marks.shape[:-1])
