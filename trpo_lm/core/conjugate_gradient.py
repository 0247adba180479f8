"""Solve A x = b for a symmetric positive (semi)definite A known only by its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CGSolution:
    """The result of a conjugate-gradient solve, and why it ended.

    Attributes:
        x: The solution, (M,); always finite.
        Ax: A x, (M,), from the recurrence: no further product is needed for x.Ax.
        residual: ||b - (A + shift I) x|| / ||b||, dimensionless.
        iterations: Number of products with A.
        status: 'converged', 'max_iterations', 'indefinite' (a direction had no positive curvature:
            A is not positive semidefinite, or float32 cannot tell), 'nonfinite' (a product returned
            nan or inf) or 'zero' (b is zero).
    """

    x: Tensor
    Ax: Tensor
    residual: float
    iterations: int
    status: str


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    max_iterations: int,
    rtol: float = 1e-10,
    damping: float = 0.0,
) -> CGSolution:
    """Solve (A + shift I) x = b by conjugate gradient, starting at zero.

    shift = damping * (b.Ab / b.b): damping is relative to the curvature along b, which the first
    product gives for free, so it means the same at every reward scale and model size.

    Starts at zero, not at random noise: ranks stay in step and LoRA's null block (B = 0 at
    initialisation) stays untouched. The tolerance is relative. There is no epsilon in a
    denominator: a breakdown is a status, and x is the last iterate before it.

    Args:
        matvec: Maps (M,) to (M,); symmetric positive semidefinite, already reduced over ranks.
        b: Right-hand side, (M,), float32 or float64.
        max_iterations: Most products with A.
        rtol: Relative residual at which to stop, dimensionless.
        damping: Relative shift of the diagonal, dimensionless.

    Returns:
        The solution; a truncated solve is a status, not an error.

    Raises:
        ValueError: If `b` is not a vector or `max_iterations` < 1.

    Source: Hestenes and Stiefel (1952); Shewchuk (1994), App. B2. TRPO: arXiv:1502.05477, App. C.
    """
    if b.dim() != 1 or max_iterations < 1:
        raise ValueError("b must be a vector and max_iterations at least 1")
    x, shift = torch.zeros_like(b), 0.0
    b_norm = float(torch.linalg.vector_norm(b, dtype=torch.float64))  # float32 squares overflow
    if b_norm == 0.0 or not torch.isfinite(b).all():
        return CGSolution(x, x, 0.0, 0, "zero" if b_norm == 0.0 else "nonfinite")
    r = b / b_norm  # normalised, so that float32 neither over- nor underflows
    p, rr, status, iteration = r.clone(), 1.0, "max_iterations", 0
    for iteration in range(1, max_iterations + 1):
        Ap = matvec(p)
        if iteration == 1:
            shift = damping * float(p @ Ap)
        Ap = Ap + shift * p
        curvature = float(p @ Ap)
        if not torch.isfinite(Ap).all():
            status = "nonfinite"
            break
        if curvature <= 0.0:
            status = "indefinite"
            break
        alpha = rr / curvature
        x = x + alpha * p
        r = r - alpha * Ap
        rr, rr_before = float(r @ r), rr
        if rr <= rtol**2:
            status = "converged"
            break
        p = r + (rr / rr_before) * p
    Ax = b - (r + shift * x) * b_norm
    return CGSolution(x * b_norm, Ax, rr**0.5, iteration, status)
