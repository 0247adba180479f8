"""Passes that become smaller when the memory of a device runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from trpo_lm.lm.memory import Room
from trpo_lm.training.ranks import OutOfMemory, Ranks

Result = TypeVar("Result")


def halved_if_full(
    work: Callable[[], Result],
    undo: Callable[[], None],
    room: Room,
    ranks: Ranks,
    note: Callable[[str], None],
) -> Result:
    """Do something on all ranks; while memory runs out, undo it and do it in smaller passes.

    Each rank halves the size of the phase that it was in; sizes are of passes that are summed, so
    they change no result but by the order of sums (a smaller rollout draws other completions).

    Args:
        work: What to do, from the start.
        undo: Takes back what it did before memory ran out.
        room: Sizes of the phases.
        ranks: All do it again when one ran out.
        note: Told which phase became smaller.

    Raises:
        OutOfMemory: If a phase that handles one completion at a time does not fit.
    """
    while True:
        try:
            return ranks.agree(work)
        except OutOfMemory as full:
            phase = room.phase
            if not any(ranks.gather([room.halve()])):
                raise OutOfMemory(
                    f"{full.what}; {room.floor()}", where=full.where, hint=full.hint
                ) from full
        undo()  # the exception is gone by now, and with it the tensors that its frames held
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        note(f"out of memory: the {phase} phase takes half as many tokens at once now")
