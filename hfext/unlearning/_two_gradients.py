"""Two gradients of one update, taken apart: the retain gradient in `.grad`, the forget gradient in a second buffer.

Each part has its own forward and backward pass, so that an update costs what one pass over both parts together costs
and the graph of one part is freed before the next is built. Processes keep their sums to themselves until the last
micro-batch, are averaged there, and only then are the two combined: norms of a part of the gradient are wrong.
"""

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..compat import set_optimizer_mode

UNSUPPORTED = {
    DistributedType.DEEPSPEED: "DeepSpeed owns the gradients",
    DistributedType.FSDP: "it needs whole gradients on each process",
    DistributedType.MEGATRON_LM: "Megatron-LM owns the training step",
    DistributedType.XLA: "it was never tested on XLA",
}


class Pass:
    """The gradients of one evaluation of an update's micro-batches."""

    def __init__(self, params: list[nn.Parameter]):
        self.params = params
        self.forget: list[Tensor | None] = [None] * len(params)
        self.losses: dict[str, Tensor] = {}
        self.seen = 0

    def swap(self) -> None:
        """Exchange `.grad` and the second buffer."""
        for k, p in enumerate(self.params):
            p.grad, self.forget[k] = self.forget[k], p.grad


def two_gradient_step(trainer: Any, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
    """One micro-batch as `Trainer.training_step` does it; after the last of a pass the combined gradient is in
    `.grad`. Returns the loss of this micro-batch, retain minus forget."""
    model.train()
    set_optimizer_mode(trainer.optimizer, train=True)
    inputs = trainer._prepare_inputs(inputs)
    made = trainer.gradient_pass
    if made is None:
        made = trainer.gradient_pass = Pass([p for p in model.parameters() if p.requires_grad])
    try:
        found = {}
        with trainer.accelerator.no_sync(model):
            for part in ("retain", "forget"):
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, {part: inputs[part]}, num_items_in_batch=num_items)
                if part == "forget":
                    made.swap()
                try:
                    trainer.accelerator.backward(loss)
                finally:
                    if part == "forget":
                        made.swap()
                found[part] = loss.detach()
                made.losses[part] = made.losses.get(part, 0.0) + found[part]
        made.seen += 1
        if made.seen == trainer.current_gradient_accumulation_steps:
            trainer.gradient_pass = None
            finish(trainer, made)
    except BaseException:
        trainer.gradient_pass = None
        raise
    return found["retain"] - found["forget"]


def finish(trainer: Any, made: Pass) -> None:
    """Average over processes, combine, and put the result where the optimizer looks for it."""
    several = trainer.accelerator.num_processes > 1
    for k, p in enumerate(made.params):
        # A parameter that one task does not reach has no gradient there: it counts as zero.
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        made.forget[k] = torch.zeros_like(p) if made.forget[k] is None else made.forget[k]
        if several:
            for gradient in (p.grad, made.forget[k]):
                gradient.copy_(trainer.accelerator.reduce(gradient, reduction="mean"))
    losses = {
        part: trainer.accelerator.reduce(x, reduction="mean") if several else x for part, x in made.losses.items()
    }
    retain = [p.grad for p in made.params]
    trainer.note(trainer.objective.combine(retain, made.forget, losses))
    for p, gradient in zip(made.params, retain, strict=True):
        p.grad = gradient


def gradient_angles(model: nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norm of the gradient of each loss, and the cosine of the first two."""
    params = [p for p in model.parameters() if p.requires_grad]
    flat = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        flat[name] = torch.cat([g.float().flatten() for g in grads if g is not None])
    found = {f"{name}_norm": g.norm() for name, g in flat.items()}
    if len(flat) > 1:
        a, b = list(flat.values())[:2]
        if a.shape == b.shape:
            found["cosine"] = nn.functional.cosine_similarity(a, b, dim=0)
    return found
