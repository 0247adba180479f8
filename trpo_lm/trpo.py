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

from trpo_lm.advantages import gae, whiten
from trpo_lm.config import TRPOSettings
from trpo_lm.conjugate_gradient import CGSolution, conjugate_gradient
from trpo_lm.divergences import categorical_kl, token_logprobs
from trpo_lm.fisher import FisherOperator, hessian_operator, softmax_curvature, twice_differentiable
from trpo_lm.line_search import Search, backtrack
from trpo_lm.mdp import Batch
from trpo_lm.parameters import ParameterVector
from trpo_lm.policy import Policy
from trpo_lm.trust_region import Step, plane_step

LEAST_DAMPING, MOST_DAMPING = 0.03, 10.0  # Fisher products are sampled too; pure gradient
KL_MARGIN = 1.05  # the trust region aims this much inside max_kl: a second trial costs a forward
MEMORY = 0.9  # weight of earlier updates in the running means of signal and noise

Product = Callable[[Tensor], Tensor]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measurement:
    """Exact on the batch at some theta: gain of L, D, R, and the largest KL of a state."""

    gain: float
    kl: float
    ref_kl: float = math.nan
    kl_max: float = math.nan


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
    damping: tuple[float, float] = (0.0, 0.0),
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
        damping: Of the solves for v and for w, relative as `conjugate_gradient` takes it.
        ref_kl: k, R at theta_old as this batch measures it, nats.
        budget: K on the scale of this batch's R, nats.

    Returns:
        The solves, the step and the search; theta is at the accepted point.
    """
    solve = {"max_iterations": settings.cg_iterations, "rtol": settings.cg_tolerance}
    v = conjugate_gradient(F, g, damping=damping[0], **solve)
    w = conjugate_gradient(F, b, damping=damping[1], **solve) if b is not None else None
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
        at, objection, ratio=settings.backtrack_ratio, trials=settings.line_search_trials
    )
    if not search.accepted:
        theta.restore(theta_old)
    return Update(v, w, step, search)


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
        return Measurement(float(surrogate()) - float(before), float(kl()), R)

    return constrained_update(
        theta,
        g,
        None if k is None else theta.gradient(k),
        hessian_operator(theta, kl()),
        measure,
        settings,
        radius=settings.max_kl,
        damping=(settings.damping or 0.0,) * 2,
        ref_kl=math.nan if k is None else float(k),
        budget=math.inf if settings.max_ref_kl is None else settings.max_ref_kl,
    )


@dataclass(frozen=True)
class TRPO(TRPOSettings):
    """Trust region policy optimisation of a language model under a reference-KL budget."""

    needs_critic = True

    def with_lam(self, lam: float) -> TRPO:
        """Return these settings with the critic's lambda where none was chosen."""
        return self if self.lam is not None else replace(self, lam=lam)

    def init_state(self, policy: Policy) -> dict[str, Any]:
        """Return the state kept between updates: plain numbers."""
        return {"reference": {}, "noise": {}, "kl_ratio": KL_MARGIN}

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
        N = float(reduce(torch.tensor(float(len(batch.rollout)), dtype=torch.float64)))
        sums_g, sums_b = gradients(policy, batch, reduce, reference=self.max_ref_kl is not None)
        g, b = sums_g.sum(0) / N, None if sums_b is None else sums_b.sum(0) / N
        signal = {name: noise(sums, N) for name, sums in (("g", sums_g), ("b", sums_b))}
        damping = tuple(self._damping(state["noise"], name, signal[name], N) for name in signal)
        F = fisher(policy, batch, reduce, self.fisher_completions)
        k, budget = self._budget(state["reference"], batch, reduce, N)
        radius = self.max_kl / max(1.0, state["kl_ratio"])
        result = constrained_update(
            policy.parameters, g, b, F, lambda: measure_at(policy, batch, reduce, N), self,
            radius=radius, damping=damping, ref_kl=k, budget=budget,
        )  # fmt: skip
        trial, step, accepted = result.search.trial, result.step, result.search.accepted
        change = trial.ref_kl - k if accepted else 0.0
        state["reference"]["change"] = change
        if accepted and step.kl > 0:  # how far exact KL exceeds its prediction from sampled Fisher products
            ratio = trial.kl / (step.kl * result.search.scale**2)
            state["kl_ratio"] += 0.5 * (KL_MARGIN * ratio - state["kl_ratio"])
        return {
            "trust_region/kl": trial.kl if accepted else 0.0,
            "trust_region/kl_max": trial.kl_max if accepted else 0.0,
            "trust_region/predicted_kl": step.kl * result.search.scale**2,
            "trust_region/predicted_gain": step.gain * result.search.scale,
            "trust_region/actual_gain": trial.gain if accepted else 0.0,
            "trust_region/ref_kl_after": k + change,
            "trust_region/case": step.case,
            "trust_region/alignment": step.alignment,
            "trust_region/radius": radius,
            "cg/iterations": result.v.iterations + (result.w.iterations if result.w else 0),
            "cg/residual": result.v.residual,
            "cg/damping": damping[0],
            "line_search/trials": result.search.trials,
            "line_search/accepted": accepted,
            "line_search/reason": result.search.reasons[-1] if result.search.reasons else None,
            "signal/noise_scale": signal["g"].scale,
            "signal/half_batch_cosine": signal["g"].cosine,
        }

    def _damping(self, kept: dict[str, list[float]], name: str, new: Noise, N: float) -> float:
        """Return the relative damping of a solve whose right-hand side is as noisy as it is.

        Wiener's filter: let the natural gradient be isotropic with variance tau^2 a component and
        the sampled gradient be F theta* plus noise of covariance sigma^2 F / N. The best linear
        estimate of theta* is (F + lambda I)^-1 g with lambda = sigma^2 / (N tau^2), which is
        (noise scale / N) times tr F^2 / tr F, the Rayleigh quotient along a noisy gradient. So the
        relative damping is the noise scale in batches; both its parts are running means.
        """
        if self.damping is not None:
            return self.damping
        signal, variance = kept.get(name, (0.0, 0.0))
        kept[name] = [MEMORY * signal + new.signal, MEMORY * variance + new.variance]
        signal, variance = kept[name]
        batches = variance / (N * signal) if signal > 0 else math.inf
        return min(max(batches, LEAST_DAMPING), MOST_DAMPING)

    def _budget(
        self, kept: dict[str, float], batch: Batch, reduce: Reduce, N: float
    ) -> tuple[float, float]:
        """Return k = R(theta_old) on this batch, and the budget on the scale of this batch's R.

        A fresh rollout measures R with a sampling error of several per cent, and the run must stay
        inside its budget, not around it. So R is tracked: the estimate of the update before, plus
        the change its line search measured, corrected by the fresh measurement as their variances
        say (a scalar Kalman filter); the step aims at the budget less one standard error.
        """
        per_completion = batch.rollout.padded(batch.ref_kl).double().sum(-1)
        k = float(reduce(per_completion.sum())) / N
        error = float(reduce((per_completion - k).square().sum())) / max(N - 1, 1) / N
        estimate, variance = k, error
        if "estimate" in kept:
            change = kept["change"]
            expected, doubt = kept["estimate"] + change, kept["variance"] + (0.1 * change) ** 2
            trust = doubt / (doubt + error) if doubt + error > 0 else 1.0
            estimate, variance = expected + trust * (k - expected), (1 - trust) * doubt
        kept |= {"estimate": estimate, "variance": variance}
        if self.max_ref_kl is None:
            return k, math.inf
        return k, k + (self.max_ref_kl - math.sqrt(variance)) - estimate


