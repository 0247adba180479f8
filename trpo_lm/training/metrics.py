"""What one batch says, in numbers that are the same on every rank.

Means are sums over all completions (or tokens) of all ranks, divided once; a mean of no values is
None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trpo_lm.core.advantages import EQUAL
from trpo_lm.errors import RunFault
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.rollout import Batch, Rollout
from trpo_lm.training.ranks import Ranks

# "per completion" = summed over a completion's tokens, averaged over completions.
METRICS: dict[str, str] = {
    "update": "number of this update, from 1",
    "completions": "completions sampled so far in the run, all processes",
    "tokens": "completion tokens sampled so far in the run, all processes",
    "skipped": "why the policy was left alone in this update; null when it was not",
    "objective/score_mean": "mean score of this update's completions, units of the reward",
    "objective/score_std": "standard deviation of those scores, units of the reward",
    "objective/ref_kl": "KL(old || ref) of this update's rollouts, nats per completion",
    "objective/ref_kl_per_token": "the same, nats per token",
    "objective/entropy": "entropy of the policy that sampled, nats per token",
    "objective/completion_length": "mean length of a completion, tokens",
    "objective/eos_rate": "share of completions that end before the length limit",
    "objective/eval_score_mean": "mean score on held-out prompts after the update, reward's units",
    "objective/eval_ref_kl": "KL(policy || ref) on held-out prompts, nats per completion",
    "trust_region/kl": "exact KL(old || new) after the step, nats per completion",
    "trust_region/kl_per_token": "the same, nats per token",
    "trust_region/kl_max": "largest KL(old || new) of a single state, nats",
    "trust_region/predicted_kl": "KL of the step by the quadratic model, nats per completion",
    "trust_region/predicted_gain": "surrogate gain of the step by the linear model, per completion",
    "trust_region/actual_gain": "surrogate gain measured after the step, per completion",
    "trust_region/ref_kl_after": "KL(new || ref) estimated on the batch, nats per completion",
    "trust_region/case": "which constraint bound the step: old, ref, both or recover",
    "trust_region/alignment": "cosine of v and w in the Fisher metric, -1 to 1",
    "trust_region/radius": "KL the step was allowed, at most max_kl, nats per completion",
    "cg/iterations": "conjugate-gradient iterations of both solves",
    "cg/residual": "relative residual of the gradient's solve, dimensionless",
    "cg/status": "how the gradient's solve ended: converged, max_iterations, indefinite, nonfinite",
    "cg/ref_status": "how the solve for the reference KL ended; null without a budget",
    "cg/damping": "damping of both solves, as a share of the curvature along their right-hand side",
    "line_search/trials": "step lengths tried",
    "line_search/accepted": "whether a step was taken",
    "line_search/reason": "why the last rejected trial was rejected, or why there was none",
    "critic/explained_variance": "share of the returns' variance the critic explains, at most 1",
    "critic/loss": "mean squared error of the critic, squared units of the reward",
    "signal/half_batch_cosine": "cosine of the gradients of two halves of the batch, -1 to 1",
    "signal/noise_scale": "completions at which the gradient's signal equals its noise",
    "ppo/beta": "price of the reference KL after the update, units of the reward per nat",
    "policy/checksum": "checksum of the trainable parameters after the update",
    "time/rollout": "seconds spent on sampling",
    "time/score": "seconds spent on rewards",
    "time/update": "seconds spent on the policy's update",
    "time/value": "seconds spent on the critic",
    "time/total": "seconds of the whole update",
}


def metrics_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with every name of METRICS present, null where it has no value."""
    return dict.fromkeys(METRICS) | dict(values)


NOISY_BATCHES, NOISY_UPDATES = 10, 5  # a noise scale worth a word, and over how many updates


