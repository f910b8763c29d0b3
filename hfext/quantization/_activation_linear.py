"""`ActivationLinear`: a quantised layer whose inputs are rounded too, per tensor and with ranges found beforehand.

    x' = s (clamp(round(x / s) + o, 0, 2^b - 1) - o)        one s and one o for all tokens and channels

This is a simulation: products are those of floats, and no integer kernel runs. A protected layer leaves first tokens
of texts as they are, and where it is certain what such a token is, its output is the stored one. What is certain a
`FirstTokens` knows, a hook on the model that looks at ids, masks, positions and cache before the layers run.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ._linear import QuantLinear


class ActivationLinear(QuantLinear):
    """A quantised layer with quantised inputs; until it has a range, they stay as they are.

    Tensors beside those of `QuantLinear`: `act_scale` and `act_offset` [1] in float32, and `bos_out` [out] of
    protected layers, the output of the plain model's layer for the first token.
    """

    act_bits: int
    first_tokens: "FirstTokens | None" = None

    def prepare(self, bits: int, symmetric: bool, protected: bool) -> "ActivationLinear":
        """Make the tensors of the inputs."""
        self.act_bits, self.act_symmetric, self.protected = bits, symmetric, protected
        device = self.qweight.device
        for name in ("act_scale", "act_offset"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.float32, device=device))
        empty = torch.zeros(self.out_features, dtype=self.compute_dtype, device=device)
        self.register_buffer("bos_out", empty if protected else None)
        return self

    def set_range(self, low: float, high: float) -> None:
        """Fix the grid of the inputs to hold low .. high and 0."""
        scale, offset = activation_grid(low, high, self.act_bits, self.act_symmetric)
        self.act_scale.fill_(scale)
        self.act_offset.fill_(offset)

    def rounded(self, x: Tensor) -> Tensor:
        """x' [..., in]; its gradient is that of x."""
        with torch.no_grad():
            made = fake_quantized(x, self.act_scale, self.act_offset, self.act_bits, self.act_symmetric)
        return x + (made - x).detach() if x.requires_grad else made

    def forward(self, x: Tensor) -> Tensor:
        if not self.act_scale.item():
            return super().forward(x)
        rounded = self.rounded(x)
        if not self.protected:
            return super().forward(rounded)
        exact, known = FirstTokens.of(self.first_tokens, x)
        if exact is not None:
            rounded = torch.where(exact, x, rounded)
        y = super().forward(rounded)
        return y if known is None else torch.where(known, self.bos_out.to(y.dtype), y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act_bits={self.act_bits}, protected={self.protected}"

    def _apply(self, fn, recurse=True):
        kept = {name: self._buffers[name] for name in ("act_scale", "act_offset")}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            self._buffers[name] = old.to(self._buffers[name].device)
        return self


class FirstTokens:
    """Where in the running call the first tokens of texts are; a hook before and after a decoder's forward.

    `exact` [rows, tokens] marks tokens that are at position 0, or may be; `known` those of them that are `token`, in
    the first column of a call that nothing precedes. Both are None where there are none. `known` needs ids, no padding
    on the left, no gradient and no adapters, which would change what enters the layers.
    """

    def __init__(self, token: int):
        self.token = token
        self.exact: Tensor | None = None
        self.known: Tensor | None = None
        self.running = False

    @staticmethod
    def of(found: "FirstTokens | None", x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`exact` and `known` [..., 1] for the inputs of a layer [..., in]. All tokens are exact where they are not
        those of the call; outside of a call, as in calibration, the first of each row."""
        if found is None or not found.running:
            first = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
            first[..., :1] = True
            return first[..., None], None
        exact, known = found.exact, found.known
        if exact is None:
            return None, None
        if exact.numel() != x[..., 0].numel():
            return x.new_ones(*x.shape[:-1], 1, dtype=torch.bool), None
        shape = (*x.shape[:-1], 1)
        exact = exact.to(x.device).reshape(shape)
        return exact, None if known is None else known.to(x.device).reshape(shape)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        shape = tuple((ids if ids is not None else embeds).shape[:2])
        device = (ids if ids is not None else embeds).device
        cache = given.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        starts, exact = first_tokens(shape, seen, given.get("attention_mask"), given.get("position_ids"), device)
        known = None
        if ids is not None and not torch.is_grad_enabled():
            known = exact & starts & (ids == self.token)
            if not known.any() or any(type(m).__module__.startswith("peft.") for m in module.modules()):
                known = None
        self.exact, self.known, self.running = exact if exact.any() else None, known, True

    def after(self, module: nn.Module, args: tuple, out: Any) -> None:
        """Forward hook of the decoder; what is run again for a gradient needs what was found."""
        if not torch.is_grad_enabled():
            self.exact = self.known = None
            self.running = False


def first_tokens(
    shape: tuple[int, int], seen: int, mask: Any, positions: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two masks [rows, tokens] of a call after `seen` tokens: tokens that begin their row, with nothing before them,
    and all that are at position 0 or may be.

    Args:
        shape (`tuple[int, int]`): Rows and tokens.
        seen (`int`): Tokens in the cache.
        mask: The attention mask; one that is not [rows, tokens] tells nothing about padding.
        positions (`torch.Tensor`, *optional*): Position ids [rows or 1, tokens].
        device (`torch.device`): Of the masks.
    """
    rows, tokens = shape
    column = torch.arange(tokens, device=device)
    if positions is not None and positions.dim() == 2:
        zero = (positions.to(device) == 0).expand(rows, tokens)
    else:
        zero = None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        before = mask.shape[1] - tokens
        first = mask.to(device).ne(0).int().argmax(1) - before
        exact = column == first[:, None]
        starts = exact & (column == 0) & (before == 0) & (seen == 0)
    elif mask is None:
        exact = ((column == 0) & (seen == 0)).expand(rows, tokens)
        starts = exact
    else:
        exact = torch.ones(rows, tokens, dtype=torch.bool, device=device) if zero is None else zero
        starts = torch.zeros_like(exact)
    return (starts, exact) if zero is None else (starts & zero, exact | zero)


def activation_grid(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, float]:
    """Step and offset of a grid that holds low .. high and 0; 0 is one of its values."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return max(-low, high, 1e-30) / (2 ** (bits - 1) - 1), 0.0
    scale = max(high - low, 1e-30) / (2**bits - 1)
    return scale, float(round(-low / scale))


def fake_quantized(x: Tensor, scale: Tensor, offset: Tensor, bits: int, symmetric: bool) -> Tensor:
    """x' in the type of x, worked out in float32."""
    most = 2 ** (bits - 1) - 1
    low, high = (-most, most) if symmetric else (0, 2**bits - 1)
    return ((x.float() / scale).round_().add_(offset).clamp_(low, high).sub_(offset) * scale).to(x.dtype)
