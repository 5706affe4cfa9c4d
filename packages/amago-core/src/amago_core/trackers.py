"""Where metrics go: a JSONL file always, TensorBoard and Weights & Biases on request, and the terminal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from amago_core.errors import MissingDependencyError, RunDirError
from amago_core.progress import ConsoleProgress

__all__ = [
    "ConsoleProgress",
    "JSONLTracker",
    "MultiTracker",
    "TensorBoardTracker",
    "Tracker",
    "WandbTracker",
    "read_jsonl",
]


@runtime_checkable
class Tracker(Protocol):
    """Anything that records metrics."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics.

        Args:
            step: x-axis, a count that never decreases within a run.
            metrics: name -> number, string, None, or list of numbers.
        """
        ...

    def close(self) -> None:
        """Write out everything that is pending; calling it again does nothing."""
        ...


def _plain(value: Any, bad: list[int]) -> Any:
    """A value as strict JSON; `bad[0]` counts non-finite numbers, which become null."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        bad[0] += 1
        return None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, bad) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, bad) for inner in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        return _plain(value.tolist(), bad)
    return str(value)


class JSONLTracker:
    """One JSON object per line, flushed line by line; the record of a run.

    Non-finite numbers become `null` (strict JSON has no NaN) and are counted in `nonfinite`, so that one bad value
    never stops a run and never hides.

    Args:
        path: file to append to; created, with its folder, if needed. An unfinished last line, left by a kill, is
            moved aside first.

    Attributes:
        path: the file.
        nonfinite: how many non-finite numbers were written as null by this object.

    Raises:
        RunDirError: if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.nonfinite = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        except OSError as error:
            raise RunDirError(f"cannot write {self.path}: {error.strerror}") from error
        complete = _complete_bytes(self.path)
        if complete != self.offset:
            self.truncate_to(complete)

    @property
    def offset(self) -> int:
        """Size of the file in bytes; keep it in the checkpoint and give it to `truncate_to` on resume."""
        return os.fstat(self._file.fileno()).st_size

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line that holds `step` and the metrics.

        Args:
            step: x-axis, stored under `"step"`.
            metrics: name -> number, string, bool, None, array, or nested lists and dictionaries of them.
        """
        bad = [0]
        record = {"step": int(step), **{str(key): _plain(value, bad) for key, value in metrics.items()}}
        self.nonfinite += bad[0]
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def truncate_to(self, offset: int) -> Path | None:
        """Go back to an earlier end of the file; what lay behind it moves to `<name>.tail-<k>.jsonl`.

        Args:
            offset: size in bytes to return to.

        Returns:
            The file that holds the tail, None if there was none.

        Raises:
            RunDirError: if the file is shorter than `offset`: it is not the file the checkpoint was written with.
        """
        size = self.offset
        if not 0 <= offset <= size:
            raise RunDirError(f"{self.path} has {size} bytes, fewer than the {offset} that the checkpoint expects")
        if offset == size:
            return None
        tail = self._next_tail()
        with self.path.open("rb") as file, tail.open("xb") as copy:
            file.seek(offset)
            while block := file.read(1 << 20):
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
        self._file.truncate(offset)
        self._file.seek(offset)
        return tail

    def _next_tail(self) -> Path:
        number = 0
        while (tail := self.path.with_name(f"{self.path.stem}.tail-{number}{self.path.suffix}")).exists():
            number += 1
        return tail

    def sync(self) -> None:
        """Force everything to disk; call before writing a checkpoint that holds `offset`."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        self._file.close()


def _complete_bytes(path: Path) -> int:
    """Bytes up to and including the last newline."""
    size = path.stat().st_size
    with path.open("rb") as file:
        end = size
        while end > 0:
            start = max(0, end - 4096)
            file.seek(start)
            position = file.read(end - start).rfind(b"\n")
            if position >= 0:
                return start + position + 1
            end = start
    return 0


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file; an unfinished last line is left out.

    Args:
        path: file written by `JSONLTracker`.

    Yields:
        One dictionary per complete line.
    """
    with Path(path).open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and line.strip():
                yield json.loads(line)


class TensorBoardTracker:
    """Scalars and histograms for TensorBoard; needs `pip install "amago-core[tensorboard]"`.

    Args:
        log_dir: folder for the event files.
        purge_step: on resume, the step from which TensorBoard should hide what was logged before.

    Raises:
        MissingDependencyError: if tensorboard is not installed.
    """

    def __init__(self, log_dir: str | Path, *, purge_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError("the TensorBoard tracker", "tensorboard", "tensorboard") from error
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write numbers as scalars, lists of numbers as histograms, strings as text.

        Args:
            step: x-axis.
            metrics: name -> value; None is left out.
        """
        for key, value in metrics.items():
            if isinstance(value, str):
                self._writer.add_text(key, value, step)
            elif value is not None:
                array = np.asarray(value, dtype=np.float64)
                if array.ndim == 0:
                    self._writer.add_scalar(key, float(array), step)
                elif array.size:
                    self._writer.add_histogram(key, array, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """Weights & Biases, offline mode included; needs `pip install "amago-core[wandb]"`.

    Args:
        project: project name.
        name: run name shown by wandb.
        config: configuration of the run, JSON-able.
        log_dir: folder for wandb's files.
        run_id: continue this run; None starts a new one.
        mode: `"online"`, `"offline"` or `"disabled"`; None leaves it to wandb's environment variables.

    Attributes:
        run_id: keep it in the checkpoint and pass it back on resume.

    Raises:
        MissingDependencyError: if wandb is not installed.
    """

    def __init__(
        self,
        project: str,
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        log_dir: str | Path | None = None,
        run_id: str | None = None,
        mode: Any = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingDependencyError("the Weights & Biases tracker", "wandb", "wandb") from error
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project=project,
            name=name,
            config=dict(config or {}),
            dir=None if log_dir is None else str(log_dir),
            id=run_id,
            resume="allow" if run_id else None,
            mode=mode,
        )
        self.run_id: str = self._run.id

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send numbers and strings as they are, lists of numbers as histograms.

        Args:
            step: x-axis.
            metrics: name -> value; None is left out.
        """
        row: dict[str, Any] = {}
        for key, value in metrics.items():
            if value is None:
                continue
            is_list = not isinstance(value, str | bool | int | float) and np.ndim(value) > 0
            row[key] = self._histogram(np.asarray(value)) if is_list else value
        self._run.log(row, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MultiTracker:
    """Passes everything on to several trackers.

    Args:
        trackers: they are called in this order.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log to every tracker.

        Args:
            step: x-axis.
            metrics: name -> value.
        """
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        """Close every tracker, also if one of them fails; the first failure is raised at the end."""
        failure: Exception | None = None
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:  # the others must still be closed
                failure = failure or error
        if failure is not None:
            raise failure
