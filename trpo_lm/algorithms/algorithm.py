"""The protocol of an update rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from trpo_lm.config import Limits
from trpo_lm.lm.mdp import Batch
from trpo_lm.lm.policy import Policy


class Algorithm(Protocol):
    """An update rule: how rewards become advantages, and how the policy moves."""

    @property
    def needs_critic(self) -> bool:
        """Whether advantages look at values."""
        ...

    @property
    def limits(self) -> Limits:
        """Distances that the updates keep to."""
        ...

    @property
    def gamma(self) -> float:
        """Discount per token."""
        ...

    def with_lam(self, lam: float) -> Algorithm:
        """Return itself with the critic's lambda where none was chosen."""
        ...

    def init_state(self, policy: Policy) -> dict[str, Any]:
        """Return what must survive between updates: JSON values and tensors."""
        ...

    def rewards(self, batch: Batch, state: dict[str, Any]) -> Tensor:
        """Return the reward of each action, (N, T) float64."""
        ...

    def advantages(self, batch: Batch, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Return A_t, (N, T), from `batch.rewards` and `batch.values`."""
        ...

    def update(
        self,
        policy: Policy,
        batch: Batch,
        reduce: Callable[[Tensor], Tensor],
        state: dict[str, Any],
        seed: tuple[int | str, ...],
    ) -> dict[str, Any]:
        """Move the policy; return metrics."""
        ...