def rollout_metrics(batch: Batch, ranks: Ranks) -> tuple[dict[str, Any], int, int]:
    """Return what was sampled, as metrics, and how many completions and tokens it was."""
    r = batch.rollout
    score, std = ranks.mean(r.scores.score[r.scores.valid])
    sums = (torch.tensor(len(r)), r.lengths, batch.ref_kl, batch.entropy, ~r.truncated)
    total = ranks.reduce(torch.stack([x.double().sum().cpu() for x in sums]))
    N, tokens, ref_kl, entropies, ended = total.tolist()
    columns = {
        f"rewards/{name}": known(ranks.mean(_tensor(values))[0])
        for name, values in r.scores.columns.items()
    }
    metrics = {
        "objective/score_mean": known(score),
        "objective/score_std": known(std),
        "objective/ref_kl": ref_kl / N,
        "objective/ref_kl_per_token": ref_kl / tokens,
        "objective/entropy": entropies / tokens,
        "objective/completion_length": tokens / N,
        "objective/eos_rate": ended / N,
        **columns,
        **logged(r.scores.logged, ranks),
    }
    return metrics, int(N), int(tokens)


def logged(values: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Return the mean over ranks of what reward functions logged; skipped rows are counted."""
    told = ranks.gather([values])
    found = {name: [x[name] for x in told if name in x] for x in told for name in x}
    return {
        name: sum(said) / (1 if name == "rewards/skipped" else len(said))
        for name, said in found.items()
    }


def critic_error(
    rollout: Rollout, values: Tensor, targets: Tensor, ranks: Ranks
) -> dict[str, float | None]:
    """Return how well values explain returns, (N, T) both, that the critic has not seen yet."""
    mask = rollout.action_mask & rollout.scores.valid[:, None]
    bias, error = ranks.mean((targets - values)[mask])
    spread = ranks.mean(targets[mask])[1] ** 2
    return {
        "critic/loss": known(error**2 + bias**2),
        "critic/explained_variance": 1 - error**2 / spread if spread > 0 else None,
    }


def no_signal(rollout: Rollout, ranks: Ranks) -> str | None:
    """Say why a batch cannot teach anything, or None."""
    totals = rollout.rewards.sum(-1)[rollout.scores.valid].tolist()
    by_token = rollout.scores.token_rewards is not None
    told = ranks.gather([(len(rollout), totals, by_token)])
    scores = [score for _, row, _ in told for score in row]
    if not scores:
        return f"no reward: all {sum(n for n, _, _ in told)} completions abstained"
    low, high = min(scores), max(scores)
    if high - low <= EQUAL * max(abs(low), abs(high)) and not any(by for *_, by in told):
        return "zero advantage: every completion got the same reward"
    return None


def check_old_policy(policy: Policy, batch: Batch, ranks: Ranks) -> None:
    """Assert D == 0 at theta_old, and with it ratio == 1: no dropout, no other source of noise.

    Raises:
        RunFault: If two passes of the same policy differ.
    """
    nothing = torch.zeros(batch.rollout.action_mask.shape)
    objective = BatchObjective(policy, batch, nothing, ranks.reduce)
    kl = objective.measure().kl * objective.N  # over all completions
    if not kl <= 1e-5:
        raise RunFault(
            f"two passes of the same policy differ: KL {kl:.2g}",
            where="first update",
            hint="something in the model is random or changes between passes (dropout, noise)",
        )


def known(value: float) -> float | None:
    """Return None for the mean of no values."""
    return None if value != value else value


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([v for v in values if v is not None], dtype=torch.float64)


def noise_note(rows: Sequence[dict[str, Any]], size: int) -> str | None:
    """Return what to change when the gradient has become mostly noise; said once in a run.

    Args:
        rows: Metrics of all updates so far, the newest last.
        size: Completions of an update.
    """
    measured = [r for r in rows if r.get("signal/half_batch_cosine") is not None]
    if not rows or not measured or measured[-1] is not rows[-1]:
        return None
    scales = [r["signal/noise_scale"] for r in measured]
    scales = [math.inf if scale is None else scale for scale in scales]
    over = [
        median(scales[i - NOISY_UPDATES : i]) > NOISY_BATCHES * size
        for i in range(NOISY_UPDATES, len(scales) + 1)
    ]
    if not over or not over[-1] or any(over[:-1]):
        return None
    scale = median(scales[-NOISY_UPDATES:])
    told = "more completions than can be told" if math.isinf(scale) else f"{scale:,.0f} completions"
    return (
        f"the gradient is mostly noise (noise scale {told}, an update has {size}): raise "
        "prompts_per_update, or use a reward that scores prefixes (critic=prefix)"
    )
