"""Recurrences over windows that may hold several episodes: linear (LRU, S5) and selective (Mamba)."""

from __future__ import annotations

from .linear import linear_scan, linear_scan_step
from .selective import selective_scan, selective_scan_step

__all__ = ["linear_scan", "linear_scan_step", "selective_scan", "selective_scan_step"]
