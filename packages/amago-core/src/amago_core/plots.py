"""Pictures of a run; needs `pip install "amago-core[plot]"`.

Drawn off-screen without touching matplotlib's global state. Colours are those of Okabe and Ito, which colour-blind
readers can tell apart; every line carries its name at its end instead of a legend.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amago_core.errors import MissingDependencyError

__all__ = ["plot_learning_curve", "plot_success_per_attempt"]

Curve = tuple[Sequence[float], Sequence[float] | None, Sequence[float] | None]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_GREY, _INK, _FAINT = "#8A8A8A", "#222222", "#E6E6E6"
_REFERENCES = ("random", "uniform")
_ORACLES = ("planner", "oracle", "optimal", "expert", "scripted")
_SUCCESS = re.compile(r"(?:^|/)attempt_(\d+)/success$")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plotting", "matplotlib", "plot") from error
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
    return path


def _tidy(axis: Any) -> None:
    """Only the frame lines that carry numbers, and a faint horizontal grid."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_GREY)
    axis.tick_params(colors=_INK, labelsize=9, length=3, color=_GREY)
    axis.grid(axis="y", color=_FAINT, linewidth=0.8)
    axis.set_axisbelow(True)


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved apart to at least `gap`, in their order and as near to their places as possible."""
    # Blocks of labels that touch share one shift; this is isotonic regression by pooling neighbours.
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, count = positions[index] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, weight = blocks.pop()
            mean, count = (before * weight + mean * count) / (weight + count), weight + count
        blocks.append((mean, count))
    shifts = [mean for mean, count in blocks for _ in range(count)]
    spread = [0.0] * len(positions)
    for rank, index in enumerate(order):
        spread[index] = shifts[rank] + rank * gap
    return spread


def _label_ends(axis: Any, ends: Sequence[tuple[float, str, Any]], right: float) -> None:
    """Write the name of each line beside its end; `ends` holds (y, text, colour)."""
    low, high = axis.get_ylim()
    gap = 0.062 * (high - low) * 3.4 / (axis.get_position().height * axis.figure.get_figheight())
    for (_, text, colour), y in zip(ends, _spread([end[0] for end in ends], gap), strict=True):
        axis.annotate(
            text,
            (right, y),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            fontsize=9.5,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def _curve_style(label: str, rank: int) -> dict[str, Any]:
    lowered = label.lower()
    if any(word in lowered for word in _REFERENCES):
        return {"color": _GREY, "linestyle": (0, (1.5, 2)), "linewidth": 1.8, "marker": "s", "markersize": 4}
    if any(word in lowered for word in _ORACLES):
        return {"color": _INK, "linestyle": (0, (5, 2.5)), "linewidth": 1.5, "marker": "D", "markersize": 3.8}
    return {"color": _COLOURS[rank % len(_COLOURS)], "linewidth": 2.4, "marker": "o", "markersize": 5.5, "zorder": 4}


def _checked_curve(label: str, curve: Curve) -> tuple[np.ndarray, np.ndarray | None]:
    """Means and `[2, K]` distances to the interval ends, both in per cent."""
    means, lows, highs = (None if part is None else np.asarray(part, dtype=np.float64) for part in curve)
    if means is None or means.ndim != 1 or not means.size:
        raise ValueError(f"curves[{label!r}]: means must be a list of at least one number")
    if lows is None or highs is None:
        return 100 * means, None
    if lows.shape != means.shape or highs.shape != means.shape:
        raise ValueError(
            f"curves[{label!r}]: means, lows and highs must have one length, got "
            f"{means.size}, {lows.size} and {highs.size}"
        )
    return 100 * means, 100 * np.clip(np.stack([means - lows, highs - means]), 0, None)


def plot_success_per_attempt(
    path: str | Path,
    curves: Mapping[str, Curve],
    title: str = "Success per attempt",
    *,
    subtitle: str | None = None,
    interval: str = "95 % bootstrap intervals",
) -> Path:
    """Share of successful attempts, first to last, one line per policy.

    Lines named like a random policy are grey and dotted, those named like a planner or an expert black and dashed.

    Args:
        path: picture to write; the ending chooses the format. Its folder is created.
        curves: label -> (means, lows, highs), each `[K]` with shares in [0, 1]; lows and highs may be None.
        title: heading.
        subtitle: a second, smaller line, for example the number of tasks.
        interval: what the bars are, written below; not shown if no curve has any.

    Returns:
        The file.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        ValueError: if there is no curve, or the lengths within a curve differ.
    """
    if not curves:
        raise ValueError("curves is empty; give at least one curve")
    checked = {label: _checked_curve(label, curve) for label, curve in curves.items()}
    attempts = max(means.size for means, _ in checked.values())
    figure = _figure(min(11.0, 4.2 + 0.55 * attempts), 3.9)
    axis = figure.add_subplot()
    _tidy(axis)
    axis.set_ylim(0, 102)
    axis.set_xlim(0.7, attempts + 0.3)
    ends, rank, any_bars = [], 0, False
    for label, (means, bars) in checked.items():
        style = _curve_style(label, rank)
        rank += style["color"] in _COLOURS
        axis.errorbar(np.arange(1, means.size + 1), means, yerr=bars, capsize=3, elinewidth=1.3, clip_on=False, **style)
        any_bars = any_bars or bars is not None
        ends.append((float(means[-1]), f"{label}  {means[-1]:.0f} %", style["color"]))
    axis.set_yticks(range(0, 101, 25), [f"{value} %" for value in range(0, 101, 25)])
    axis.set_xticks(range(1, attempts + 1, 1 + attempts // 16))
    axis.set_xlabel("attempt at the same task", fontsize=9.5, color=_INK)
    _label_ends(axis, ends, attempts + 0.1)
    _headings(axis, title, subtitle)
    if any_bars and interval:
        axis.annotate(
            f"Bars: {interval}",
            (1, 0),
            xycoords="axes fraction",
            xytext=(0, -46),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            color=_GREY,
        )
    return _save(figure, path)


def _headings(axis: Any, title: str, subtitle: str | None, raise_by: float = 0.0) -> None:
    lines = [(title, 12, "bold", _INK, 24 if subtitle else 10)]
    if subtitle:
        lines.append((subtitle, 9, "normal", "#555555", 9))
    for text, size, weight, colour, above in lines:
        axis.annotate(
            text,
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, above + raise_by),
            textcoords="offset points",
            fontsize=size,
            fontweight=weight,
            color=colour,
            va="bottom",
        )


def _series(records: Sequence[Mapping[str, Any]], x_key: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record[x_key], record[key]) for record in records if _number(record, x_key) and _number(record, key)]
    array = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _number(record: Mapping[str, Any], key: str) -> bool:
    value = record.get(key)
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _success_keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys such as `val/attempt_0/success` of one prefix, validation first, in the order of the attempts."""
    found = sorted({key for record in records for key in record if _SUCCESS.search(key)})
    prefixes = sorted({_SUCCESS.sub("", key) for key in found}, key=lambda prefix: (prefix != "val", prefix))
    if not prefixes:
        return []
    matched = [(int(match[1]), key) for key in found if (match := _SUCCESS.search(key))]
    return [key for _, key in sorted(matched) if _SUCCESS.sub("", key) == prefixes[0]]


