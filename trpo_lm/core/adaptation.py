"""Damping, budget margin, price of R and radius, adapted to what updates measure.

Each quantity that is tracked over updates is a frozen dataclass, empty at first; a function takes
it with what an update has measured and returns its successor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

LEAST_DAMPING, MOST_DAMPING = 0.03, 10.0  # Fisher products are sampled too; pure gradient
MEMORY = 0.9  # weight of earlier updates in the running means of signal and noise
RMS_MEMORY, LEAST_METRIC = 0.95, 1e-3  # of the running square; floor, as a share of the mean
REACH = 1.5  # R is not quadratic: its farthest value is taken this much larger
FIRST_DRIFT = 0.05  # of the budget: a first guess at what the predictions of R will miss
KL_MARGIN = 1.05  # the trust region aims this much inside max_kl: a second trial costs a forward


@dataclass(frozen=True)
class Noise:
    """Signal and noise of a sampled gradient.

    Attributes:
        signal: Squared length of the mean gradient, estimated without bias.
        variance: Variance of one completion's gradient.
        cosine: Of the gradients of two halves of the batch.
    """

    signal: float
    variance: float
    cosine: float

    @property
    def scale(self) -> float:
        """Completions at which signal equals noise; inf where the halves disagree altogether."""
        return self.variance / self.signal if self.signal > 0 else math.inf


def noise(sums: Tensor, N: float) -> Noise:
    """Compare the gradients of two halves of a batch.

    The product of two independent halves estimates the squared signal without bias.

    Args:
        sums: Sums of gradients over the completions of each half, (2, M).
        N: Completions of both.

    Source: McCandlish et al. (2018), arXiv:1812.06162, App. A.
    """
    first, second = sums.double() / (N / 2)
    lengths = float(first.norm() * second.norm())
    signal = float(first @ second)
    return Noise(
        signal=signal,
        variance=float((first - second).square().sum()) * N / 4,
        cosine=signal / lengths if lengths > 0 else math.nan,
    )


def running_rms(square: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the running mean square of g and its root, normalised: (M,) each, the root positive.

    The root is the metric of the damping. LoRA's two factors differ in scale and change it as they
    grow; plain damping measures both with one ruler, and the damped step is then dominated by
    whichever is larger. Noise dominates g, so this is about the root of the Fisher's diagonal.

    Args:
        square: Running mean square of earlier gradients, (M,); zeros at first.
        g: This update's gradient, (M,).

    Source: the second moment of Adam, Kingma and Ba (2015), arXiv:1412.6980, as a metric.
    """
    square = RMS_MEMORY * square + (1 - RMS_MEMORY) * g.square()
    rms = square.sqrt()
    mean = rms.mean()
    return square, (rms / mean).clamp(min=LEAST_METRIC) if mean > 0 else rms + 1.0


@dataclass(frozen=True)
class RunningNoise:
    """Exponentially weighted sums of `Noise.signal` and `Noise.variance`."""

    signal: float = 0.0
    variance: float = 0.0


def wiener_damping(past: RunningNoise, seen: Noise, N: float) -> tuple[RunningNoise, float]:
    """Return the relative damping of a solve whose right-hand side is a noisy sample.

    Wiener's filter: let the natural gradient be isotropic with variance tau^2 a component and the
    sampled gradient be F theta* plus noise of covariance sigma^2 F / N. The best linear estimate of
    theta* is (F + lambda I)^-1 g with lambda = sigma^2 / (N tau^2), which is (noise scale / N)
    times tr F^2 / tr F, the Rayleigh quotient along a noisy gradient. So the relative damping is
    the noise scale in batches; both of its parts are running means.

    Args:
        past: Running sums of earlier updates.
        seen: Of this batch's gradient.
        N: Completions in the batch.
    """
    sums = RunningNoise(
        MEMORY * past.signal + seen.signal, MEMORY * past.variance + seen.variance
    )  # fmt: skip
    batches = sums.variance / (N * sums.signal) if sums.signal > 0 else math.inf
    return sums, min(max(batches, LEAST_DAMPING), MOST_DAMPING)


@dataclass(frozen=True)
class ReferenceFilter:
    """What an alpha-beta filter knows of R, nats per completion; None before the first rollout.

    Attributes:
        estimate: R at the latest rollout, filtered.
        drift: What predictions of R have lately missed, after steps whose direction depended on R.
        expected: R on the next rollout.
        fitted: 1.0 if the latest step's direction depended on R, else 0.0.
    """

    estimate: float | None = None
    drift: float | None = None
    expected: float | None = None
    fitted: float = 0.0

    def after(self, change: float, *, fitted: bool) -> ReferenceFilter:
        """Return the filter after a step with a predicted change of R, nats."""
        return replace(self, expected=(self.expected or 0.0) + change, fitted=float(fitted))


