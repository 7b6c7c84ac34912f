from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
