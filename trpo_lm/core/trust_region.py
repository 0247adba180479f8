"""The step in closed form: two balls in the Fisher metric, and the point farthest along g.

    maximise  g.x   subject to   1/2 x.Fx <= delta   and   k + b.x + 1/2 x.Fx <= K

With v = F^-1 g, w = F^-1 b and |x|^2 = x.Fx, the first constraint is a ball around the old policy
with radius sqrt(2 delta); the second is a ball around -w, which is where the reference lies, with
radius sqrt(|w|^2 - 2 (k - K)). The solution is one of four points:

    old      the top of the first ball lies in the second      x = sqrt(2 delta / q) v
    ref      the top of the second lies in the first           x = -w + (radius / sqrt(q)) v
    both     where the two spheres meet                        x = h/s w + c (v - r/s w)
    recover  the balls do not meet: back towards the reference x = -w, cut to the first ball

with q = v.Fv, r = v.Fw, s = w.Fw, h = -(k - K) - delta, c = sqrt((2 delta - h^2/s)/(q - r^2/s)).

Truncated, damped solves give directions that are not exactly F^-1 g and F^-1 b. So `plane_step`
solves the problem inside the plane of the given directions with its true Gram matrix and true
slopes (Rayleigh-Ritz): within that plane the step is optimal and its predictions are right,
whatever the damping. Scalars in, multipliers and case out; float64 throughout.

Source: TRPO, arXiv:1502.05477, App. C, for the first ball. Two trust regions with one linearised
constraint: CPO, arXiv:1705.10528, section 6; here the constraint keeps its curvature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """A step as multipliers of the directions, with the predictions of the quadratic models.

    Attributes:
        multipliers: x = sum_i multipliers[i] * direction_i.
        case: 'old', 'ref', 'both', 'recover', or 'none' (nothing to gain, nothing to repair).
        gain: Predicted change of the surrogate, g.x.
        kl: Predicted KL(old || new), 1/2 x.Fx, nats.
        ref_change: Predicted change of the reference KL, b.x + 1/2 x.Fx, nats.
        alignment: Cosine of v and w in the Fisher metric, nan without w. With w = F^-1 b it is 1
            at the optimum of the budgeted problem, where g is a multiple of b.
    """

    multipliers: tuple[float, ...]
    case: str
    gain: float
    kl: float
    ref_change: float
    alignment: float

    def ref_change_at(self, scale: float) -> float:
        """Return the predicted change of the reference KL at a fraction of the step, nats."""
        return scale * (self.ref_change - self.kl) + scale**2 * self.kl


def farthest_point(q: float, r: float, s: float, *, delta: float, excess: float):
    """Return (alpha, beta, case) with x = alpha v + beta w, the optimum of the two-ball problem.

    Args:
        q: v.Fv, > 0 unless g = 0.
        r: v.Fw.
        s: w.Fw, >= 0; 0 means no reference constraint.
        delta: Trust region, nats, > 0.
        excess: k - K, nats: how far the policy is over the budget (negative: below it).

    Returns:
        The two multipliers and the case.
    """
    radius_old = math.sqrt(2 * delta)
    square_ref = s - 2 * excess
    if s <= 0.0 and excess <= 0.0 and delta <= -excess:  # no slope: both balls are concentric
        return (radius_old / math.sqrt(q), 0.0, "old") if q > 0 else (0.0, 0.0, "none")
    if square_ref >= 0.0:
        radius_ref = math.sqrt(square_ref)
        if q > 0.0:
            top = radius_old / math.sqrt(q)
            if top * top * q + 2 * top * r + s <= square_ref:
                return top, 0.0, "old"
            top = radius_ref / math.sqrt(q)
            if s - 2 * top * r + top * top * q <= 2 * delta:
                return top, -1.0, "ref"
        elif excess <= 0.0:
            return 0.0, 0.0, "none"
        if math.sqrt(s) <= radius_old + radius_ref and s > 0.0:
            h = -excess - delta
            across = q - r * r / s  # |component of v orthogonal to w|^2
            remainder = max(2 * delta - h * h / s, 0.0)
            c = math.sqrt(remainder / across) if across > 1e-12 * q else 0.0
            if c > 0.0 or abs(h) <= math.sqrt(2 * delta * s):
                return c, h / s - c * r / s, "both"
    if s <= 0.0:
        return 0.0, 0.0, "none"
    return 0.0, -min(1.0, radius_old / math.sqrt(s)), "recover"


def plane_step(
    gram: Tensor, g: Tensor, b: Tensor | None, *, delta: float, excess: float = 0.0
) -> Step:
    """Solve the two-ball problem inside the span of n directions.

    Args:
        gram: Fisher products of the directions, direction_i . F direction_j, (n, n).
        g: Slope of the surrogate along each direction, (n,).
        b: Slope of the reference KL along each direction, (n,), or None without a budget.
        delta: Trust region, nats.
        excess: k - K, nats.

    Returns:
        The best step in the span.
    """
    gram = 0.5 * (gram + gram.T).double().cpu()
    g = g.double().cpu()
    # Coordinates in which the Fisher metric is the identity; directions that are combinations of
    # the others (g and b nearly parallel) have no curvature of their own and are dropped.
    scale = gram.diagonal().clamp(min=0.0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    eigenvalues, vectors = torch.linalg.eigh(gram / scale[:, None] / scale[None, :])
    keep = eigenvalues > 1e-10 * eigenvalues.max().clamp(min=1e-300)
    basis = vectors[:, keep] / eigenvalues[keep].sqrt() / scale[:, None]  # (n, m)
    v = basis.T @ g
    w = torch.zeros_like(v) if b is None else basis.T @ b.double().cpu()
    q, r, s = float(v @ v), float(v @ w), float(w @ w)
    if b is None:
        excess = -math.inf
    alpha, beta, case = farthest_point(q, r, s, delta=delta, excess=excess)
    x = alpha * v + beta * w
    kl = 0.5 * float(x @ x)
    return Step(
        multipliers=tuple((basis @ x).tolist()),
        case=case,
        gain=float(v @ x),
        kl=kl,
        ref_change=float(w @ x) + kl if b is not None else math.nan,
        alignment=r / math.sqrt(q * s) if q > 0 and s > 0 else math.nan,
    )
