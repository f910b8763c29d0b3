"""Run by `torchrun` from test_distributed.py: the same training in every process, for a list of cases in one start."""

import sys

import torch
import torch.distributed as dist
from optim_training import flat, gpt2, language_data, run_training

import hfext  # noqa: F401

# name: (optim, optim_args, rows a process and micro-batch, accumulation, dtype, dropout)
CASES = {
    "sam": ("sam", "rho=0.05,sync=true,base=sgd", 4, 1, torch.float32, 0.0),
    "sam_accumulated": ("sam", "rho=0.05,sync=true,base=sgd", 2, 2, torch.float32, 0.0),
    "sam_local": ("sam", "rho=0.05,base=sgd", 4, 1, torch.float32, 0.0),
    "asam": ("asam", "sync=true,base=sgd", 4, 1, torch.float32, 0.0),
    "bisam": ("bisam", "rho=0.05,sync=true,base=sgd", 4, 1, torch.float32, 0.0),
    "ignite": ("ignite", "lam=50,base=sgd", 2, 2, torch.float32, 0.0),
    "sampa": ("sampa", "base=sgd", 4, 1, torch.float32, 0.0),
    "sampa_parallel": ("sampa", "parallel=true,base=adamw", 2, 2, torch.float64, 0.0),
    "sampa_parallel_0": ("sampa", "lambda=0,parallel=true,base=sgd,base.momentum=0.9", 2, 1, torch.float64, 0.0),
}


def run(case, out, **options):
    optim, optim_args, rows, accumulation, dtype, dropout = CASES[case]
    return run_training(
        gpt2(dropout, dtype),
        optim,
        optim_args,
        out,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        learning_rate=1e-2,
        data=language_data(32),
        **options,
    )


def same_on_all_ranks(vector):
    gathered = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, vector)
    return all(torch.equal(gathered[0], other) for other in gathered)


def main(out):
    torch.set_num_threads(1)
    results = {}
    for case in CASES:
        job = run(case, f"{out}/{case}")
        results[case] = {
            "weights": flat(job.model),
            "same": same_on_all_ranks(flat(job.model)),
            "log": job.state.log_history,
        }
    for case in ("sampa", "sampa_parallel"):  # dropout: each process must get its own noise back
        CASES["resumed"] = (*CASES[case][:5], 0.1)
        straight = run("resumed", f"{out}/straight", save_strategy="steps", save_steps=2)
        resumed = run("resumed", f"{out}/resumed", resume=f"{out}/straight/checkpoint-2")
        results[f"resume_{case}"] = {"same": torch.equal(flat(straight.model), flat(resumed.model))}
        dist.barrier()
    if dist.get_rank() == 0:
        torch.save(results, f"{out}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
