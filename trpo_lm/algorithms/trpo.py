"""TRPO with two distances: a trust region around the old policy, a budget around the reference.

    L(theta) = E[ ratio A ]                                   surrogate, ratio = pi_theta / pi_old
    D(theta) = E[ KL(pi_old ‖ pi_theta) ]                     exact, per completion
    R(theta) = E_{y ~ pi_theta}[ sum_t KL(pi_theta ‖ pi_ref) ]     exact per state
    step     = argmax g.x   s.t.  1/2 x.Fx <= max_kl,  k + b.x + 1/2 x.Fx <= max_ref_kl

with g = grad L, b = grad R, k = R, F = Hessian of D, all at theta_old. E is the mean over
completions of a sum over their tokens. `TRPO.update` reads in that order; `constrained_update` is
the part that knows no language model, and `trust_region_step` hands it to any torch model.

Source: TRPO, arXiv:1502.05477, eq. 14 and App. C; the constraint on R is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trpo_lm.config import Limits, TRPOSettings
from trpo_lm.core.adaptation import (
    budget_on_batch,
    learn_radius,
    radius_inside,
    running_rms,
    wiener_damping,
)
from trpo_lm.core.advantages import gae, whiten
from trpo_lm.core.conjugate_gradient import CGSolution, conjugate_gradient
from trpo_lm.core.fisher import hessian_operator
from trpo_lm.core.line_search import Search, backtrack
from trpo_lm.core.parameters import ParameterVector
from trpo_lm.core.trust_region import Step, plane_step
from trpo_lm.lm.mdp import Batch
from trpo_lm.lm.objective import (
    Measurement,
    Product,
    Reduce,
    fisher,
    gradients,
    measure_at,
    noise,
    reference_kl,
)
from trpo_lm.lm.policy import Policy


@dataclass(frozen=True)
class Update:
    """What one update did: the two solves, the step they led to, and its line search."""

    v: CGSolution
    w: CGSolution | None
    step: Step
    search: Search[Measurement]


def constrained_update(
    theta: ParameterVector,
    g: Tensor,
    b: Tensor | None,
    F: Product,
    measure: Callable[[], Measurement],
    settings: TRPOSettings,
    *,
    radius: float,
    damping: float = 0.0,
    metric: Tensor | None = None,
    ref_kl: float = math.nan,
    budget: float = math.inf,
) -> Update:
    """Move theta by the budgeted natural-gradient step, or leave it bit for bit where it was.

    Args:
        theta: Parameters, M numbers, at theta_old.
        g: grad L, (M,).
        b: grad R, (M,), or None without a budget.
        F: v -> F v, reduced over ranks.
        measure: Exact gain, D and R at the present theta, reduced over ranks.
        settings: How to solve and how to search.
        radius: Trust region of this step, nats, <= settings.max_kl.
        damping: Of the solves, relative as `conjugate_gradient` takes it.
        metric: Diagonal in which damping measures parameters, (M,), positive; None: all ones.
        ref_kl: k, R at theta_old as this batch measures it, nats.
        budget: K on the scale of this batch's R, nats.

    Returns:
        The solves, the step and the search; theta is at the accepted point.
    """
    v = solve(F, g, damping, metric, settings)
    w = None if b is None else solve(F, b, damping, metric, settings)
    plane, curved = spanning(F, v, w)
    step = plane_step(
        plane @ curved.T,
        plane @ g.double(),
        None if b is None else plane @ b.double(),
        delta=radius,
        excess=ref_kl - budget if b is not None else 0.0,
    )
    x = (torch.tensor(step.multipliers, dtype=torch.float64, device=g.device) @ plane).to(g)
    theta_old = theta.snapshot()

    def at(scale: float) -> Measurement:
        theta.assign(theta_old, x, scale)
        return measure()

    def objection(trial: Measurement, scale: float) -> str | None:
        if not all(map(math.isfinite, (trial.gain, trial.kl))):
            return "non-finite"
        if settings.line_search_trials == 0:  # natural policy gradient
            return None
        if trial.kl > settings.max_kl:
            return "kl above max_kl"
        if b is not None and not trial.ref_kl <= max(budget, ref_kl):
            return "reference kl above its limit"
        if step.case == "recover" and not trial.ref_kl < ref_kl:
            return "reference kl did not fall"
        if step.gain > 0 and step.case in ("old", "ref", "both"):
            over_budget = b is not None and ref_kl > budget
            if not over_budget and trial.gain < settings.accept_ratio * scale * step.gain:
                return "gain below its promise"
        return None

    if step.case == "none":
        return Update(v, w, step, Search(0.0, measure(), ("no step",)))
    search = backtrack(
        at, objection, ratio=settings.backtrack_ratio, trials=max(1, settings.line_search_trials)
    )
    if not search.accepted:
        theta.restore(theta_old)
    return Update(v, w, step, search)


def solve(
    F: Product, b: Tensor, damping: float, metric: Tensor | None, settings: TRPOSettings
) -> CGSolution:
    """Solve (F + lambda D) x = b with D = diag(metric), by CG in the coordinates D^1/2 x."""
    scale = torch.ones_like(b) if metric is None else metric.rsqrt()
    found = conjugate_gradient(
        lambda y: scale * F(scale * y),
        scale * b,
        max_iterations=settings.cg_iterations,
        rtol=settings.cg_tolerance,
        damping=damping,
    )
    return replace(found, x=scale * found.x, Ax=found.Ax / scale)


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
    budgeted = ref_kl is not None and settings.max_ref_kl is not None
    k = ref_kl() if budgeted and ref_kl else None

    @torch.no_grad()
    def measure() -> Measurement:
        R = float(ref_kl()) if budgeted and ref_kl else math.nan
        return Measurement(float(surrogate()) - float(before.detach()), float(kl()), R)

    return constrained_update(
        theta,
        g,
        None if k is None else theta.gradient(k),
        hessian_operator(theta, kl()),
        measure,
        settings,
        radius=settings.max_kl,
        damping=settings.damping or 0.0,
        ref_kl=math.nan if k is None else float(k.detach()),
        budget=math.inf if settings.max_ref_kl is None else settings.max_ref_kl,
    )


@dataclass(frozen=True)
class TRPO(TRPOSettings):
    """Trust region policy optimisation of a language model under a reference-KL budget."""

    needs_critic = True

    @property
    def limits(self) -> Limits:
        """Distances of one update and of the whole run."""
        return Limits(self.max_kl, self.max_ref_kl)

    def with_lam(self, lam: float) -> TRPO:
        """Return these settings with the critic's lambda where none was chosen."""
        return self if self.lam is not None else replace(self, lam=lam)

    def init_state(self, policy: Policy) -> dict[str, Any]:
        """Return the state kept between updates: plain numbers, and the running square of g."""
        square = torch.zeros(len(policy.parameters), device=policy.device)
        return {"noise": {}, "reference": {}, "radius": {}, "square": square}

    def rewards(self, batch: Batch, state: dict[str, Any]) -> Tensor:
        """Return the rewards to maximise, (N, T): those of the MDP; the KL is a constraint."""
        return batch.rollout.rewards

    def advantages(self, batch: Batch, reduce: Reduce) -> Tensor:
        """Return A_t of every action, (N, T), by generalised advantage estimation, whitened."""
        r = batch.rollout
        mask = r.action_mask
        A = gae(batch.rewards, batch.values, mask, gamma=self.gamma, lam=self.lam or 0.0)
        return whiten(A, mask & r.scores.valid[:, None], reduce)

    def update(
        self,
        policy: Policy,
        batch: Batch,
        reduce: Reduce,
        state: dict[str, Any],
        seed: tuple[int | str, ...] = (),
    ) -> dict[str, Any]:
        """Make one update and return its metrics.

        Args:
            policy: At theta_old; moved if the line search accepts.
            batch: Completions sampled from it, with advantages.
            reduce: Sums a tensor over ranks.
            state: From `init_state`; changed in place.
            seed: Not used: nothing in this update is random.
        """
        theta, budgeted = policy.parameters, self.max_ref_kl is not None
        N = float(reduce(torch.tensor(float(len(batch.rollout)), dtype=torch.float64)))
        halves_g, halves_b = gradients(policy, batch, reduce, N, reference=budgeted)
        g, b = halves_g.sum(0) / N, None if halves_b is None else halves_b.sum(0) / N
        F = fisher(policy, batch, reduce, self.fisher_completions)
        metric = running_rms(state, g)
        damping = self.damping
        if damping is None:
            seen = noise(halves_g * metric.rsqrt(), N)
            damping = wiener_damping(
                state["noise"], signal=seen.signal, variance=seen.variance, N=N
            )
        k, error = reference_kl(batch, reduce, N)
        K = budget_on_batch(
            state["reference"], k=k, error=error, budget=self.max_ref_kl or math.inf
        )
        radius = radius_inside(state["radius"], self.max_kl)
        result = constrained_update(
            theta, g, b, F, lambda: measure_at(policy, batch, reduce, N), self,
            radius=radius, damping=damping, metric=metric, ref_kl=k, budget=K,
        )  # fmt: skip
        signal = noise(halves_g, N)
        trial, step, scale = result.search.trial, result.step, result.search.scale
        accepted = result.search.accepted
        if accepted:
            learn_radius(state["radius"], kl=trial.kl, predicted=step.kl * scale**2)
            state["reference"]["expected"] += (
                step.ref_change_at(scale) if budgeted else trial.ref_kl - k
            )
        state["reference"]["fitted"] = float(accepted and step.case != "old")
        return {
            "trust_region/kl": trial.kl if accepted else 0.0,
            "trust_region/kl_max": trial.kl_max if accepted else 0.0,
            "trust_region/predicted_kl": step.kl * scale**2,
            "trust_region/predicted_gain": step.gain * scale,
            "trust_region/actual_gain": trial.gain if accepted else 0.0,
            "trust_region/ref_kl_after": trial.ref_kl if accepted else k,
            "trust_region/case": step.case,
            "trust_region/alignment": step.alignment,
            "trust_region/radius": radius,
            "cg/iterations": result.v.iterations + (result.w.iterations if result.w else 0),
            "cg/residual": result.v.residual,
            "cg/damping": damping,
            "line_search/trials": result.search.trials,
            "line_search/accepted": accepted,
            "line_search/reason": result.search.reasons[-1] if result.search.reasons else None,
            "signal/noise_scale": signal.scale,
            "signal/half_batch_cosine": signal.cosine,
        }
