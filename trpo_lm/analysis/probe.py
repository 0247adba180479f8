"""Held-out measurements of a policy: score, KL, forgetting, collapse, and a judge's score.

Forgetting is the loss on the reference's text, collapse a lack of variety; the judge is a reward
model on which nothing was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from trpo_lm.lm.policy import Policy
from trpo_lm.lm.rollout import Batch, Rollout

Judge = Callable[..., list[float]]


def probe(
    policy: Policy,
    rollout: Rollout,
    text: Rollout,
    *,
    judge: Judge | None = None,
) -> dict[str, float | None]:
    """Measure a policy on its own held-out completions and on the reference's.

    Args:
        policy: At the parameters to measure.
        rollout: Sampled from it, the same number of completions for each prompt.
        text: Sampled from the reference; forgetting is measured on it.
        judge: Scores prompts and completions.

    Returns:
        Score and judge's score (units of each), exact KL to the reference (nats per completion),
        entropy, `nll` and `nll_reference` on `text` (nats per token); share of distinct pairs of
        neighbouring tokens and of repeated completions, over the first completion of each prompt.
    """
    batch = Batch.from_rollout(policy, rollout)
    baseline = Batch.from_rollout(policy, text)
    N, valid = len(rollout), rollout.scores.valid
    first = torch.cat([torch.tensor([True]), rollout.groups[1:] != rollout.groups[:-1]])
    ids = [row for row, keep in zip(rollout.completion_ids, first, strict=True) if keep]
    texts = [row for row, keep in zip(rollout.completions, first, strict=True) if keep]
    pairs = [pair for row in ids for pair in pairwise(row)]
    verdicts = judge(rollout.prompts, rollout.completions) if judge is not None else None
    score = rollout.scores.score[valid]
    return {
        "score": float(score.mean()) if len(score) else None,
        "score_std": float(score.std(correction=0)) if len(score) else None,
        "ref_kl": float(batch.ref_kl.double().sum()) / N,
        "entropy": float(batch.entropy.double().mean()),
        "length": float(rollout.lengths.double().mean()),
        "eos_rate": float((~rollout.truncated).double().mean()),
        "nll": -float(baseline.old_logprobs.double().mean()),
        "nll_reference": -float(baseline.ref_logprobs.double().mean()),
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else None,
        "duplicates": 1 - len(set(texts)) / len(texts),
        "judge": sum(verdicts) / N if verdicts is not None else None,
    }
