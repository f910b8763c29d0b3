"""CPU seconds that `import hfext` adds to a program that has imported torch and `transformers.trainer` already.

Each repeat is a fresh interpreter; the first one, which may have to compile the byte code, is not counted.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.logging import tqdm

_PROGRAM = """
import time, torch, transformers.trainer
start = time.process_time()
import hfext
print(time.process_time() - start)
"""


@dataclass(kw_only=True)
class Config:
    """
    Args:
        repeats: Interpreters that are counted, at least 1.
        bar: The most CPU seconds that the import may take, above 0.
    """

    repeats: int = 5
    bar: float = 0.5

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats} but must be at least 1.")
        if self.bar <= 0:
            raise ValueError(f"bar is {self.bar} but must be above 0.")


def run(config: Config, out: Path) -> dict:
    seconds = [_measure() for _ in tqdm(range(config.repeats + 1), desc="import hfext")][1:]
    middle = statistics.median(seconds)
    row = {
        "what": "`import hfext`, CPU s",
        "bar": f"<= {config.bar}",
        "measured": round(middle, 3),
        "least": round(min(seconds), 3),
        "most": round(max(seconds), 3),
        "met": middle <= config.bar,
    }
    return {"tables": {f"Import time, median of {config.repeats}": [row]}}


def _measure() -> float:
    # An installed package is compiled once; the interpreter that is not counted does that here.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`import hfext` failed in a fresh interpreter:\n{done.stderr}")
    return float(done.stdout.split()[-1])
