"""Foreign code is a guest: what it does to the process is undone, and told once.

Reward functions and callbacks run in the process of the run. After each call the current directory,
environment, default dtype, grad mode, threads and locale are what they were, and the global random
generators go on where they were; the guest has a stream of its own, which its next call continues.
"""

from __future__ import annotations

import locale
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def _set_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _set_directory(path: str | None) -> None:
    if path is not None:
        os.chdir(path)


STATE: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "the current directory": (_directory, _set_directory),
    "the environment": (lambda: dict(os.environ), _set_environment),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the locale": (
        lambda: locale.setlocale(locale.LC_ALL),
        lambda name: locale.setlocale(locale.LC_ALL, name),
    ),
}
_RANDOM: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
]


class Guest:
    """Calls foreign code inside `with guest("reward 'x'"):`."""

    def __init__(self):
        self._stream: list[Any] | None = None
        self._told: set[tuple[str, str]] = set()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Restore the process after the block, whatever happens in it; warn of what it changed.

        Args:
            name: Who is called, for the warning.
        """
        before = {what: get() for what, (get, _) in STATE.items()}
        own = [get() for get, _ in _RANDOM]
        if self._stream is not None:
            _set_random(self._stream)
        try:
            yield
        finally:
            self._stream = [get() for get, _ in _RANDOM]
            _set_random(own)
            for what, (get, put) in STATE.items():
                if get() != before[what]:
                    put(before[what])
                    self._tell(name, what)

    def _tell(self, name: str, what: str) -> None:
        if (name, what) not in self._told:
            self._told.add((name, what))
            logger.warning("%s changed %s; it is restored after each call", name, what)


def _set_random(states: list[Any]) -> None:
    for (_, put), state in zip(_RANDOM, states, strict=True):
        put(state)
