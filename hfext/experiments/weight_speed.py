"""Speed of SmolLM2 with quantised weights on the CPU: greedy decoding of one row, prefill, and the memory held.

"W4 g64, made whole" makes a layer's weight in one piece and multiplies: what no path may be slower than.

Models take turns; a figure is the median of its turns, and ratios are those of medians of one run. Decoding is the
model's forward with a cache and the choice of the best token, without `generate` around it.

With `quantise` a fresh process quantises the model by the layer stage of decoupleQ: seconds, and the highest memory
against what should suffice: what the process held before (the libraries, the fp32 model), one block more in fp32, and
activations: the stored inputs and outputs of a block for all rows, and for one batch what a block's forward holds.
"""

import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.utils import logging

from .. import quantization as q
from ..quantization._cpu_kernels import set_kernel
from . import _smollm2
from ._data import wikitext2

FULL, HALF = "fp32", "bf16"
PACKED = "W4 g64, packed kernel"
PIECES, WHOLE = "W4 g64, dequantised", "W4 g64, made whole"


@dataclass(kw_only=True)
class Config:
    """
    Args:
        prompt: Tokens before decoding.
        new_tokens: Tokens that are decoded.
        prefill: Lengths of prompts whose prefill is timed.
        threads: Numbers of threads.
        rounds: Turns of each model.
        bar_decode: Speed-up of packed W4 decoding over fp32 that counts as met.
        bar_prefill: Speed of W4 prefill against bf16 that counts as met.
        bar_whole: Speed of every W4 path against dequantise-then-matmul that counts as met. Layers of less than 2^20
            weights take that very path, so it leaves room for noise.
        quantise: Measure a quantisation too: minutes.
        rows, length: Calibration rows and their tokens there.
        minutes: Its bar.
        data_dir: Folder with wikitext2/valid.txt; found by itself beside a checkout.
    """

    prompt: int = 32
    new_tokens: int = 32
    prefill: list[int] = field(default_factory=lambda: [128, 512])
    threads: list[int] = field(default_factory=lambda: [1, 2])
    rounds: int = 5
    bar_decode: float = 2.5
    bar_prefill: float = 0.9
    bar_whole: float = 0.95
    quantise: bool = False
    rows: int = 16
    length: int = 512
    minutes: float = 4.0
    data_dir: str | None = None

    def __post_init__(self):
        for name in ("prompt", "new_tokens", "rounds", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        for name in ("prefill", "threads"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must hold numbers >= 1.")


class WholeLinear(q.QuantLinear):
    """Dequantise, then multiply, as layers do whose weights are not on the plain grid."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return super().dequantized(dtype)


def made_whole(model: nn.Module) -> nn.Module:
    for layer in q.quantized_layers(model).values():
        layer.__class__ = WholeLinear
    return model


def models() -> dict[str, nn.Module]:
    full = _smollm2.load()[0].eval()

    def rounded(kernel: str, **options) -> nn.Module:
        model = q.quantize(copy.deepcopy(full), q.RTNConfig(**options)).to(torch.bfloat16)
        set_kernel(model, kernel)
        return model

    return {
        FULL: full,
        HALF: copy.deepcopy(full).to(torch.bfloat16),
        PACKED: rounded("auto", bits=4),
        PIECES: rounded("dequantize", bits=4),
        WHOLE: made_whole(rounded("dequantize", bits=4)),
        "W2 g64, packed kernel": rounded("int4", bits=2),
        "W2 g64, dequantised": rounded("dequantize", bits=2),
        "W8 by row, packed kernel": rounded("auto", bits=8, group_size=-1, symmetric=True),
    }


@torch.inference_mode()
def decoding(model: nn.Module, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Wall and CPU seconds of a decoded token."""
    cache = DynamicCache(config=model.config)
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(new_tokens):
        token = model(token, past_key_values=cache).logits.argmax(-1)
    return (time.perf_counter() - wall) / new_tokens, (time.process_time() - cpu) / new_tokens


@torch.inference_mode()
def prefilling(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """Wall and CPU seconds of a prompt."""
    wall, cpu = time.perf_counter(), time.process_time()
    model(ids, logits_to_keep=1)
    return time.perf_counter() - wall, time.process_time() - cpu


@torch.inference_mode()
def linears(model: nn.Module) -> tuple[float, float]:
    """Wall and CPU seconds of one token through every linear layer of the blocks, one after the other."""
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)]
    inputs = {n: torch.ones(1, n, dtype=model.dtype) for n in {layer.in_features for layer in layers}}
    wall, cpu = time.perf_counter(), time.process_time()
    for layer in layers:
        layer(inputs[layer.in_features])
    return time.perf_counter() - wall, time.process_time() - cpu


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors and of packed copies."""
    tensors = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
    return sum(tensors.values()) + sum(layer.packed.nbytes() for layer in q.quantized_layers(model).values())


def measured(config: Config, found: dict[str, nn.Module], threads: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Median wall and CPU seconds of each task and model with so many threads."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = found[FULL].config.vocab_size
    prompts = {n: torch.randint(10, vocabulary, (1, n), generator=generator) for n in {config.prompt, *config.prefill}}
    tasks: dict[str, Callable] = {
        "decode": lambda model: decoding(model, prompts[config.prompt], config.new_tokens),
        "linear layers": linears,
    }
    for n in config.prefill:
        tasks[f"prefill {n}"] = lambda model, n=n: prefilling(model, prompts[n])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        turns = {task: {name: [] for name in found} for task in tasks}
        with logging.tqdm(total=(config.rounds + 1) * len(tasks), desc=f"{threads} threads") as bar:
            for turn in range(config.rounds + 1):
                for task, timed in tasks.items():
                    for name, model in found.items():
                        seconds = timed(model)
                        turns[task][name] += [seconds] if turn else []  # the first warms up
                    bar.update()
    finally:
        torch.set_num_threads(before)
    return {
        task: {name: tuple(statistics.median(part) for part in zip(*s, strict=True)) for name, s in by_name.items()}
        for task, by_name in turns.items()
    }


def run(config: Config, out: Path) -> dict:
    tables: dict[str, list[dict]] = {}
    bars = []
    found = models()
    for threads in config.threads:
        seconds = measured(config, found, threads)
        rows = []
        for name, model in found.items():
            row = {"model": name, "MB held": round(held_bytes(model) / 1e6, 1)}
            for task, by_name in seconds.items():
                wall, cpu = by_name[name]
                if task == "decode":
                    row["tokens/s"] = round(1 / wall, 1)
                row[f"{task}, ms"] = round(1e3 * wall, 2)
                row[f"{task}, CPU ms"] = round(1e3 * cpu, 2)
                row[f"{task}, x fp32"] = round(by_name[FULL][0] / wall, 2)
                row[f"{task}, x bf16"] = round(by_name[HALF][0] / wall, 2)
            rows.append(row)
        tables[f"SmolLM2-135M, batch 1, {threads} threads"] = rows
        decode = seconds["decode"]
        ratio = decode[FULL][0] / decode[PACKED][0]
        prefill = {n: seconds[f"prefill {n}"][HALF][0] / seconds[f"prefill {n}"][PACKED][0] for n in config.prefill}
        whole = {
            name: min(by_name[WHOLE][0] / by_name[name][0] for by_name in seconds.values())
            for name in (PACKED, PIECES)
        }
        for what, value, bar in (
            (f"decode, {PACKED}, against fp32", ratio, config.bar_decode),
            (f"prefill, {PACKED}, against bf16, the worst length", min(prefill.values()), config.bar_prefill),
            *((f"{name}, against {WHOLE}, the worst task", value, config.bar_whole) for name, value in whole.items()),
        ):
            bars.append({"what": what, "threads": threads, "ratio": round(value, 2), "bar": bar, "met": value >= bar})
    capability = torch.backends.cpu.get_cpu_capability()
    tables[f"Bars, on a CPU with {capability}"] = bars
    if config.quantise:
        tables["Quantisation by decoupleQ, layer stage"] = [quantisation(config)]
    return {"tables": tables}


def quantisation(config: Config) -> dict:
    """Seconds and memory of a quantisation in a fresh process, against the bars."""
    if platform.system() != "Linux":
        raise NotImplementedError("The highest memory is read from /proc: run this on Linux, or with quantise false.")
    command = [sys.executable, "-m", "hfext.experiments.weight_speed", json.dumps(asdict(config))]
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"The quantisation ended without a result:\n{done.stderr[-2000:]}")
    row = json.loads(lines[0].removeprefix("RESULT "))
    fast, small = row["minutes"] <= config.minutes, row["peak MB"] <= row["allowed MB"]
    return {**row, "bar, minutes": config.minutes, "met": fast and small}


def quantise_here(config: Config) -> dict:
    """What the fresh process does."""
    torch.set_num_threads(2)
    libraries = memory("VmRSS")
    model, tokenizer = _smollm2.load()
    # Weights are mapped from their file: they become resident when they are read, so their bytes are counted.
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    loaded = libraries + weights
    sizes = model.config
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    stored = 2 * config.rows * config.length * sizes.hidden_size * 4
    linear = sum(x.out_features for x in model.model.layers[0].modules() if isinstance(x, nn.Linear))
    scores = sizes.num_attention_heads * config.length**2
    batch = 4 * (config.length * (4 * sizes.hidden_size + 2 * linear) + scores)
    made = q.DecoupleQConfig(
        bits=2,
        block_epochs=0,
        dataset=str(wikitext2(config.data_dir) / "valid.txt"),
        tokenizer=tokenizer,
        num_samples=config.rows,
        sequence_length=config.length,
        batch_size=1,
    )
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory starts anew
    wall, cpu = time.perf_counter(), time.process_time()
    q.quantize(model, made)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "rows x tokens": f"{config.rows} x {config.length}",
        "minutes": round(wall / 60, 2),
        "CPU minutes": round(cpu / 60, 2),
        "libraries MB": round(libraries / 1e6),
        "model MB": round(weights / 1e6),
        "one block MB": round(block / 1e6),
        "activations MB": round((stored + batch) / 1e6),
        "allowed MB": round((loaded + block + stored + batch) / 1e6),
        "peak MB": round(memory("VmHWM") / 1e6),
    }


def memory(field: str) -> int:
    """A figure of this process in bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    sys.stdout.write(f"RESULT {json.dumps(quantise_here(Config(**json.loads(sys.argv[1]))))}\n")
