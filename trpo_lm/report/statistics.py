"""Means and intervals of a few measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean(values: np.ndarray) -> float:
    """Return the mean of what is finite; nan where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, draws: int = 10_000
) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the mean; nan for fewer than two values.

    Args:
        values: One for each seed; what is not finite is left out.
        draws: Resamples; their seed is fixed, so that a page is the same whenever it is drawn.
    """
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if len(known) < 2:
        return float("nan"), float("nan")
    rows = np.random.default_rng(0).integers(len(known), size=(draws, len(known)))
    low, high = np.percentile(known[rows].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
