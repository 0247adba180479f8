"""Metrics of one batch, identical on every rank, and notes on the metrics of a run.

Means are sums over all completions (or tokens) of all ranks, divided once; a mean of no values is
None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trpo_lm.core.advantages import EQUAL
from trpo_lm.core.divergences import token_logprobs
from trpo_lm.errors import RunFault
from trpo_lm.lm.examination import shortest_number
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.rollout import Batch, Rollout
from trpo_lm.lm.sampling import WATCHED
from trpo_lm.report.glossary import CAUSES, METRICS
from trpo_lm.storage import Row
from trpo_lm.training.ranks import Ranks, SharedFault

DASHBOARD = {  # names that TRL's dashboards read, from ours; what we call otherwise
    "reward": "objective/score_mean",
    "reward_std": "objective/score_std",
    "kl": "objective/ref_kl_per_token",
    "completions/mean_length": "objective/completion_length",
    "frac_reward_zero_std": "objective/equal_scores",
}


def dashboard(row: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a row under TRL's names."""
    named = {theirs: row[ours] for theirs, ours in DASHBOARD.items() if ours in row}
    if "objective/eos_rate" in row:
        named["completions/clipped_ratio"] = 1.0 - row["objective/eos_rate"]
    return named


def metrics_row(values: Mapping[str, Any]) -> Row:
    """Return `values` with every name of METRICS present, null where it has no value."""
    return dict.fromkeys(METRICS) | dict(values)


@dataclass(frozen=True)
class Evaluation:
    """A policy on held-out prompts.

    Attributes:
        score, std: Mean and standard deviation over all ranks; nan if every reward abstained.
        ref_kl: Exact KL to the reference, nats per completion.
        rollout: This rank's completions.
    """

    score: float
    std: float
    ref_kl: float
    rollout: Rollout


# ---------------------------------------------------------------- one batch


def rollout_metrics(batch: Batch, ranks: Ranks) -> tuple[Row, int, int]:
    """Return the metrics of a rollout, and how many completions and tokens it has."""
    r = batch.rollout
    score, std = ranks.mean(r.scores.score[r.scores.valid])
    sums = (torch.tensor(len(r)), r.lengths, batch.ref_kl, batch.entropy, ~r.truncated)
    total = ranks.reduce(torch.stack([x.double().sum().cpu() for x in sums]))
    N, tokens, ref_kl, entropies, ended = total.tolist()
    columns = {
        f"rewards/{name}": none_if_nan(ranks.mean(_tensor(values))[0])
        for name, values in r.scores.columns.items()
    }
    metrics = {
        "objective/score_mean": none_if_nan(score),
        "objective/score_std": none_if_nan(std),
        "objective/ref_kl": ref_kl / N,
        "objective/ref_kl_per_token": ref_kl / tokens,
        **sampler_distance(batch, ranks),
        "objective/entropy": entropies / tokens,
        "objective/completion_length": tokens / N,
        "objective/eos_rate": ended / N,
        "objective/equal_scores": equal_scores(r, ranks),
        **columns,
        **logged(r.scores.logged, ranks),
    }
    return metrics, int(N), int(tokens)


def drawn_log_ratio(batch: Batch) -> Tensor:
    """Return log(old / sampler) of each action whose drawing was recorded, (k, T) float64."""
    r, drawn = batch.rollout, batch.rollout.drawn_logprobs
    drawn = batch.old_logprobs.new_zeros(0, r.action_mask.shape[1]) if drawn is None else drawn
    ratio = r.padded(batch.old_logprobs).cpu()[: len(drawn)].double() - drawn.cpu()
    return ratio.where(r.action_mask[: len(drawn)], 0.0)


def sampler_distance(batch: Batch, ranks: Ranks) -> Row:
    """Return how far what was drawn is from the old policy.

    With x = log(old / sampler) of a completion, E[e^x - 1 - x] over the sampler's completions is
    KL(sampler || old), without bias, and no sample of it is below zero.
    """
    ratio = drawn_log_ratio(batch)
    x, mask = ratio.sum(-1), batch.rollout.action_mask[: len(ratio)]
    sums = (torch.expm1(x) - x).sum(), ratio.abs().sum(), mask.sum(), torch.tensor(len(x))
    kl, gap, tokens, count = ranks.reduce(torch.stack([s.double() for s in sums])).tolist()
    return {
        "objective/sampler_kl": kl / count if count else None,
        "objective/sampler_gap": gap / tokens if tokens else None,
    }


SAMPLER_SHARE, NO_REGION = 0.25, 0.1  # of max_kl; where the update rule has none, nats
NEGLIGIBLE = 1e-6  # a sampler's KL that needs no weights, nats
LARGEST_WEIGHT = 2.0


