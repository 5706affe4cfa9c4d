"""What a run was made with: versions, machine, threads, git commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["git_commit", "provenance"]

_PACKAGES = (
    "amago-core",
    "amago-nets",
    "amago-kernels",
    "amago-offline",
    "amago-envs",
    "torch",
    "numpy",
    "gymnasium",
    "tensordict",
    "safetensors",
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit(folder: str | Path | None = None) -> dict[str, Any] | None:
    """Commit that is checked out in a folder.

    Args:
        folder: any folder of the repository; default is the current one.

    Returns:
        `{"commit": ..., "dirty": ...}`, None where there is no repository, no commit yet, or no git.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def provenance() -> dict[str, Any]:
    """Versions, platform and thread counts of this process, JSON-able.

    Returns:
        `packages` (name -> version, None if not installed), `python`, `platform`, `cpu_count`, `torch_threads`,
        `torch_interop_threads`, `environment` (thread variables that are set), `cuda` (version and device names, None
        without a GPU), `git` (of the current folder) and `command`.
    """
    cuda = None
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        cuda = {"version": torch.version.cuda, "devices": names}
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED")
    return {
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_interop_threads": torch.get_num_interop_threads(),
        "environment": {name: os.environ[name] for name in variables if name in os.environ},
        "cuda": cuda,
        "git": git_commit(),
        "command": sys.argv,
    }
