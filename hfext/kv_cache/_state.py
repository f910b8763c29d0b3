"""What the layers of one compressed cache share: positions, padding, and the step that is under way."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ._geometry import Geometry


@dataclass
class Shared:
    """State of a cache that no layer owns. Positions are stored once, not once a layer.

    Attributes:
        keeps_positions: Whether the method undoes the rotary embedding and so needs the positions.
        positions: int32 [batch or 1, tokens], the position of every token for the rotary embedding.
        padding: bool [batch, tokens], True for a real token; `None` when nothing is padded. Not stored: the caller
            gives it with every call.
        prompt_length: Tokens of the prompt when the caller said so, else `None`.
        prefilling: The prompt is not complete yet.
        recording: Tokens may be taken back after every call (assisted decoding).
    """

    geometry: Geometry
    keeps_positions: bool = True
    dtype: torch.dtype = torch.float32
    positions: Tensor | None = None
    padding: Tensor | None = None
    prompt_length: int | None = None
    prefilling: bool = True
    recording: bool = False
    attention: str = "sdpa"
    _tables: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _scratch: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def begin(self, seen: int, padding: Tensor | None) -> None:
        """A forward begins after `seen` tokens: forget what an interrupted or cropped one left."""
        self.padding = padding
        self._tables = None
        self._scratch.clear()
        self.crop(seen)

    def crop(self, seen: int) -> None:
        """Forget what comes behind `seen` tokens."""
        if self.positions is not None and self.positions.shape[1] > seen:
            self.positions = self.positions[:, :seen].clone() if seen else None
            self._tables = None

    def note_positions(self, positions: Tensor) -> None:
        """The rotary embedding of this forward is made for `positions` [batch or 1, tokens]."""
        if not self.keeps_positions:
            return
        if positions.dim() != 2:
            raise NotImplementedError(
                f"Positions of shape {list(positions.shape)} (a row an axis of an image) are not supported by methods "
                "that undo the rotary embedding; take one that keeps keys as they are (kivi, snapkv, h2o)."
            )
        new = positions.to(torch.int32)
        old = self.positions
        if old is not None:
            rows = max(old.shape[0], new.shape[0])
            new = torch.cat([old.expand(rows, -1), new.expand(rows, -1)], dim=1)
        self.positions = new
        self._tables = None

    def tables(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """cos and sin [batch or 1, stop - start, rotated] of the tokens `start` to `stop`."""
        if self.positions is None or self.positions.shape[1] < stop:
            raise RuntimeError(
                "The cache was not told the positions of its tokens. Use it with the model it was made for: "
                "`config.make_cache(model)` or `hfext.kv_cache.apply(model, config)`."
            )
        if self._tables is None:
            self._tables = self.geometry.rotary.tables(self.positions.long(), self.dtype)
        cos, sin = self._tables
        return cos[:, start:stop], sin[:, start:stop]

    def scratch(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory for what a layer returns and nobody reads after its attention, so one piece serves all layers.

        Fresh memory where somebody may: with gradients, and in models whose layers share keys.
        """
        if torch.is_grad_enabled() or "dummy" in self.geometry.layer_types:
            return like.new_empty(shape)
        old = self._scratch.get(name)
        if old is None or old.shape != shape or old.dtype != like.dtype or old.device != like.device:
            self._scratch[name] = old = like.new_empty(shape)
        return old

    def end(self) -> None:
        """A forward is over: nothing that can be made again is kept, but the padding where `crop` will code tokens."""
        self._tables = None
        if not self.recording:
            self.padding = None
        self._scratch.clear()

    def rows(self, change) -> None:
        """Change the batch dimension of the positions, which is 1 where all rows agree."""
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = change(self.positions)
        self._tables = None

    def nbytes(self) -> int:
        held = (x for x in (self.positions, self.padding) if x is not None)
        return sum(x.numel() * x.element_size() for x in held)


@dataclass
class Step:
    """What an attention module is about to do: its inputs, before the cache layer's `update`."""

    module: nn.Module
    hidden_states: Tensor  # [batch, tokens, hidden]
    cos: Tensor | None
    sin: Tensor | None
    geometry: Geometry

    def queries(self, last: int | None = None) -> Tensor:
        """Queries after the rotary embedding [batch, heads, tokens, head_dim], of the `last` tokens if given."""
        cut = slice(None) if last is None else slice(-last, None)
        flat = project_queries(self.module, self.hidden_states[:, cut], self.geometry)
        if self.geometry.rotary_problem is not None:
            raise ValueError(f"The queries cannot be made again: {self.geometry.rotary_problem}")
        rotary = self.geometry.rotary_of(self.module.layer_idx)
        if self.cos is None or rotary is None:
            return flat
        turned = rotary.rotate(flat.float(), self.cos[:, cut].float(), self.sin[:, cut].float())
        return turned.to(flat.dtype)


def project_queries(module: nn.Module, hidden_states: Tensor, geometry: Geometry) -> Tensor:
    """Queries before the rotary embedding [batch, heads, tokens, head_dim], as the attention module makes them."""
    heads, dim = geometry.num_heads, geometry.head_dim
    batch, tokens = hidden_states.shape[:2]
    if hasattr(module, "q_proj"):
        flat = module.q_proj(hidden_states)
    elif hasattr(module, "qkv_proj"):
        flat = module.qkv_proj(hidden_states)[..., : heads * dim]
    else:
        raise NotImplementedError(
            f"{type(module).__name__} has neither `q_proj` nor `qkv_proj`, so its queries cannot be made again. Take "
            "a method that needs none (rotatekv, kivi, turboquant, xkv, streamingllm)."
        )
    norm = getattr(module, "q_norm", None)
    if norm is None:
        return flat.view(batch, tokens, heads, dim).transpose(1, 2)
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.numel() == heads * dim:  # normed over all heads (OLMo 2)
        return norm(flat).view(batch, tokens, heads, dim).transpose(1, 2)
    return norm(flat.view(batch, tokens, heads, dim)).transpose(1, 2)
