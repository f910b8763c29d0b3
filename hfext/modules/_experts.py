"""Mixture-of-experts blocks of transformers: where they are, what is routed to whom, and fewer experts in them.

The models below hold their experts stacked in parameters [experts, ...] beside a router whose forward gives (logits,
gates of the top k, their indices). Everything of the router and of the experts that has one row for each expert is cut
alike, and so are the counts in the config and in the modules, so that a model saves, loads and runs without hfext.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Model type and the name of its router inside a block.
ROUTERS = {
    "mixtral": "gate",
    "qwen2_moe": "gate",
    "qwen3_moe": "gate",
    "olmoe": "gate",
    "granitemoe": "router",
    "gpt_oss": "router",
    "deepseek_v3": "gate",
}
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Block:
    """One layer's router and experts."""

    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module

    @property
    def count(self) -> int:
        return self.router.weight.shape[0]

    def rows(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Every parameter and buffer that has one row for each expert."""
        return [
            (module, name, tensor)
            for module in (self.router, self.experts)
            for store in (module._parameters, module._buffers)
            for name, tensor in store.items()
            if tensor is not None and tensor.dim() and tensor.shape[0] == self.count
        ]


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a supported model in the order of its layers, or an error that says why there are none."""
    if any(type(module).__module__.split(".")[0] == "peft" for module in model.modules()):
        raise NotImplementedError(
            "The model carries PEFT adapters, which would no longer fit its experts: merge_and_unload() them first, "
            "or remove experts before adapters are added."
        )
    config = vars(model).get("config")
    kind = None if config is None else config.model_type
    if kind not in ROUTERS:
        known = f"Experts can be removed from {', '.join(ROUTERS)}."
        if config is not None and any(name in config.to_dict() for name in COUNTS):
            raise NotImplementedError(f"The experts of {kind} are not laid out as those that hfext knows. {known}")
        raise ValueError(f"A {kind or type(model).__name__} model has no experts. {known}")
    if kind == "deepseek_v3" and config.n_group > 1:
        raise NotImplementedError(
            f"Experts are routed in {config.n_group} groups, which would be torn; n_group must be 1."
        )
    found = []
    for name, module in model.named_modules():
        children = module._modules
        if "experts" in children and ROUTERS[kind] in children:
            found.append(Block(name, module, children[ROUTERS[kind]], children["experts"]))
    if not found:
        raise ValueError(f"The model is of type {kind} but none of its layers has experts.")
    for block in found:
        for _, name, tensor in block.rows():
            if tensor.is_meta:
                raise NotImplementedError(f"{block.name}: {name} is offloaded or on meta; load the model into memory.")
            if not tensor.is_floating_point():
                raise NotImplementedError(f"{block.name}: {name} is {tensor.dtype}; dequantise the model first.")
    return found


@dataclass
class Routing:
    """What the tokens of a layer did, summed over them in float64 on the CPU."""

    tokens: int
    hits: Tensor  # [experts]: times among the top k
    gates: Tensor  # [experts]: sum of gates
    outputs: Tensor  # [experts]: sum of gate x norm of the expert's output
    gram: Tensor  # [experts, experts]: sum of products of router logits

    def plus(self, other: "Routing") -> "Routing":
        return Routing(
            self.tokens + other.tokens,
            self.hits + other.hits,
            self.gates + other.gates,
            self.outputs + other.outputs,
            self.gram + other.gram,
        )

    def score(self, name: str) -> Tensor:
        """[experts] means over tokens: `frequency`, `gate_mass` or `gate_output_norm`."""
        sums = {"frequency": self.hits, "gate_mass": self.gates, "gate_output_norm": self.outputs}
        return sums[name] / self.tokens


def count_routes(logits: Tensor, gates: Tensor, indices: Tensor) -> Routing:
    """The sums over tokens of logits [tokens, experts], gates [tokens, k] and indices [tokens, k]."""
    count = logits.shape[-1]
    wide, indices = logits.double().cpu(), indices.cpu()
    zeros = torch.zeros(count, dtype=torch.float64)
    flat = indices.flatten()
    hits = zeros.index_add(0, flat, torch.ones(flat.shape, dtype=torch.float64))
    mass = zeros.index_add(0, flat, gates.double().cpu().flatten())
    return Routing(len(logits), hits, mass, zeros.clone(), wide.mT @ wide)


def output_norms(experts: nn.Module, hidden: Tensor, gates: Tensor, indices: Tensor, count: int) -> Tensor:
    """sum over tokens of gate x ||expert(hidden)||, float64 [experts]."""
    found = torch.zeros(count, dtype=torch.float64)
    for e in indices.unique().tolist():
        token, place = (indices == e).nonzero(as_tuple=True)
        alone = torch.full((len(token), 1), e, device=indices.device, dtype=indices.dtype)
        out = experts.forward(hidden[token], alone, torch.ones_like(gates[token, :1]))
        found[e] = (gates[token, place].double() * out.double().norm(dim=-1)).sum().item()
    return found


def watch(
    blocks: list[Block], total: dict[str, Routing], mask: Callable[[], Tensor | None], norms: bool
) -> list[RemovableHandle]:
    """Hooks that add every forward's routes of unmasked tokens to `total`, by block name."""

    def on_router(block: Block, output: tuple) -> None:
        logits, gates, indices = (t.detach().flatten(0, -2) for t in output[:3])
        kept = mask()
        if kept is not None:
            if kept.numel() != len(logits):
                raise ValueError(
                    f"attention_mask has {kept.numel()} places but {block.name} saw {len(logits)} tokens."
                )
            kept = kept.to(logits.device)
            logits, gates, indices = logits[kept], gates[kept], indices[kept]
        if not logits.isfinite().all():
            raise ValueError(f"{block.name}: the router's logits are not finite on the calibration data.")
        new = count_routes(logits, gates, indices)
        old = total.get(block.name)
        total[block.name] = new if old is None else old.plus(new)

    def on_experts(block: Block, args: tuple) -> None:
        hidden, indices, gates = (t.detach() for t in args[:3])
        kept = mask()
        if kept is not None:
            kept = kept.to(hidden.device)
            hidden, indices, gates = hidden[kept], indices[kept], gates[kept]
        total[block.name].outputs += output_norms(block.experts, hidden, gates, indices, block.count)

    handles = []
    for block in blocks:
        handles.append(block.router.register_forward_hook(lambda m, a, out, block=block: on_router(block, out)))
        if norms:
            handles.append(block.experts.register_forward_pre_hook(lambda m, a, block=block: on_experts(block, a)))
    return handles


def _not_batches(found: object, why: str, is_a: str = "is a") -> str:
    return (
        f"calibration_batches {is_a} {type(found).__name__} ({why}) but must be an iterable of batches, each a dict "
        "for the model's forward, {'input_ids': ids, 'attention_mask': mask}, or token ids [batch, tokens]."
    )


@torch.no_grad()
def calibrate(
    model: nn.Module, blocks: list[Block], batches: Iterable[Mapping | Tensor], norms: bool = False
) -> dict[str, Routing]:
    """Run the model in eval mode over batches and count the routes of every block; padding does not count."""
    if isinstance(batches, str):
        raise TypeError(_not_batches(batches, "text: tokenize it"))
    if isinstance(batches, Mapping) or (isinstance(batches, Tensor) and batches.dim() < 3):
        raise TypeError(_not_batches(batches, "one batch: put it into a list"))
    if not isinstance(batches, Iterable):
        raise TypeError(_not_batches(batches, "not iterable"))
    device = model.get_input_embeddings().weight.device
    total: dict[str, Routing] = {}
    kept: list[Tensor | None] = [None]
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for handle in watch(blocks, total, lambda: kept[0], norms):
            stack.callback(handle.remove)
        model.eval()
        try:
            for batch in batches:
                if not isinstance(batch, Mapping | Tensor):
                    why = "text: tokenize it" if isinstance(batch, str) else "neither"
                    raise TypeError(_not_batches(batch, why, "holds a"))
                batch = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
                batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
                mask = batch.get("attention_mask")
                if mask is not None and mask.dim() != 2:
                    raise ValueError(f"attention_mask has {mask.dim()} dimensions but must be [batch, tokens].")
                kept[0] = None if mask is None else mask.bool().flatten()
                model(**{**batch, "use_cache": False})
        finally:
            for module, mode in modes.items():
                module.training = mode
    if not total or any(routing.tokens == 0 for routing in total.values()):
        raise ValueError("The calibration batches hold no tokens.")
    return total


def cut(
    model: nn.Module, blocks: list[Block], tensors: list[list[tuple[nn.Module, str, Tensor]]], count: int, top_k: int
) -> None:
    """Put new rows into the blocks and new counts into modules and config; an exception undoes all of it."""
    undo: list[Callable[[], None]] = []

    def put(owner: object, name: str, value: object, old: object) -> None:
        undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    config = model.config
    try:
        for rows in tensors:
            for module, name, value in rows:
                old = {**module._parameters, **module._buffers}[name]
                if isinstance(old, nn.Parameter):
                    value = nn.Parameter(value, requires_grad=old.requires_grad)
                put(module, name, value, old)
        modules = [model, *(m for block in blocks for m in (block.block, block.router, block.experts))]
        for module in modules:
            for name, value in (*((n, count) for n in COUNTS), ("top_k", top_k), ("num_experts_per_tok", top_k)):
                if isinstance(vars(module).get(name), int):
                    put(module, name, value, vars(module)[name])
        # The other names of the count are aliases of one of them, through the config's attribute map.
        for name in [n for n in COUNTS if n in config.to_dict()]:
            put(config, name, count, config.to_dict()[name])
        put(config, "num_experts_per_tok", top_k, config.num_experts_per_tok)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