def budget_on_batch(
    past: ReferenceFilter, *, k: float, error: float, budget: float
) -> tuple[ReferenceFilter, float]:
    """Return the budget on the scale of this batch's R.

    A fresh rollout measures R with a sampling error of several per cent, and a step that trades R
    for score is flattered by its own batch: x was fitted to the very completions on which R after x
    is predicted, so the next rollout shows more. Both are tracked (an alpha-beta filter): the
    estimate follows the predicted changes and every fresh rollout, the drift is what predictions of
    such steps have lately missed. The step aims at the budget minus the drift, minus the estimate's
    standard error, and minus any underestimate of R by this batch; overestimates earn no credit.

    Args:
        past: The filter after the latest step.
        k: R on the fresh rollout, nats per completion.
        error: Its standard error, by sampling; the estimate averages about two of them.
        budget: K, nats per completion; inf without one.
    """
    first_drift = FIRST_DRIFT * budget if math.isfinite(budget) else 0.0
    drift = first_drift if past.drift is None else past.drift
    expected = k if past.expected is None else past.expected
    surprise = k - expected - past.fitted * drift
    estimate, drift = k - 0.5 * surprise, drift + 0.3 * past.fitted * surprise
    filtered = ReferenceFilter(estimate, drift, expected=estimate, fitted=past.fitted)
    return filtered, budget - max(drift, 0.0) - max(estimate - k, 0.0) - error / math.sqrt(2)


@dataclass(frozen=True)
class Slope:
    """Exponentially weighted sum of dL / d sqrt(R) along the ray from the reference, and weight."""

    total: float = 0.0
    weight: float = 0.0


def budget_price(
    past: Slope, *, gain: float, rise: float, k: float, budget: float
) -> tuple[Slope, float]:
    """Return the price of R: the multiplier that its budget will have when it binds, L per nat.

    Steps follow noise too, and nothing takes that back before the budget binds, although the nats
    are spent for good. So the budget's multiplier is charged from the start. Along the ray from the
    reference through the policy R grows as the square of the distance and L about linearly, so that
    L = a sqrt(R), and the last nat of a budget K buys a / (2 sqrt K). The slope a = dL / d sqrt(R)
    takes two inner products; what earlier batches moved is independent of this batch's noise.

    Args:
        past: Of earlier updates.
        gain: grad L . d, with d = theta_old - theta_ref.
        rise: grad R . d, nats.
        k: R at theta_old, nats.
        budget: K, nats; inf without one.
    """
    if k > 0 and rise > 0:
        a = 2 * math.sqrt(k) * gain / rise
        past = Slope(MEMORY * past.total + a, MEMORY * past.weight + 1.0)
    slope = past.total / past.weight if past.weight else 0.0
    return past, max(slope, 0.0) / (2 * math.sqrt(budget))


def in_reach(k: float, max_kl: float, budget: float) -> bool:
    """Return whether a step of `max_kl` could lead beyond the budget at all.

    In the Fisher metric the reference lies at the distance sqrt(2 k), and a step is at most
    sqrt(2 max_kl) long: by the triangle inequality R after it is at most (sqrt k + sqrt max_kl)^2.
    Below the budget, the budget's ball holds the whole trust region, and grad R decides nothing.

    Args:
        k: R at theta_old, nats.
        max_kl: Trust region, nats.
        budget: Of R, nats; inf without one.
    """
    return REACH * (math.sqrt(max(k, 0.0)) + math.sqrt(max_kl)) ** 2 > budget


@dataclass(frozen=True)
class RadiusRatio:
    """Exact KL over its prediction from sampled Fisher products, with a margin."""

    kl_ratio: float = KL_MARGIN


def radius_inside(past: RadiusRatio, max_kl: float) -> float:
    """Return the radius whose step is expected to have an exact KL just inside `max_kl`."""
    return max_kl / max(1.0, past.kl_ratio)


def learn_radius(past: RadiusRatio, *, kl: float, predicted: float) -> RadiusRatio:
    """Return the ratio after a step of exact `kl` where `predicted` was expected, nats."""
    if not predicted > 0:
        return past
    return RadiusRatio(past.kl_ratio + 0.5 * (KL_MARGIN * kl / predicted - past.kl_ratio))


def shrink_radius(past: RadiusRatio, *, max_kl: float, rejected: float) -> RadiusRatio:
    """Return the ratio after a search without an accepted step: the next one starts below it.

    Args:
        past: The ratio so far.
        max_kl: Trust region, nats.
        rejected: Predicted KL of the shortest step that was tried, nats.
    """
    if not rejected > 0:
        return past
    return RadiusRatio(max(past.kl_ratio, KL_MARGIN * max_kl / rejected))
