"""Backtracking: the step promised by quadratic models is tried on the exact quantities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Trial = TypeVar("Trial")


@dataclass(frozen=True)
class Search(Generic[Trial]):
    """How the search ended.

    Attributes:
        scale: Accepted share of the full step, 0 when every trial was rejected.
        trial: What was measured at the accepted scale, else at the last one tried.
        reasons: Why each rejected trial was rejected, in order.
    """

    scale: float
    trial: Trial
    reasons: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        """Whether some trial was accepted."""
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
) -> Search[Trial]:
    """Try scales 1, ratio, ratio^2, ... and take the first without an objection.

    Args:
        measure: Moves the parameters to the given share of the step and measures there.
        objection: Says why a trial (measured at a scale) is not acceptable, or None if it is.
        ratio: Each scale as a share of the one before, in (0, 1).
        trials: Scales tried at most, >= 1.

    Returns:
        The accepted scale, or 0 with the reasons; putting parameters back is the caller's.

    Source: TRPO, arXiv:1502.05477, App. C (backtracking after the conjugate-gradient step).
    """
    reasons: list[str] = []
    scale = 1.0
    while True:
        trial = measure(scale)
        reason = objection(trial, scale)
        if reason is None:
            return Search(scale, trial, tuple(reasons))
        reasons.append(reason)
        if len(reasons) == trials:
            return Search(0.0, trial, tuple(reasons))
        scale *= ratio