def check_sampler(row: Row, max_kl: float | None) -> None:
    """Check that the servers sample from the old policy, to a share of the trust region.

    Args:
        row: From `sampler_distance`.
        max_kl: The trust region, nats per completion.

    Raises:
        SharedFault: If they do not; on every rank.
    """
    kl, most = row["objective/sampler_kl"], SAMPLER_SHARE * (max_kl or NO_REGION)
    if not kl <= most:
        raise SharedFault(
            f"what the servers sample is {kl:.2g} nats per completion from the policy, and more "
            f"than {most:.2g} ({SAMPLER_SHARE:.0%} of max_kl) is too much",
            where="rollout_servers",
            hint="a server has another adapter or base than this run, or rounds too coarsely for "
            f"its completions ({row['objective/sampler_gap']:.2g} nats a token): restart it with "
            "--dtype float32, or raise max_kl",
        )


def sampler_weights(batch: Batch, row: Row, ranks: Ranks) -> Tensor | None:
    """Return min(old / sampler, LARGEST_WEIGHT) of each completion, (N,); None if it is near 1.

    Args:
        batch: Every completion's drawing was recorded.
        row: From `sampler_distance`; gets the share of weights that were cut.
        ranks: Of the run.

    Source: truncated importance sampling, Ionides (2008), doi:10.1198/106186008X320456.
    """
    if row["objective/sampler_kl"] <= NEGLIGIBLE:
        return None
    weights = drawn_log_ratio(batch).sum(-1).exp()
    row["objective/sampler_truncated"] = ranks.mean((weights > LARGEST_WEIGHT).double())[0]
    return weights.clamp(max=LARGEST_WEIGHT)


def equal_scores(rollout: Rollout, ranks: Ranks) -> float | None:
    """Return the share of prompts whose completions all got one score: no contrast within them.

    None where no prompt has two scores.
    """
    rows = rollout.scores.valid
    groups, scores = rollout.groups[rows].tolist(), rollout.scores.score[rows].tolist()
    of_prompt: dict[int, list[float]] = {}
    for group, score in zip(groups, scores, strict=True):
        of_prompt.setdefault(group, []).append(score)
    spreads = [(max(s) - min(s), max(map(abs, s))) for s in of_prompt.values() if len(s) > 1]
    equal = sum(spread <= EQUAL * size for spread, size in spreads)
    total = ranks.reduce(torch.tensor([equal, len(spreads)], dtype=torch.float64))
    return float(total[0] / total[1]) if total[1] else None


def evaluation(batch: Batch, ranks: Ranks) -> Evaluation:
    """Return the evaluation of a rollout on held-out prompts."""
    r = batch.rollout
    score, std = ranks.mean(r.scores.score[r.scores.valid])
    ref_kl = ranks.reduce(batch.ref_kl.double().sum().cpu())
    N = ranks.reduce(torch.tensor(float(len(r)), dtype=torch.float64))
    return Evaluation(score, std, float(ref_kl / N), r)


COUNTS = ("rewards/skipped", "rewards/timed_out", "rewards/truncated")  # of completions


