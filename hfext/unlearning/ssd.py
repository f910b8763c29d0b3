"""Selective synaptic dampening: weights that matter much more to the forget set than to all data are shrunk.

    I_D,i   = mean over the batches of D of (d loss / d theta_i)^2             loss: mean of the batch, eval mode
    select i where I_F,i > alpha I_D,i                                        F: forget set, D: all training data
    theta_i <- theta_i min((lam I_D,i / I_F,i)^p, 1)                          elsewhere theta_i stays, bit for bit

The gradient of a batch is squared, so I depends on the batch size: both sets need the same. I_D holds F's rows too and
can be stored when training ends (`importance(...).save(path)`), so that the data are not needed later. `label_free`
(LFSSD) takes the mean squared L2 norm of the outputs for the loss and |gradient| for its square. On selected weights
the factor is below (lam / alpha)^p, so with lam <= alpha each one shrinks. Importances are float32.

Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening, arXiv 2308.07707; LFSSD: Loss-Free
Machine Unlearning, arXiv 2402.19308.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from ..registry import Method, Result
from ._batches import read_batches, rows_in, single_rows
from ._edit import Edit, Entries, refuse_quantized

logger = logging.get_logger(__name__)
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def dampening(forget: Tensor, full: Tensor, alpha: float, lam: float, p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Which entries are selected (bool), and the factor of every entry, 1 where it is not selected."""
    selected = forget > alpha * full
    # What does not matter at all to the data goes, also with an infinite lam.
    ratio = torch.where(full > 0, lam * full, 0.0) / torch.where(selected, forget, 1.0)
    return selected, torch.where(selected, ratio.pow(p).clamp(max=1.0), 1.0)


