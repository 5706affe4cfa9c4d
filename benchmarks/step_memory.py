"""Acting costs the same however long the history is, and a step copies no cache.

For every backbone, 32 lanes: the median time of a step right after the ring buffer is full, and after ten times as many
steps; the two ages take turns, in blocks of steps, at the same addresses. Then the bytes that one step allocates, all
temporaries included, beside the bytes of the state; once with all lanes full and once after one lane was reset.
The script fails if the state grows, if old lanes are slower by a third, or if a Transformer's step allocates more than
an eighth of its cache: a copy of the keys of one of its two layers would be a quarter.

    python benchmarks/step_memory.py [--only gru ...] [--quick] [--threads 2] [--device cuda] [--out results.json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _report import report
from backbones import CONFIGS, IN_DIM
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from amago_nets.traj_encoders import State, TrajEncoder

LANES = 32
BLOCK = 16
SLOWER = 4 / 3
SHARE = 1 / 8


def allocated(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes handed out by the allocator during a call, whether given back or not."""
    if device.type == "cuda":
        before = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
        call()
        return torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = profiler.profiler.kineto_results  # The summaries of the profiler subtract what is given back.
    return sum(max(0, event.nbytes()) for event in results.events() if event.name() == "[memory]")


def size_of(state: State) -> int:
    """Bytes of the state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())


class Lanes:
    """Lanes of a backbone that act on random inputs."""

    def __init__(self, module: TrajEncoder) -> None:
        self.module, self.device = module, next(module.parameters()).device
        self.state = module.initial_state(LANES)
        self.x = torch.randn(LANES, IN_DIM, device=self.device)
        self.now = torch.zeros(LANES, dtype=torch.int64, device=self.device)

    def step(self) -> Tensor:
        """One timestep."""
        out = self.module.step(self.x, self.now, self.state)
        self.now += 1
        return out

    def timed(self) -> list[float]:
        """Seconds of each timestep of a block, without the first ones, which bring the memory into the caches."""
        times = []
        for _ in range(BLOCK):
            start = time.perf_counter()
            self.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return times[BLOCK // 4 :]


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times and bytes of one backbone."""
    torch.manual_seed(0)
    module = CONFIGS[name].build(IN_DIM, args.slots).to(args.device).eval()
    lanes = Lanes(module)
    size = size_of(lanes.state)
    ages = {}
    for age, steps in (("young", args.slots), ("old", 10 * args.slots)):
        for _ in range(steps):
            lanes.step()
        ages[age] = lanes.state.state_dict(), lanes.now.clone()
    times: dict[str, list[float]] = {age: [] for age in ages}
    for _ in range(args.slots // BLOCK):
        for age, (snapshot, now) in ages.items():
            lanes.state.load_state_dict(snapshot)
            lanes.now.copy_(now)
            times[age] += lanes.timed()
    medians = {age: sorted(values)[len(values) // 2] for age, values in times.items()}
    bytes_full = allocated(lanes.step, lanes.device)
    module.reset_state(lanes.state, torch.arange(LANES, device=lanes.device) == 3)
    lanes.step()
    bytes_ragged = allocated(lanes.step, lanes.device)
    if size_of(lanes.state) != size:
        raise SystemExit(f"{name}: the state grows from {size:,} to {size_of(lanes.state):,} bytes")
    return {
        "backbone": name,
        "step_us_full": 1e6 * medians["young"],
        "step_us_ten_times_older": 1e6 * medians["old"],
        "ratio": medians["old"] / medians["young"],
        "state_bytes": size,
        "step_bytes": bytes_full,
        "step_bytes_after_reset": bytes_ragged,
    }


def check_counting(device: torch.device) -> None:
    """A copy must be seen, or the counts mean nothing."""
    cache = torch.zeros(1 << 20, device=device)
    seen = allocated(lambda: cache.clone() is None, device)
    if seen < cache.numel() * 4:
        raise SystemExit(f"a copy of {cache.numel() * 4:,} bytes was counted as {seen:,}; nothing is reported")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--slots", type=int, default=512, help="max_seq_len")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="half the slots")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.quick:
        args.slots //= 2
    torch.set_num_threads(args.threads)
    check_counting(torch.device(args.device))
    with torch.no_grad():
        rows = [measure(name, args) for name in args.only]
    report("step_memory", rows, args.out, settings={**vars(args), "torch": torch.__version__})
    wrong = [f"{row['backbone']} is {row['ratio']:.2f} times slower" for row in rows if row["ratio"] > SLOWER]
    for row in rows:
        most = max(row["step_bytes"], row["step_bytes_after_reset"])
        if row["backbone"] == "transformer" and most > SHARE * row["state_bytes"]:
            wrong.append(f"transformer allocates {most:,} bytes per step beside a cache of {row['state_bytes']:,}")
    if wrong:
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
