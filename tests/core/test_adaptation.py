"""What a run learns about its own noise, and steers by."""

import math

import pytest
import torch

from trpo_lm.core.adaptation import (
    FIRST_DRIFT,
    KL_MARGIN,
    LEAST_DAMPING,
    MOST_DAMPING,
    budget_on_batch,
    learn_radius,
    radius_inside,
    wiener_damping,
)


def test_the_tracked_reference_kl_averages_what_does_not_move():
    kept, rng, errors = {}, torch.Generator().manual_seed(0), []
    for i in range(300):
        k = 0.4 + 0.0125 * float(torch.randn((), generator=rng))
        budget = budget_on_batch(kept, k=k, error=0.0125, budget=1.0)
        assert budget - k <= 1.0 - kept["estimate"]  # a step that uses it up ends inside
        if i > 50:
            errors.append((k - 0.4, kept["estimate"] - 0.4))
    raw, tracked = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert tracked < raw


def test_the_tracked_reference_kl_learns_what_the_predictions_miss():
    """Each update predicts +0.010 on its own batch, and the next rollout shows +0.015."""
    kept, truth = {}, 0.2
    for _ in range(60):
        budget = budget_on_batch(kept, k=truth, error=0.01, budget=10.0)
        kept["expected"] += 0.010
        kept["fitted"] = 1.0
        k, truth = truth, truth + 0.015
    assert kept["drift"] == pytest.approx(0.005, rel=1e-3)
    assert kept["estimate"] == pytest.approx(k)
    assert kept["expected"] + kept["drift"] == pytest.approx(truth)
    assert budget == pytest.approx(10.0 - 0.005 - 0.01 / math.sqrt(2), rel=1e-6)
    assert budget_on_batch({}, k=0.3, error=0.1, budget=math.inf) == math.inf


def test_a_batch_that_shows_too_little_is_believed_less_than_one_that_shows_too_much():
    known = {"expected": 0.5, "drift": 0.0}
    assert budget_on_batch(dict(known), k=0.4, error=0.0, budget=1.0) == pytest.approx(1.0 - 0.05)
    assert budget_on_batch(dict(known), k=0.6, error=0.0, budget=1.0) == 1.0


def test_steps_that_ignore_the_reference_teach_nothing_of_the_drift():
    kept = {}
    for k in (0.1, 0.4, 0.5):
        budget_on_batch(kept, k=k, error=0.0125, budget=1.0)
        kept["fitted"] = 0.0
    assert kept["drift"] == FIRST_DRIFT
    kept["fitted"] = 1.0
    budget_on_batch(kept, k=kept["expected"] + FIRST_DRIFT + 0.1, error=0.0, budget=1.0)
    assert kept["drift"] == pytest.approx(FIRST_DRIFT + 0.03)


@pytest.mark.parametrize("optimism", [0.0, 0.5, 0.9])
def test_the_budget_holds_although_every_prediction_is_optimistic(optimism):
    """A plant that moves by more than predicted settles at the budget, not above it."""
    kept, truth, last = {}, 0.0, []
    for i in range(200):
        room = budget_on_batch(kept, k=truth, error=0.0, budget=1.0) - truth
        step = max(min(room, 0.1), -0.1)
        kept["expected"] += step
        kept["fitted"] = 1.0
        truth += step + optimism * 0.1  # what the batch did not show
        if i > 100:
            last.append(truth)
    assert max(last) <= 1.01 and min(last) >= 0.9


def test_damping_is_the_noise_scale_in_batches_within_limits():
    N, kept = 64.0, {}
    assert wiener_damping(kept, signal=2.0, variance=64.0, N=N) == pytest.approx(0.5)
    second = wiener_damping(kept, signal=-1.0, variance=32.0, N=N)  # running means of both
    assert second == pytest.approx((0.9 * 64 + 32) / (64 * (0.9 * 2 - 1)))
    assert wiener_damping({}, signal=-1.0, variance=64.0, N=N) == MOST_DAMPING
    assert wiener_damping({}, signal=1e9, variance=1.0, N=N) == LEAST_DAMPING


def test_the_wiener_filter_is_the_best_of_all_dampings():
    """F theta* plus noise of covariance F / N: no other damping comes nearer to theta*."""
    rng, tau, N = torch.Generator().manual_seed(1), 0.3, 8.0
    f = torch.logspace(-2, 1, 40, dtype=torch.float64)
    theta = tau * torch.randn(4000, 40, generator=rng, dtype=torch.float64)
    noise = torch.randn(4000, 40, generator=rng, dtype=torch.float64) * (f / N).sqrt()
    signal, variance = tau**2 * f.square().sum(), f.sum()
    rayleigh = f.square().sum() / f.sum()
    shift = wiener_damping({}, signal=float(signal), variance=float(variance), N=N) * rayleigh

    def error(damping):
        return float(((theta * f + noise) / (f + damping) - theta).square().sum())

    assert all(error(shift) <= error(shift * factor) for factor in (0.3, 0.7, 1.5, 3.0))


def test_the_radius_learns_how_far_exact_kls_exceed_predictions():
    kept = {}
    assert radius_inside(kept, 0.1) == pytest.approx(0.1 / KL_MARGIN)
    for _ in range(30):
        learn_radius(kept, kl=0.12, predicted=0.1)
    assert radius_inside(kept, 0.1) == pytest.approx(0.1 / (1.2 * KL_MARGIN))
    for _ in range(30):
        learn_radius(kept, kl=0.05, predicted=0.1)
    assert radius_inside(kept, 0.1) == 0.1  # never beyond max_kl
