"""Times and memory of calls that take turns."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]

# More than any second-level cache holds, written so often that the host hands over a whole training step meanwhile.
_FLUSH_BYTES = 1 << 28
_FLUSHES = 5
_FEWEST, _SLOW_FEWEST = 20, 5
# Calls beyond this many milliseconds may be repeated fewer times.
_SLOW_MS = 50.0


@dataclass(frozen=True)
class Times:
    """What repeated calls took.

    Attributes:
        ms: the median, in milliseconds.
        spread: the middle half of the times, as a share of the median.
        runs: how many there were.
    """

    ms: float
    spread: float
    runs: int

    @classmethod
    def of(cls, times: list[float]) -> Times:
        """Summarises times.

        Args:
            times: in milliseconds.

        Returns:
            The summary.
        """
        ordered = sorted(times)
        count = len(ordered)
        middle = ordered[count // 2]
        return cls(middle, (ordered[(3 * count) // 4] - ordered[count // 4]) / middle, count)


def repeats(ms: float, seconds: float, most: int) -> int:
    """How often a call is repeated.

    Args:
        ms: what it takes, roughly.
        seconds: to spend on it.
        most: not more often than this.

    Returns:
        At least 20; at least 5 where a call takes more than 50 ms.
    """
    fewest = _FEWEST if ms <= _SLOW_MS else _SLOW_FEWEST
    return max(min(int(1e3 * seconds / max(ms, 1e-3)), most), min(fewest, most))


class Clock:
    """Takes times on one device: by events on CUDA, with a cold second-level cache; by the wall elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if self.cuda else None

    def once(self, step: Step, restore: Step = lambda: None) -> float:
        """One call.

        Every call begins on an idle device behind five writes of 256 MiB, which take about 0.5 ms on a large GPU: what
        the host needs beyond that to start a call counts, what it needs until then does not.

        Args:
            step: what to time.
            restore: called before, not timed.

        Returns:
            Milliseconds.
        """
        restore()
        if self._flushed is None:
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(_FLUSHES):
            self._flushed.zero_()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def medians(
        self,
        steps: Mapping[str, Step],
        *,
        seconds: float,
        most: int = 100,
        restores: Mapping[str, Step] | None = None,
    ) -> dict[str, Times]:
        """Times of calls that take turns, each warmed up.

        Args:
            steps: what to time, by name.
            seconds: per name.
            most: repeats per name.
            restores: called before each call of that name, not timed.

        Returns:
            Times by name.
        """
        restores = restores or {}
        undo = {name: restores.get(name, lambda: None) for name in steps}
        for name, step in steps.items():
            self.once(step, undo[name])
        first = {name: min(self.once(step, undo[name]) for _ in range(2)) for name, step in steps.items()}
        counts = {name: repeats(ms, seconds, most) for name, ms in first.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(max(counts.values(), default=0)):
            for name, step in steps.items():
                if turn < counts[name]:
                    times[name].append(self.once(step, undo[name]))
        return {name: Times.of(values) for name, values in times.items()}


def captured(step: Step, restore: Step) -> Step:
    """A CUDA graph of one call.

    Args:
        step: what to capture; must have run before.
        restore: called before every call, not captured.

    Returns:
        Replays it.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            restore()
            step()
    torch.cuda.current_stream().wait_stream(side)
    restore()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # What is made while capturing must live as long as the graph.
        kept = step()

    def replay(kept: object = kept) -> None:
        graph.replay()

    return replay


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory that a call holds beyond what was held before, results included.

    Args:
        step: what to look at.
        device: where it runs.

    Returns:
        Bytes: of the allocator on CUDA, of the profiler's record of allocations on CPUs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()
    results = profiler.profiler.kineto_results
    del kept
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Some versions of the profiler write a line when they begin and end, past Python."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
