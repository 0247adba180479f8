"""Critics: V(s_t), the expected return from a state on.

Both critics are linear, fitted by running least squares with exponential forgetting, on earlier
batches only: the batch a critic is applied to never enters its own baseline, so at lambda = 1 the
gradient stays unbiased however wrong the critic is. There is no learning rate, no epoch count, and
nothing of it reaches the policy's parameters. Sums cross ranks; the solve is the same everywhere.

`PrefixCritic`   V(s_t) = a_t score(prompt + y_<t) + c_t, a line for each position t: the reward
                 model's score of the unfinished text, calibrated.
`ValueHead`      V(s_t) = w . [hidden state of the reference, prefix score if there is one, 1].
                 The reference never changes, so old batches stay valid evidence; the ridge is
                 chosen by the error on each new batch before it is learned from.
`NoCritic`       V = 0, for advantages that compare completions instead.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trpo_lm.core.parameters import Reduce

FORGETTING = 0.95  # weight of the past per update; about the last 20 batches count


class Critic(Protocol):
    """What the trainer needs of a critic.

    `hidden` (S, D) are detached hidden states in flat order, `prefix_scores` (N, T) or None, `mask`
    (N, T) marks action tokens, `targets` (N, T) are the returns; all float64 but `hidden`.
    """

    name: str
    default_lam: float

    @property
    def reads_prefixes(self) -> bool:
        """Whether it looks at `prefix_scores`."""
        ...

    def values(
        self, hidden: Tensor, prefix_scores: Tensor | None, mask: Tensor, *, untrained: float
    ) -> Tensor:
        """Return V(s_t), (N, T) float64, zero off the mask; `untrained` before the first fit."""
        ...

    def fit(
        self,
        hidden: Tensor,
        prefix_scores: Tensor | None,
        mask: Tensor,
        targets: Tensor,
        valid: Tensor,
        reduce: Reduce,
    ) -> None:
        """Learn from a batch whose values were used; rows where `valid` is False do not count."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        ...


class NoCritic:
    """V = 0."""

    name, default_lam, reads_prefixes = "none", 1.0, False

    def values(self, hidden, prefix_scores, mask, *, untrained: float) -> Tensor:
        """Return zeros, (N, T)."""
        return torch.zeros(mask.shape, dtype=torch.float64)

    def fit(self, hidden, prefix_scores, mask, targets, valid, reduce) -> None:
        """Learn nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore nothing."""


