"""Short runs of the stock Trainer that the conformance report of optimizers compares.

The model is a Llama whose matrices are all square, and every row has every token once, in an order of its own: no
gradient has a null space that rounding could fill (but the one direction of the output layer that stays at 0). Labels
are masked to different lengths, so that micro-batches hold different numbers of items.

Also a program: `python -m hfext.experiments._conformance_runs SPEC`, started twice with the environment of `torchrun`.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from ..optim import mup

WIDTH, ROWS = 32, 8  # of the model, which is the length of a row too; of an update


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained with: an optimizer with its options, and a schedule."""

    optim: str = "adamw_torch"
    optim_args: str | None = None
    schedule: str = "linear"
    schedule_args: dict[str, Any] | None = None


def data(n: int = 32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(WIDTH, generator=generator) for _ in range(n)]
    return [
        {"input_ids": x, "labels": x.clone().masked_fill(torch.arange(WIDTH) < i % 7, -100)}
        for i, x in enumerate(rows)
    ]


def loss64(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch=None, **kwargs) -> Tensor:
    """The causal cross-entropy in the type of the logits; that of transformers is always float32."""
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def make_model(dtype: torch.dtype = torch.float32, dropout: float = 0.0, lora: bool = False) -> nn.Module:
    """The same every time, with base shapes for methods that want them; with `lora`, adapters and one norm train."""

    def config(width: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=WIDTH,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=WIDTH,
            attention_dropout=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config(WIDTH)).to(dtype)
        if dtype == torch.float64:
            model.loss_function = loss64
        mup.set_base_shapes(model, config(WIDTH // 2))
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(
                model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
            )
    return model


def train(job: Job, folder: str, model: nn.Module, rows: int = ROWS, accumulation: int = 1, **options) -> Trainer:
    """The Trainer after its run."""
    resume, callbacks = options.pop("resume", None), options.pop("callbacks", None)
    settings = dict(
        optim=job.optim,
        optim_args=job.optim_args,
        lr_scheduler_type=job.schedule,
        lr_scheduler_kwargs=job.schedule_args,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    args = TrainingArguments(folder, **{**settings, **options})
    trainer = Trainer(model, args, train_dataset=data(), callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def flat(model: nn.Module) -> Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


# two processes


def run_two(jobs: dict[str, Job], timeout: float) -> dict[str, list[Tensor] | str]:
    """Name -> the weights of both processes after a run in float64 on both, or why there are none.

    All jobs share one start of the processes; a job that stops them is told, and the rest starts again.
    """
    found: dict[str, list[Tensor] | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        while len(found) < len(jobs):
            left = {name: job for name, job in jobs.items() if name not in found}
            errors = _start({name: dataclasses.asdict(job) for name, job in left.items()}, folder, timeout)
            for name in left:
                told = [Path(folder, f"{name}-{rank}.txt") for rank in range(2)]
                kept = [Path(folder, f"{name}-{rank}.pt") for rank in range(2)]
                if any(path.is_file() for path in told):
                    found[name] = next(path.read_text(encoding="utf-8") for path in told if path.is_file())
                elif all(path.is_file() for path in kept):
                    found[name] = [torch.load(path, weights_only=True) for path in kept]
                else:
                    found[name] = f"RuntimeError: the processes stopped here. {errors}"
                    break
    return found


def _start(spec: dict[str, Any], folder: str, timeout: float) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    file = Path(folder) / "jobs.json"
    file.write_text(json.dumps({"folder": folder, "jobs": spec}), encoding="utf-8")
    logs = [Path(folder) / f"errors-{rank}.txt" for rank in range(2)]
    ranks = []
    for rank in range(2):
        env = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path}
        with logs[rank].open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", __name__, str(file)],
                    env={**env, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                )
            )
    try:
        for process in ranks:
            process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return logs[0].read_text(encoding="utf-8", errors="replace").strip()[-300:]


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main(file: str) -> None:
    import hfext  # noqa: F401

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    spec = json.loads(Path(file).read_text(encoding="utf-8"))
    rank = os.environ["RANK"]
    for name, job in spec["jobs"].items():
        target = os.path.join(spec["folder"], f"{name}-{rank}")
        try:
            with tempfile.TemporaryDirectory() as out:
                trainer = train(Job(**job), out, make_model(torch.float64), rows=ROWS // 2)
            torch.save(flat(trainer.model), f"{target}.pt")
        except Exception as error:
            traceback.print_exc()
            Path(f"{target}.txt").write_text(one_line(error), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
