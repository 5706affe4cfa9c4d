"""Statistics of finished rollouts: intervals, tails, and the summaries that evaluation logs.

Dimensions: S samples (rollouts or seeds), M columns (metrics or points of a curve).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Interval",
    "bootstrap_ci",
    "lower_quintile",
    "summarize_metrics",
    "summarize_returns",
    "worst_fifth_mean",
]

# Bounds the memory of one block of resamples to a few tens of megabytes.
_MAX_DRAWS_PER_BLOCK = 2_000_000


class Interval(NamedTuple):
    """A confidence interval.

    Args:
        low: lower end, `[M]` float64, or `[]` for a single column.
        high: upper end, the same shape.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]


def bootstrap_ci(samples: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int) -> Interval:
    """Percentile-bootstrap confidence interval of the mean.

    Rows are resampled as a whole, so that columns of one row (the points of one seed's curve) stay together. One sample
    gives an interval of width 0.

    Args:
        samples: `[S]` or `[S, M]` finite numbers, S >= 1.
        confidence: probability that the interval is meant to hold the mean, in (0, 1).
        resamples: number of bootstrap resamples, >= 1.
        seed: seed of the resampling, >= 0.

    Returns:
        The interval, one per column.

    Raises:
        ValueError: if an argument is out of its range, or a sample is not finite.

    Source: Efron (1979), "Bootstrap Methods: Another Look at the Jackknife".
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim not in (1, 2) or values.shape[0] < 1:
        raise ValueError(f"samples: got shape {values.shape}, expected [S] or [S, M] with S >= 1")
    if not np.isfinite(values).all():
        raise ValueError("samples: contains NaN or infinity, all must be finite")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: got {confidence}, must be in (0, 1)")
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}, must be >= 1")
    rng = np.random.default_rng(seed)
    columns = values.reshape(len(values), -1)
    # Centred, so that the matrix product rounds relative to the spread and a constant column gives exactly itself.
    center = columns[0]
    means = center + _resampled_means(columns - center, resamples, rng)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, (tail, 1.0 - tail), axis=0)
    shape = values.shape[1:]
    return Interval(low.reshape(shape), high.reshape(shape))


def _resampled_means(columns: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of resampled rows, `[resamples, M]`: how often each row was drawn, times the rows, in one product."""
    size = len(columns)
    block = max(1, _MAX_DRAWS_PER_BLOCK // size)
    means = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        draws = rng.integers(size, size=(rows, size)) + np.arange(rows)[:, None] * size
        counts = np.bincount(draws.ravel(), minlength=rows * size).reshape(rows, size)
        means.append(counts @ columns / size)
    return np.concatenate(means)


def lower_quintile(returns: ArrayLike) -> float:
    """The 20th percentile, with linear interpolation: 1.8 for 0, 1, ..., 9.

    Args:
        returns: `[S]` finite numbers, S >= 1.

    Returns:
        The percentile.

    Raises:
        ValueError: if there is no number, or one is not finite.
    """
    return float(np.quantile(_checked(returns), 0.2))


def worst_fifth_mean(returns: ArrayLike) -> float:
    """Mean of the worst fifth (CVaR at 20%): 0.5 for 0, 1, ..., 9.

    If a fifth of S is not whole, the next worst number counts with the remaining fraction.

    Args:
        returns: `[S]` finite numbers, S >= 1.

    Returns:
        The mean.

    Raises:
        ValueError: if there is no number, or one is not finite.

    Source: Rockafellar & Uryasev (2000), "Optimization of Conditional Value-at-Risk".
    """
    ordered = np.sort(_checked(returns))
    amount = len(ordered) / 5
    weights = np.clip(amount - np.arange(math.ceil(amount)), 0.0, 1.0)
    return float(weights @ ordered[: len(weights)] / amount)


def summarize_returns(returns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Summaries of the total returns of finished rollouts, as evaluation logs them.

    Per environment name: `Finished Rollouts in <env>`, `Average Total Return in <env>`,
    `Bottom Quintile Total Return in <env>` (a 20th percentile, under the name it has always had),
    `20th Percentile Total Return in <env>` (the same number, named for what it is) and
    `Worst Fifth Mean Total Return in <env>`; overall, `Average Total Return (Across All Env Names)`, the unweighted
    mean of the averages per name.

    Args:
        returns: environment name to total returns of the rollouts that finished there; may be empty.

    Returns:
        Name to finite number. Where no rollout finished, only the count, 0, is reported.

    Raises:
        ValueError: if a return is not finite.
    """
    summary: dict[str, float] = {}
    averages: list[float] = []
    for env, values in returns.items():
        summary[f"Finished Rollouts in {env}"] = float(len(values))
        if len(values) == 0:
            continue
        average = float(_checked(values).mean())
        percentile = lower_quintile(values)
        averages.append(average)
        summary[f"Average Total Return in {env}"] = average
        summary[f"Bottom Quintile Total Return in {env}"] = percentile
        summary[f"20th Percentile Total Return in {env}"] = percentile
        summary[f"Worst Fifth Mean Total Return in {env}"] = worst_fifth_mean(values)
    if averages:
        summary["Average Total Return (Across All Env Names)"] = float(np.mean(averages))
    return summary


def summarize_metrics(metrics: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Means of what the environments reported themselves, under `Average <metric> in <env>`.

    Args:
        metrics: environment name to metric name to all reported values; may be empty.

    Returns:
        Name to finite number; a metric without values is left out.

    Raises:
        ValueError: if a value is not finite.
    """
    return {
        f"Average {name} in {env}": float(_checked(values).mean())
        for env, by_name in metrics.items()
        for name, values in by_name.items()
        if len(values) > 0
    }


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"values: got shape {array.shape}, expected [S] with S >= 1")
    if not np.isfinite(array).all():
        raise ValueError("values: contains NaN or infinity, all must be finite")
    return array
