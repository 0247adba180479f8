"""Named stages of a run, for timings, for errors, and for faults that tests inject.

    start | updates: rollout score measure values update critic evaluate record checkpoint/* | end

The trainer, checkpoints and the best policy enter their stages through one `Stages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter


class Stages:
    """`with stage("rollout"): ...` names and times a part of the work.

    Attributes:
        name: Innermost stage under way.
        seconds: Duration of the latest pass through each stage.
        on_enter: Called with the name of each stage as it begins; for tests.
    """

    def __init__(self, on_enter: Callable[[str], None] = lambda name: None):
        self.name = "start"
        self.seconds: dict[str, float] = {}
        self.on_enter = on_enter

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Enter a stage for the block."""
        outer, self.name = self.name, name
        start = perf_counter()
        try:
            self.on_enter(name)
            yield
        finally:
            self.seconds[name] = perf_counter() - start
            self.name = outer
