"""Before anything imports Triton, which decides at import whether its kernels are interpreted; and shared helpers."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.register_assert_rewrite("serving")
