"""Speed of window sampling from a replay store on disk: windows of length 128 per second.

Two stores, small vectors and 64x64x3 uint8 images, in one segment or in 16. Beside it the plain gather alone: indexing
typed rows of arrays in memory, with neither drawing nor padding nor a store. Both must return the same numbers, or
nothing is reported.

    python benchmarks/sampling.py --out sampling.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import report

from amago_offline import Field, ReplayDataset, Schema, Trajectory, discrete_action_field

LENGTH = 128
STORES = {
    "vectors": (Schema({"obs": Field((8,), "float32")}, discrete_action_field(4)), 400_000, 200),
    "images": (Schema({"obs": Field((64, 64, 3), "uint8")}, discrete_action_field(4)), 40_000, 500),
}


def fill(dataset: ReplayDataset, timesteps: int, length: int) -> float:
    """Append trajectories of `length` timesteps; returns trajectories per second."""
    rng = np.random.default_rng(0)
    field = dataset.schema.obs["obs"]
    obs = rng.integers(0, 255, (2 * length, *field.shape)).astype(field.dtype)
    end = np.zeros(length, bool)
    spent = 0.0
    for number in range(timesteps // length):
        shift = number % length
        trajectory = Trajectory(
            obs={"obs": obs[shift : shift + length]},
            prev_action=rng.integers(0, 4, length),
            prev_reward=rng.normal(size=length),
            terminated=end,
            truncated=end,
            time_idx=np.arange(length),
        )
        start = time.perf_counter()
        dataset.append(trajectory)
        spent += time.perf_counter() - start
    return (timesteps // length) / spent


def plain(columns: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, torch.Tensor]:
    """The same windows by indexing typed rows; `rows` `[B, L]`."""
    return {name: torch.from_numpy(values[rows]) for name, values in columns.items()}


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(name: str, folder: Path, *, segments: int, padding: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of the report for one store."""
    schema, timesteps, length = STORES[name]
    dataset = ReplayDataset(folder, schema, segment_timesteps=timesteps // segments, padding=padding)
    written = fill(dataset, timesteps, length)
    everything = [dataset.trajectory(i) for i in range(len(dataset))]
    columns = {
        "obs": np.concatenate([t.obs["obs"] for t in everything]),
        "prev_action": np.concatenate([t.prev_action for t in everything]).astype(np.int64),
        "prev_reward": np.concatenate([t.prev_reward for t in everything]),
    }
    del everything
    rows_out = []
    for batch_size in (24, 256):
        rng = np.random.default_rng(0)
        batch = dataset.sample(batch_size, LENGTH, np.random.default_rng(1))
        picks = np.random.default_rng(1).integers(0, len(dataset), size=batch_size)
        rows = picks[:, None] * length + batch.time_idx.numpy()
        pad = ~batch.timestep_mask
        for key, value in plain(columns, rows).items():
            value[pad] = 0
            got = batch.obs["obs"] if key == "obs" else getattr(batch, key)
            if not torch.equal(value, got):
                raise SystemExit(f"refusing to report: {key} differs from plain indexing")
        ours = seconds(lambda size=batch_size, rng=rng: dataset.sample(size, LENGTH, rng), repeats)
        simple = seconds(lambda rows=rows: plain(columns, rows), repeats)
        moved = batch_size * (LENGTH + 1) * schema.row_bytes
        rows_out.append(
            {
                "store": name,
                "segments": len(dataset.sources),
                "padding": padding,
                "batch": batch_size,
                "windows_per_s": batch_size / ours,
                "plain_indexing_windows_per_s": batch_size / simple,
                "gigabytes_per_s": moved / ours / 1e9,
                "appended_trajectories_per_s": written,
            }
        )
    dataset.close()
    return rows_out


def main() -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file to write, or a folder that gets sampling.json")
    parser.add_argument("--repeats", type=int, default=15, help="calls per measurement; the median counts")
    parser.add_argument("--stores", nargs="+", choices=sorted(STORES), default=sorted(STORES, reverse=True))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.stores:
        for segments, padding in ((1, "none"), (16, "none"), (16, "both")):
            with tempfile.TemporaryDirectory() as folder:
                repeats = arguments.repeats
                rows += measure(name, Path(folder), segments=segments, padding=padding, repeats=repeats)
    versions = {"numpy": np.__version__, "torch": torch.__version__}
    report("sampling", rows, arguments.out, settings={"length": LENGTH, "repeats": arguments.repeats, **versions})


if __name__ == "__main__":
    main()
