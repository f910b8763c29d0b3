"""A2ATS: everything is kept, one code a token tells what to attend to.

code of a token       m_j = argmin_m |k_j L - c_m|        k_j before the rotary embedding, L L^T = H = E q_b^T q_b
score of query i      a[m_j],  a[m] = q_b . (c_m L^-1)    q_b = the query turned as if it stood b tokens after the key
attended to           the best floor(rho T) of every query head, joined over the heads that share keys, the latest w
                      tokens and the first n_sink, with exact softmax over exact keys and values
Tokens nearer than w are attended to anyway, so that one distance b serves all others and keys need no position
(windowed rotary embedding); H makes the codes keep products with queries rather than keys.

"A2ATS: Retrieval-Based KV Cache Reduction via Windowed Rotary Position Embedding and Query-Aware Vector Quantization",
arXiv 2502.12665. The prompt, and any call of several tokens, attends to everything. Of tokens with equal scores the
latest are taken.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._fields import in_range
from ..registry import Method, Result
from ._cache import CompressedLayer
from ._calibration import Calibration, Observed, watch
from ._codec_layer import CodecLayer, marked
from ._config import KVCacheConfig
from ._geometry import Geometry, geometry, unwrapped
from ._query_aware_vq import encode, learn_codebook, score_table
from ._retrieval import ExactLayer, at_distance, chosen
from ._state import Shared, project_queries

STORAGE = "storage."  # before the names of the storage's own calibration tensors


@dataclass(kw_only=True, repr=False)
class A2ATSConfig(KVCacheConfig):
    """Options of A2ATS. Needs `calibrate(model, data)`.

    Args:
        topk (`float`, *optional*, defaults to 0.03): Share rho in (0, 1] of the tokens seen that a query head selects,
            rounded down, but at least one token. 1 attends to everything.
        window (`int`, *optional*, defaults to 64): Latest tokens w, the new one among them, always attended to.
        distance (`int`, *optional*, defaults to 2048): The paper's b, in tokens: how far behind a query all tokens
            outside the window are taken to be when they are scored.
        n_sink (`int`, *optional*, defaults to 8): First tokens of a text, always attended to.
        codebook_size (`int`, *optional*, defaults to 4096): Codes of a kv head, 2 to 32768.
        query_aware (`bool`, *optional*, defaults to `True`): `False` takes H = I, ordinary vector quantisation.
        offload (`bool`, *optional*, defaults to `False`): Keep tokens that left the window in the host's memory; the
            codes stay, and selected tokens are copied when needed.
        storage (`KVCacheConfig` or `dict`, *optional*): Keep keys and values by this quantiser, such as
            `RotateKVConfig(bits=4)`; selected tokens alone are decoded. By default they are kept as they are.
    """

    method: ClassVar[str] = "a2ats"
    undoes_rotary: ClassVar[bool] = True
    learns_with: ClassVar[tuple[str, ...]] = ("distance", "query_aware")
    topk: float = 0.03
    window: int = 64
    distance: int = 2048
    n_sink: int = 8
    codebook_size: int = 4096
    query_aware: bool = True
    offload: bool = False
    storage: KVCacheConfig | None = None

    def __post_init__(self):
        if isinstance(self.storage, dict):
            self.storage = KVCacheConfig.from_dict(self.storage)
        super().__post_init__()

    def check(self) -> None:
        in_range("topk", self.topk, 0, 1, low_open=True)
        in_range("window", self.window, 1, 65536)
        in_range("distance", self.distance, 0, 2**20)
        in_range("n_sink", self.n_sink, 0, 65536)
        in_range("codebook_size", self.codebook_size, 2, 2**15)

    def to_dict(self) -> dict[str, Any]:
        """The tensors of a calibrated storage are part of this calibration, so its JSON form names none."""
        values = super().to_dict()
        if self.storage is not None:
            values["storage"] = dataclasses.replace(self.storage, calibration=None).to_dict()
        return values

    def stored_by(self) -> KVCacheConfig | None:
        """`storage` with its part of the calibration."""
        inside = {} if self.calibration is None else self.calibration.tensors
        inside = {name.removeprefix(STORAGE): x for name, x in inside.items() if name.startswith(STORAGE)}
        if self.storage is None or not inside:
            return self.storage
        about = self.calibration
        return dataclasses.replace(self.storage, calibration=Calibration(inside, about.facts, about.tokens))

    def check_model(self, geometry: Geometry) -> None:
        inner = self.stored_by()
        if inner is None:
            return
        layer = inner.make_layer(Shared(geometry), geometry.layers[0])
        if not isinstance(layer, CodecLayer) or layer.rates:
            raise ValueError(
                f"storage is {inner!r} but must be a cache that codes every token by itself: RotateKVConfig or "
                "TurboQuantConfig."
            )
        inner.check_model(geometry)
        if self.calibration is not None and self.storage.calibration is not None and inner is self.storage:
            raise ValueError("storage was calibrated after the config around it: calibrate A2ATSConfig again.")

    def calibration_shapes(self, geometry: Geometry) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        heads, dim = geometry.num_kv_heads, geometry.head_dim
        shapes = {}
        for i in geometry.layers:
            shapes[f"{i}.codebook"] = ((heads, self.codebook_size, dim), torch.float32)
            shapes |= {f"{i}.{name}": ((heads, dim, dim), torch.float32) for name in ("chol", "inv_chol")}
        inner = self.stored_by()
        if inner is not None and inner.calibration is not None:
            shapes |= {f"{STORAGE}{name}": wanted for name, wanted in inner.calibration_shapes(geometry).items()}
        return shapes

    def check_calibration(self, geometry: Geometry) -> None:
        one = torch.eye(geometry.head_dim)
        for i in geometry.layers:
            product = self.calibration.layer(i, "chol").cpu() @ self.calibration.layer(i, "inv_chol").cpu()
            if not bool((product - one).abs().max() < 0.01):
                raise ValueError(f"The calibration tensors {i}.chol and {i}.inv_chol are not inverses of each other.")
        inner = self.stored_by()
        if inner is not None and inner.calibration is not None:
            inner.check_calibration(geometry)

    def calibrate(
        self, model: nn.Module, data: Any, max_iterations: int = 300, seed: int = 0, length: int = 512
    ) -> "A2ATSConfig":
        """A copy with the codebooks, learnt from text; the paper takes 64,000 tokens of web text and 16,000 of random
        identifiers for 4096 codes. All keys are held in float32 meanwhile.

        Args:
            model (`PreTrainedModel`): Runs with its own attention.
            data: Token ids; see `hfext.kv_cache.calibration_batches`. Not the text you measure on.
            max_iterations (`int`, *optional*, defaults to 300): Of k-means.
            seed (`int`, *optional*, defaults to 0): Of its first centroids.
            length (`int`, *optional*, defaults to 512): Tokens of a row when `data` is one long tensor.

        A `storage` that is calibrated brings its tensors along.
        """
        in_range("max_iterations", max_iterations, 1, 100_000)
        shape = geometry(unwrapped(model))
        shape.needs_rotary(self.method)
        self.check_model(shape)
        keys, moments, tokens = seen_by(model, data, self.distance, self.n_sink, length)
        tensors: dict[str, Tensor] = {}
        for index, moment in moments.items():
            tensors |= self.fitted(index, keys.pop(index), moment, max_iterations, seed)
        inner = self.stored_by()
        if inner is not None:
            tensors |= {f"{STORAGE}{name}": x for name, x in inner.stored().items()}
            inner = dataclasses.replace(inner, calibration=None)
        return dataclasses.replace(self, storage=inner, calibration=Calibration(tensors, self.facts(shape), tokens))

    def fitted(
        self, index: int, keys: Tensor, moment: Tensor, max_iterations: int = 300, seed: int = 0
    ) -> dict[str, Tensor]:
        """The calibration tensors of a layer from keys [kv_heads, n, d] and the sum of q^T q [kv_heads, d, d]."""
        if not self.query_aware:
            moment = torch.eye(moment.shape[-1], device=moment.device).expand_as(moment)
        generator = torch.Generator().manual_seed(seed + index)
        problem = f"only {keys.shape[1]} tokens were seen" if keys.shape[1] < self.codebook_size else None
        try:
            found = {} if problem else learn_codebook(keys, moment, self.codebook_size, generator, max_iterations)
        except ValueError as error:
            problem = f"of {keys.shape[1]} tokens {error}"
        if problem:
            raise ValueError(
                f"codebook_size is {self.codebook_size} but layer {index} has too few keys for it: {problem}. Give "
                "more text or a smaller codebook_size."
            )
        return {f"{index}.{name}": x.cpu().contiguous() for name, x in found.items()}

    def learnt(self, index: int, device: torch.device) -> list[Tensor]:
        """codebook, L and L^-1 of a layer, copied to a device once."""
        copies = vars(self).setdefault("_copies", {})
        key = self.calibration.digest, index, device
        if key not in copies:
            names = ("codebook", "chol", "inv_chol")
            copies[key] = [self.calibration.layer(index, name).to(device) for name in names]
        return copies[key]

    def make_layers(self, shared: Shared) -> dict[int, CompressedLayer]:
        inner = self.stored_by()
        layers = {}
        for index in shared.geometry.layers:
            store = ExactLayer(shared, index, self.window) if inner is None else inner.make_layer(shared, index)
            layers[index] = A2ATSLayer(shared, index, self, store)
        return layers

    def make_layer(self, shared: Shared, layer_idx: int) -> CompressedLayer:
        return self.make_layers(shared)[layer_idx]


@torch.no_grad()
def seen_by(
    model: nn.Module, data: Any, distance: int, n_sink: int, length: int = 512
) -> tuple[dict[int, Tensor], dict[int, Tensor], int]:
    """Per layer the keys before the rotary embedding [kv_heads, n, d] and the sum of q^T q, float64 [kv_heads, d, d].

    Keys of the first `n_sink` tokens of a text are left out, as they are never looked up. Also the number of tokens.
    """
    shape = geometry(unwrapped(model))
    keys: dict[int, list[Tensor]] = {}
    moments: dict[int, Tensor] = {}

    def visit(seen: Observed) -> None:
        later = seen.real & (seen.real.cumsum(-1) > n_sink)
        keys.setdefault(seen.layer, []).append(seen.keys.transpose(1, 2)[later])
        flat = project_queries(seen.step.module, seen.step.hidden_states, shape).float()
        turned = at_distance(flat, shape.rotary_of(seen.layer), distance).transpose(1, 2)[seen.real]
        grouped = turned.unflatten(1, (shape.num_kv_heads, -1)).transpose(0, 1).flatten(1, 2).double()
        moments[seen.layer] = moments.get(seen.layer, 0) + grouped.transpose(1, 2) @ grouped

    tokens = watch(model, data, visit, length)
    return {i: torch.cat(parts).transpose(0, 1).contiguous() for i, parts in keys.items()}, moments, tokens


def _of_store(name: str) -> property:
    def read(layer: "A2ATSLayer") -> Any:
        return getattr(layer.store, name)

    def write(layer: "A2ATSLayer", value: Any) -> None:
        setattr(layer.store, name, value)

    return property(read, write)


class A2ATSLayer(CompressedLayer):
    """Held: `codes` [batch, kv_heads, tokens], uint8 up to 256 codes and int16 beyond, and what the store holds.

    Attributes:
        store (`CodecLayer`): Keeps keys and values, in the same dictionary.
        selected (`Tensor` or `None`): Tokens that the attention under way takes, int64 [batch, kv_heads, n].
    """

    seen, dtype, device = _of_store("seen"), _of_store("dtype"), _of_store("device")
    record_past, block_input = _of_store("record_past"), _of_store("block_input")

    def __init__(self, shared: Shared, layer_idx: int, config: A2ATSConfig, store: CodecLayer):
        self.store = store
        super().__init__(shared, layer_idx)
        self.config, self.held, self.selected = config, store.held, None
        self.numbers, self.wants_block_input = store.numbers, store.wants_block_input
        if config.offload:
            store.home = torch.device("cpu")

    def mask(self, query_length: int, dtype: torch.dtype) -> Tensor | None:
        self.selected = None
        if query_length != 1 or self.shared.prefilling or not self.seen:
            return None
        if self.shared.attention not in ("sdpa", "eager"):
            raise NotImplementedError(
                f"A2ATS attends to other tokens in every layer, which attention {self.shared.attention!r} does not "
                'take. Load the model with attn_implementation="sdpa" or "eager".'
            )
        self.selected = self._select()
        group = self.shared.geometry.num_heads // self.shared.geometry.num_kv_heads
        return (self.selected >= 0).repeat_interleave(group, dim=1).unsqueeze(2)

    def _select(self) -> Tensor:
        cfg, shape = self.config, self.shared.geometry
        flat = project_queries(self.step.module, self.step.hidden_states, shape).float()
        queries = at_distance(flat, shape.rotary_of(self.layer_idx), cfg.distance)
        codebook, _, inverse = cfg.learnt(self.layer_idx, queries.device)
        table = score_table(queries, codebook, inverse).unflatten(1, (shape.num_kv_heads, -1)).squeeze(3)
        codes = self.held["codes"].long().unsqueeze(2).expand(-1, -1, table.shape[2], -1)
        scores = table.gather(3, codes).flatten(1, 2)
        real = self.shared.padding
        if real is None:
            real = torch.ones(len(scores), self.seen + 1, dtype=torch.bool, device=scores.device)
        marks = chosen(scores, real[:, : self.seen + 1], shape.num_kv_heads, cfg.topk, cfg.window, cfg.n_sink)
        return marked(marks)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        codebook, lower, _ = self.config.learnt(self.layer_idx, keys.device)
        codes = encode(self.store.unrotated(keys, self.seen), codebook, lower)
        codes = codes.to(torch.uint8 if self.config.codebook_size <= 256 else torch.int16)
        old = self.held.get("codes")
        self.held["codes"] = codes.contiguous() if old is None else torch.cat([old, codes], dim=2)
        self.store.wanted, self.selected = self.selected, None
        return self.store.append(keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.selected is None or self.step is None:
            return super().get_mask_sizes(query_length)
        return self.selected.shape[2], self.seen + 1 - self.selected.shape[2]

    def finish_prefill(self) -> None:
        self.store.finish_prefill()

    def drop_last(self, tokens: int) -> None:
        self.store.drop_last(tokens)
        self.held["codes"] = self.held["codes"][:, :, : self.seen].clone()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.record_past and self.is_initialized:
            self.store.code()

    def reset(self) -> None:
        super().reset()
        self.selected = None

    def decompressed(self) -> tuple[Tensor, Tensor]:
        return self.store.decompressed()

    def _on_host(self) -> set[str]:
        """Names of what `offload` keeps in the host's memory."""
        sides = ("key", "value") if self.config.offload else ()
        return {f"{side}_{name}" for side in sides for name in self.store.coded(side)}

    def prefetch(self) -> None:
        host = self._on_host()
        self.held.update({name: x.to(self.device) for name, x in self.held.items() if name not in host})

    def device_nbytes(self) -> int:
        """Bytes of what lies where the model runs: everything, or with `offload` codes and recent tokens."""
        host = self._on_host()
        return sum(x.numel() * x.element_size() for name, x in self.held.items() if name not in host)


