"""Two processes that train together, as `torchrun` starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# The first rank holds the store that both talk through: it must not go before the other is done.
END = """
import torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def run_two(script: str, timeout: int = 240) -> None:
    """Run the source of a Python program as both ranks of a world of two; a rank that fails shows its errors.

    The program finds this project and the shared modules of the tests, as a test does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script + END],
            env={
                **os.environ,
                **world,
                "PYTHONPATH": found,
                "RANK": str(i),
                "LOCAL_RANK": str(i),
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(error[-3000:] for error in errors)