def _short(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def plot_learning_curve(
    path: str | Path,
    records: Iterable[Mapping[str, Any]],
    *,
    return_keys: Sequence[str] = ("val/return", "collect/return"),
    success_keys: Sequence[str] | None = None,
    x_key: str = "frames",
    updates_key: str = "updates",
    title: str = "Learning curve",
    subtitle: str | None = None,
) -> Path:
    """Return and success per attempt against environment frames, with gradient updates along the top.

    Args:
        path: picture to write; the ending chooses the format. Its folder is created.
        records: rows of `metrics.jsonl`, as `read_jsonl` gives them; rows without a key are left out of its line.
        return_keys: the first of these that occurs is drawn.
        success_keys: keys of the success per attempt, in order; None finds `.../attempt_<i>/success`, validation first.
        x_key: x-axis; where it never changes (offline learning) `updates_key` takes its place.
        updates_key: gradient updates.
        title: heading.
        subtitle: a second, smaller line.

    Returns:
        The file.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        ValueError: if no record holds any of the keys.
    """
    rows = list(records)
    if len(set(_series(rows, x_key, x_key)[0])) < 2:
        x_key = updates_key
    success_keys = _success_keys(rows) if success_keys is None else list(success_keys)
    success_keys = [key for key in success_keys if _series(rows, x_key, key)[0].size]
    return_key = next((key for key in return_keys if _series(rows, x_key, key)[0].size), None)
    panels = [name for name, wanted in (("success", success_keys), ("return", return_key)) if wanted]
    if not panels:
        raise ValueError(f"no record holds {x_key!r} together with one of {list(return_keys)} or a success per attempt")
    figure = _figure(6.4, 2.9 * len(panels) + 0.6)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(hspace=0.16)
    for axis, panel in zip(axes, panels, strict=True):
        _tidy(axis)
        if panel == "success":
            _draw_success(axis, rows, x_key, success_keys)
        elif return_key is not None:
            _draw_return(axis, rows, x_key, return_key)
        axis.margins(x=0.02)
    names = {"frames": "environment frames", "updates": "gradient updates"}
    axes[-1].set_xlabel(names.get(x_key, x_key), fontsize=9.5, color=_INK)
    axes[-1].xaxis.set_major_formatter(lambda value, _: _short(value))
    has_top = x_key != updates_key and _updates_on_top(axes[0], rows, x_key, updates_key)
    _headings(axes[0], title, subtitle, raise_by=30.0 if has_top else 0.0)
    return _save(figure, path)


def _marker(count: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.2} if count <= 40 else {}


def _draw_success(axis: Any, rows: Sequence[Mapping[str, Any]], x_key: str, keys: Sequence[str]) -> None:
    """First and last attempt in colour and named, those between as thin lines of the colours between."""
    axis.set_ylim(0, 102)
    axis.set_yticks(range(0, 101, 25), [f"{value} %" for value in range(0, 101, 25)])
    axis.set_ylabel("success", fontsize=9.5, color=_INK)
    ends, right = [], 0.0
    first, last = np.array([0xE6, 0x9F, 0x00]) / 255, np.array([0x00, 0x72, 0xB2]) / 255
    for index, key in enumerate(keys):
        x, y = _series(rows, x_key, key)
        share = index / max(1, len(keys) - 1) if len(keys) > 1 else 1.0
        named = index in (0, len(keys) - 1)
        colour = tuple((1 - share) * first + share * last)
        width, alpha = (2.2, 1.0) if named else (1.1, 0.55)
        axis.plot(
            x,
            100 * y,
            color=colour,
            linewidth=width,
            alpha=alpha,
            zorder=3 + named,
            **(_marker(x.size) if named else {}),
        )
        right = max(right, float(x[-1]))
        match = _SUCCESS.search(key)
        attempt = int(match[1]) + 1 if match else index + 1
        if named:
            ends.append((100 * float(y[-1]), f"attempt {attempt}", colour))
        elif len(keys) <= 6:
            ends.append((100 * float(y[-1]), str(attempt), tuple(0.6 * part + 0.3 for part in colour)))
    _label_ends(axis, ends, right)


def _draw_return(axis: Any, rows: Sequence[Mapping[str, Any]], x_key: str, key: str) -> None:
    x, y = _series(rows, x_key, key)
    axis.plot(x, y, color=_COLOURS[2], linewidth=2.2, **_marker(x.size))
    axis.set_ylabel("return", fontsize=9.5, color=_INK)
    low, high = axis.get_ylim()
    axis.set_ylim(min(0.0, low) if low > -0.5 * high else low, high)
    _label_ends(axis, [(float(y[-1]), f"{y[-1]:.3g}", _COLOURS[2])], float(x[-1]))


def _updates_on_top(axis: Any, rows: Sequence[Mapping[str, Any]], x_key: str, updates_key: str) -> bool:
    """A second scale: the updates that had been made at the frames below."""
    frames, updates = _series(rows, x_key, updates_key)
    if frames.size < 2 or updates[-1] <= updates[0]:
        return False
    from matplotlib.ticker import MaxNLocator

    round_counts = MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True).tick_values(updates[0], updates[-1])
    counts = [count for count in round_counts if updates[0] <= count <= updates[-1]]
    top = axis.secondary_xaxis("top")
    top.set_xticks(np.interp(counts, updates, frames), [_short(count) for count in counts])
    top.spines["top"].set_visible(False)
    top.tick_params(labelsize=8, colors=_GREY, length=0)
    top.set_xlabel("gradient updates", fontsize=8, color=_GREY, labelpad=4)
    return True
