"""Two processes (gloo) against one process on the same rows, for every way in which gradients are shared."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optim_training import flat, gpt2, language_data, run_training

sys.path.insert(0, str(Path(__file__).parent))
import distributed_worker as worker

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Results of all cases from one start of two processes."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run([*command, worker.__file__, str(out)], capture_output=True, text=True, timeout=300, env=env)
    assert (out / "results.pt").exists(), done.stderr[-3000:]
    return torch.load(out / "results.pt", weights_only=False)


def one(case, tmp_path):
    """The same rows in one process: twice as many micro-batches, which is exact for every method."""
    optim, optim_args, rows, accumulation, dtype, _ = worker.CASES[case]
    return run_training(
        gpt2(dtype=dtype),
        optim,
        optim_args.replace(",parallel=true", "").replace("parallel=true,", ""),
        tmp_path,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2 * accumulation,
        max_steps=4,
        learning_rate=1e-2,
        data=language_data(32),  # no ragged last update: two processes would fill it up by repeating rows
    )


@pytest.mark.parametrize("case", list(worker.CASES))
def test_ranks_end_with_the_same_bits(case, two):
    assert two[case]["same"]


@pytest.mark.parametrize("case", [c for c in worker.CASES if c != "sam_local"])
def test_two_processes_equal_one(case, two, tmp_path):
    single = one(case, tmp_path)
    assert (two[case]["weights"] - flat(single.model)).abs().max() <= 1e-7
    losses = [[h["loss"] for h in log if "loss" in h] for log in (two[case]["log"], single.state.log_history)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("case", ["sampa_parallel", "sampa_parallel_0"])
def test_parallel_sampa_equals_serial_bitwise(case, two, tmp_path):
    assert torch.equal(two[case]["weights"], flat(one(case, tmp_path).model))


def test_local_ascent_differs_from_the_averaged_one(two):
    assert (two["sam"]["weights"] - two["sam_local"]["weights"]).abs().max() > 1e-7


@pytest.mark.parametrize("case", ["sampa", "sampa_parallel"])
def test_resume_is_bitwise_with_two_processes(case, two):
    assert two[f"resume_{case}"]["same"]


def test_parallel_sampa_needs_pairs(tmp_path):
    with pytest.raises(ValueError, match="even number of processes, this run has 1"):
        run_training(gpt2(), "sampa", "parallel=true", tmp_path)
