"""The best score attainable at each KL.

Of all policies at a given KL from the reference, the one with the highest score is the tilted
reference

    pi_beta(y|x) = pi_ref(y|x) exp(score(x, y) / beta) / Z(x)

for some beta. Its score and KL are estimated without training, from n samples of the reference for
each prompt, weighted in proportion to exp(score / beta). Reweighting cannot reach beyond log n
nats, so the curve ends at KL = log(n) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trpo_lm.lm.mdp import TokenMDP
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompt

PROMPTS_AT_ONCE = 16  # each with n samples; `progress` is called after every so many


def tilted(scores: Tensor, beta: float) -> tuple[float, float]:
    """Return KL to the reference and score of the tilted reference, means over prompts.

    w_i = exp(s_i / beta) / sum_j exp(s_j / beta),  score = sum w s,  KL = sum w log(n w)

    Example: scores [[0, 1]] and beta -> 0 give all weight to one of two samples: (log 2, 1).

    Args:
        scores: n samples of the reference for each of P prompts, (P, n); nan if missing.
        beta: Temperature of the tilt, units of the score, > 0.
    """
    present = ~scores.isnan()
    s = scores.double().nan_to_num()
    log_w = (s / beta).masked_fill(~present, -math.inf).log_softmax(-1)
    w = log_w.exp()
    n = present.sum(-1, keepdim=True).double()
    kl = (w * (log_w.masked_fill(~present, 0.0) + n.log())).sum(-1)
    return float(kl.mean()), float((w * s).sum(-1).mean())


def limit_curve(scores: Tensor, *, points: int = 60) -> list[dict[str, float | None]]:
    """Return the limit as rows of `beta`, `ref_kl` (nats per completion) and `score`, by KL.

    The first row is the reference itself (beta None, i.e. infinite).

    Args:
        scores: (P, n), as in `tilted`; prompts with fewer than two samples are ignored.
        points: Values of beta, a geometric grid around the spread within a prompt.
    """
    scores = scores.double()[(~scores.isnan()).sum(-1) > 1]
    centred = scores - scores.nanmean(-1, keepdim=True)
    spread = float(centred.square().nanmean().sqrt())
    curve: list[dict[str, float | None]] = [
        {"beta": None, "ref_kl": 0.0, "score": float(scores.nanmean(-1).mean())}
    ]
    if not spread > 0:
        return curve
    trusted = math.log(float((~scores.isnan()).sum(-1).double().mean())) / 2
    for exponent in torch.linspace(3, -4, points).tolist():
        kl, score = tilted(scores, beta := spread * math.exp(exponent))
        if kl > trusted:
            break
        curve.append({"beta": beta, "ref_kl": kl, "score": score})
    return curve


def reference_scores(
    policy: Policy,
    mdp: TokenMDP,
    prompts: Sequence[Prompt],
    columns: dict[str, list],
    *,
    samples: int,
    seed: tuple[int | str, ...],
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Return the scores of `samples` completions of the reference for each prompt, (P, samples)."""
    scores = []
    with policy.reference():
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            part = slice(start, start + PROMPTS_AT_ONCE)
            rollout = mdp.rollout(
                policy,
                prompts[part],
                completions_per_prompt=samples,
                columns={name: values[part] for name, values in columns.items()},
                seed=(*seed, start),
            )
            scores.append(rollout.scores.score.reshape(-1, samples))
            progress(min(start + PROMPTS_AT_ONCE, len(prompts)))
    return torch.cat(scores)
