"""What a run learns about its own noise, and steers by: one function for each.

Each takes what was kept from earlier updates as a dict and changes it in place; a checkpoint stores
it as it is.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

LEAST_DAMPING, MOST_DAMPING = 0.03, 10.0  # Fisher products are sampled too; pure gradient
MEMORY = 0.9  # weight of earlier updates in the running means of signal and noise
RMS_MEMORY, LEAST_METRIC = 0.95, 1e-3  # of the running square; floor, as a share of the mean
FIRST_DRIFT = 0.05  # of the budget: a first guess at what the predictions of R will miss
KL_MARGIN = 1.05  # the trust region aims this much inside max_kl: a second trial costs a forward


def running_rms(kept: dict[str, Any], g: Tensor) -> Tensor:
    """Return the root of the running mean square of each component of g, (M,), positive.

    The metric of the damping. LoRA's two factors differ in scale and change it as they grow; plain
    damping measures both with one ruler, and the damped step is then dominated by whichever is
    larger. Noise dominates g, so this is about the root of the Fisher's diagonal.

    Source: the second moment of Adam, Kingma and Ba (2015), arXiv:1412.6980, as a metric.
    """
    kept["square"] = RMS_MEMORY * kept["square"] + (1 - RMS_MEMORY) * g.square()
    rms = kept["square"].sqrt()
    mean = rms.mean()
    return (rms / mean).clamp(min=LEAST_METRIC) if mean > 0 else rms + 1.0


def wiener_damping(kept: dict[str, float], *, signal: float, variance: float, N: float) -> float:
    """Return the relative damping of a solve whose right-hand side is a noisy sample.

    Wiener's filter: let the natural gradient be isotropic with variance tau^2 a component and the
    sampled gradient be F theta* plus noise of covariance sigma^2 F / N. The best linear estimate of
    theta* is (F + lambda I)^-1 g with lambda = sigma^2 / (N tau^2), which is (noise scale / N)
    times tr F^2 / tr F, the Rayleigh quotient along a noisy gradient. So the relative damping is
    the noise scale in batches; both of its parts are running means.

    Args:
        kept: Running sums, changed in place; empty at first.
        signal: Squared length of the mean gradient, as this batch estimates it.
        variance: Variance of one completion's gradient.
        N: Completions in the batch.
    """
    kept["signal"] = MEMORY * kept.get("signal", 0.0) + signal
    kept["variance"] = MEMORY * kept.get("variance", 0.0) + variance
    batches = kept["variance"] / (N * kept["signal"]) if kept["signal"] > 0 else math.inf
    return min(max(batches, LEAST_DAMPING), MOST_DAMPING)


def budget_on_batch(kept: dict[str, float], *, k: float, error: float, budget: float) -> float:
    """Return the budget on the scale of this batch's R.

    A fresh rollout measures R with a sampling error of several per cent, and a step that trades R
    for score is flattered by its own batch: x was fitted to the very completions on which R after x
    is predicted, so the next rollout shows more. Both are tracked (an alpha-beta filter): the
    estimate follows the predicted changes and every fresh rollout, the drift is what predictions of
    such steps have lately missed. The step aims at the budget less the drift, less the estimate's
    standard error, and less what this batch shows too little of R; where it shows too much, nothing
    is given back.

    Args:
        kept: Estimate, drift and expectation, changed in place; empty at first. After a step the
            caller adds its predicted change to `kept["expected"]`, and sets `kept["fitted"]` to 1.0
            if the step's direction depended on R, else to 0.0.
        k: R on the fresh rollout, nats per completion.
        error: Its standard error, by sampling; the estimate averages about two of them.
        budget: K, nats per completion; inf without one.
    """
    drift = kept.get("drift", FIRST_DRIFT * budget if math.isfinite(budget) else 0.0)
    fitted = kept.get("fitted", 0.0)
    surprise = k - kept.get("expected", k) - fitted * drift
    estimate, drift = k - 0.5 * surprise, drift + 0.3 * fitted * surprise
    kept |= {"estimate": estimate, "drift": drift, "expected": estimate}
    return budget - max(drift, 0.0) - max(estimate - k, 0.0) - error / math.sqrt(2)


def radius_inside(kept: dict[str, float], max_kl: float) -> float:
    """Return the radius whose step is expected to have an exact KL just inside `max_kl`."""
    return max_kl / max(1.0, kept.setdefault("kl_ratio", KL_MARGIN))


def learn_radius(kept: dict[str, float], *, kl: float, predicted: float) -> None:
    """Learn by how much exact KLs exceed predictions from sampled Fisher products."""
    if predicted > 0:
        kept["kl_ratio"] += 0.5 * (KL_MARGIN * kl / predicted - kept["kl_ratio"])
