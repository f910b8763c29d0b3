"""Antidote: weights that harmful (or forgotten) data use most are set to zero, after any fine-tuning.

    s_ij = |W_ij| ||X_j||,   ||X_j||^2 = mean over rows of the sum over tokens of x_j^2         (Wanda's score)
    in each output row i the in - int(in (1 - dense_ratio)) largest s_ij, by a stable ascending sort, become 0

All X come from one pass through the untouched model; the zeros are written afterwards. Padding does not count. Without
data the score is |W|. A model with LoRA adapters loses weights of their A and B alone; another one of its query, key
and value projections. Sums are float64.

Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful Fine-tuning, arXiv 2408.09600.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..registry import Method, Result
from ._batches import read_batches, rows_in
from ._down_projections import linear_layers, matrix_of
from ._edit import Edit, Entries, refuse_quantized

QKV = r"(^|[._])(q|k|v|qkv)_proj$|(^|\.)(query|key|value|query_key_value|c_attn|Wqkv|qkv)$"


def wanda_scores(weight: Tensor, squared_norms: Tensor | None = None) -> Tensor:
    """|W| ||X|| [out, in] in at least float32; `squared_norms` [in] are mean squared norms, `None` for |W|."""
    size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    return size if squared_norms is None else size * squared_norms.sqrt()


def largest_in_rows(scores: Tensor, dense_ratio: float) -> Tensor:
    """Marks (bool) of the in - int(in (1 - dense_ratio)) largest in each row; of equal ones the later is larger."""
    kept = int(scores.shape[1] * (1 - dense_ratio))
    order = scores.sort(dim=1, stable=True).indices[:, kept:]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


@torch.no_grad()
def squared_input_norms(
    model: nn.Module, modules: Mapping[str, nn.Module], data: Iterable[Any], batch_size: int = 8
) -> dict[str, Tensor]:
    """Of each module [in], float64: the mean over rows of the sum over tokens of its squared inputs, in eval mode."""
    totals: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]):
            x = args[0].detach().double()
            if mask is not None and mask.shape == x.shape[:-1]:
                x = x * mask[..., None].to(x.device)
            totals[name] = totals.get(name, 0) + x.square().reshape(-1, x.shape[-1]).sum(0)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    mode, rows = {m: m.training for m in model.modules()}, 0
    try:
        model.eval()
        for batch in read_batches(data, batch_size, model, "data"):
            mask = batch.get("attention_mask")
            model(**{key: value for key, value in batch.items() if key != "labels"})
            rows += rows_in(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in mode.items():
            module.training = training
    unseen = sorted(set(modules) - set(totals))
    if unseen:
        raise ValueError(f"{unseen[0]} got no input from these data: choose other `targets`.")
    return {name: total / rows for name, total in totals.items()}


def target_layers(model: nn.Module, targets: str | None) -> dict[str, nn.Module]:
    """The linear layers whose weights Antidote may zero; see [`antidote`]."""
    adapters = linear_layers(model, adapters=True)
    if targets is not None:
        found = {n: m for n, m in (linear_layers(model) | adapters).items() if re.search(targets, n)}
    else:
        found = {n: m for n, m in adapters.items() if re.search(r"\.lora_[AB]\.[^.]+$", n)}
        found = found or {n: m for n, m in linear_layers(model).items() if re.search(QKV, n)}
    if not found:
        raise ValueError(
            f"targets is {targets!r} and matches no linear layer{'' if targets else ' that looks like q, k or v'}. "
            f"Give a regex; the layers are {', '.join(linear_layers(model))}."
        )
    return found


def antidote(
    model: nn.Module,
    data: Iterable[Any] | None,
    dense_ratio: float = 0.1,
    targets: str | None = None,
    *,
    batch_size: int = 8,
) -> Edit:
    """Zero, in place, the weights that matter most to `data`.

    Args:
        model (`nn.Module`): The fine-tuned model.
        data: Harmful rows, or the forget set: tokenised rows, a dataset of examples, or batches. `None`: scores |W|.
        dense_ratio (`float`, *optional*, defaults to 0.1): Share of each output row that is zeroed, in [0, 1]; in the
            paper 0.1 (SST2, GSM8K) and 0.05 (AGNews), with 2000 rows.
        targets (`str`, *optional*): A regex, searched in the names of linear layers. By default the A and B of LoRA
            adapters if there are any, else the query, key and value projections.
        batch_size (`int`, *optional*, defaults to 8): Rows of a batch, where `data` are rows.

    Returns:
        [`Edit`], whose report has the share of zeros of each layer after it (`sparsity`).
    """
    if not 0 <= dense_ratio <= 1:
        raise ValueError(f"dense_ratio is {dense_ratio} but must be in [0, 1].")
    modules = target_layers(model, targets)
    for module in modules.values():
        refuse_quantized(module)
    norms = {} if data is None else squared_input_norms(model, modules, data, batch_size)
    sparsity: dict[str, float] = {}

    def changes():
        for name, module in modules.items():
            matrix = matrix_of(module)
            marks = largest_in_rows(wanda_scores(matrix, norms.get(name)), dense_ratio)
            sparsity[name] = float((marks | (matrix == 0)).float().mean())
            stored = marks.T if isinstance(module, Conv1D) else marks
            index = stored.reshape(-1).nonzero()[:, 0]
            if index.numel():
                yield f"{name}.weight", Entries(index, matrix.new_zeros(index.numel()))

    return Edit.make(model, changes(), {"sparsity": sparsity, "dense_ratio": dense_ratio})


METHOD = Method(
    name="antidote",
    family="unlearning",
    title="Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful Fine-tuning",
    authors="Huang et al.",
    arxiv="2408.09600",
    year=2024,
    repo="git-disl/Antidote",
    status="faithful",
    target="hfext.unlearning.antidote:antidote",
    usage="edit = hfext.unlearning.antidote(model, harmful_rows, dense_ratio=0.1)",
    summary="Zeroes the weights that harmful data use most, by Wanda's score; no training.",
    claim="Harmful behaviour after fine-tuning falls at a small loss of task accuracy.",
    headline=Result(
        metric="harmful score",
        setting="Llama-2-7B fine-tuned on tasks mixed with harmful data",
        value="lower by up to 17.8 points, at most 1.8 points of task accuracy lost",
    ),
    notes="No recipe: the claim needs harmful data, which the library does not ship. With the forget set as `data` it "
    "is an unlearning edit. Use as many rows as there are: the paper takes 2000.",
)
