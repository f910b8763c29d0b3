"""Private parts of torch."""

from typing import Any

import torch


def optimizer_hook_tables(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tables in which `torch.optim.Optimizer.register_*_hook` writes, to be shared with a wrapper."""
    return {name: table for name, table in vars(optimizer).items() if name.startswith("_optimizer_")}


def set_optimizer_mode(optimizer: torch.optim.Optimizer, train: bool) -> None:
    """`train()` or `eval()` of optimizers that have modes (schedule-free)."""
    switch = getattr(optimizer, "train" if train else "eval", None)
    if callable(switch):
        switch()


def cpu_kernels() -> tuple[Any, Any, Any]:
    """torch's CPU operators for packed weights: pack 4 bits, multiply by 4 bits, by 8. AttributeError without them."""
    aten = torch.ops.aten
    return aten._convert_weight_to_int4pack_for_cpu, aten._weight_int4pack_mm_for_cpu, aten._weight_int8pack_mm


def cpu_multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU; without it such products are slower than fp32."""
    return getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)()


def full_tensor(x: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; other tensors as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def set_base_rates(scheduler: torch.optim.lr_scheduler.LambdaLR, rates: list[float]) -> None:
    """Give a schedule that multiplies other learning rates to multiply, from this step on; saved with its state."""
    scheduler.base_lrs = list(rates)
    now = [rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, now, strict=True):
        group["lr"] = rate
    scheduler._last_lr = now
