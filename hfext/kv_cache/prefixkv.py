"""PrefixKV: every layer keeps as much of its attention, so that some layers keep more tokens than others.

s_l[t]    = sum over queries i of the mean over heads h of P_l[h, i, t]       the score of token t in layer l
c_l[n]    = share of the scores of layer l that its n best tokens have
n_l(p)    = the least n with c_l[n] >= p
forget_l  = max(0, T - n_l(p) - n_start - n_protect)   with p such that   sum_l forget_l = ratio L T

p is found by bisection. The sum jumps where a token enters, so the counts just below and above the target are
interpolated and rounded down. A layer keeps its first `n_start` tokens, its last `n_protect`, and of the others all
but the forget_l of lowest score. With rho_l = forget_l / T, a layer that stores S of N tokens forgets
S - N (1 - rho_l) more after every later call, rounded down, from the place `distance` before the end of the prompt's
kept tokens.

"PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation",
arXiv 2412.03409.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor, nn

from .._fields import in_range
from ..registry import Method
from ._attention_mass import attention_mass, logit_options
from ._calibration import Calibration, Observed, watch
from ._config import KVCacheConfig
from ._evicting_layer import EvictingLayer, needs_queries
from ._geometry import Geometry, geometry
from ._state import Shared

PROFILES = ("online", "offline", "uniform")


@dataclass(kw_only=True, repr=False)
class PrefixKVConfig(KVCacheConfig):
    """Options of PrefixKV.

    Args:
        ratio (`float`, *optional*, defaults to 0.5): Share of all tokens that is forgotten, in [0, 1).
        profile (`str` or `list[float]`, *optional*, defaults to `"online"`): `"online"` finds the layers' shares for
            every prompt, `"offline"` takes those of `calibrate`, `"uniform"` gives every layer the same; a list gives
            the share that each compressed layer forgets, and `ratio` is not used.
        n_start (`int`, *optional*, defaults to 1): First tokens that are always kept.
        n_protect (`int`, *optional*, defaults to 1): Last tokens of the prompt that are always kept.
        distance (`int`, *optional*, defaults to -25): Place, counted from the end of the prompt's kept tokens, where
            later calls forget. The middle when fewer are kept.
        profile_ratios (`list[float]`, *optional*, defaults to 0.1 to 0.9): Ratios that `calibrate` measures; between
            them an offline profile is interpolated.

    A prompt for which `ratio` leaves fewer than `n_start + n_protect + 1` tokens is kept whole.

    Raises:
        ValueError: A value is out of range, or a list does not have a share for every layer.
    """

    method: ClassVar[str] = "prefixkv"
    ratio: float = 0.5
    profile: str | list[float] = "online"
    n_start: int = 1
    n_protect: int = 1
    distance: int = -25
    profile_ratios: list[float] = dataclasses.field(default_factory=lambda: [i / 10 for i in range(1, 10)])

    def check(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio} but must be in [0, 1).")
        if isinstance(self.profile, str) and self.profile not in PROFILES:
            raise ValueError(f"profile is {self.profile!r} but must be one of {', '.join(PROFILES)} or a list.")
        if isinstance(self.profile, list) and not all(0 <= share < 1 for share in self.profile):
            raise ValueError(f"profile is {self.profile} but its shares must be in [0, 1).")
        in_range("n_start", self.n_start, 0, 65536)
        in_range("n_protect", self.n_protect, 0, 65536)
        in_range("distance", self.distance, -65536, -1)
        ratios = self.profile_ratios
        if not ratios or sorted(set(ratios)) != ratios or not all(0 < r < 1 for r in ratios):
            raise ValueError(f"profile_ratios is {ratios} but must be ascending numbers in (0, 1).")

    def check_model(self, geometry: Geometry) -> None:
        needs_queries(self.method, geometry)
        if isinstance(self.profile, list) and len(self.profile) != len(geometry.layers):
            raise ValueError(
                f"profile has {len(self.profile)} shares but must have one for each of the {len(geometry.layers)} "
                "full-attention layers."
            )

    def calibration_shapes(self, geometry: Geometry) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if self.profile != "offline":
            return {}
        return {"prefix_profile": ((len(self.profile_ratios), len(geometry.layers)), torch.float32)}

    def check_calibration(self, geometry: Geometry) -> None:
        shares = self.calibration.tensors["prefix_profile"]
        if not bool(((shares >= 0) & (shares <= 1)).all()):
            raise ValueError("The calibration tensor prefix_profile must be in [0, 1].")

    def calibrate(self, model: nn.Module, data: Any, **options: Any) -> "PrefixKVConfig":
        """A copy with an offline profile: the mean over texts of the shares found for each.

        Args:
            model (`PreTrainedModel`): The model.
            data: Token ids: a tensor, a tokenizer's output, a dataset or a list of these; about 10 texts.
            ratios (`Sequence[float]`, *optional*): Takes the place of `profile_ratios`.
            length (`int`, *optional*, defaults to 512): Tokens of a text, where `data` is one long text.
        """
        ratios = options.pop("ratios", self.profile_ratios)
        made = dataclasses.replace(self, profile="offline", profile_ratios=list(ratios), calibration=None)
        shape = geometry(model)
        scores: dict[int, Tensor] = {}
        shares: list[Tensor] = []

        def visit(seen: Observed) -> None:
            rotary, step = shape.rotary_of(seen.layer), seen.step
            keys = seen.keys if rotary is None else rotary.rotate(seen.keys, step.cos, step.sin)
            scale, softcap = logit_options(step.module, shape.head_dim)
            mass = attention_mass(step.queries(), keys, seen.real[:, None], scale, softcap)
            scores[seen.layer] = mass.mean(1)
            if seen.layer == shape.layers[-1]:
                tokens = seen.real.sum(-1)
                stacked = torch.stack([scores[index] for index in shape.layers], dim=1)
                counts = [forget_counts(stacked, tokens, r, self.n_start, self.n_protect) for r in ratios]
                shares.append(torch.stack(counts, dim=1) / tokens[:, None, None])

        tokens = watch(model, data, visit, **options)
        profile = torch.cat(shares).mean(0).float().cpu()
        return dataclasses.replace(made, calibration=Calibration({"prefix_profile": profile}, shape.facts, tokens))

    def make_layers(self, shared: Shared) -> dict[int, EvictingLayer]:
        made: dict[int, EvictingLayer] = {}
        for place, index in enumerate(shared.geometry.layers):
            first = next(iter(made.values()), None)
            made[index] = PrefixKVLayer(shared, index, self, place, first)
        return made


def lengths_of(cumulative: Tensor, mass: Tensor) -> Tensor:
    """The first place of `cumulative` [batch, layers, tokens] that reaches `mass` [batch], counted from 1."""
    wanted = mass[:, None, None].expand(-1, cumulative.shape[1], -1).contiguous()
    return torch.searchsorted(cumulative.contiguous(), wanted)[..., 0] + 1


def forget_counts(scores: Tensor, tokens: Tensor, ratio: float, n_start: int = 1, n_protect: int = 1) -> Tensor:
    """How many tokens each layer forgets so that all keep the same mass: int64 [batch, layers].

    `scores` [batch, layers, tokens] are 0 at padding; `tokens` [batch] counts the real ones. The sum of a row is
    within one token a layer of `ratio layers tokens`, never above.
    """
    best = scores.double().sort(dim=-1, descending=True).values.cumsum(-1)
    best = best / best[..., -1:].clamp(min=torch.finfo(best.dtype).tiny)
    always = n_start + n_protect

    def forgotten(mass: Tensor) -> Tensor:
        lengths = torch.minimum(lengths_of(best, mass), tokens[:, None])
        return (tokens[:, None] - lengths - always).clamp(min=0).double()

    target = ratio * scores.shape[1] * tokens.double()
    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(60):
        middle = (low + high) / 2
        too_many = forgotten(middle).sum(-1) > target
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    most, least = forgotten(low), forgotten(high)  # more than the target, and not more
    room = (most.sum(-1) - least.sum(-1)).clamp(min=1)
    part = ((target - least.sum(-1)) / room).clamp(0, 1)
    counts = (least + part[:, None] * (most - least) + 1e-6).floor().long()
    return counts.masked_fill((tokens * (1 - ratio) < always + 1)[:, None], 0)


def interpolated(ratio: float, ratios: Sequence[float], profile: Tensor) -> Tensor:
    """Shares of the layers at `ratio`, from those at `ratios`, none at 0 and all at 1: [layers]."""
    known = torch.tensor([0.0, *ratios, 1.0], dtype=torch.float64)
    shares = torch.cat([torch.zeros_like(profile[:1]), profile, torch.ones_like(profile[:1])]).double()
    above = int(torch.searchsorted(known, torch.tensor(ratio, dtype=torch.float64)).clamp(min=1))
    part = (ratio - known[above - 1]) / (known[above] - known[above - 1])
    return shares[above - 1] + part * (shares[above] - shares[above - 1])


class PrefixKVLayer(EvictingLayer):
    """Held besides the slots: `prompt_kept` int64 [batch]. All layers use two tensors that the first one holds:
    `mass` float32 [batch, layers, tokens], the scores, until the prompt is complete, and then `shares` float64
    [batch, layers] of the tokens that are forgotten."""

    per_head = False

    def __init__(
        self, shared: Shared, layer_idx: int, config: PrefixKVConfig, place: int, first: Optional["PrefixKVLayer"]
    ):
        super().__init__(shared, layer_idx)
        self.config, self.place, self._first = config, place, first

    @property
    def first(self) -> "PrefixKVLayer":
        return self._first or self

    @property
    def may_evict(self) -> bool:
        profile = self.config.profile
        return any(profile) if isinstance(profile, list) else self.config.ratio > 0

    def after_append(self, new: int) -> None:
        if not self.may_evict:
            return
        if not self.shared.prefilling:
            self.forget_later()
            return
        keys = self.held["kept_keys"]
        mass = attention_mass(self.queries(), keys, self.filled, self.scale, self.softcap).mean(1)
        if self.place == 0:
            layers = len(self.shared.geometry.layers)
            column = mass.new_zeros(len(mass), layers, new)
            old = self.held.get("mass")
            self.held["mass"] = column if old is None else torch.cat([old, column], dim=2)
        shared = self.first.held["mass"]
        shared[:, self.place] += mass.to(shared.device)

    def finish_prefill(self) -> None:
        if not self.may_evict or "prompt_kept" in self.held:
            return
        config, tokens = self.config, self.held["tokens"]
        held = self.first.held
        if self.place == 0:
            held["shares"] = self.shares(held["mass"], tokens)
        always = config.n_start + config.n_protect
        share = held["shares"][:, self.place].to(tokens.device)
        forget = (tokens * share).round().long()
        forget = torch.where(tokens - forget < always + 1, 0, forget)
        self.held["prompt_kept"] = tokens - forget
        score = held["mass"][:, None, self.place].to(tokens.device)
        rank = self.filled.cumsum(-1) - 1
        ends = (rank < config.n_start) | (rank >= tokens[:, None, None] - config.n_protect)
        self.keep_best(score.masked_fill(ends, torch.inf), tokens - forget)
        if self.place == len(self.shared.geometry.layers) - 1:
            del held["mass"]

    def shares(self, mass: Tensor, tokens: Tensor) -> Tensor:
        """What each layer forgets: float64 [batch, layers]."""
        config, (batch, layers, _) = self.config, mass.shape
        if config.profile == "online":
            counts = forget_counts(mass, tokens, config.ratio, config.n_start, config.n_protect)
            short = tokens * (1 - config.ratio) < config.n_start + config.n_protect + 1
            return torch.where(short[:, None], config.ratio, counts / tokens[:, None].clamp(min=1).double())
        if config.profile == "offline":
            row = interpolated(config.ratio, config.profile_ratios, config.calibration.tensors["prefix_profile"])
        elif config.profile == "uniform":
            row = torch.full((layers,), config.ratio, dtype=torch.float64)
        else:
            row = torch.tensor(config.profile, dtype=torch.float64)
        return row.to(mass.device).expand(batch, -1).clone()

    def forget_later(self) -> None:
        """After a call behind the prompt: forget the tokens at a fixed place until the budget is met."""
        config, tokens, filled = self.config, self.held["tokens"], self.filled
        share = self.first.held["shares"][:, self.place].to(tokens.device)
        stored = filled[:, 0].sum(-1)
        more = (stored - tokens * (1 - share) + 1e-6).floor().long()
        more = torch.minimum(more, stored - config.n_start - config.n_protect - 1).clamp(min=0)
        kept = self.held["prompt_kept"]
        place = torch.where(kept + config.distance < 1, kept // 2, kept + config.distance)
        place = torch.minimum(place, stored - config.n_protect - more).clamp(min=config.n_start)
        rank = filled[:, 0].cumsum(-1) - 1
        leaves = (rank >= place[:, None]) & (rank < (place + more)[:, None])
        score = torch.where(leaves, 0.0, 1.0)[:, None]
        self.keep_best(score, stored - more)


METHOD = Method(
    name="prefixkv",
    family="kv_cache",
    title="PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient "
    "Generation",
    arxiv="2412.03409",
    year=2024,
    authors="Ao Wang et al.",
    repo="THU-MIG/PrefixKV",
    status="faithful",
    target="hfext.kv_cache.prefixkv:PrefixKVConfig",
    config=PrefixKVConfig,
    usage="from_pretrained(path, quantization_config=hfext.kv_cache.PrefixKVConfig(ratio=0.5))",
    summary="Keeps in every layer the tokens with the same share of its attention, so layers keep different numbers.",
    claim="At the same total, budgets of layers that keep equal attention give a lower perplexity than equal budgets.",
    recipe="kv_cache/prefixkv-smollm2-wikitext2.yaml",
    notes="Every row of a batch has its own profile; the authors' code uses that of the first. What bisection leaves "
    "of the budget is interpolated between the two nearest solutions instead of scaled, so that a larger ratio never "
    "makes a layer keep more.",
)
