"""Conjugate gradient against dense solves, and every way in which it can end."""

import math
from itertools import pairwise

import pytest
import torch

from trpo_lm.core.conjugate_gradient import conjugate_gradient


def spd(n, *, condition=100.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    A = Q @ torch.diag(torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ Q.T
    return A.to(dtype), torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", [1, 2, 7, 30])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
def test_N02_equals_the_dense_solve_within_n_iterations(n, condition):
    A, b = spd(n, condition=condition, seed=n)
    solution = conjugate_gradient(lambda v: A @ v, b, max_iterations=2 * n + 2, rtol=1e-9)
    expected = torch.linalg.solve(A, b)
    assert solution.status == "converged"
    assert solution.iterations <= (n + 1 if condition <= 10 else 2 * n)
    torch.testing.assert_close(solution.x, expected, rtol=1e-7, atol=1e-9)
    residual = float((b - A @ solution.x).norm() / b.norm())
    assert residual <= 1e-8 and solution.residual == pytest.approx(residual, abs=1e-9)
    torch.testing.assert_close(solution.Ax, A @ solution.x, rtol=1e-8, atol=1e-8)


def test_n_iterations_suffice():
    A, b = spd(12, condition=50.0)
    solution = conjugate_gradient(lambda v: A @ v, b, max_iterations=12, rtol=0.0)
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("damping", [0.1, 1.0, 10.0])
def test_N02_damping_is_a_share_of_the_curvature_along_b(damping):
    A, b = spd(20)
    solution = conjugate_gradient(
        lambda v: A @ v, b, max_iterations=40, rtol=1e-12, damping=damping
    )
    shift = damping * float(b @ A @ b / (b @ b))
    expected = torch.linalg.solve(A + shift * torch.eye(20, dtype=A.dtype), b)
    torch.testing.assert_close(solution.x, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solution.Ax, A @ solution.x, rtol=1e-8, atol=1e-8)


def test_N02_stops_early_at_the_tolerance_and_says_how_often_it_multiplied():
    A, b = spd(50, condition=1e4)
    calls = []

    def product(v):
        calls.append(v)
        return A @ v

    solution = conjugate_gradient(product, b, max_iterations=50, rtol=0.3)
    assert solution.status == "converged" and solution.residual <= 0.3
    assert solution.iterations == len(calls) < 50


def test_a_truncated_solve_is_a_status_and_lowers_the_energy_with_each_iteration():
    A, b = spd(40, condition=1e4)
    shift, energies = 0.05 * float(b @ A @ b / (b @ b)), [0.0]
    for n in (1, 3, 6, 10):
        solution = conjugate_gradient(
            lambda v: A @ v, b, max_iterations=n, rtol=1e-12, damping=0.05
        )
        assert solution.status == "max_iterations" and solution.iterations == n
        torch.testing.assert_close(solution.Ax, A @ solution.x, rtol=1e-8, atol=1e-8)
        damped = solution.Ax + shift * solution.x
        assert solution.residual == pytest.approx(float((b - damped).norm() / b.norm()), rel=1e-6)
        energies.append(float(0.5 * solution.x @ damped - b @ solution.x))
    assert all(later < earlier for earlier, later in pairwise(energies))


def test_a_direction_of_negative_curvature_ends_the_solve_at_the_last_good_iterate():
    A = torch.diag(torch.tensor([4.0, 1.0, -1.0], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    solution = conjugate_gradient(lambda v: A @ v, b, max_iterations=10)
    assert solution.status == "indefinite" and torch.isfinite(solution.x).all()
    first = conjugate_gradient(lambda v: -A.abs() @ v, b, max_iterations=10, damping=0.1)
    assert first.status == "indefinite" and first.iterations == 1
    assert torch.equal(first.x, torch.zeros(3).double())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_ends_the_solve_at_the_last_good_iterate(bad):
    A, b = spd(5)
    count = 0

    def product(v):
        nonlocal count
        count += 1
        out = A @ v
        if count == 3:
            out[2] = bad
        return out

    solution = conjugate_gradient(product, b, max_iterations=10)
    assert solution.status == "nonfinite" and solution.iterations == 3
    two = conjugate_gradient(lambda v: A @ v, b, max_iterations=2)
    assert torch.equal(solution.x, two.x)
    assert conjugate_gradient(lambda v: A @ v, b * bad, max_iterations=3).status == "nonfinite"


def test_zero_gives_zero_without_a_product():
    solution = conjugate_gradient(lambda v: v / 0, torch.zeros(4), max_iterations=3)
    assert solution.status == "zero" and solution.iterations == 0
    assert torch.equal(solution.x, torch.zeros(4))


def test_a_null_space_that_b_does_not_touch_stays_untouched():
    """LoRA at initialisation: A's block of the Fisher is zero, and so is that block of g."""
    A, b = spd(6)
    A[3:], A[:, 3:], b[3:] = 0.0, 0.0, 0.0
    solution = conjugate_gradient(lambda v: A @ v, b, max_iterations=20, rtol=1e-9)
    assert solution.status == "converged" and torch.equal(solution.x[3:], torch.zeros(3).double())


def test_deterministic_and_independent_of_the_global_generator():
    A, b = spd(30, dtype=torch.float32)
    torch.manual_seed(0)
    one = conjugate_gradient(lambda v: A @ v, b, max_iterations=8, damping=0.1)
    torch.manual_seed(1)
    two = conjugate_gradient(lambda v: A @ v, b, max_iterations=8, damping=0.1)
    assert torch.equal(one.x, two.x) and one.iterations == two.iterations


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-12, 1e12, 1e30, 1e36])
def test_R13_float32_right_hand_sides_of_any_size(scale):
    """Squares of these numbers do not fit into float32."""
    A, b = spd(20, dtype=torch.float32)
    options = {"max_iterations": 40, "rtol": 1e-4, "damping": 0.1}
    one = conjugate_gradient(lambda v: A @ v, b, **options)
    other = conjugate_gradient(lambda v: A @ v, b * scale, **options)
    assert other.status == one.status == "converged"
    shift = 0.1 * float(b @ A @ b / (b @ b))
    expected = torch.linalg.solve(A + shift * torch.eye(20), b)
    torch.testing.assert_close(one.x, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.x.double() / scale, one.x.double(), rtol=1e-3, atol=1e-6)


def test_scale_of_the_matrix_does_not_matter_in_float32():
    A, b = spd(20, dtype=torch.float32)
    one = conjugate_gradient(lambda v: A @ v, b, max_iterations=5, damping=0.1)
    tiny = conjugate_gradient(lambda v: 1e-20 * (A @ v), b, max_iterations=5, damping=0.1)
    torch.testing.assert_close(tiny.x * 1e-20, one.x, rtol=1e-4, atol=1e-6)


def test_arguments_are_checked():
    with pytest.raises(ValueError):
        conjugate_gradient(lambda v: v, torch.ones(2, 2), max_iterations=3)
    with pytest.raises(ValueError):
        conjugate_gradient(lambda v: v, torch.ones(2), max_iterations=0)
