"""Time against length: one panel per kind and direction, one line per contender."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from cases import Operation, Row

_COLUMNS = 3


def draw(operation: Operation, rows: list[Row], folder: Path, device_name: str) -> Path | None:
    """Draws what has been measured at two lengths or more.

    Args:
        operation: whose axis is drawn against.
        rows: of its table.
        folder: gets `<operation>.png`.
        device_name: for the title.

    Returns:
        The file; None if matplotlib is not installed or no line has two points.
    """
    panels = series(rows, operation.axis)
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.2 * columns, 4.4 * lines), squeeze=False)
    names = list(dict.fromkeys(name for contenders in panels.values() for name in contenders))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, contenders) in zip(axes.flat, panels.items(), strict=False):
        ticks = sorted({x for points in contenders.values() for x, _ in points})
        for name, points in contenders.items():
            mine = name.startswith("ours")
            axis.plot(
                *zip(*points, strict=True),
                color=colours[name],
                label=name,
                marker="o",
                markersize=4,
                linewidth=2.2 if mine else 1.2,
                linestyle="-" if mine else "--",
            )
        axis.set(xscale="log", yscale="log", title=title, ylabel="median time [ms]")
        axis.set_xlabel(_AXES.get(operation.axis, operation.axis))
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.title.set_fontsize(9)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(f"{operation.name} on {device_name}")
    figure.tight_layout()
    path = folder / f"{operation.name}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


_AXES = {"L": "timesteps L", "M": "slots of the ring buffer M", "T": "transitions T"}


def series(rows: list[Row], axis: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Rows that differ in one size only, as lines.

    Args:
        rows: of a table.
        axis: the size that differs.

    Returns:
        Title to contender to points (size, milliseconds), with two points at least.
    """
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["ms"] is None or axis not in row:
            continue
        others = " ".join(part for part in row["shape"].split() if part != f"{axis}{row[axis]}")
        title = f"{row['kind']}, {row['direction']}\n{others}, {row['dtype']}"
        panels.setdefault(title, {}).setdefault(row["contender"], {})[row[axis]] = row["ms"]
    kept = {
        title: {name: sorted(points.items()) for name, points in contenders.items() if len(points) > 1}
        for title, contenders in panels.items()
    }
    return {title: contenders for title, contenders in kept.items() if contenders}
