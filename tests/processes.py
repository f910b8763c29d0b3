"""Two processes that train together, as `torchrun` starts them."""

import os
import socket
import subprocess
import sys


def run_two(script: str, timeout: int = 240) -> None:
    """Run the source of a Python program as both ranks of a world of two; a rank that fails shows its errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **world, "RANK": str(i), "LOCAL_RANK": str(i), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-3000:]
