"""TRPO with two distances: a trust region around the old policy, a budget around the reference.

    L(theta) = E[ ratio A ]                                   surrogate, ratio = pi_theta / pi_old
    D(theta) = E[ KL(pi_old ‖ pi_theta) ]                     exact, per completion
    R(theta) = E_{y ~ pi_theta}[ sum_t KL(pi_theta ‖ pi_ref) ]     exact per state
    step     = argmax g.x   s.t.  1/2 x.Fx <= max_kl,  k + b.x + 1/2 x.Fx <= max_ref_kl

with g = grad (L - price R), b = grad R, k = R, F = Hessian of D, all at theta_old. E is the mean
over completions of a sum over their tokens; R has the price that its budget will have when it
binds. `TRPO.update` reads in that order: `lm/objective.py` works the quantities out on a batch,
`core/adaptation.py` says how far to trust them, and `core/natural_step.py` takes the step.

Source: TRPO, arXiv:1502.05477, eq. 14 and App. C; the constraint on R is this project's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from trpo_lm.algorithms.algorithm import Metrics
from trpo_lm.config import Limits, TRPOSettings
from trpo_lm.core.adaptation import (
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
    running_rms,
    shrink_radius,
    wiener_damping,
)
from trpo_lm.core.advantages import gae, whiten
from trpo_lm.core.natural_step import StepLimits, Update, constrained_update
from trpo_lm.core.parameters import ParameterVector, Reduce
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.rollout import Batch, Rollout


@dataclass(frozen=True)
class TRPOState:
    """What is learned from update to update.

    Attributes:
        noise: Running signal and noise of g: the strength of the damping.
        reference: Filter of R: the margin to the budget.
        radius: Exact KL over predicted KL: the margin to `max_kl`.
        slope: What L gains along the ray from the reference: the price of R.
        square: Running mean square of g, (M,): the metric of the damping.
    """

    noise: RunningNoise
    reference: ReferenceFilter
    radius: RadiusRatio
    slope: Slope
    square: Tensor


@dataclass(frozen=True)
class TRPO(TRPOSettings):
    """Trust region policy optimisation of a language model under a reference-KL budget."""

    needs_critic = True

    @property
    def limits(self) -> Limits:
        """Both distances."""
        return Limits(self.max_kl, self.max_ref_kl)

    def init_state(self, theta: ParameterVector) -> TRPOState:
        """Return the state before the first update."""
        return TRPOState(RunningNoise(), ReferenceFilter(), RadiusRatio(), Slope(), theta.zeros())

    def rewards(self, batch: Batch, state: TRPOState) -> Tensor:
        """Return the rewards to maximise, (N, T): those of the MDP; the KL is a constraint."""
        return batch.rollout.rewards

    def advantages(
        self, rollout: Rollout, rewards: Tensor, values: Tensor, reduce: Reduce
    ) -> Tensor:
        """Return A_t of every action, (N, T), by generalised advantage estimation, whitened."""
        mask = rollout.action_mask
        A = gae(rewards, values, mask, gamma=self.gamma, lam=self.lam or 0.0)
        return whiten(A, mask & rollout.scores.valid[:, None], reduce)

    def update(self, objective: BatchObjective, state: TRPOState) -> tuple[TRPOState, Metrics]:
        """Make one update; return the successor of the state, and metrics.

        Args:
            objective: Of a batch, policy at theta_old; it is moved if the line search accepts.
            state: From `init_state` or the update before.
        """
        N, limit = objective.N, self.max_ref_kl or math.inf
        R, error = objective.reference_kl()
        reference, budget = budget_on_batch(state.reference, k=R, error=error, budget=limit)
        near = in_reach(R, self.max_kl, budget)
        spent = R > 0 and limit < math.inf
        halves_g, halves_b = objective.gradients(reference=near or spent)
        slope, price = state.slope, 0.0
        if halves_b is not None:
            d = objective.policy.from_reference().double()
            gain, rise = (float(halves.sum(0).double() @ d) for halves in (halves_g, halves_b))
            slope, price = budget_price(state.slope, gain=gain, rise=rise, k=R, budget=limit)
            halves_g = halves_g - price * halves_b
        state = replace(state, reference=reference, slope=slope)
        g = halves_g.sum(0) / N  # grad (L - price R)
        b = halves_b.sum(0) / N if near and halves_b is not None else None  # grad R
        F = objective.fisher(self.fisher_completions)  # Hessian of D
        state, limits = self.step_limits(state, halves_g, R, budget, price, N)  # damping, radius
        step = constrained_update(objective.theta, g, b, F, objective.measure, limits, self)
        row = metrics(step, limits, noise(halves_g, N))
        row |= {"cg/product": F.name, "cg/completions": F.count}
        return learned(state, step, R, self.max_kl), row

    def step_limits(
        self, state: TRPOState, halves_g: Tensor, R: float, budget: float, price: float, N: float
    ) -> tuple[TRPOState, StepLimits]:
        """Return how far a step may go and how it is damped, and the state with this batch.

        Args:
            state: From `init_state` or the update before.
            halves_g: Sums of grad (L - price R) over two halves of the batch, (2, M).
            R: R(theta_old) on the batch, nats per completion.
            budget: On the scale of R, nats; inf without one.
            price: Of R, L per nat.
            N: Completions of the batch.
        """
        square, metric = running_rms(state.square, halves_g.sum(0) / N)
        seen, damping = state.noise, self.damping
        if damping is None:
            seen, damping = wiener_damping(seen, noise(halves_g * metric.rsqrt(), N), N)
        radius = radius_inside(state.radius, self.max_kl)
        state = replace(state, noise=seen, square=square)
        return state, StepLimits(radius, R, budget, damping, metric, price)


def learned(state: TRPOState, update: Update, R: float, max_kl: float) -> TRPOState:
    """Return the state after an update, whose predictions it is held against.

    Args:
        state: With what the batch added to it.
        update: What was done.
        R: R(theta_old) on the batch, nats per completion.
        max_kl: Trust region, nats per completion.
    """
    step, search = update.step, update.search
    if not search.accepted:
        rejected = step.kl * search.shortest**2
        return replace(
            state,
            reference=replace(state.reference, fitted=0.0),
            radius=shrink_radius(state.radius, max_kl=max_kl, rejected=rejected),
        )
    budgeted = update.w is not None
    change = step.ref_change_at(search.scale) if budgeted else search.trial.ref_kl - R
    predicted = step.kl * search.scale**2
    return replace(
        state,
        reference=state.reference.after(change, fitted=step.case != "old"),
        radius=learn_radius(state.radius, kl=search.trial.kl, predicted=predicted),
    )


def metrics(update: Update, limits: StepLimits, signal: Noise) -> Metrics:
    """Return what an update did under the names of `report.glossary.METRICS`."""
    step, search, trial = update.step, update.search, update.search.trial
    accepted, solves = search.accepted, [s for s in (update.v, update.w) if s is not None]
    return {
        "trust_region/kl": trial.kl if accepted else 0.0,
        "trust_region/kl_max": trial.kl_max if accepted else 0.0,
        "trust_region/predicted_kl": step.kl * search.scale**2,
        "trust_region/predicted_gain": step.gain * search.scale,
        "trust_region/actual_gain": trial.gain if accepted else 0.0,
        "trust_region/ref_kl_after": trial.ref_kl if accepted else limits.ref_kl,
        "trust_region/case": step.case,
        "trust_region/alignment": step.alignment,
        "trust_region/radius": limits.radius,
        "trust_region/price": limits.price,
        "cg/iterations": sum(s.iterations for s in solves),
        "cg/residual": update.v.residual,
        "cg/status": update.v.status,
        "cg/ref_status": None if update.w is None else update.w.status,
        "cg/damping": limits.damping,
        "line_search/trials": search.trials,
        "line_search/accepted": accepted,
        "line_search/reason": update.reason,
        "signal/noise_scale": signal.scale,
        "signal/half_batch_cosine": signal.cosine,
    }
