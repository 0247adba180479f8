"""Credit assignment: advantages of tokens from rewards and, if there is one, a critic.

All functions take right-padded (N, T) tensors and a boolean `mask` that is True at action tokens;
results are zero in the padding. Rewards may have any scale: work in float64 and normalise last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trpo_lm.core.parameters import Reduce

EQUAL = 1e-12  # relative difference up to which values are equal but for rounding


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation over completions that all terminate.

    delta_t = r_t + gamma V(s_t+1) - V(s_t),  A_t = sum_l (gamma lam)^l delta_t+l,  V(terminal) = 0

    Example: rewards [0, 0, 1], values [.5, .6, .8], gamma = lam = 1 gives [.5, .4, .2], the
    return minus the value.

    Args:
        rewards: Reward of each action, (N, T).
        values: V(s_t) of the state each action was taken in, (N, T), in units of reward.
        mask: True at action tokens, (N, T); a row's actions come first, without gaps.
        gamma: Discount per token, dimensionless.
        lam: 0 relies on the critic, 1 on the sampled return; dimensionless.

    Returns:
        Advantages, (N, T), zero off the mask.

    Source: Schulman et al. (2016), arXiv:1506.02438, eqs. 11 and 16.
    """
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    delta = (rewards + gamma * following - values) * mask
    advantages = torch.zeros_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages * mask


def returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Return the discounted sum of the rewards from each action onwards, (N, T)."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)


def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """Score minus the mean score of the *other* completions of the same prompt (RLOO).

    Args:
        scores: Total reward of each completion, (N,); nan for rows without a score.
        groups: Index of the prompt of each completion, (N,) int64.

    Returns:
        Advantage of each completion, (N,); 0 if it is the only scored one of its prompt.

    Source: Ahmadian et al. (2024), arXiv:2402.14740, section 3 (RLOO estimator).
    """
    total, count, present = _group_sums(scores, groups)
    others = (total[groups] - scores.nan_to_num()) / (count[groups] - 1).clamp(min=1)
    return torch.where(present & (count[groups] > 1), scores.nan_to_num() - others, 0.0)


def group_normalised(scores: Tensor, groups: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """Score standardised within the completions of one prompt (GRPO).

    A_i = (score_i - mean) / (std + epsilon), std with Bessel's correction, as TRL computes it.

    Args:
        scores: Total reward of each completion, (N,); nan for rows without a score.
        groups: Index of the prompt of each completion, (N,) int64.
        epsilon: Added to the standard deviation, in units of the score.

    Returns:
        Advantage of each completion, (N,), dimensionless.

    Source: Shao et al. (2024), DeepSeekMath, arXiv:2402.03300, section 4.1.2.
    """
    total, count, present = _group_sums(scores, groups)
    centred = torch.where(present, scores.nan_to_num() - (total / count.clamp(min=1))[groups], 0.0)
    squares = torch.zeros_like(total).index_add_(0, groups, centred**2)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return centred / (std[groups] + epsilon)


def _group_sums(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    present = ~scores.isnan()
    size = int(groups.max()) + 1 if len(groups) else 0
    total = scores.new_zeros(size).index_add_(0, groups, scores.nan_to_num())
    count = scores.new_zeros(size).index_add_(0, groups, present.to(scores.dtype))
    return total, count, present


def whiten(advantages: Tensor, mask: Tensor, reduce: Reduce) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over all masked tokens of all ranks.

    Args:
        advantages: (N, T).
        mask: True at the tokens that count, (N, T); the result is 0 at others.
        reduce: Sums a tensor over ranks.

    Returns:
        (N, T), dimensionless; all zero if the masked values are all equal.
    """
    x = advantages[mask].double()
    total, count = reduce(torch.stack([x.sum(), x.new_tensor(float(len(x)))]))
    mean = total / count.clamp(min=1)
    std = (reduce((x - mean).square().sum()) / count.clamp(min=1)).sqrt()
    size = (reduce(x.square().sum()) / count.clamp(min=1)).sqrt()
    out = torch.zeros_like(advantages, dtype=torch.float64)
    out[mask] = (x - mean) / std if std > EQUAL * size else torch.zeros_like(x)
    return out
