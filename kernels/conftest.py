"""Kernels run in Triton's interpreter where there is no GPU. Triton reads the variable when it is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401
    import triton.language  # noqa: F401

    if before is None:
        del os.environ["TRITON_INTERPRET"]  # only kernel tests run kernels


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
