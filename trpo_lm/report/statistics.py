"""Statistics of a few measurements, some of which may be missing (nan)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean(values: np.ndarray) -> float:
    """Return the mean of the finite values; nan if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def largest(values: np.ndarray) -> float:
    """Return the largest finite value, at least 0."""
    return float(values[np.isfinite(values)].max(initial=0))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, draws: int = 10_000
) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the mean; nan for fewer than two values.

    Args:
        values: One for each seed; those that are not finite are ignored.
        draws: Resamples; their seed is fixed, so that a page is the same whenever it is drawn.
    """
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 2:
        return float("nan"), float("nan")
    rows = np.random.default_rng(0).integers(len(finite), size=(draws, len(finite)))
    low, high = np.percentile(finite[rows].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
