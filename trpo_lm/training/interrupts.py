"""SIGINT and SIGTERM: the first stops at the next safe point, the second immediately.

In one process the first signal raises `Interrupted` in the middle of an update, which the trainer
then rolls back; while files are written it is deferred. With several processes a rank that stopped
by itself would leave the others waiting in a collective, so it only sets a flag, which the ranks
compare between updates.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trpo_lm.errors import Interrupted


class Interrupts:
    """Handlers for both signals inside a `with` block; the previous ones are restored after it.

    Args:
        alone: Whether this is the only process of the run.

    Attributes:
        asked: Number of the signal that was received, or 0.
    """

    def __init__(self, *, alone: bool):
        self.alone, self.asked = alone, 0
        self._waits = not alone
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        except ValueError:  # not the main thread: it gets no signals
            pass
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _handle(self, signum: int, frame: Any) -> None:
        for handled in self._before:
            signal.signal(handled, signal.SIG_DFL)
        self.asked = signum
        if not self._waits:
            self.stop(signum)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Defer a signal to the end of the block."""
        self._waits = True
        yield
        self._waits = not self.alone
        if self.alone and self.asked:
            self.stop(self.asked)

    def stop(self, signum: int) -> None:
        """Raise `Interrupted`."""
        raise Interrupted(f"stopped by {signal.Signals(signum).name}", signum=signum)