class PrefixCritic:
    """V(s_t) = a_t score_t + c_t; before the first fit a_t = 1, c_t = 0.

    Each position has a line of its own, drawn towards the common line of all positions with the
    weight of `PRIOR` completions: late positions are rare.

    Args:
        length: T, positions that have a line of their own.
    """

    name, default_lam, reads_prefixes = "prefix", 0.5, True
    PRIOR = 16.0

    def __init__(self, length: int):
        self.sums = torch.zeros(length, 5, dtype=torch.float64)  # n, x, y, xx, xy per position
        self.origin = torch.zeros(1, dtype=torch.float64)  # taken off x and y: no cancellation
        self.seen = torch.zeros(1, dtype=torch.float64)

    def lines(self) -> tuple[Tensor, Tensor]:
        """Return slopes a and intercepts c, (T,) each, of values less the origin."""
        n, x, y, xx, xy = self.sums.unbind(-1)
        mean_x, mean_y = x / n.clamp(min=1), y / n.clamp(min=1)
        spread, joint = xx - x * mean_x, xy - x * mean_y  # centred within each position
        common = joint.sum() / spread.sum() if spread.sum() > 0 else torch.ones_like(spread.sum())
        pull = self.PRIOR * spread.sum() / n.sum().clamp(min=1)
        a = (joint + pull * common) / (spread + pull) if pull > 0 else common.expand_as(n)
        level = (y.sum() - common * x.sum()) / n.sum().clamp(min=1)
        c = level + n / (n + self.PRIOR) * (mean_y - a * mean_x - level)
        return a, c

    def values(self, hidden, prefix_scores, mask, *, untrained: float) -> Tensor:
        """Return the calibrated prefix scores, (N, T)."""
        assert prefix_scores is not None
        if not self.seen:
            return prefix_scores * mask
        T = mask.shape[1]
        a, c = self.lines()
        return (a[:T] * (prefix_scores - self.origin) + c[:T] + self.origin) * mask

    def fit(self, hidden, prefix_scores, mask, targets, valid, reduce) -> None:
        """Add a batch to the running sums of each position."""
        mask = (mask & valid[:, None]).double()
        if not self.seen:
            total, count = reduce(torch.stack([(prefix_scores * mask).sum(), mask.sum()]))
            if count == 0:
                return
            self.origin = (total / count).reshape(1)
        x, y = (prefix_scores - self.origin) * mask, (targets - self.origin) * mask
        columns = torch.stack([mask.sum(0), x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)], -1)
        columns = reduce(columns)
        if columns[:, 0].sum() == 0:  # nothing was scored: nothing is learned, nothing forgotten
            return
        self.sums = self.sums * FORGETTING
        self.sums[: mask.shape[1]] += columns
        self.seen = self.seen + 1

    def state(self) -> dict[str, Tensor]:
        """Return the running sums."""
        return {"sums": self.sums, "origin": self.origin, "seen": self.seen}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the running sums."""
        self.sums, self.origin, self.seen = state["sums"], state["origin"], state["seen"]


class ValueHead:
    """A ridge regression on frozen hidden states; before the first fit V is constant.

    Args:
        width: D of the hidden states.
        use_prefix: Whether the prefix score is one more feature.
    """

    default_lam = 0.95
    RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3)  # in feature variances; the strongest wins ties

    def __init__(self, width: int, *, use_prefix: bool = False):
        self.name = "value_head+prefix" if use_prefix else "value_head"
        self.use_prefix = use_prefix
        size = width + use_prefix + 2  # ... and 1, and the target itself: one Gram matrix of all
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self.origin = torch.zeros(2, dtype=torch.float64)  # of prefix scores and of targets
        self.errors = torch.zeros(len(self.RIDGES), dtype=torch.float64)
        self.seen = torch.zeros(1, dtype=torch.float64)

    @property
    def reads_prefixes(self) -> bool:
        """Whether the prefix score is a feature."""
        return self.use_prefix

    def _features(self, hidden: Tensor, prefix_scores: Tensor | None, mask: Tensor) -> Tensor:
        columns = [hidden.double().cpu()]
        if self.use_prefix:
            assert prefix_scores is not None
            columns.append((prefix_scores[mask] - self.origin[0])[:, None])
        return torch.cat([*columns, torch.ones(len(hidden), 1, dtype=torch.float64)], dim=1)

    def weights(self) -> Tensor:
        """Return one column of weights for each ridge, (D', len(RIDGES))."""
        unit = self.gram.diagonal()[:-1].sqrt()  # each feature in a unit of its own
        unit = torch.where(unit > 0, unit, 1.0)
        A = self.gram[:-1, :-1] / unit[:, None] / unit[None, :]
        y = self.gram[:-1, -1] / unit
        # The penalty is a share of a feature's variance, 0 for the constant.
        variance = (A.diagonal() - A[-1] ** 2).clamp(min=1e-10)
        solve = [torch.linalg.solve(A + (r * variance + 1e-10).diag(), y) for r in self.RIDGES]
        return torch.stack(solve, dim=1) / unit[:, None]

    def values(self, hidden, prefix_scores, mask, *, untrained: float) -> Tensor:
        """Return V(s_t), (N, T)."""
        out = untrained * mask.double()
        if self.seen:
            best = int(self.errors.argmin())
            predicted = self._features(hidden, prefix_scores, mask) @ self.weights()[:, best]
            out[mask] = predicted + self.origin[1]
        return out

    def fit(self, hidden, prefix_scores, mask, targets, valid, reduce) -> None:
        """Judge every ridge on the new batch, then add the batch to the running sums."""
        if not self.seen:
            x = prefix_scores if self.use_prefix else targets
            rows = (mask & valid[:, None]).double()
            parts = torch.stack([(x * rows).sum(), (targets * rows).sum(), rows.sum()])
            sums = reduce(parts)
            if sums[2] == 0:
                return
            self.origin = sums[:2] / sums[2]
        used = valid[:, None].expand_as(mask)[mask]
        phi = self._features(hidden, prefix_scores, mask)[used]
        y = (targets[mask] - self.origin[1])[used]
        joint = torch.cat([phi, y[:, None]], dim=1)
        new = reduce(joint.T @ joint)
        if new[-2, -2] == 0:  # nothing was scored: nothing is learned, nothing forgotten
            return
        if self.seen:
            error = ((phi @ self.weights() - y[:, None]) ** 2).sum(0)
            self.errors = self.errors * FORGETTING + reduce(error)
        self.gram = self.gram * FORGETTING + new
        self.seen = self.seen + 1

    def state(self) -> dict[str, Tensor]:
        """Return the running sums and the weights they imply."""
        state = {k: getattr(self, k) for k in ("gram", "origin", "errors", "seen")}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the running sums."""
        for name in ("gram", "origin", "errors", "seen"):
            setattr(self, name, state[name])


def make_critic(choice: str, *, can_score_prefixes: bool, width: int, length: int) -> Critic:
    """Return the critic of that name; 'auto' takes the prefix critic where the reward allows it."""
    if choice == "none":
        return NoCritic()
    if choice == "prefix" or (choice == "auto" and can_score_prefixes):
        return PrefixCritic(length)
    return ValueHead(width, use_prefix=can_score_prefixes)
