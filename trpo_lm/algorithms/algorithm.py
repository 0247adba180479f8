"""The protocol of an update rule."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from trpo_lm.config import Limits
from trpo_lm.core.parameters import ParameterVector, Reduce
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.rollout import Batch, Rollout
from trpo_lm.storage import Row

State = TypeVar("State")
Metrics = dict[str, float | str | bool | None]  # by names of report.glossary.METRICS


class Algorithm(Protocol[State]):
    """How rewards become advantages, and how the policy moves: a frozen dataclass of settings.

    `TRPO` and `PPO` are such. What it learns from update to update is a frozen dataclass too, of
    numbers, tensors and dataclasses of these: the trainer passes it in, takes its successor back,
    and keeps it in checkpoints.
    """

    @property
    def limits(self) -> Limits:
        """Distances that the updates keep to."""
        ...

    @property
    def needs_critic(self) -> bool:
        """Whether advantages depend on values."""
        ...

    @property
    def gamma(self) -> float:
        """Discount per token."""
        ...

    @property
    def lam(self) -> float | None:
        """GAE's lambda; None: the critic's default."""
        ...

    def init_state(self, theta: ParameterVector) -> State:
        """Return the state before the first update."""
        ...

    def rewards(self, batch: Batch, state: State) -> Tensor:
        """Return the reward of each action, (N, T) float64."""
        ...

    def advantages(
        self, rollout: Rollout, rewards: Tensor, values: Tensor, reduce: Reduce
    ) -> Tensor:
        """Return A_t of every action, (N, T), from `rewards` and `values`, (N, T) each."""
        ...

    def update(self, objective: BatchObjective, state: State) -> tuple[State, Metrics]:
        """Move the policy; return the successor of the state, and metrics."""
        ...


def with_default_lam(algorithm: Any, lam: float) -> Any:
    """Return an algorithm with the critic's lambda where it has none of its own."""
    return algorithm if algorithm.lam is not None else replace(algorithm, lam=lam)


def unpacked(state: Any) -> tuple[Row, dict[str, Tensor]]:
    """Return a state's numbers, nested as its dataclasses are, and its tensors, by field."""
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {
        name: unpacked(value)[0] if is_dataclass(value) else value
        for name, value in values.items()
        if name not in tensors
    }
    return numbers, tensors


def packed(state: Any, numbers: Row, tensors: dict[str, Tensor]) -> Any:
    """Return a state with the numbers and tensors of `unpacked`.

    Args:
        state: A fresh one; says which fields there are, and what is absent stays as it is there.
        numbers: As they were saved.
        tensors: Likewise; they go to the device of the fresh one's.
    """
    values = {}
    for name in (f.name for f in fields(state)):
        value = getattr(state, name)
        if name in tensors:
            values[name] = tensors[name].to(value.device)
        elif name in numbers:
            nested = is_dataclass(value)
            values[name] = packed(value, numbers[name], {}) if nested else numbers[name]
    return replace(state, **values)
