"""SIGINT and SIGTERM: the first one stops a run where that is safe, the second one at once.

In one process the first signal raises `Interrupted` in the middle of an update, whose half-done
work the trainer takes back; while files are written it waits. With several processes a rank that
left by itself would leave the others waiting in a collective, so that it only sets a flag, which
the ranks compare between updates.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trpo_lm.errors import Interrupted


class Interrupts:
    """Handlers for both signals inside a `with` block; those of before come back after it.

    Args:
        alone: Whether this is the only process of the run.

    Attributes:
        asked: Number of the signal that was met, or 0.
    """

    def __init__(self, *, alone: bool):
        self.alone, self.asked = alone, 0
        self._waits = not alone
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        except ValueError:  # not the main thread: signals are somebody else's business
            pass
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _handle(self, signum: int, frame: Any) -> None:
        for known in self._before:
            signal.signal(known, signal.SIG_DFL)
        self.asked = signum
        if not self._waits:
            self.stop(signum)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal wait until the end of the block."""
        self._waits = True
        yield
        self._waits = not self.alone
        if self.alone and self.asked:
            self.stop(self.asked)

    def stop(self, signum: int) -> None:
        """Raise `Interrupted`."""
        raise Interrupted(f"stopped by {signal.Signals(signum).name}", signum=signum)
