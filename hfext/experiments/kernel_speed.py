"""Speed of the Triton kernels on a GPU: the benchmark of each kernel folder, one after another, in one table.

Every benchmark compares its results with float64 before it times anything, flushes the L2 cache before each call, and
takes the median of 20 rounds in which the sides take turns. Without a GPU the table lists the bars as "not measured".
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from .. import recipe

logger = logging.get_logger(__name__)

# What is to be shown on one H200: kernel, case, bar.
BARS = (
    ("hfext-attention", "forward D128 full 16k", "470 TFLOP/s"),
    ("hfext-attention", "forward D128 causal 8k", "400 TFLOP/s"),
    ("hfext-attention", "forward D64 causal 8k", "330 TFLOP/s"),
    ("hfext-attention", "backward D128 full 8k", "320 TFLOP/s"),
    ("hfext-attention", "forward, backward against SDPA's flash kernel", "1.15, 1.0 times"),
    ("hfext-attention", "forward, backward against cuDNN", "0.75, 0.6 times"),
    ("hfext-attention", "forward, backward against compiled FlexAttention", "1.1, 1.1 times"),
    ("hfext-attention", "both ways against SDPA with a dense mask", "3 times, memory O(N)"),
    ("hfext-attention", "soft cap, sink, window 4096, left padding, a visited pair", "85 % of plain causal"),
    ("hfext-attention", "decode bf16, 512 MB", "85 % of 4.3 TB/s"),
    ("hfext-attention", "decode 4 bits, 2 bits against bf16", "2.2, 2.8 times"),
    ("hfext-gr-kan", "forward fp32, bf16 at 25088 x 3072", "85, 80 % of 4.3 TB/s"),
    ("hfext-gr-kan", "backward fp32, bf16 at 25088 x 3072", "65, 40 % of 4.3 TB/s"),
    ("hfext-gr-kan", "ViT-B MLP step against GELU", "at most 1.15 times"),
    ("hfext-lowbit", "W4, W2 against bf16 at 4096 x 14336, one token", "3, 5 times"),
)


@dataclass(kw_only=True)
class Config:
    """
    Args:
        kernels: Names of kernel folders; empty for all of them.
        limit: Seconds that one benchmark may take.
    """

    kernels: tuple[str, ...] = ()
    limit: int = 100

    def __post_init__(self):
        if self.limit <= 0:
            raise ValueError(f"limit is {self.limit!r} but must be above 0.")
        checkout = recipe.checkout()
        found = () if checkout is None else checkout.glob("kernels/*/benchmarks/*.py")
        known = {path.parent.parent.name for path in found}
        for name in self.kernels:
            if name not in known:
                raise ValueError(f"kernels holds {name!r} but must be of {', '.join(sorted(known)) or 'a checkout'}.")


def run(config: Config, out: Path) -> dict:
    if not torch.cuda.is_available():
        rows = [{"kernel": kernel, "case": case, "bar": bar, "found": "not measured"} for kernel, case, bar in BARS]
        return {"tables": {"kernels, for want of a GPU": rows}}
    checkout = recipe.checkout()
    if checkout is None:
        raise FileNotFoundError("The benchmarks lie in kernels/ of a checkout of hfext: run it there.")
    rows, details = [], {}
    for path in sorted(checkout.glob("kernels/*/benchmarks/benchmark.py")):
        name = path.parent.parent.name
        if config.kernels and name not in config.kernels:
            continue
        file = out / f"{name}.json"
        logger.info(f"Timing {name}")
        done = subprocess.run(
            [sys.executable, str(path), "--out", str(file)], capture_output=True, text=True, timeout=config.limit
        )
        if done.returncode:
            raise RuntimeError(f"The benchmark of {name} failed: {done.stderr[-2000:]}")
        details[name] = json.loads(file.read_text())
        rows += [measured(name, row) for row in details[name]["rows"]]
    return {"tables": {"kernels": rows}, "details": details}


def measured(kernel: str, row: dict) -> dict:
    """A row of a benchmark for the table; `met` is left out where there is no bar."""
    found = {"kernel": kernel, "case": row["name"], "found": row["value"], "unit": row["unit"], "bar": row["bar"]}
    return found if row.get("met") is None else {**found, "met": row["met"]}
