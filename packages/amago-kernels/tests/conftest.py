"""Before anything imports Triton: its interpreter where there is no GPU, and no search for configurations anywhere."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("AMAGO_KERNELS_TUNE", "0")