METHOD = Method(
    name="a2ats",
    family="kv_cache",
    title="A²ATS: Retrieval-Based KV Cache Reduction via Windowed Rotary Position Embedding and Query-Aware Vector "
    "Quantization",
    arxiv="2502.12665",
    year=2025,
    authors="Junhui He et al.",
    repo="junhuihe-hjh/A2ATS",
    status="variant",
    difference="Padding and rows of different lengths; an empty cluster of k-means starts again at the farthest key; "
    "the scale of yarn is part of the scores; keys of the first tokens, never looked up, are left out of codebooks; "
    "with offload the first tokens are copied with those selected. `storage` is ours.",
    target="hfext.kv_cache.a2ats:A2ATSConfig",
    config=A2ATSConfig,
    usage="hfext.kv_cache.apply(model, hfext.kv_cache.A2ATSConfig(topk=0.03).calibrate(model, ids))",
    summary="Keeps all tokens, on the host if wished, and attends to the few that one code a token ranks highest.",
    claim="Codes learnt with the queries find more of the attention than ordinary vector quantisation.",
    headline=Result(
        metric="serving throughput", setting="Llama-3.1-8B-Instruct, long context", value="up to 2.7x", baseline="full"
    ),
    recipe="kv_cache/a2ats-smollm2-wikitext2.yaml",
)
