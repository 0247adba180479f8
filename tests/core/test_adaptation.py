"""Trackers of noise, of R and of the radius, on made-up measurements."""

import math
from dataclasses import replace

import pytest
import torch

from trpo_lm.core.adaptation import (
    FIRST_DRIFT,
    KL_MARGIN,
    LEAST_DAMPING,
    MOST_DAMPING,
    Noise,
    RadiusRatio,
    ReferenceFilter,
    RunningNoise,
    Slope,
    budget_on_batch,
    budget_price,
    in_reach,
    learn_radius,
    noise,
    radius_inside,
    wiener_damping,
)


def test_the_tracked_reference_kl_averages_what_does_not_move():
    past, rng, errors = ReferenceFilter(), torch.Generator().manual_seed(0), []
    for i in range(300):
        k = 0.4 + 0.0125 * float(torch.randn((), generator=rng))
        past, budget = budget_on_batch(past, k=k, error=0.0125, budget=1.0)
        assert budget - k <= 1.0 - past.estimate  # a step that uses it up ends inside
        if i > 50:
            errors.append((k - 0.4, past.estimate - 0.4))
    raw, tracked = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert tracked < raw


def test_the_tracked_reference_kl_learns_what_the_predictions_miss():
    """Each update predicts +0.010 on its own batch, and the next rollout shows +0.015."""
    past, truth = ReferenceFilter(), 0.2
    for _ in range(60):
        past, budget = budget_on_batch(past, k=truth, error=0.01, budget=10.0)
        past = past.after(0.010, fitted=True)
        k, truth = truth, truth + 0.015
    assert past.drift == pytest.approx(0.005, rel=1e-3)
    assert past.estimate == pytest.approx(k)
    assert past.expected + past.drift == pytest.approx(truth)
    assert budget == pytest.approx(10.0 - 0.005 - 0.01 / math.sqrt(2), rel=1e-6)
    assert budget_on_batch(ReferenceFilter(), k=0.3, error=0.1, budget=math.inf)[1] == math.inf


def test_a_batch_that_shows_too_little_is_believed_less_than_one_that_shows_too_much():
    past = ReferenceFilter(expected=0.5, drift=0.0)
    assert budget_on_batch(past, k=0.4, error=0.0, budget=1.0)[1] == pytest.approx(1.0 - 0.05)
    assert budget_on_batch(past, k=0.6, error=0.0, budget=1.0)[1] == 1.0


def test_steps_that_ignore_the_reference_teach_nothing_of_the_drift():
    past = ReferenceFilter()
    for k in (0.1, 0.4, 0.5):
        past, _ = budget_on_batch(past, k=k, error=0.0125, budget=1.0)
    assert past.drift == FIRST_DRIFT and past.fitted == 0.0
    k = past.expected + FIRST_DRIFT + 0.1
    past, _ = budget_on_batch(replace(past, fitted=1.0), k=k, error=0.0, budget=1.0)
    assert past.drift == pytest.approx(FIRST_DRIFT + 0.03)


@pytest.mark.parametrize("optimism", [0.0, 0.5, 0.9])
def test_the_budget_holds_although_every_prediction_is_optimistic(optimism):
    """A plant that moves by more than predicted settles at the budget, not above it."""
    past, truth, last = ReferenceFilter(), 0.0, []
    for i in range(200):
        past, budget = budget_on_batch(past, k=truth, error=0.0, budget=1.0)
        step = max(min(budget - truth, 0.1), -0.1)
        past = past.after(step, fitted=True)
        truth += step + optimism * 0.1  # what the batch did not show
        if i > 100:
            last.append(truth)
    assert max(last) <= 1.01 and min(last) >= 0.9


def seen(signal, variance):
    return Noise(signal=signal, variance=variance, cosine=math.nan)


def test_damping_is_the_noise_scale_in_batches_within_limits():
    N, nothing = 64.0, RunningNoise()
    past, first = wiener_damping(nothing, seen(2.0, 64.0), N)
    assert first == pytest.approx(0.5)
    _, second = wiener_damping(past, seen(-1.0, 32.0), N)  # running means of both
    assert second == pytest.approx((0.9 * 64 + 32) / (64 * (0.9 * 2 - 1)))
    assert wiener_damping(nothing, seen(-1.0, 64.0), N)[1] == MOST_DAMPING
    assert wiener_damping(nothing, seen(1e9, 1.0), N)[1] == LEAST_DAMPING


def test_the_wiener_filter_is_the_best_of_all_dampings():
    """F theta* plus noise of covariance F / N: no other damping comes nearer to theta*."""
    rng, tau, N = torch.Generator().manual_seed(1), 0.3, 8.0
    f = torch.logspace(-2, 1, 40, dtype=torch.float64)
    theta = tau * torch.randn(4000, 40, generator=rng, dtype=torch.float64)
    errors = torch.randn(4000, 40, generator=rng, dtype=torch.float64) * (f / N).sqrt()
    signal, variance = tau**2 * f.square().sum(), f.sum()
    rayleigh = f.square().sum() / f.sum()
    shift = wiener_damping(RunningNoise(), seen(float(signal), float(variance)), N)[1] * rayleigh

    def error(damping):
        return float(((theta * f + errors) / (f + damping) - theta).square().sum())

    assert all(error(shift) <= error(shift * factor) for factor in (0.3, 0.7, 1.5, 3.0))


