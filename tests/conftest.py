"""Before anything imports Triton, which decides at import whether its kernels are interpreted; and shared helpers."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a worker a core; more threads would wait for each other

pytest.register_assert_rewrite("serving")


@pytest.fixture(scope="session")
def smollm2():
    """A pretrained language model and its tokenizer."""
    from pretrained import smollm2

    return smollm2()
