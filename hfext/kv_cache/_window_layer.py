"""A layer that keeps features of all tokens, and keys and values only in the window that is not finished.

The windows of a row are counted from its first real token, so that a row of a padded batch is coded as it is alone.
For that a row with p columns of padding is shifted by s = -p modulo w: column t stands at place t + s of its store,
where every window begins at a multiple of w and none mixes padding with text. Windows enter the store when all rows
have finished them; one that only its row has finished waits among the recent columns and is read as if it were coded.
A call attends to the windows that were finished before it as coded, and to all later tokens as they are.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from ._cache import CompressedLayer
from ._state import Shared

SIDES = ("key", "value")


class WindowLayer(CompressedLayer):
    """Held: what `encode` makes of the store, under `<side>_<name>`; of the latest columns `recent_<side>_feature`
    [batch, columns, n] and `<side>_recent` [batch, kv_heads, columns, head_dim]; with padding `shift` int32 [batch].

    Attributes:
        window (`int`): w.
        stored (`int`): Places of the store, a multiple of w.
        padded (`bool`): There was padding, so that there is a shift.
        rates (`dict[str, int]`): Places that share one row of an encoded tensor, by its full name.
    """

    numbers = ("seen", "stored", "padded")
    rates: dict[str, int] = {}

    def __init__(self, shared: Shared, layer_idx: int, window: int):
        super().__init__(shared, layer_idx)
        self.window, self.stored, self.padded = window, 0, False

    # -- what a method writes

    @abstractmethod
    def features(self, side: str) -> Tensor:
        """Of the tokens of the step under way [batch, tokens, n]; `side` is "key" or "value"."""

    @abstractmethod
    def encode(self, side: str, feature: Tensor) -> dict[str, Tensor]:
        """Codes of whole windows [batch, windows * w, n], all batch first and then by place or by window."""

    @abstractmethod
    def decode(self, side: str, codes: dict[str, Tensor]) -> Tensor:
        """The inverse."""

    @abstractmethod
    def expand(self, side: str, feature: Tensor) -> Tensor:
        """Keys before the rotary embedding, or values [batch, kv_heads, places, head_dim], of features."""

    # -- the core

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        before, total = self.seen, self.seen + keys.shape[2]
        for side, new in zip(SIDES, (keys, values), strict=True):
            for name, x, dim in ((f"recent_{side}_feature", self.features(side), 1), (f"{side}_recent", new, 2)):
                old = self.held.get(name)
                self.held[name] = x.clone() if old is None else torch.cat([old, x], dim=dim)
        self._note_padding(total)
        whole = tuple(self._whole(side, before, total) for side in SIDES)
        self.seen = total
        if not self.record_past:
            self._store()
        return whole

    def _note_padding(self, total: int) -> None:
        padding = self.shared.padding
        if padding is None or (self.padded and bool(padding[:, self.seen : total].all())):
            return
        pads = (padding[:, :total].cumsum(1) == 0).sum(1)
        self.held["shift"] = (-pads % self.window).to(torch.int32)
        self.padded = True

    def _shifts(self) -> tuple[int, int]:
        """The least and the largest shift."""
        if not self.padded:
            return 0, 0
        shift = self.held["shift"]
        return int(shift.min()), int(shift.max())

    def _places(self, total: int) -> Tensor:
        """The place of every column [batch, total]."""
        return torch.arange(total, device=self.held["shift"].device) + self.held["shift"][:, None]

    def _columns(self, side: str, start: int, stop: int, total: int) -> Tensor:
        """Features of the places `start` to `stop`, taken from the recent columns, which end before `total`."""
        recent = self.held[f"recent_{side}_feature"]
        first = total - recent.shape[1]
        if not self.padded:
            return recent[:, start - first : stop - first]
        place = torch.arange(start, stop, device=recent.device) - self.held["shift"][:, None] - first
        place = place.clamp(0, recent.shape[1] - 1)  # the rest is padding, or not finished, and not read
        return recent.gather(1, place[..., None].expand(-1, -1, recent.shape[2]))

    def _codes(self, side: str) -> dict[str, Tensor]:
        start = f"{side}_"
        return {
            name.removeprefix(start): x
            for name, x in self.held.items()
            if name.startswith(start) and name != f"{side}_recent"
        }

    def _whole(self, side: str, before: int, total: int) -> Tensor:
        """Keys (rotated) or values of all `total` columns, coded where a window was finished by `before` columns."""
        recent = self.held[f"{side}_recent"]
        parts = [self.decode(side, self._codes(side))] if self.stored else []
        if self.padded:
            finished = (before + self.held["shift"]) // self.window * self.window
            last = int(finished.max())
            if last > self.stored:
                waiting = self._columns(side, self.stored, last, total)
                parts.append(self.decode(side, self.encode(side, waiting)))
        if not parts:
            return recent[:, :, recent.shape[2] - total :]
        x = self.expand(side, torch.cat(parts, dim=1))
        if not self.padded:
            return torch.cat([self._rotated(side, x, self.stored), recent], dim=2)
        place = self._places(total)
        index = place.clamp(max=x.shape[2] - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        x = self._rotated(side, x.gather(2, index), total)
        gap = total - recent.shape[2]
        late = (place >= finished[:, None])[:, None, gap:, None]
        return torch.cat([x[:, :, :gap], torch.where(late, recent, x[:, :, gap:])], dim=2)

    def _rotated(self, side: str, x: Tensor, stop: int) -> Tensor:
        rotary = self.shared.geometry.rotary_of(self.layer_idx)
        if side == "key" and rotary is not None:
            x = rotary.rotate(x.float(), *self.shared.tables(0, stop))
        return x.to(self.dtype)

    def _store(self) -> None:
        """Code the windows that all rows have finished, and forget the columns that no row needs any more."""
        low, high = self._shifts()
        ready = (self.seen + low) // self.window * self.window
        for side in SIDES if ready > self.stored else ():
            codes = self.encode(side, self._columns(side, self.stored, ready, self.seen))
            for name, new in codes.items():
                old = self.held.get(f"{side}_{name}")
                self.held[f"{side}_{name}"] = new.clone() if old is None else torch.cat([old, new], dim=1)
        self.stored = max(self.stored, ready)
        self._keep_recent(min(self.seen, self.seen + high - self.stored))

    def _keep_recent(self, columns: int) -> None:
        for side in SIDES:
            for name, dim in ((f"recent_{side}_feature", 1), (f"{side}_recent", 2)):
                x = self.held[name]
                if x.shape[dim] > columns:
                    self.held[name] = x.narrow(dim, x.shape[dim] - columns, columns).clone()

    def decompressed(self) -> tuple[Tensor, Tensor]:
        key, value = (self._whole(side, self.seen, self.seen) for side in SIDES)
        return key, value

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.record_past and self.is_initialized:
            self._store()

    def drop_last(self, tokens: int) -> None:
        """Exact: tokens of a finished window stay coded. Windows that share scales leave whole or not at all."""
        stay, (low, high) = self.seen - tokens, self._shifts()
        stored = min(self.stored, (stay + low) // self.window * self.window)
        if stored == self.stored:
            for side in SIDES:
                for name, dim in ((f"recent_{side}_feature", 1), (f"{side}_recent", 2)):
                    x = self.held[name]
                    self.held[name] = x.narrow(dim, 0, max(0, x.shape[dim] - tokens)).clone()
        else:
            if self.rates and (self.padded or stay % self.window):
                raise NotImplementedError(
                    f"{tokens} tokens cannot be taken back: windows of {self.window} tokens share scales, and these "
                    "are more than are in no finished window. Use bits=16 or a larger window."
                )
            self._reopen(stay, stored, min(stay, stay + high - stored))
        self.seen = stay

    def _reopen(self, stay: int, stored: int, columns: int) -> None:
        """Cut the store; what is left of a window that was finished is read as it was until it is finished again."""
        for side in SIDES:
            whole = self._whole(side, self.seen, self.seen)[:, :, stay - columns : stay].clone()
            if columns:
                features = self._all_features(side)[:, stay - columns : stay].clone()
            else:
                features = self.held[f"recent_{side}_feature"][:, :0].clone()
            self.held |= {f"{side}_recent": whole, f"recent_{side}_feature": features}
            for name in [f"{side}_{name}" for name in self._codes(side)]:
                self.held[name] = self.held[name][:, : stored // self.rates.get(name, 1)].clone()
        self.stored = stored

    def _all_features(self, side: str) -> Tensor:
        """Features of all columns."""
        coded, recent = self.decode(side, self._codes(side)), self.held[f"recent_{side}_feature"]
        if not self.padded:
            return torch.cat([coded, recent], dim=1)
        place = self._places(self.seen)
        gap = self.seen - recent.shape[1]
        index = place.clamp(max=coded.shape[1] - 1)[..., None].expand(-1, -1, coded.shape[2])
        early = (place < self.stored)[:, gap:, None]
        x = coded.gather(1, index)
        return torch.cat([x[:, :gap], torch.where(early, x[:, gap:], recent)], dim=1)

    def reset(self) -> None:
        super().reset()
        self.stored, self.padded = 0, False