def logged(values: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Return the means over ranks of the values reward functions logged; skipped rows add up."""
    parts = ranks.gather([values])
    columns = {name: [x[name] for x in parts if name in x] for x in parts for name in x}
    return {
        name: sum(column) / (1 if name in COUNTS else len(column))
        for name, column in columns.items()
    }


def critic_error(
    rollout: Rollout, values: Tensor, targets: Tensor, ranks: Ranks
) -> dict[str, float | None]:
    """Return how well values explain returns, (N, T) both, that the critic was not fitted to."""
    mask = rollout.action_mask & rollout.scores.valid[:, None]
    bias, error = ranks.mean((targets - values)[mask])
    spread = ranks.mean(targets[mask])[1] ** 2
    return {
        "critic/loss": none_if_nan(error**2 + bias**2),
        "critic/explained_variance": 1 - error**2 / spread if spread > 0 else None,
    }


def no_signal(rollout: Rollout, ranks: Ranks) -> str | None:
    """Return why a batch has no gradient, or None."""
    totals = rollout.rewards.sum(-1)[rollout.scores.valid].tolist()
    by_token = rollout.scores.token_rewards is not None
    parts = ranks.gather([(len(rollout), totals, by_token)])
    scores = [score for _, row, _ in parts for score in row]
    if not scores:
        return f"no reward: all {sum(n for n, _, _ in parts)} completions abstained"
    low, high = min(scores), max(scores)
    if high - low <= EQUAL * max(abs(low), abs(high)) and not any(by for *_, by in parts):
        return "zero advantage: every completion got the same reward"
    return None


DRAWN = {8: 1e-5, 4: 1e-2, 2: 0.3, 1: 0.3}  # nats, by bytes of a number: two computations of one


def check_old_policy(
    policy: Policy, batch: Batch, ranks: Ranks, *, in_process: bool = True
) -> None:
    """Check that D == 0, and so ratio == 1, at theta_old, and that this policy was sampled from.

    Args:
        policy: At theta_old.
        batch: The first.
        ranks: Of the run.
        in_process: Whether it was drawn here; `check_sampler` judges what servers drew.

    Raises:
        RunFault: If two passes of the same policy differ (dropout, other noise), or if, in the
            first completions, the log-probabilities of the actions when they were drawn, or in a
            pass over whole rows, are not those measured.
    """
    objective = BatchObjective(policy, batch, None, ranks.reduce)
    kl = objective.measure().kl * objective.N  # of all completions together
    if not kl <= 1e-5:
        raise RunFault(
            f"two passes of the same policy differ: KL {kl:.2g}",
            where="first update",
            hint="something in the model is random or changes between passes (dropout, noise)",
        )
    r, drawn = batch.rollout, batch.rollout.drawn_logprobs
    if drawn is None:
        return
    drawn = drawn[:WATCHED]
    first = r.action_mask[: len(drawn)]
    measured = r.padded(batch.old_logprobs).cpu()[: len(drawn)][first]
    others = {"in a pass over whole rows": _row_by_row(policy, r, len(drawn))}
    if in_process:
        others = {"when they were drawn": drawn[first], **others}
    for when, found in others.items():
        apart, _ = ranks.mean((measured - found).double().abs())
        if not apart <= DRAWN[shortest_number(policy.base)]:
            raise RunFault(
                f"the log-probabilities of actions {when} are {apart:.2g} nats from those "
                "measured, a token",
                where="first update",
                hint=f"{type(policy.base).__name__} computes another distribution with a key-value "
                "cache (the attention mask, positions, a window); choose a model of another family",
            )


@torch.no_grad()
def _row_by_row(policy: Policy, rollout: Rollout, count: int) -> Tensor:
    """Return log pi(a_t|s_t) of the first completions, each in a pass of its own, (S',)."""
    found = []
    for rows in policy.in_step(torch.arange(count).split(1)):
        features = policy.features(*rollout.model_inputs(rows))
        actions = rollout.actions[rollout.token_index(rows)].to(policy.device)
        for s in policy.chunks(len(actions)):
            found.append(token_logprobs(policy.logprobs(features[s]), actions[s]).cpu())
    return torch.cat(found)


def times(seconds: Mapping[str, float], *, scoring: float) -> dict[str, float]:
    """Return the times of an update.

    Args:
        seconds: Duration of each of its stages.
        scoring: Seconds that the stage "rollout" spent on rewards.
    """
    parts = {
        "time/rollout": seconds["rollout"] - scoring,
        "time/score": seconds["score"] + scoring,
        "time/update": seconds["measure"] + seconds["update"],
        "time/value": seconds["values"] + seconds["critic"],
    }
    return {**parts, "time/total": sum(parts.values())}


def none_if_nan(value: float) -> float | None:
    """Return None for the mean of no values."""
    return None if value != value else value


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([v for v in values if v is not None], dtype=torch.float64)


# ---------------------------------------------------------------- notes: pure functions of all rows

NOISY_BATCHES, NOISY_UPDATES = 10, 5  # a noise scale worth a note, and over how many updates
STALLED_UPDATES = 3
BOUND_BY_BUDGET = ("ref", "both", "recover")


def notes(rows: Sequence[Row], size: int) -> list[str]:
    """Return the notes due after the newest of all updates, of `size` completions each."""
    due = budget_note(rows), noise_note(rows, size), stalled_note(rows)
    return [note for note in due if note is not None]


def budget_note(rows: Sequence[Row]) -> str | None:
    """Return a note when the budget bounds a step for the first time."""
    bound = [row for row in rows if row.get("trust_region/case") in BOUND_BY_BUDGET]
    if len(bound) != 1 or bound[0] is not rows[-1]:
        return None
    return "reference KL budget reached: it shortens steps from here on"


def noise_note(rows: Sequence[Row], size: int) -> str | None:
    """Return advice when the gradient has become mostly noise; once in a run.

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
    much = "too large to measure" if math.isinf(scale) else f"{scale:,.0f} completions"
    return (
        f"the gradient is mostly noise (noise scale {much}, an update has {size}): raise "
        "prompts_per_update, or use a reward that scores prefixes (critic=prefix)"
    )


def stalled_note(rows: Sequence[Row]) -> str | None:
    """Return the likely causes when the policy has stopped moving; once a stall."""
    still = [*takewhile(_rejected, reversed(rows))]
    if len(still) != STALLED_UPDATES:
        return None
    facts = {
        "gradient's solve": still[0].get("cg/status"),
        "reference KL's solve": still[0].get("cg/ref_status"),
        "line search": still[0].get("line_search/reason"),
    }
    given = {name: str(fact) for name, fact in facts.items() if fact is not None}
    causes = [CAUSES[key] for fact in given.values() for key in CAUSES if fact.startswith(key)]
    reported = ", ".join(f"{name}: {fact}" for name, fact in given.items())
    head = f"the policy has not moved for {len(still)} updates ({reported})"
    return "; ".join(dict.fromkeys([head, *causes]))


def _rejected(row: Row) -> bool:
    return row.get("line_search/accepted") is False and not row.get("skipped")