def gradients(
    policy: Policy, batch: Batch, reduce: Reduce, *, reference: bool
) -> tuple[Tensor, Tensor | None]:
    """Return N grad L and N grad R as the sums over two halves of the batch, (2, M) each.

    grad R = E[ sum_t ( grad KL_t + grad log pi(a_t|s_t) sum_{t'>t} KL_t' ) ]: the second part is
    the drift through the prefixes that the policy visits.

    Source: Amini, Vieira and Cotterell (2025), arXiv:2504.10637 (Rao-Blackwellised KL gradient).
    """
    r, theta = batch.rollout, policy.parameters
    kl = r.padded(batch.ref_kl)
    after = (kl.flip(-1).cumsum(-1).flip(-1) - kl)[r.action_mask]  # sum over t' > t
    g = torch.zeros(2, len(theta), device=policy.device, dtype=theta.tensors[0].dtype)
    b = torch.zeros_like(g)
    for half in range(2):  # by prompt: completions of one prompt are not independent
        for rows, tokens in batch.micro_batches((r.groups % 2 == half).nonzero()[:, 0]):
            features = policy.features(*r.model_inputs(rows))
            actions, advantages = batch.actions[tokens], batch.advantages[tokens]
            old_logprobs, drift = batch.old_logprobs[tokens], after[tokens]
            ref_features = batch.ref_features[tokens]

            def sums(logprobs: Tensor, s: slice, a=actions, A=advantages, old=old_logprobs,
                     d=drift, ref=ref_features) -> list[Tensor]:  # fmt: skip
                logprob = token_logprobs(logprobs, a[s])
                surrogate = ((logprob - old[s]).exp() * A[s]).sum()
                if not reference:
                    return [surrogate]
                kl_t = categorical_kl(old=logprobs, new=policy.logprobs(ref[s]))
                return [surrogate, (kl_t + logprob * d[s]).sum()]

            for_g, *for_b = policy.cotangents(features, sums)
            g[half] += theta.gradient(features, cotangent=for_g, retain=bool(for_b))
            if for_b:
                b[half] += theta.gradient(features, cotangent=for_b[0])
    return reduce(g), reduce(b) if reference else None


