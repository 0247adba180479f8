"""Micro-batches that are halved when memory runs out; whole runs are in test_resume."""

from types import SimpleNamespace

import pytest

from trpo_lm.lm.rollout import MOST_ROWS
from trpo_lm.training.memory import MicroBatch
from trpo_lm.training.ranks import OutOfMemory

ALONE = SimpleNamespace(agree=lambda work: work())


def full_for(times):
    left = [times]

    def work():
        left[0] -= 1
        if left[0] >= 0:
            raise OutOfMemory("the device is out of memory")
        return "done"

    return work


@pytest.mark.parametrize(("size", "half"), [(8, 4), (5, 2), (None, MOST_ROWS // 2)])
def test_the_work_is_undone_and_done_again_with_half(size, half):
    notes, undone = [], []
    micro_batch = MicroBatch(size, ALONE, notes.append)
    assert micro_batch.halved_if_full(full_for(0)) == "done" and micro_batch.size == size
    done = micro_batch.halved_if_full(full_for(1), lambda: undone.append(micro_batch.size))
    assert done == "done" and undone == [size]
    assert micro_batch.size == half and len(notes) == 1 and f"is {half} now" in notes[0]


@pytest.mark.parametrize(("size", "times"), [(8, 2), (1, 1)])
def test_memory_that_stays_full_is_a_fault(size, times):
    with pytest.raises(OutOfMemory):
        MicroBatch(size, ALONE, print).halved_if_full(full_for(times))