def test_the_radius_learns_how_far_exact_kls_exceed_predictions():
    past = RadiusRatio()
    assert radius_inside(past, 0.1) == pytest.approx(0.1 / KL_MARGIN)
    for _ in range(30):
        past = learn_radius(past, kl=0.12, predicted=0.1)
    assert radius_inside(past, 0.1) == pytest.approx(0.1 / (1.2 * KL_MARGIN))
    for _ in range(30):
        past = learn_radius(past, kl=0.05, predicted=0.1)
    assert radius_inside(past, 0.1) == 0.1  # never beyond max_kl
    assert learn_radius(past, kl=0.05, predicted=0.0) == past


def test_noise_scale_of_a_known_mixture():
    """Gradients mu + sigma z: variance of one is sigma^2 M, and the halves' product shows mu."""
    N, M, sigma = 4096, 400, 2.0
    generator = torch.Generator().manual_seed(0)
    each = 0.5 + sigma * torch.randn(N, M, generator=generator, dtype=torch.float64)
    found = noise(torch.stack([each[::2].sum(0), each[1::2].sum(0)]), N)
    assert found.signal == pytest.approx(0.25 * M, rel=0.05)
    assert found.variance == pytest.approx(sigma**2 * M, rel=0.2)
    assert found.scale == pytest.approx(sigma**2 / 0.25, rel=0.2)
    assert found.cosine == pytest.approx(0.25 / (0.25 + 2 * sigma**2 / N), rel=0.05)


def test_the_signal_of_halves_that_share_nothing_is_none():
    """The square of the mean gradient would count its noise as signal."""
    seen = noise(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), N=2.0)
    assert (seen.signal, seen.cosine, seen.scale) == (0.0, 0.0, math.inf)
    assert seen.variance == pytest.approx((9 + 16) * 2 / 4)
    against = noise(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), N=2.0)
    assert against.signal == -1.0 and against.cosine == -1.0 and against.scale == math.inf


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0, 2.4])
@pytest.mark.parametrize("max_kl", [0.01, 0.1, 1.0])
def test_the_budget_is_out_of_reach_only_if_no_step_can_leave_its_ball(k, max_kl):
    """Quadratic R = 1/2 |y|^2, the reference at 0: straight out is the farthest a step leads."""
    farthest = 0.5 * (math.sqrt(2 * k) + math.sqrt(2 * max_kl)) ** 2
    assert in_reach(k, max_kl, farthest * 0.999) and in_reach(k, max_kl, farthest)
    assert not in_reach(k, max_kl, 2 * farthest) and not in_reach(k, max_kl, math.inf)


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0, 1.7])
def test_the_price_is_the_multiplier_that_the_budget_will_have(share):
    """On L = g.x, R = 1/2 x.Fx: wherever the policy stands between reference and optimum."""
    rng = torch.Generator().manual_seed(0)
    A = torch.randn(8, 8, generator=rng, dtype=torch.float64)
    F, g = A @ A.T + torch.eye(8, dtype=torch.float64), torch.randn(8, generator=rng).double()
    K, Fg = 0.7, torch.linalg.solve(F, g)
    multiplier = math.sqrt(float(g @ Fg) / (2 * K))
    best = Fg / multiplier  # g = multiplier F x and 1/2 x.Fx = K
    assert float(best @ F @ best) / 2 == pytest.approx(K)
    x = math.sqrt(share) * best
    b = F @ x
    _, price = budget_price(
        Slope(), gain=float(g @ x), rise=float(b @ x), k=float(x @ F @ x) / 2, budget=K
    )
    assert price == pytest.approx(multiplier)
    idle = torch.linalg.qr(torch.stack([g, b], 1)).Q  # nats spent across g buy nothing
    across = torch.randn(8, generator=rng).double()
    across -= idle @ (idle.T @ across)
    y = x + across
    _, dearer = budget_price(
        Slope(), gain=float(g @ y), rise=float(F @ y @ y), k=float(y @ F @ y) / 2, budget=K
    )
    assert dearer < price


def test_nothing_is_charged_before_anything_is_spent_or_without_a_budget():
    assert budget_price(Slope(), gain=0.0, rise=0.0, k=0.0, budget=1.0) == (Slope(), 0.0)
    assert budget_price(Slope(), gain=1.0, rise=0.0, k=0.1, budget=1.0) == (Slope(), 0.0)
    assert budget_price(Slope(), gain=1.0, rise=1.0, k=0.1, budget=math.inf)[1] == 0.0
    past, price = budget_price(Slope(), gain=-1.0, rise=1.0, k=0.1, budget=1.0)
    assert price == 0.0 and past.total < 0  # remembered: a mean, not a record


def test_the_slope_is_a_mean_over_updates():
    past, rng = Slope(), torch.Generator().manual_seed(0)
    for _ in range(400):
        gain = 0.5 + float(torch.randn((), generator=rng))
        past, price = budget_price(past, gain=gain, rise=1.0, k=0.25, budget=1.0)
    assert past.weight == pytest.approx(10.0)
    assert price == pytest.approx(0.25, abs=0.4)  # a single update's: 0.5 of standard deviation
    assert price == pytest.approx(past.total / past.weight / 2)
