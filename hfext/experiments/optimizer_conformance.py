"""One report on every optimizer and schedule that has a name in `TrainingArguments`: five things that must hold.

Each cell is a run of the stock Trainer and shows the largest deviation of a weight from what it must be, or why there
is none: a method's own `opt_out`, or the NotImplementedError with which it refuses. Names come from the records, so a
new method is a new row. What cannot be the same bits is compared in float64, where what magnifies rounding (1/(2 eps)
of two-point estimates, signs, divisions by small roots) stays below one tolerance for all.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from .. import registry
from ._conformance_runs import ROWS, Job, flat, make_model, one_line, run_two, train

FAMILIES = {"optim": OptimizerNames, "schedule": SchedulerType}
# In float64, where an update moves weights by 1e-2 and one rounding is 1e-16: SOAP's basis of directions in which a
# gradient nearly vanishes magnifies it to 1e-8, the 1 / (2 eps) of two-point estimates to 1e-13.
TOLERANCE = 1e-7
SAVED = {"save_strategy": "steps", "save_steps": 2}
RESUMED = {"rows": ROWS // 2, "accumulation": 2}


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Args:
        name: As in the `opt_out` of a record.
        compared: What the deviation is between.
        dtype: Of weights and loss.
        tolerance: Largest deviation that passes; 0 is bit for bit.
        measure: (job, folder) -> deviation; `None` where all methods are run together.
    """

    name: str
    compared: str
    dtype: torch.dtype
    tolerance: float
    measure: Callable[[Job, str], float] | None


RARER = {
    "frugal": "update_gap=2",
    "soap": "precondition_frequency=2",
    "justonebyte": "check_every=2",
}


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def moved(trained: Trainer, start: Tensor) -> Tensor:
    """The trained weights; an error when they are not finite or never moved, since then all comparisons pass."""
    weights = flat(trained.model)
    if not weights.isfinite().all():
        raise RuntimeError("Weights are not finite after the run.")
    if torch.equal(weights, start):
        raise RuntimeError("No weight moved in the run.")
    return weights


