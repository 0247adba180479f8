"""The two-ball step against a brute-force search of the plane."""

import math

import numpy as np
import pytest
import torch

from trpo_lm.core.trust_region import farthest_point, plane_step

ANGLES = np.linspace(0, 2 * math.pi, 8001)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)


def search(v, w, *, delta, excess):
    """Best v.x over both circles where both constraints hold; None if the balls do not meet.

    A linear function on the intersection of two discs is largest on its boundary, which consists of
    arcs of the two circles.
    """
    square = w @ w - 2 * excess
    if square < 0:
        return None
    best = None
    for centre, radius in ((0 * w, math.sqrt(2 * delta)), (-w, math.sqrt(square))):
        x = centre + radius * CIRCLE
        slack = 1e-6 * (2 * delta + w @ w)
        inside = ((x**2).sum(1) <= 2 * delta + slack) & (((x + w) ** 2).sum(1) <= square + slack)
        if inside.any():
            best = max(-math.inf if best is None else best, (x[inside] @ v).max())
    return best


def problems(count, seed=0):
    """Random problems, degenerate ones among them; yields (v, w, delta, excess)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        v, w = rng.normal(size=(2, 2)) * 10 ** rng.uniform(-2, 1, size=(2, 1))
        delta, excess = 10 ** rng.uniform(-3, 0), rng.normal() * 10 ** rng.uniform(-3, 1)
        match i % 7:
            case 1:
                w = v * rng.normal()  # parallel or opposed
            case 2:
                w = v * rng.normal() + 1e-7 * rng.normal(size=2)  # nearly
            case 3:
                w = 0 * w  # no slope of the reference KL: the balls are concentric
            case 4 | 5:
                excess = rng.uniform(-1, 0.5) * max(w @ w, delta)  # spheres that cut each other
            case 6:
                excess = 0.0  # exactly at the budget
        yield v, w, delta, excess


def test_farthest_point_is_feasible_and_best_over_random_problems_of_all_cases():
    seen = dict.fromkeys(("old", "ref", "both", "recover", "none"), 0)
    for v, w, delta, excess in problems(1400):
        alpha, beta, case = farthest_point(v @ v, v @ w, w @ w, delta=delta, excess=excess)
        x = alpha * v + beta * w
        seen[case] += 1
        best, unit = search(v, w, delta=delta, excess=excess), 1 + w @ w + abs(excess)
        assert x @ x <= 2 * delta + 1e-9 * unit
        if case in ("old", "ref", "both"):
            assert w @ x + x @ x / 2 <= -excess + 1e-9 * unit
            assert abs(v @ x - best) <= 2e-3 * np.linalg.norm(v) * math.sqrt(2 * delta)
        if case in ("old", "both"):
            assert x @ x / 2 == pytest.approx(delta, rel=1e-9) or abs(w @ v) == pytest.approx(
                np.linalg.norm(v) * np.linalg.norm(w), rel=1e-6
            )
        if case == "recover":  # nothing satisfies both, and nothing in the first ball has less R
            assert best is None
            reach = math.sqrt(2 * delta) * CIRCLE
            least = min((reach @ w + delta).min(), -(w @ w) / 2 if w @ w <= 2 * delta else 1e9)
            assert w @ x + x @ x / 2 <= least + 1e-9 * unit
        if case == "none":
            assert w @ w == 0 and excess > 0  # over the budget, and no slope to mend it along
    assert min(seen.values()) > 30, seen


def step_of(v, w, *, delta, excess):
    gram = torch.tensor([[v @ v, v @ w], [v @ w, w @ w]])
    return plane_step(gram, gram[:, 0], gram[:, 1], delta=delta, excess=excess)


def test_plane_step_agrees_with_the_scalar_solution_and_keeps_its_promises():
    for v, w, delta, excess in problems(700, seed=1):
        alpha, beta, case = farthest_point(v @ v, v @ w, w @ w, delta=delta, excess=excess)
        step = step_of(v, w, delta=delta, excess=excess)
        expected = alpha * v + beta * w
        x = step.multipliers[0] * v + step.multipliers[1] * w
        size = math.sqrt(2 * delta)
        if abs(v @ w) < 0.999999 * math.sqrt((v @ v) * (w @ w)):
            assert step.case == case
            assert np.abs(x - expected).max() <= 1e-5 * size
        assert abs(step.gain - v @ x) <= 1e-6 * np.linalg.norm(v) * size
        assert step.kl == pytest.approx(x @ x / 2, rel=1e-5, abs=1e-9 * delta)
        assert step.kl <= delta * (1 + 1e-9)
        change = w @ x + x @ x / 2
        assert abs(step.ref_change - change) <= 1e-6 * (np.linalg.norm(w) * size + delta)


def test_without_a_budget_or_without_its_slope_the_step_is_plain_trpo():
    v = np.array([3.0, 4.0])
    gram, g = torch.tensor([[25.0]]), torch.tensor([25.0])
    step = plane_step(gram, g, None, delta=0.02)
    assert step.case == "old" and step.multipliers[0] == pytest.approx(math.sqrt(0.04 / 25))
    assert step.kl == pytest.approx(0.02) and step.gain == pytest.approx(0.2 * 5)
    assert math.isnan(step.ref_change) and math.isnan(step.alignment)
    flat = step_of(v, 0 * v, delta=0.02, excess=-5.0)
    assert flat.case == "old" and flat.gain == pytest.approx(step.gain)
    shrunk = step_of(v, 0 * v, delta=0.02, excess=-0.005)  # concentric, the budget is the smaller
    assert shrunk.case == "ref" and shrunk.kl == pytest.approx(0.005)


def test_nothing_to_gain_and_nothing_to_mend_is_no_step():
    zero, w = np.zeros(2), np.array([0.3, -0.1])
    for step in (
        step_of(zero, w, delta=0.02, excess=-1.0),
        step_of(zero, zero, delta=0.02, excess=-1.0),
        step_of(zero, zero, delta=0.02, excess=1.0),
        plane_step(torch.zeros(1, 1), torch.zeros(1), None, delta=0.02),
        plane_step(torch.full((2, 2), math.nan), torch.ones(2), torch.ones(2), delta=0.02),
    ):
        assert step.case == "none" and step.kl == 0.0 and step.gain == 0.0
        assert all(m == 0.0 for m in step.multipliers)


def test_over_the_budget_without_a_gradient_the_step_still_lowers_the_reference_kl():
    w = np.array([0.3, -0.1])
    for excess in (1e-3, 0.04, 5.0):
        step = step_of(np.zeros(2), w, delta=0.02, excess=excess)
        assert step.case in ("both", "recover") and step.ref_change < 0
        assert step.kl <= 0.02 * (1 + 1e-9)


def test_recover_goes_straight_towards_the_reference_and_no_further():
    w = np.array([0.3, -0.1])
    far = step_of(np.array([1.0, 1.0]), w, delta=1e-4, excess=5.0)
    assert far.case == "recover" and far.kl == pytest.approx(1e-4)
    assert far.multipliers[1] == pytest.approx(-math.sqrt(2e-4 / (w @ w)))
    near = step_of(np.array([1.0, 1.0]), w, delta=1.0, excess=5.0)  # the model's best is inside
    assert near.case == "recover" and near.multipliers == pytest.approx((0.0, -1.0), abs=1e-9)
    assert near.ref_change == pytest.approx(-(w @ w) / 2)


def test_alignment_is_the_cosine_of_the_two_directions():
    v, w = np.array([1.0, 2.0]), np.array([-2.0, 0.5])
    cosine = v @ w / np.linalg.norm(v) / np.linalg.norm(w)
    assert step_of(v, w, delta=0.1, excess=-0.01).alignment == pytest.approx(cosine)
    assert step_of(v, 3 * v, delta=0.1, excess=-0.01).alignment == pytest.approx(1.0)


def test_inexact_directions_still_give_the_best_point_of_their_plane():
    """Damped, truncated solves: v and w are not F^-1 g and F^-1 b."""
    rng = np.random.default_rng(3)
    seen = set()
    for i in range(60):
        root = rng.normal(size=(6, 6))
        F = root @ root.T
        g, b = rng.normal(size=(2, 6))
        damped = F + 3.0 * np.eye(6)
        D = np.linalg.solve(damped, np.stack([g, b], axis=1))  # (6, 2)
        gram, slope_g, slope_b = D.T @ F @ D, D.T @ g, D.T @ b
        delta = 10 ** rng.uniform(-2, 0)
        excess = (-1.0, -0.02, 0.0, 0.02, 1.0)[i % 5] * delta * 10
        step = plane_step(*map(torch.tensor, (gram, slope_g, slope_b)), delta=delta, excess=excess)
        seen.add(step.case)
        x = D @ np.array(step.multipliers)
        assert x @ F @ x / 2 == pytest.approx(step.kl, rel=1e-9, abs=1e-15)
        assert g @ x == pytest.approx(step.gain, rel=1e-9, abs=1e-12)
        assert b @ x + x @ F @ x / 2 == pytest.approx(step.ref_change, rel=1e-9, abs=1e-12)
        # In orthonormal coordinates of the plane the problem is the one `search` solves.
        L = np.linalg.cholesky(gram)
        v, w = np.linalg.solve(L, slope_g), np.linalg.solve(L, slope_b)
        best = search(v, w, delta=delta, excess=excess)
        if step.case == "recover":
            assert best is None
        else:
            assert abs(step.gain - best) <= 2e-3 * np.linalg.norm(v) * math.sqrt(2 * delta)
    assert seen >= {"old", "ref", "both", "recover"}, seen


def test_scale_of_gradients_does_not_matter():
    """Rewards in other units: g -> c g leaves the step alone, its promise scales."""
    for v, w, delta, excess in problems(70, seed=5):
        one = step_of(v, w, delta=delta, excess=excess)
        gram = np.array([[v @ v, v @ w], [v @ w, w @ w]])
        D = np.diag([1e9, 1.0])
        big = plane_step(
            torch.tensor(D @ gram @ D), torch.tensor(1e9 * (D @ gram[:, 0])),
            torch.tensor(D @ gram[:, 1]), delta=delta, excess=excess,
        )  # fmt: skip
        assert big.case == one.case or abs(v @ w) > 0.999999 * math.sqrt((v @ v) * (w @ w))
        assert big.kl == pytest.approx(one.kl, rel=1e-5, abs=1e-9 * delta)
        tiny = 1e-6 * np.linalg.norm(v) * math.sqrt(2 * delta)
        assert big.gain / 1e9 == pytest.approx(one.gain, rel=1e-5, abs=tiny)
