"""Live progress of a run: a few refreshed lines on a terminal, one plain line per epoch anywhere else."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

__all__ = ["ConsoleProgress", "format_duration", "format_value", "headline", "padding_note"]

_RATED = ("frames", "updates")
_BAR_FIELDS = frozenset(
    {"epoch", "epochs", "phase", "phase_done", "phase_total", "frames", "updates", "total_frames", "total_updates"}
)
_WINDOW_SECONDS = 60.0
_GAP = 3


def format_duration(seconds: float | None) -> str:
    """Seconds as `h:mm:ss`, `--:--` if unknown.

    Args:
        seconds: a duration, None or non-finite if unknown.

    Returns:
        For example `"0:02:05"`.
    """
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "--:--"
    total = round(seconds)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"


def format_value(name: str, value: Any) -> str:
    """A metric for people: shares as per cent, counts with separators, other numbers with three digits.

    Args:
        name: names that start with `success` or end in `rate` or `share` are shares in [0, 1].
        value: number, string or None.

    Returns:
        A short text; `"-"` for None and NaN.
    """
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if name.startswith("success") or name.endswith(("rate", "share")):
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        return f"{value:,}"
    magnitude = abs(value)
    if magnitude != 0 and not 1e-3 <= magnitude < 1e7:
        return f"{value:.2e}"
    return f"{value:,.0f}" if magnitude >= 1000 else f"{value:.3g}"


def headline(record: Mapping[str, Any]) -> dict[str, Any]:
    """What people want to see of a record of metrics while a run goes on.

    Args:
        record: metrics by name, as in `metrics.jsonl`.

    Returns:
        Fields for `ConsoleProgress.update`: returns, and success in the first and the last attempt; a field is absent
        when the record does not tell.
    """
    fields = {"return": "val/return", "return_while_exploring": "collect/return"}
    shown = {field: record[name] for field, name in fields.items() if name in record}
    matches = [re.fullmatch(r"val/attempt_(\d+)/success", name) for name in record]
    attempts = {int(match[1]): record[match[0]] for match in matches if match}
    if attempts:
        shown["success_first"], shown["success_last"] = attempts[min(attempts)], attempts[max(attempts)]
    return shown


def padding_note(longest: int, window: int) -> str | None:
    """What to tell people whose training windows are too long for what has been collected.

    Args:
        longest: transitions of the longest stored trajectory.
        window: transitions of a training window.

    Returns:
        A line; None if at least a quarter of some window is filled.
    """
    if longest > window / 4:
        return None
    return (
        f"note: no stored trajectory has more than {longest} transitions yet, so that most of each window of "
        f"max_seq_len={window} is padding"
    )


class ConsoleProgress:
    """Progress of a run, from named fields.

    `update` may be called after every step: it stores the fields and redraws at most `refresh` times a second, in the
    calling thread. The fields `frames`, `total_frames`, `updates`, `total_updates`, `epoch`, `epochs`, `phase`,
    `phase_done` and `phase_total` are laid out specially, with rates and the remaining time derived from them; all
    others are shown by name in the order of their first appearance. A trailing underscore is not shown, so that
    `return_` works as a keyword.

    Args:
        title: name of the run.
        file: where to write; default `sys.stdout`. The live display is used only if it is a terminal.
        refresh: redraws per second at most.
        live: force the live display on or off; None decides by `file`.
        clock: seconds, monotonic; for tests.

    Attributes:
        live: whether the live display is in use.
    """

    def __init__(
        self,
        title: str = "",
        *,
        file: TextIO | None = None,
        refresh: float = 4.0,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = title
        self._file = sys.stdout if file is None else file
        is_terminal = self._file.isatty() and os.environ.get("TERM") != "dumb"
        self.live = is_terminal if live is None else live
        self._interval = 1.0 / refresh
        self._clock = clock
        self._fields: dict[str, Any] = {}
        self._start = clock()
        self._next_draw = self._start
        self._samples: deque[tuple[float, dict[str, float]]] = deque()
        self._first: dict[str, float] = {}
        self._display: Any = None

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, fields: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Set fields; the others keep their values.

        Args:
            fields: name -> value, for names that are no Python identifiers.
            **named: the same as keywords.
        """
        if fields:
            self._fields.update(fields)
        self._fields.update(named)
        now = self._clock()
        if now >= self._next_draw:
            self._next_draw = now + self._interval
            self._sample(now)
            if self.live:
                self._draw()

    def epoch_end(self, fields: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Set fields at the end of an epoch; without a terminal this prints the line of the epoch.

        Args:
            fields: as in `update`.
            **named: as in `update`.
        """
        self._next_draw = self._clock()
        self.update(fields, **named)
        if not self.live:
            self.print(self.line())

    def print(self, message: str) -> None:
        """Print a line, above the live display if there is one.

        Args:
            message: plain text.
        """
        if self._display is not None:
            self._display.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=self._file, flush=True)

    def close(self) -> None:
        """Draw the last state and give the terminal back; calling it again does nothing."""
        if self._display is not None:
            self._sample(self._clock())
            self._draw()
            self._display.stop()
            self._display = None

    def rate(self, name: str) -> float | None:
        """Increase per second of a counting field over the last minute.

        Args:
            name: `"frames"` or `"updates"`.

        Returns:
            The rate, None as long as there is nothing to measure.
        """
        points = [(when, values[name]) for when, values in self._samples if name in values]
        if len(points) < 2 or points[-1][0] <= points[0][0]:
            return None
        return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])

    def eta(self) -> float | None:
        """Seconds until the end at the average pace of this session, None if unknown."""
        for name, total_name in (("frames", "total_frames"), ("updates", "total_updates"), ("epoch", "epochs")):
            total, done, first = self._fields.get(total_name), self._fields.get(name), self._first.get(name)
            if total is None or done is None or first is None:
                continue
            elapsed = self._clock() - self._start
            return max(0.0, total - done) * elapsed / (done - first) if done > first else None
        return None

    def line(self) -> str:
        """The current state as one line of plain text."""
        parts = [self.title] if self.title else []
        if "epoch" in self._fields:
            parts.append(f"epoch {self._of('epoch', 'epochs')}")
        for name in _RATED:
            if name in self._fields:
                rate = self.rate(name)
                parts.append(f"{name} {self._of(name, f'total_{name}')}" + (f" ({rate:,.0f}/s)" if rate else ""))
        parts += [f"{self._label(name)} {format_value(name, value)}" for name, value in self._others()]
        if self.eta() is not None:
            parts.append(f"ETA {format_duration(self.eta())}")
        return "  ".join(parts)

    def _sample(self, now: float) -> None:
        values = {name: float(self._fields[name]) for name in (*_RATED, "epoch") if self._fields.get(name) is not None}
        for name, value in values.items():
            self._first.setdefault(name, value)
        self._samples.append((now, values))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_SECONDS:
            self._samples.popleft()

    def _of(self, name: str, total_name: str) -> str:
        total = self._fields.get(total_name)
        text = format_value(name, self._fields.get(name))
        return text if total is None else f"{text} / {format_value(total_name, total)}"

    def _others(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in self._fields.items() if name not in _BAR_FIELDS]

    @staticmethod
    def _label(name: str) -> str:
        return name.rstrip("_").replace("_", " ")

    def _share(self) -> float | None:
        for name, total_name in (("frames", "total_frames"), ("updates", "total_updates"), ("epoch", "epochs")):
            total, done = self._fields.get(total_name), self._fields.get(name)
            if total and done is not None:
                return min(1.0, done / total)
        return None

    def _draw(self) -> None:
        if self._display is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._file, force_terminal=True if self.live else None)
            self._display = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._display.start()
        self._display.update(self._render(), refresh=True)

    def _bar_row(self, label: str, share: float | None, note: str, style: str) -> list[Any]:
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        bar = ProgressBar(total=1.0, completed=share or 0.0, width=20, complete_style=style, finished_style=style)
        percent = "" if share is None else f"{100 * share:3.0f} %"
        return [Text(label), bar, Text(percent), Text(note)]

    def _render(self) -> Any:
        from rich.console import Group
        from rich.table import Column, Table
        from rich.text import Text

        fields = self._fields
        bars = Table.grid(*(Column(no_wrap=True) for _ in range(4)), padding=(0, 2))
        elapsed = format_duration(self._clock() - self._start)
        note = f"{elapsed} elapsed, ETA {format_duration(self.eta())}"
        bars.add_row(*self._bar_row(self.title or "run", self._share(), note, "cyan"))
        if fields.get("phase") is not None or "epoch" in fields:
            total, done = fields.get("phase_total"), fields.get("phase_done")
            share = min(1.0, done / total) if total and done is not None else None
            epoch = f"epoch {self._of('epoch', 'epochs')}" if "epoch" in fields else ""
            bars.add_row(*self._bar_row(epoch, share, str(fields.get("phase") or ""), "green"))
        cells: list[tuple[str, str]] = []
        for name in _RATED:
            if name in fields:
                rate = self.rate(name)
                cells.append((name, self._of(name, f"total_{name}")))
                cells.append((f"{name}/s", "-" if rate is None else format_value("", rate)))
        cells += [(self._label(name), format_value(name, value)) for name, value in self._others()]
        texts = [Text.assemble((f"{label} ", "dim"), (value, "bold")) for label, value in cells]
        columns = _columns_that_fit([text.cell_len for text in texts], self._display.console.width)
        table = Table.grid(*(Column(no_wrap=True) for _ in range(columns)), padding=(0, _GAP))
        for start in range(0, len(texts), columns):
            table.add_row(*texts[start : start + columns])
        return Group(bars, table)


def _columns_that_fit(widths: list[int], available: int) -> int:
    """Number of columns, at most four, so that a row-wise grid of cells is not wider than the terminal."""
    for columns in (4, 3, 2):
        if sum(max(widths[first::columns], default=0) + _GAP for first in range(columns)) <= available:
            return columns
    return 1