def accumulation(job: Job, folder: str) -> float:
    start = flat(make_model(torch.float64))
    ends = [
        moved(train(job, folder, make_model(torch.float64), rows=rows, accumulation=ROWS // rows), start)
        for rows in (ROWS, ROWS // 2, ROWS // 4)
    ]
    return max(difference(end, ends[0]) for end in ends)


class Updates(TrainerCallback):
    """Counts those of one run."""

    made = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.made += 1


def resumed(job: Job, folder: str, model: nn.Module) -> nn.Module:
    """The model after it went on from the checkpoint of the straight run; an error when it began anew, which would
    end at the same weights."""
    count = Updates()
    checkpoint = f"{folder}/straight/checkpoint-2"
    train(job, f"{folder}/resumed", model, **RESUMED, resume=checkpoint, callbacks=[count])
    if count.made != 2:
        raise RuntimeError(f"{count.made} updates after the checkpoint instead of 2: it was not loaded.")
    return model


def resume_in(dtype: torch.dtype, dropout: float) -> Callable[[Job, str], float]:
    def resume(job: Job, folder: str) -> float:
        start = flat(make_model(dtype))
        straight = moved(train(job, f"{folder}/straight", make_model(dtype, dropout), **RESUMED, **SAVED), start)
        return difference(straight, flat(resumed(job, folder, make_model(dtype, dropout))))

    return resume


def lora(job: Job, folder: str) -> float:
    before = {name: p.detach().clone() for name, p in make_model(lora=True).named_parameters()}
    model = make_model(lora=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    straight = train(job, f"{folder}/straight", model, **RESUMED, **SAVED)
    end = moved(straight, torch.cat([p.flatten().double() for p in before.values()]))
    still = sorted(n for n in trained if "lora_B" in n and torch.equal(model.get_parameter(n), before[n]))
    # What trains a part of the weights only (the norms, say) moves that part and no other.
    if still and not any(not torch.equal(model.get_parameter(n), before[n]) for n in trained):
        raise RuntimeError(f"No trained parameter moved, as {still[0]}.")
    frozen = max(difference(model.get_parameter(n), before[n]) for n in before if n not in trained)
    return max(frozen, difference(end, flat(resumed(job, folder, make_model(lora=True)))))


CELLS = (
    Cell(
        "accumulation",
        f"{ROWS} rows at once, in 2 and in 4 micro-batches with different numbers of tokens",
        torch.float64,
        TOLERANCE,
        accumulation,
    ),
    Cell(
        "resume",
        "4 steps, and 2 steps from the checkpoint after 2; with dropout",
        torch.float32,
        0.0,
        resume_in(torch.float32, 0.1),
    ),
    Cell(
        "PEFT",
        "resume of a LoRA and a norm as above, without dropout; and frozen weights before and after",
        torch.float32,
        0.0,
        lora,
    ),
    Cell("bf16", "the same resume with weights in bfloat16", torch.bfloat16, 0.0, resume_in(torch.bfloat16, 0.1)),
    Cell(
        "two processes",
        "two processes with half the rows each, and one with two micro-batches; both ranks have the same bits",
        torch.float64,
        TOLERANCE,
        None,
    ),
)


def known() -> dict[str, registry.Method]:
    """The records of optimizers and schedules that are names of `TrainingArguments`."""
    names = {family: {x.value for x in kind} for family, kind in FAMILIES.items()}
    return {m.name: m for family in names for m in registry.methods(family) if m.name in names[family]}


@dataclass(kw_only=True)
class Config:
    """
    Args:
        names: Methods to run; all when empty.
        cells: Comparisons to run; all when empty.
        optim_args: Options by optimizer, as in `TrainingArguments`: what makes its rarer acts fall into the 4 updates
            of a cell, as SOAP's refreshes and FRUGAL's change of part. The report shows them. Whatever has the option
            `sync` gets `sync=true` where two processes are compared with one: without it they ascend apart,
            which one process cannot.
        schedule_args: `lr_scheduler_kwargs` by schedule. The amplitude of `power` keeps its rate below the limit.
        timeout: Seconds that two processes may take for all methods together.
    """

    names: list[str] | None = None
    cells: list[str] | None = None
    optim_args: dict[str, str] = dataclasses.field(default_factory=lambda: dict(RARER))
    schedule_args: dict[str, dict[str, Any]] = dataclasses.field(default_factory=lambda: {"power": {"a": 0.01}})
    timeout: float = 1200.0

    def __post_init__(self):
        cells = [cell.name for cell in CELLS]
        wanted = {"names": (self.names, known()), "cells": (self.cells, cells)}
        wanted |= {"optim_args": (self.optim_args, known()), "schedule_args": (self.schedule_args, known())}
        for field, (given, choices) in wanted.items():
            for name in given or []:
                if name not in choices:
                    raise ValueError(f"{field} has {name!r}. {registry.suggest(name, choices)}")
        if self.timeout <= 0:
            raise ValueError(f"timeout is {self.timeout!r} but must be above 0.")


def job_of(config: Config, method: registry.Method, processes: int = 1) -> Job:
    if method.family == "schedule":
        return Job(schedule=method.name, schedule_args=config.schedule_args.get(method.name))
    options = [config.optim_args.get(method.name, "")]
    fields = [f.name for f in dataclasses.fields(method.config)] if method.config else []
    if processes > 1 and "sync" in fields and "sync=" not in options[0]:
        options.append("sync=true")
    return Job(optim=method.name, optim_args=",".join(filter(None, options)) or None)


def options_of(config: Config, method: registry.Method) -> str:
    """As the report shows them."""
    if method.family == "schedule":
        return ",".join(f"{key}={value}" for key, value in config.schedule_args.get(method.name, {}).items())
    return config.optim_args.get(method.name, "")


def attempt(call: Callable[[], float]) -> float | str:
    """The deviation, or the error in one line: what a foreign method raises is the finding."""
    try:
        return call()
    except Exception as error:
        return one_line(error)


def measure(config: Config, methods: list[registry.Method], cells: list[Cell]) -> dict[tuple[str, str], float | str]:
    """(method, cell) -> deviation or error, for every cell that its record does not opt out of."""
    found: dict[tuple[str, str], float | str] = {}
    todo = [(m, c) for m in methods for c in cells if c.name not in dict(m.opt_out)]
    for method, cell in logging.tqdm(todo, desc="optimizers"):
        if cell.measure is not None:
            with tempfile.TemporaryDirectory() as folder:
                job = job_of(config, method)
                found[method.name, cell.name] = attempt(lambda job=job, cell=cell, to=folder: cell.measure(job, to))
    together = {m.name: job_of(config, m, 2) for m, c in todo if c.measure is None}
    if together:
        both = run_two(together, config.timeout)
        name = next(cell.name for cell in cells if cell.measure is None)
        for method, result in logging.tqdm(both.items(), desc="two processes"):
            found[method, name] = (
                result
                if isinstance(result, str)
                else attempt(lambda method=method, result=result: _against_one(together[method], result))
            )
    return found


def _against_one(job: Job, ranks: list[Tensor]) -> float:
    if not torch.equal(*ranks):
        raise RuntimeError(f"The processes end with different weights, by {difference(*ranks):.3g}.")
    with tempfile.TemporaryDirectory() as folder:
        single = train(job, folder, make_model(torch.float64), rows=ROWS // 2, accumulation=2)
    return difference(ranks[0], moved(single, flat(make_model(torch.float64))))


def run(config: Config, out: Path) -> dict[str, Any]:
    methods = [m for name, m in known().items() if not config.names or name in config.names]
    cells = [cell for cell in CELLS if not config.cells or cell.name in config.cells]
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity_error()
    # The tensors are tiny: more threads only wait for each other.
    torch.set_num_threads(1)
    try:
        found = measure(config, methods, cells)
    finally:
        logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)
    tables: dict[str, list[dict[str, Any]]] = {"optim": [], "schedule": []}
    reasons, failures = [], []
    for method in methods:
        row: dict[str, Any] = {"method": method.name, "options": options_of(config, method)}
        met = True
        for cell in cells:
            result = found.get((method.name, cell.name))
            refused = isinstance(result, str) and result.startswith("NotImplementedError: ")
            where = {"method": method.name, "cell": cell.name}
            if result is None or refused:
                reason = dict(method.opt_out)[cell.name] if result is None else result.partition(": ")[2]
                reasons.append(where | {"reason": reason})
                row[cell.name] = "cannot"
            elif isinstance(result, str):
                failures.append(where | {"found": result, "allowed": cell.tolerance})
                row[cell.name], met = "failed", False
            else:
                row[cell.name] = result
                if not result <= cell.tolerance:
                    failures.append(where | {"found": f"{result:.3g}", "allowed": cell.tolerance})
                    met = False
        tables[method.family].append(row | {"met": met})
    return {
        "tables": {
            "Largest deviation of a weight: optimizers": tables["optim"],
            "Largest deviation of a weight: schedules": tables["schedule"],
            "Cells": [
                {
                    "cell": cell.name,
                    "compared": cell.compared,
                    "weights": str(cell.dtype).removeprefix("torch."),
                    "allowed": cell.tolerance,
                }
                for cell in cells
            ],
            "What cannot be, and why": reasons,
            "Failures": failures,
        }
    }
