"""The step between two balls, for any torch model: two solves, one plane, one line search.

    step = argmax g.x   s.t.  1/2 x.Fx <= radius,  k + b.x + 1/2 x.Fx <= budget

with g = grad L, b = grad R, k = R and F = Hessian of D, all at theta_old: L is the surrogate to
maximise, D the divergence from the old point, R the divergence from a fixed reference.
`constrained_update` takes these quantities from anyone; `trust_region_step` works them out by
automatic differentiation from three functions.

Source: TRPO, arXiv:1502.05477, eq. 14 and App. C; the constraint on R is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trpo_lm.config import TRPOSettings
from trpo_lm.core.conjugate_gradient import CGSolution, conjugate_gradient
from trpo_lm.core.fisher import hessian_operator
from trpo_lm.core.line_search import Search, backtrack
from trpo_lm.core.parameters import ParameterVector
from trpo_lm.core.trust_region import Step, plane_step

Product = Callable[[Tensor], Tensor]

# Why a solve ended before it should have, in words for whoever has to mend it.
BROKEN = {
    "nonfinite": "a Fisher product was not finite",
    "indefinite": "a Fisher product had no positive curvature",
}


@dataclass(frozen=True)
class Measurement:
    """Exact at some theta: gain of L, D, R, and the largest divergence of a single state."""

    gain: float
    kl: float
    ref_kl: float = math.nan
    kl_max: float = math.nan


@dataclass(frozen=True)
class StepLimits:
    """How far one step may go, and how its solves are damped.

    Attributes:
        radius: Trust region that the step is solved in, nats, <= `settings.max_kl`.
        ref_kl: k, R at theta_old, nats; nan without a budget.
        budget: K on the scale of `ref_kl`, nats; inf without one.
        damping: Of the solves, relative as `conjugate_gradient` takes it.
        metric: Diagonal in which damping measures parameters, (M,), positive; None: all ones.
        price: Of R in what the step maximises, L - price R; L per nat.
    """

    radius: float
    ref_kl: float = math.nan
    budget: float = math.inf
    damping: float = 0.0
    metric: Tensor | None = None
    price: float = 0.0


@dataclass(frozen=True)
class Update:
    """The two solves of an update, the step they led to, and its line search."""

    v: CGSolution
    w: CGSolution | None
    step: Step
    search: Search[Measurement]

    @property
    def reason(self) -> str | None:
        """Why the step was shortened, rejected or missing; None for the full step."""
        if not self.search.reasons:
            return None
        solves = [solution for solution in (self.v, self.w) if solution is not None]
        causes = [BROKEN[s.status] if s.iterations else "a gradient was not finite"
                  for s in solves if s.status in BROKEN and not self.search.accepted]  # fmt: skip
        return "; ".join([self.search.reasons[-1], *causes[:1]])


def constrained_update(
    theta: ParameterVector,
    g: Tensor,
    b: Tensor | None,
    F: Product,
    measure: Callable[[], Measurement],
    limits: StepLimits,
    settings: TRPOSettings,
) -> Update:
    """Move theta by the budgeted natural-gradient step, or leave it bit for bit where it was.

    Args:
        theta: Parameters, M numbers, at theta_old.
        g: grad L, (M,); of L - price R if R has a price.
        b: grad R, (M,), or None without a budget.
        F: v -> F v, reduced over ranks.
        measure: Exact gain, D and R at the present theta, reduced over ranks.
        limits: Radius, budget and damping of this step.
        settings: How to solve and how to search.

    Returns:
        The solves, the step and the search; theta is at the accepted point.
    """
    v = solve(F, g, limits, settings)
    w = None if b is None else solve(F, b, limits, settings)
    x, step = farthest_step(F, v, w, g, b, limits)
    if step.case == "none":
        return Update(v, w, step, Search(0.0, measure(), ("no step",)))
    theta_old = theta.snapshot()

    def at(scale: float) -> Measurement:
        theta.assign(theta_old, x, scale)
        trial = measure()
        if not limits.price:
            return trial
        return replace(trial, gain=trial.gain - limits.price * (trial.ref_kl - limits.ref_kl))

    def objection(trial: Measurement, scale: float) -> str | None:
        return why_rejected(trial, step, scale, limits, settings)

    search = backtrack(
        at,
        objection,
        ratio=settings.backtrack_ratio,
        trials=max(1, settings.line_search_trials),
        excess=lambda trial: trial.kl / settings.max_kl,
    )
    if not search.accepted:
        theta.restore(theta_old)
    return Update(v, w, step, search)


def solve(F: Product, b: Tensor, limits: StepLimits, settings: TRPOSettings) -> CGSolution:
    """Solve (F + lambda D) x = b with D = diag(metric), by CG in the coordinates D^1/2 x."""
    scale = torch.ones_like(b) if limits.metric is None else limits.metric.rsqrt()
    solution = conjugate_gradient(
        lambda y: scale * F(scale * y),
        scale * b,
        max_iterations=settings.cg_iterations,
        rtol=settings.cg_tolerance,
        damping=limits.damping,
    )
    return replace(solution, x=scale * solution.x, Ax=solution.Ax / scale)


def farthest_step(
    F: Product,
    v: CGSolution,
    w: CGSolution | None,
    g: Tensor,
    b: Tensor | None,
    limits: StepLimits,
) -> tuple[Tensor, Step]:
    """Return x, (M,), the point of both balls farthest along g in the plane of v and w."""
    plane, curved = spanning(F, v, w)
    step = plane_step(
        plane @ curved.T,
        plane @ g.double(),
        None if b is None else plane @ b.double(),
        delta=limits.radius,
        excess=0.0 if b is None else limits.ref_kl - limits.budget,
    )
    return (torch.tensor(step.multipliers, dtype=torch.float64, device=g.device) @ plane).to(
        g
    ), step


def spanning(F: Product, v: CGSolution, w: CGSolution | None) -> tuple[Tensor, Tensor]:
    """Return directions that span the plane of v and w, and F times each: (n, M) float64 both.

    Near the constrained optimum v and w nearly coincide, and in float32 what tells them apart is
    lost in the rounding of their products. There w gives way to its part across v, with a product
    of its own.
    """
    plane, curved = [v.x.double()], [v.Ax.double()]
    if w is not None:
        x, Fx = w.x.double(), w.Ax.double()
        q, r, s = float(plane[0] @ curved[0]), float(plane[0] @ Fx), float(x @ Fx)
        if q > 0 and s > 0 and r * r > 0.99 * q * s:
            across = (x - r / q * plane[0]).to(w.x)
            x, Fx = across.double(), F(across).double()
        plane.append(x)
        curved.append(Fx)
    return torch.stack(plane), torch.stack(curved)


def why_rejected(
    trial: Measurement, step: Step, scale: float, limits: StepLimits, settings: TRPOSettings
) -> str | None:
    """Return what is wrong with a trial of `scale` times the step, None if it is acceptable."""
    if not all(map(math.isfinite, (trial.gain, trial.kl))):
        return "non-finite"
    if settings.line_search_trials == 0:  # natural policy gradient
        return None
    if trial.kl > settings.max_kl:
        return "kl above max_kl"
    budgeted, over = limits.budget < math.inf, limits.ref_kl > limits.budget
    if budgeted and not trial.ref_kl <= max(limits.budget, limits.ref_kl):
        return "reference kl above its limit"
    if step.case == "recover":
        return None if trial.ref_kl < limits.ref_kl else "reference kl did not fall"
    if not over and step.gain > 0 and trial.gain < settings.accept_ratio * scale * step.gain:
        return "gain below its promise"
    return None


def trust_region_step(
    parameters: Sequence[Tensor],
    surrogate: Callable[[], Tensor],
    kl: Callable[[], Tensor],
    ref_kl: Callable[[], Tensor] | None = None,
    settings: TRPOSettings | None = None,
) -> Update:
    """Take one budgeted trust-region step on any torch model.

    Args:
        parameters: Leaf tensors to move; everything else is constant.
        surrogate: Returns L as a scalar with a graph; maximised.
        kl: Returns D(theta) = KL(old ‖ theta) as a scalar that is zero, and twice
            differentiable, at the present parameters.
        ref_kl: Returns R as a scalar with a graph, for a budget `settings.max_ref_kl`.
        settings: The distances and the solver.

    Returns:
        The solves, the step and the line search; the parameters were moved if it accepted.
    """
    settings = settings or TRPOSettings(max_ref_kl=None)
    theta = ParameterVector(parameters)
    before = surrogate()
    g = theta.gradient(before)
    R = ref_kl if settings.max_ref_kl is not None else None
    b, limits = None, StepLimits(settings.max_kl, damping=settings.damping or 0.0)
    if R is not None and settings.max_ref_kl is not None:
        k = R()
        b = theta.gradient(k)
        limits = replace(limits, ref_kl=float(k.detach()), budget=settings.max_ref_kl)

    @torch.no_grad()
    def measure() -> Measurement:
        gain = float(surrogate()) - float(before.detach())
        return Measurement(gain, float(kl()), math.nan if R is None else float(R()))

    F = hessian_operator(theta, kl())
    return constrained_update(theta, g, b, F, measure, limits, settings)
