"""How the parameters of a model grew against a base model: read from shapes alone, on the meta device."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class InfShape:
    """Width ratios of one parameter.

    Args:
        ninf: Number of infinite dimensions: 0 scalar-like, 1 vector-like, 2 matrix-like.
        fan_in: Width ratio of the fan-in; 1 when it is finite.
        fan_out: Width ratio of the fan-out; 1 when it is finite.
        multiplier: a, when the network uses a times the stored parameter.
    """

    ninf: int = 0
    fan_in: float = 1.0
    fan_out: float = 1.0
    multiplier: float = 1.0


def infinite_dims(base: Iterable[int], other: Iterable[int]) -> tuple[int, ...]:
    """The dimensions in which two shapes differ."""
    return tuple(i for i, (m, n) in enumerate(zip(base, other, strict=True)) if m != n)


def set_base_shapes(
    model: nn.Module,
    base: PreTrainedConfig | nn.Module,
    delta: PreTrainedConfig | nn.Module | None = None,
    roles: Mapping[str, str] | None = None,
) -> dict[str, InfShape]:
    """Note on every parameter how it grew; values and forward pass stay as they are.

    Args:
        model: The model to train.
        base: Config (of the same class) or model of the base width. Only shapes are read; on the meta device is fine.
        delta: A third width. Dimensions that differ between `base` and `delta` are infinite; without it, those that
            differ between `base` and `model`.
        roles: `{name: "input" | "output"}` for parameters of unknown modules, whose fan-in cannot be seen from shapes.

    Returns:
        `InfShape` by name, also found as `p.hf_infshape`.
    """
    roles = dict(roles or {})
    shapes, bases = _shapes(model), _shapes(skeleton(model, base))
    others = shapes if delta is None else _shapes(skeleton(model, delta))
    for which, known in (("base", bases), ("delta", others)):
        odd = sorted(set(shapes) ^ set(known))
        if odd:
            raise ValueError(f"The {which} model must differ in width alone, but only one of the two has {some(odd)}.")
    unknown = sorted(set(roles) - set(shapes))
    if unknown or set(roles.values()) - {"input", "output"}:
        raise ValueError(f"roles maps parameter names to 'input' or 'output'; wrong: {some(unknown) or roles}.")
    found = {}
    for name, p, owner in _owned(model):
        if len(bases[name]) != len(shapes[name]) or len(others[name]) != len(shapes[name]):
            raise ValueError(f"{name} has shape {shapes[name]} here and {bases[name]} in the base model.")
        infinite = infinite_dims(bases[name], others[name])
        ratios = {dim: shapes[name][dim] / bases[name][dim] for dim in infinite}
        fixed = [dim for dim in infinite_dims(bases[name], shapes[name]) if dim not in infinite]
        if fixed:
            raise ValueError(f"{name}: dimension {fixed[0]} differs from the base model but is finite by `delta`.")
        fan_out, fan_in = _fans(name, owner, shapes[name], ratios, roles)
        found[name] = p.hf_infshape = InfShape(len(infinite), ratios.get(fan_in, 1.0), ratios.get(fan_out, 1.0))
    if delta is not None and not any(shape.ninf for shape in found.values()):
        raise ValueError("No dimension is infinite: base and delta have the same shapes. Make delta wider than base.")
    # Copies of a parameter lose its attributes; copies of the model keep this.
    model.hfext_base_shapes = found
    return found


def infshapes(params: Iterable[Tensor], model: nn.Module | None = None) -> list[InfShape]:
    """The width ratios of `params`; `ValueError` when one has none. A copied model finds them by name."""
    params = list(params)
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    known = {} if model is None else vars(model).get("hfext_base_shapes", {})
    for p in params:
        if "hf_infshape" not in vars(p) and names.get(id(p)) in known:
            p.hf_infshape = known[names[id(p)]]
    missing = [
        names.get(id(p), f"a parameter of shape {tuple(p.shape)}") for p in params if "hf_infshape" not in vars(p)
    ]
    if missing:
        raise ValueError(
            f"No base shapes are known for {some(missing)}. Call hfext.optim.mup.apply(model, base_config) before "
            "the optimizer is made."
        )
    return [p.hf_infshape for p in params]


def skeleton(model: nn.Module, base: PreTrainedConfig | nn.Module) -> nn.Module:
    """A model to read shapes from; a config becomes one on the meta device, which costs no memory."""
    if isinstance(base, nn.Module) and isinstance(base, PreTrainedModel) == isinstance(model, PreTrainedModel):
        return base
    if not isinstance(base, PreTrainedConfig) or not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"The base of a {type(model).__name__} must be a module of its kind, got {type(base).__name__}."
        )
    if not isinstance(base, type(model.config)):
        raise TypeError(f"The base config must be a {type(model.config).__name__}, got {type(base).__name__}.")
    with torch.device("meta"):
        return type(model)(copy.deepcopy(base))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Each parameter once, with the module that decides its layout: an embedding, where it is tied to one."""
    embeddings = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        yield name, p, embeddings.get(id(p)) or model.get_submodule(name.rpartition(".")[0])


def _fans(
    name: str, owner: nn.Module, shape: tuple[int, ...], ratios: dict[int, float], roles: dict[str, str]
) -> tuple[int | None, int | None]:
    """Which dimension is the fan-out and which the fan-in, as far as they are infinite."""
    if len(ratios) > 2:
        raise ValueError(f"{name} has {len(ratios)} infinite dimensions; muP knows at most 2.")
    if not ratios or len(shape) == 1:
        return (0, None) if ratios else (None, None)
    transposed = nn.Embedding | nn.EmbeddingBag | Conv1D | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    if isinstance(owner, transposed):
        return 1, 0
    if isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention):
        return 0, 1
    dims = sorted(ratios)
    if len(dims) == 2 and ratios[dims[0]] == ratios[dims[1]]:
        return dims[0], dims[1]
    if len(dims) == 1 and (name in roles or shape[0] == 1):
        return (None, dims[0]) if roles.get(name) == "output" else (dims[0], None)
    raise ValueError(
        f"{name}: the fan-in of a {type(owner).__name__} of shape {shape} cannot be told. "
        + (f"Pass roles={{{name!r}: 'input' or 'output'}}." if len(dims) == 1 else "Grow both dimensions alike.")
    )


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