@dataclass(frozen=True)
class Noise:
    """Signal and noise of a sampled gradient: |mean|^2, and the variance of one completion's."""

    signal: float
    variance: float
    cosine: float

    @property
    def scale(self) -> float:
        """Completions at which signal equals noise; inf where the halves disagree altogether."""
        return self.variance / self.signal if self.signal > 0 else math.inf


def noise(sums: Tensor | None, N: float) -> Noise:
    """Compare the gradients of two halves of a batch.

    The product of two independent halves estimates the squared signal without bias.

    Args:
        sums: Sums of gradients over the completions of each half, (2, M), or None.
        N: Completions of both.

    Source: McCandlish et al. (2018), arXiv:1812.06162, App. A.
    """
    if sums is None:
        return Noise(0.0, 0.0, math.nan)
    first, second = sums.double() / (N / 2)
    lengths = float(first.norm() * second.norm())
    signal = float(first @ second)
    return Noise(
        signal=signal,
        variance=float((first - second).square().sum()) * N / 4,
        cosine=signal / lengths if lengths > 0 else math.nan,
    )


def fisher(policy: Policy, batch: Batch, reduce: Reduce, completions: int) -> FisherOperator:
    """Return F over the tokens of whole completions, an even share of the batch."""
    r = batch.rollout
    everyone = float(reduce(torch.tensor(float(len(r)), dtype=torch.float64)))
    share = max(1, min(len(r), math.ceil(completions * len(r) / everyone)))
    rows = torch.linspace(0, len(r) - 1, share).round().long().unique()
    pieces = []
    with twice_differentiable():
        for part, _ in batch.micro_batches(rows):
            features = policy.features(*r.model_inputs(part), recompute=False)
            pieces.append((features, head_curvature(policy, features.detach())))
        count = float(reduce(torch.tensor(float(len(rows)), dtype=torch.float64)))
        return FisherOperator(policy.parameters, pieces, count=count, reduce=reduce)


def head_curvature(policy: Policy, features: Tensor) -> Product:
    """Return u -> W^T (diag p - p p^T) W u on features (n, D), W the tempered output layer."""
    slices = list(policy.chunks(len(features)))
    with torch.no_grad():
        cached = softmax_curvature(policy.logprobs(features)) if len(slices) <= 16 else None

    def product(u: Tensor) -> Tensor:
        if cached is not None:
            return policy.pull(cached(policy.push(u)))
        curvature = ((s, softmax_curvature(policy.logprobs(features[s]))) for s in slices)
        return torch.cat([policy.pull(H(policy.push(u[s]))) for s, H in curvature])

    return product


@torch.no_grad()
def measure_at(policy: Policy, batch: Batch, reduce: Reduce, N: float) -> Measurement:
    """Measure L - L_old, D, R and the largest KL of a state at the present theta, exactly.

    R re-weights each state by the ratio of its prefix, prod_{t'<t} ratio_t': without it R would
    count only the prefixes of the old policy, and the budget would leak through the drift.
    """
    r = batch.rollout
    logprobs = torch.zeros_like(batch.old_logprobs)
    kl, ref_kl = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    for rows, tokens in batch.micro_batches():
        features = policy.features(*r.model_inputs(rows))
        for s in policy.chunks(len(features)):
            at = tokens[s]
            new = policy.logprobs(features[s])
            logprobs[at] = token_logprobs(new, batch.actions[at])
            kl[at] = categorical_kl(old=policy.logprobs(batch.old_features[at]), new=new)
            ref_kl[at] = categorical_kl(old=new, new=policy.logprobs(batch.ref_features[at]))
    log_ratio = (logprobs - batch.old_logprobs).double()
    steps = r.padded(log_ratio)
    prefix = (steps.cumsum(-1) - steps)[r.action_mask].exp()
    gain = (torch.expm1(log_ratio) * batch.advantages).sum()
    sums = reduce(torch.stack([gain, kl.double().sum(), (prefix * ref_kl).sum()])) / N
    return Measurement(float(sums[0]), float(sums[1]), float(sums[2]), float(kl.max()))
