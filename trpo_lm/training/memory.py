"""Micro-batches that are halved when the memory of a device runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from trpo_lm.lm.rollout import MOST_ROWS
from trpo_lm.training.ranks import OutOfMemory, Ranks

Result = TypeVar("Result")


class MicroBatch:
    """How many completions go through the model in one pass.

    Micro-batches are summed, so their size changes no result but by the order of sums.

    Args:
        size: See `TrainerConfig.micro_batch_size`.
        ranks: Which all halve it when one runs out of memory.
        note: Told of the new size.
    """

    def __init__(self, size: int | None, ranks: Ranks, note: Callable[[str], None]):
        self.size, self._ranks, self._note = size, ranks, note

    def halved_if_full(
        self, work: Callable[[], Result], undo: Callable[[], None] = lambda: None
    ) -> Result:
        """Do something on all ranks; if memory runs out, undo it and do it with half the size.

        Raises:
            OutOfMemory: If that is not enough, or the size is 1.
        """
        try:
            return self._ranks.agree(work)
        except OutOfMemory:
            size = self.size or MOST_ROWS
            if size == 1:
                raise
        undo()  # the exception is gone by now, and with it the tensors that its frames held
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        self.size = size // 2
        self._note(f"out of memory: micro_batch_size is {self.size} now")
        return self._ranks.agree(work)
