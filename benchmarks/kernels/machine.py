"""The device: its name, what it runs, and how fast it copies and multiplies."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from typing import Any

import torch
from timing import Clock

# Packages whose kernels take part where they are installed: name to import, name to install.
OTHERS = {
    "flash_attn": "flash-attn",
    "fla": "flash-linear-attention",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "accelerated_scan": "accelerated-scan",
}


@dataclass(frozen=True)
class Machine:
    """What numbers are compared with.

    Attributes:
        device: where everything runs.
        name: of the device.
        copy_rate: bytes per second that a copy reads and writes.
        matmul_rate: FLOPs per second of a product of matrices.
        versions: of what the numbers depend on.
    """

    device: torch.device
    name: str
    copy_rate: float
    matmul_rate: float
    versions: dict[str, Any]


def slug(name: str) -> str:
    """A name as a folder.

    Args:
        name: for example "NVIDIA H100 80GB HBM3".

    Returns:
        For example "nvidia-h100-80gb-hbm3".
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_name(device: torch.device) -> str:
    """What the driver calls it; the CPU by its cores.

    Args:
        device: the device.

    Returns:
        The name.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {os.cpu_count()}core"


def installed(module: str) -> bool:
    """Whether a package can be found.

    Args:
        module: name to import.

    Returns:
        True if it is there.
    """
    return importlib.util.find_spec(module) is not None


def survey(device: torch.device) -> Machine:
    """Measures what percentages are of: a copy, and a product of square matrices.

    Args:
        device: where.

    Returns:
        The machine. On CUDA a copy of 1 GiB and a product of 8192 in bfloat16; elsewhere 256 MiB and 2048 in float32.
    """
    cuda = device.type == "cuda"
    size, side, dtype = (1 << 30, 8192, torch.bfloat16) if cuda else (1 << 28, 2048, torch.float32)
    clock = Clock(device)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    steps = {"copy": lambda: copy.copy_(source), "matmul": lambda: torch.mm(left, right, out=out)}
    with torch.no_grad():
        times = clock.medians(steps, seconds=0.5, most=30)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "triton": importlib.metadata.version("triton") if installed("triton") else None,
        **{name: importlib.metadata.version(name) for module, name in OTHERS.items() if installed(module)},
    }
    rates = 2e3 * size / times["copy"].ms, 2e3 * side**3 / times["matmul"].ms
    return Machine(device, device_name(device), *rates, versions)
