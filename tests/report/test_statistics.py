"""Intervals of a few measurements."""

import math

import numpy as np
import pytest

from trpo_lm.report.statistics import bootstrap_interval


def test_the_bootstrap_interval():
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])
    assert all(map(math.isnan, bootstrap_interval([1.0])))
    assert bootstrap_interval([2.0, 2.0, math.nan]) == (2.0, 2.0)
    x = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(x)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.1)
