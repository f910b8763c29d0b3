"""SAMPa on pairs of processes: the even rank computes g_x, the odd rank g_n, each over the batches of both.

A pair's batch is the union of the batches that the Trainer deals to its two ranks, so sampler, step count and total
batch size are those of ordinary data parallelism. Gradients are averaged over ranks of one role, then exchanged in
the pair: every rank ends with the same bits of g_x and g_n, and no all-reduce of DistributedDataParallel runs.
"""

import torch
import torch.distributed as dist
from torch import nn

from ._driver import MicroBatch, TrainerPasses, Update, clear_gradients, evaluate
from ._passes import rng_state, set_rng_state


class Pairs:
    """Process groups of the run; `torch.distributed` must be initialised, with an even number of processes."""

    def __init__(self):
        world, rank = dist.get_world_size(), dist.get_rank()
        self.role, self.first, self.replicas = rank % 2, rank - rank % 2, world // 2
        pairs = [dist.new_group([i, i + 1]) for i in range(0, world, 2)]
        roles = [dist.new_group(list(range(role, world, 2))) for role in (0, 1)]
        self.pair, self.same_role = pairs[rank // 2], roles[self.role]

    def share(self, mine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every rank's flat buffer in; (even role's mean, odd role's mean) out, the same bits on every rank."""
        if self.replicas > 1:
            dist.all_reduce(mine, group=self.same_role)
            mine /= self.replicas
        both = [mine, torch.empty_like(mine)] if self.role == 0 else [torch.empty_like(mine), mine]
        work = [dist.broadcast(both[i], self.first + i, group=self.pair, async_op=True) for i in (0, 1)]
        for w in work:
            w.wait()
        return both[0], both[1]


def check_world() -> None:
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world % 2:
        raise ValueError(
            f"SAMPa: parallel=true needs an even number of processes, this run has {world}. Start it with "
            "`torchrun --nproc_per_node 2`, or leave parallel=true out: one process computes both gradients in turn."
        )


def drive(original, trainer, optimizer, model, inputs, num_items) -> torch.Tensor:
    """One `training_step` of parallel SAMPa; the exchange happens at the last micro-batch of the update."""
    if optimizer.pairs is None:
        optimizer.pairs = Pairs()
    pairs = optimizer.pairs
    # Below DistributedDataParallel: it broadcasts buffers in forward, and here ranks do not run forward in step.
    model = trainer.accelerator.unwrap_model(model)
    update = vars(trainer).get("_hfext_update")
    if update is None or update.step != trainer.state.global_step:
        update = trainer._hfext_update = Update(step=trainer.state.global_step)
        optimizer.begin(trainer.state.max_steps or None, trainer.state.global_step)
        if not optimizer.is_first:
            optimizer.move_ahead() if pairs.role else optimizer.move_up()
        update.todo = list(optimizer.previous) if pairs.role == 0 else []
    passes = TrainerPasses(trainer, original, model, optimizer, update.batches)

    own = MicroBatch(inputs, num_items, trainer.current_gradient_accumulation_steps, rng_state())
    own.prepared = trainer._prepare_inputs(inputs)
    dealt = [None, None]
    dist.all_gather_object(dealt, passes.keep(own), group=pairs.pair)
    update.batches += [passes.revive(kept) for kept in dealt]
    after = own.rng
    last = trainer.accelerator.gradient_state.sync_gradients
    if pairs.role == 1:
        work = update.batches[-2:]
    else:
        count = len(update.todo) if last else 2
        work = [passes.revive(kept) for kept in update.todo[:count]]
        del update.todo[:count]
    for batch in work:
        set_rng_state(batch.rng)
        loss = evaluate(trainer, original, model, batch, sync=False)
        update.loss = update.loss + loss / 2
        if batch is update.batches[-2 + pairs.role]:
            after = rng_state()
    if pairs.role == 0:
        after = _advanced(after, work)
    set_rng_state(after)
    if not last:
        return torch.zeros((), device=own_device(optimizer))
    _exchange(trainer, optimizer, model, passes, update)
    del trainer._hfext_update
    return update.loss


def _advanced(state, work):
    # The even rank drew its noise for other batches; going on from there keeps its stream moving.
    return rng_state() if work else state


def own_device(optimizer) -> torch.device:
    return next(p.device for p in optimizer.parameters())


@torch.no_grad()
def _exchange(trainer, optimizer, model, passes, update: Update) -> None:
    params, pairs = optimizer.parameters(), optimizer.pairs
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    loss = torch.as_tensor(update.loss, dtype=dtype, device=params[0].device)
    flags = torch.tensor([p.grad is not None for p in params], dtype=dtype, device=params[0].device)
    halves = [
        torch.zeros_like(p, dtype=dtype).flatten() if p.grad is None else p.grad.flatten().to(dtype) / 2
        for p in params
    ]
    g_x, g_n = pairs.share(torch.cat([*halves, flags, loss[None]]))
    optimizer.restore()
    used = (g_x[-len(params) - 1 : -1] + g_n[-len(params) - 1 : -1] > 0).tolist()
    sizes = [p.numel() for p in params]
    unpack = [
        [v.view_as(p).to(p.dtype) for v, p in zip(g[: sum(sizes)].split(sizes), params, strict=True)]
        for g in (g_x, g_n)
    ]
    clear_gradients(model, optimizer)
    keep = [i for i, use in enumerate(used) if use]
    optimizer.settle(
        [params[i] for i in keep],
        None if optimizer.is_first else [unpack[0][i] for i in keep],
        [unpack[1][i] for i in keep],
        passes,
    )
    update.loss = g_n[-1].to(torch.float32)
    # Statistics of BatchNorm come from the odd rank, which saw this update's batches.
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for buffer in module.buffers(recurse=False):
                dist.broadcast(buffer, pairs.first + 1, group=pairs.pair)
