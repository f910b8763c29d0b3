"""Seconds of an update: SAM in one process against SAMPa on a pair of processes, the same batch and one thread each.

Programs take turns; the ratio is that of the medians of all updates. Nothing else should run on the machine: the pair
needs two free cores.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.utils import logging

from ..optim.sampa import METHOD


@dataclass(kw_only=True)
class Config:
    """
    Args:
        rounds: Turns of each program.
        steps: Updates in a turn; the first three are not counted.
        rows: Rows of an update, even.
        hidden, layers, vocab, length: Size of the Llama.
        bar: Speed-up that counts as reproduced.
    """

    rounds: int = 2
    steps: int = 13
    rows: int = 32
    hidden: int = 256
    layers: int = 4
    vocab: int = 512
    length: int = 64
    bar: float = 1.6

    def __post_init__(self):
        if self.rows < 2 or self.rows % 2:
            raise ValueError(f"rows is {self.rows} but must be even and >= 2: a pair of processes shares them.")
        if self.steps < 5 or self.rounds < 1:
            raise ValueError(f"steps is {self.steps} and rounds {self.rounds}, but must be >= 5 and >= 1.")


def start(processes: int, **spec) -> list[float]:
    """Seconds of the counted updates of one program."""
    command = [sys.executable, "-m", "hfext.experiments._timed_training", json.dumps(spec)]
    if processes > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
        command[1:3] = [*launcher, "-m", "hfext.experiments._timed_training"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TIMES ")]
    if not lines:
        raise RuntimeError(f"A timed run ended without times:\n{done.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("TIMES "))[3:]


def run(config: Config, out: Path) -> dict:
    size = {k: v for k, v in asdict(config).items() if k in ("hidden", "layers", "vocab", "length", "steps")}
    runs = {
        "AdamW, one process": (1, "adamw_torch", None),
        "SAM, one process": (1, "sam", None),
        "SAMPa, one process": (1, "sampa", None),
        "SAMPa, a pair of processes": (2, "sampa", "parallel=true"),
    }
    seconds = {name: [] for name in runs}
    with logging.tqdm(total=config.rounds * len(runs), desc="programs") as bar:
        for _ in range(config.rounds):
            for name, (processes, optim, optim_args) in runs.items():
                seconds[name] += start(
                    processes, optim=optim, optim_args=optim_args, rows=config.rows // processes, **size
                )
                bar.update()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    sam, pair = median["SAM, one process"], median["SAMPa, a pair of processes"]
    rows = [
        {"run": n, "ms an update": round(1e3 * m, 1), "speed-up over SAM": round(sam / m, 2)}
        for n, m in median.items()
    ]
    return {
        "tables": {"Wall-clock time of an update, one thread a process": rows},
        "evidence": {
            "claim": METHOD.claim,
            "paper": "up to 2x, if communication is negligible",
            "metric": "speed-up of an update over SAM in one process",
            "setting": f"Llama {config.hidden}x{config.layers}, {config.rows}x{config.length} tokens, CPU, gloo",
            "method": "sampa",
            "ours": round(sam / pair, 3),
            "ours_sd": None,
            "n": len(seconds["SAM, one process"]),
            "baseline_name": "sam",
            "baseline": 1.0,
            "baseline_sd": None,
            "reproduced": sam / pair >= config.bar,
            "note": f"Reproduced means at least {config.bar}x.",
        },
    }
