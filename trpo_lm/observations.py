"""What one batch says, in numbers that are the same on every rank.

Means are sums over all completions (or tokens) of all ranks, divided once; a mean of no values is
None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trpo_lm.errors import RunFault
from trpo_lm.mdp import Batch, Rollout
from trpo_lm.objective import measure_at
from trpo_lm.policy import Policy
from trpo_lm.ranks import Ranks

NOISY_BATCHES, NOISY_UPDATES = 10, 5  # a noise scale worth a word, and over how many updates
EQUAL = 1e-12  # rewards that differ by less than this share of their size differ by rounding


def objective(batch: Batch, ranks: Ranks) -> tuple[dict[str, Any], int, int]:
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


def critic_error(batch: Batch, targets: Tensor, ranks: Ranks) -> dict[str, float | None]:
    """Return how well values explain returns (N, T) that the critic has not seen yet."""
    mask = batch.rollout.action_mask & batch.rollout.scores.valid[:, None]
    bias, error = ranks.mean((targets - batch.values)[mask])
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
    """Assert ratio == 1 and D == 0 at theta_old: no dropout, no other source of noise.

    Raises:
        RunFault: If two passes of the same policy differ.
    """
    at_old = measure_at(policy, batch, ranks.reduce, 1.0)
    if not (abs(at_old.gain) <= 1e-3 and at_old.kl <= 1e-5):
        raise RunFault(
            f"two passes of the same policy differ: KL {at_old.kl:.2g}",
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
