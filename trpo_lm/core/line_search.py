"""Backtracking: the step of the quadratic models, shortened until the exact quantities allow it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Trial = TypeVar("Trial")


@dataclass(frozen=True)
class Search(Generic[Trial]):
    """The result of a backtracking line search.

    Attributes:
        scale: Accepted fraction of the full step; 0 if every trial was rejected.
        trial: Measurement at the accepted scale, or at the last one tried.
        reasons: Why each rejected trial was rejected, in order.
        shortest: Smallest fraction that was tried.
    """

    scale: float
    trial: Trial
    reasons: tuple[str, ...]
    shortest: float = 1.0

    @property
    def accepted(self) -> bool:
        """Whether a trial was accepted."""
        return self.scale > 0.0

    @property
    def trials(self) -> int:
        """Number of step lengths that were measured."""
        return len(self.reasons) + self.accepted


def backtrack(
    measure: Callable[[float], Trial],
    objection: Callable[[Trial, float], str | None],
    *,
    ratio: float,
    trials: int,
    excess: Callable[[Trial], float] = lambda trial: 1.0,
) -> Search[Trial]:
    """Try scales 1, ratio, ratio^2, ... and take the first without an objection.

    A divergence grows with the square of the step: scales at which it would still be too large, by
    what the trial before measured, are passed over.

    Args:
        measure: Moves the parameters to the given fraction of the step and measures there.
        objection: Returns why a trial at a scale is rejected, or None to accept it.
        ratio: Each scale as a fraction of the previous one, in (0, 1).
        trials: Most scales to try, >= 1.
        excess: Divergence of a trial over its limit.

    Returns:
        The accepted scale, or 0 with the reasons; restoring the parameters is up to the caller.

    Source: TRPO, arXiv:1502.05477, App. C (backtracking after the conjugate-gradient step).
    """
    reasons: list[str] = []
    scale = 1.0
    while True:
        trial = measure(scale)
        reason = objection(trial, scale)
        if reason is None:
            return Search(scale, trial, tuple(reasons), scale)
        reasons.append(reason)
        if len(reasons) == trials:
            return Search(0.0, trial, tuple(reasons), scale)
        over = excess(trial)
        powers = math.log(over) / -2 / math.log(ratio) if 1 < over < math.inf else 0.0
        scale *= ratio ** max(1, math.ceil(powers - 1e-9))