def squared_norm(outputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared L2 norm of outputs [..., classes], over the positions where `mask` [...] is not 0."""
    norms = outputs.float().square().sum(-1)
    return norms.mean() if mask is None else norms[mask.bool()].mean()


@dataclass(frozen=True)
class Importance:
    """Importance of each parameter, by name, and how it was measured."""

    values: dict[str, Tensor]
    batch_size: int
    batches: int
    batch_unit: str
    label_free: bool

    def save(self, path: str | Path) -> None:
        """As one safetensors file in float32."""
        facts = {key: value for key, value in vars(self).items() if key != "values"}
        data = {key: value.contiguous() for key, value in self.values.items()}
        save_file(data, path, metadata={"hfext_importance": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> "Importance":
        """What [`Importance.save`] wrote; `ValueError` for any other file."""
        try:
            with safe_open(str(path), "pt") as file:
                facts = json.loads((file.metadata() or {})["hfext_importance"])
                return cls({key: file.get_tensor(key) for key in file.keys()}, **facts)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no importance of SSD: {error}.") from error


def importance(
    model: nn.Module,
    data: Iterable[Any],
    *,
    batch_size: int = 8,
    batch_unit: Literal["batch", "sample"] = "batch",
    loss: Loss | None = None,
    label_free: bool = False,
    targets: str | None = None,
) -> Importance:
    """How much each parameter matters to the loss of `data`, in one pass. The model is not changed.

    Args:
        model (`nn.Module`): Any model that returns a loss or, with `label_free`, logits.
        data: Tokenised rows (`input_ids`, `labels`), a dataset of examples, or an iterable of batches of tensors.
        batch_size (`int`, *optional*, defaults to 8): Rows of a batch, where `data` are rows.
        batch_unit (`str`, *optional*, defaults to `"batch"`): Whose gradient is squared; `"sample"`: each row's alone.
        loss (`Callable`, *optional*): `loss(model, batch)`, a scalar; by default the loss that the model returns.
        label_free (`bool`, *optional*, defaults to `False`): LFSSD: no labels are used.
        targets (`str`, *optional*): A regex, searched in the parameters' names; by default all of them.
    """
    if batch_unit not in ("batch", "sample"):
        raise ValueError(f"batch_unit is {batch_unit!r} but must be one of batch, sample.")
    if loss is not None and label_free:
        raise ValueError("label_free has a loss of its own: leave out `loss`.")
    refuse_quantized(model)
    chosen = {name: p for name, p in model.named_parameters() if targets is None or re.search(targets, name)}
    if not chosen:
        raise ValueError(f"targets is {targets!r} but matches no parameter.")
    ask = loss or (_norm_of_outputs if label_free else _own_loss)
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in chosen.items()}
    units = largest = 0
    mode, frozen = {m: m.training for m in model.modules()}, [p for p in chosen.values() if not p.requires_grad]
    try:
        model.eval()
        for p in frozen:
            p.requires_grad_(True)
        for batch in logging.tqdm(read_batches(data, batch_size, model, "data"), desc="importance"):
            largest = max(largest, rows_in(batch))
            for unit in single_rows(batch) if batch_unit == "sample" else [batch]:
                with torch.enable_grad():
                    grads = torch.autograd.grad(ask(model, unit), list(chosen.values()), allow_unused=True)
                for (name, total), grad in zip(totals.items(), grads, strict=True):
                    if grad is not None:
                        total += grad.float().abs() if label_free else grad.float().square()
                    if grad is not None and not total.isfinite().all():
                        raise RuntimeError(f"The gradient of {name} is not finite: importances would be NaN.")
                units += 1
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, training in mode.items():
            module.training = training
    values = {name: total.div_(units) for name, total in totals.items()}
    return Importance(values, largest if batch_unit == "batch" else 1, units, batch_unit, label_free)


_measure = importance  # `ssd` has an argument of that name


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    outputs = model(**batch)
    found = outputs.get("loss")
    if found is None:
        raise ValueError(f"The model returns no loss for {', '.join(batch)}: add labels, or give `loss`.")
    return found


def _norm_of_outputs(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    outputs = model(**{key: value for key, value in batch.items() if key != "labels"})["logits"]
    mask = batch.get("attention_mask")
    return squared_norm(outputs, mask if mask is not None and mask.shape == outputs.shape[:-1] else None)


def ssd(
    model: nn.Module,
    forget: Iterable[Any],
    data: Iterable[Any] | None = None,
    importance: Importance | None = None,
    alpha: float = 10.0,
    lam: float = 1.0,
    p: float = 1.0,
    *,
    batch_size: int = 8,
    batch_unit: Literal["batch", "sample"] = "batch",
    loss: Loss | None = None,
    label_free: bool = False,
    targets: str | None = None,
) -> Edit:
    """Dampen, in place, what matters to `forget` alone.

    Args:
        model (`nn.Module`): The trained model.
        forget: What is to be forgotten, in any form that [`importance`] takes.
        data: All training data, `forget` among them; or else
        importance (`Importance`): What [`importance`] found on them earlier.
        alpha (`float`, *optional*, defaults to 10.0): How much more a weight must matter to `forget` to be selected,
            > 0. In the paper 10 for ResNet-18 and 5 for ViT; smaller forgets more.
        lam (`float`, *optional*, defaults to 1.0): Strength of what is left of a selected weight, >= 0; 0 zeroes it.
        p (`float`, *optional*, defaults to 1.0): Exponent of the factor, > 0.
        batch_size, batch_unit, loss, label_free, targets: As of [`importance`].

    Returns:
        [`Edit`], whose report has the share selected in each parameter (`selected`) and in all (`share`).
    """
    for name, value, fine in (("alpha", alpha, alpha > 0), ("lam", lam, lam >= 0), ("p", p, p > 0)):
        if not fine or math.isnan(value):
            raise ValueError(f"{name} is {value} but must be {'>=' if name == 'lam' else '>'} 0.")
    if (data is None) == (importance is None):
        raise ValueError("Give either `data`, the whole training data, or their stored `importance`.")
    options = {"batch_unit": batch_unit, "loss": loss, "label_free": label_free, "targets": targets}
    full = importance
    if full is None:
        full = _measure(model, data, batch_size=batch_size, **options)
    mine = _measure(model, forget, batch_size=batch_size, **options)
    _check_alike(mine, full)
    selected: dict[str, float] = {}
    changes = _changes(model, mine, full, alpha, lam, p, selected)
    edit = Edit.make(model, changes, {"selected": selected, "alpha": alpha, "lam": lam})
    sizes = {name: value.numel() for name, value in mine.values.items()}
    edit.report["share"] = sum(selected[name] * size for name, size in sizes.items()) / sum(sizes.values())
    return edit


def _changes(
    model: nn.Module,
    mine: Importance,
    full: Importance,
    alpha: float,
    lam: float,
    p: float,
    selected: dict[str, float],
) -> Iterator[tuple[str, Entries]]:
    parameters = dict(model.named_parameters())
    for name, forget in mine.values.items():
        chosen, factor = dampening(forget, full.values[name].to(forget.device), alpha, lam, p)
        selected[name] = float(chosen.float().mean())
        index = chosen.reshape(-1).nonzero()[:, 0]
        if index.numel():
            old = parameters[name].detach().reshape(-1)[index]
            yield name, Entries(index, (old.float() * factor.reshape(-1)[index]).to(old.dtype))


def _check_alike(mine: Importance, full: Importance) -> None:
    for name, value in mine.values.items():
        if name not in full.values or full.values[name].shape != value.shape:
            raise ValueError(f"The importance of all data lacks {name}, or has it in another shape: another model's?")
    for field in ("batch_unit", "label_free"):
        if vars(mine)[field] != vars(full)[field]:
            raise ValueError(
                f"The importance of all data has {field}={vars(full)[field]!r}, not {vars(mine)[field]!r}."
            )
    if mine.batch_size != full.batch_size:
        logger.warning(
            f"Batches hold {mine.batch_size} rows of the forget set and {full.batch_size} of all data. Squared "
            "gradients shrink with the batch, so the two importances are not on one scale: use the same size "
            "(batch_size, or batch_unit='sample')."
        )


METHOD = Method(
    name="ssd",
    family="unlearning",
    title="Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
    authors="Foster et al.",
    arxiv="2308.07707",
    year=2023,
    repo="if-loops/selective-synaptic-dampening",
    status="faithful",
    target="hfext.unlearning.ssd:ssd",
    usage="edit = hfext.unlearning.ssd(model, forget_rows, data=all_rows, alpha=10)",
    summary="Shrinks the weights that matter far more to the forget set than to all training data; no training.",
    claim="SSD is competitive with retraining in a fraction of its time.",
    headline=Result(
        metric="forget and retain accuracy",
        setting="class and random forgetting, ResNet-18 and ViT on CIFAR",
        value="competitive with retraining-based methods, in seconds",
    ),
    recipe="unlearning/ssd-vit-digits.yaml",
    notes="Two passes with gradients, no optimizer; memory of two copies of the parameters in float32. In language "
    "models embedding rows of tokens that occur in the forget set alone are zeroed: `targets` can leave them out. "
    "Search alpha for each model: on models that differ in their seed alone the same one forgets, ruins or does "
    "nothing.",
)
