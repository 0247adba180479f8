"""Passes that become smaller when memory runs out; whole runs are in test_resume."""

from types import SimpleNamespace

import pytest
import torch

from trpo_lm.lm.memory import MOST_TOKENS, PHASES, Cost, Room, rows_within
from trpo_lm.training.memory import halved_if_full
from trpo_lm.training.ranks import OutOfMemory, Ranks

ALONE = SimpleNamespace(agree=lambda work: work(), gather=lambda items: items)
LENGTH, TOTAL = 100, 6000


def room(most=None, budget=1e9):
    return Room(budget, dict.fromkeys(PHASES, Cost(1000.0)), most)


def full_for(times, passes, phase):
    """Work whose phase runs out of memory so many times."""
    left = [times]

    def work():
        passes.tokens("forward", LENGTH, TOTAL)
        passes.tokens(phase, LENGTH, TOTAL)
        left[0] -= 1
        if left[0] >= 0:
            raise OutOfMemory("the device is out of memory")
        return "done"

    return work


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("times", [0, 1, 3])
def test_the_work_is_undone_and_done_again_with_half_in_the_phase_that_was_full(phase, times):
    notes, undone, passes = [], [], room()
    work = full_for(times, passes, phase)
    assert halved_if_full(work, lambda: undone.append(1), passes, ALONE, notes.append) == "done"
    assert len(undone) == len(notes) == times and all(f"the {phase} phase" in n for n in notes)
    sizes = {name: passes.tokens(name, LENGTH, TOTAL) for name in PHASES}
    most = 10**6 if phase == "rollout" else MOST_TOKENS
    assert sizes.pop(phase) == (TOTAL >> times if times else most)
    assert sizes.pop("rollout", 10**6) == 10**6  # only memory limits what is sampled together
    assert set(sizes.values()) == {MOST_TOKENS}


def test_a_phase_goes_down_to_one_completion_and_then_says_what_it_needs():
    notes, passes = [], room(most=800)
    with pytest.raises(OutOfMemory, match="the gradient phase takes one completion at a time") as e:
        halved_if_full(full_for(99, passes, "gradient"), lambda: None, passes, ALONE, notes.append)
    assert "KiB" in e.value.what or "MiB a token" in e.value.what
    assert passes.tokens("gradient", LENGTH, TOTAL) == LENGTH and len(notes) == 3  # 400, 200, 100


def test_a_size_is_what_memory_allows_and_at_least_a_row():
    passes = room(budget=5e5)
    assert passes.tokens("forward", LENGTH, TOTAL) == 500
    assert passes.tokens("forward", 700, TOTAL) == 700
    assert room(budget=1e12).tokens("forward", LENGTH, TOTAL) == MOST_TOKENS
    assert room(most=64, budget=1e12).tokens("forward", 10, TOTAL) == 64
    assert room(most=64, budget=1e6).tokens("rollout", 10, TOTAL) == 1000
    square = Room(1e6, dict.fromkeys(PHASES, Cost(1000.0, 10.0)), None)
    assert square.tokens("forward", LENGTH, TOTAL) == 500
    assert square.tokens("forward", 10, TOTAL) == 909


def test_a_set_of_rows_fits_by_its_own_tokens():
    passes = room(budget=1e6)
    assert passes.holds("fisher", 1000, LENGTH) and not passes.holds("fisher", 1001, LENGTH)
    assert passes.halve() == "fisher" and not passes.holds("fisher", 501, LENGTH)


def test_rows_of_a_padded_batch():
    assert rows_within([1, 2, 3, 4], 100) == 4 and rows_within([1, 2, 3, 4], 9) == 3
    assert rows_within([50], 10) == 1 and rows_within([5, 50], 60) == 1


def allocate():
    torch.empty(1 << 60, dtype=torch.uint8)


def full():
    raise MemoryError


def elsewhere():
    raise RuntimeError("std::bad_alloc")


def another():
    raise RuntimeError("another fault")


@pytest.mark.parametrize("work", [allocate, full, elsewhere])
def test_B58_a_full_host_is_a_full_device(work):
    tries = []

    def once():
        tries.append(1)
        if len(tries) == 1:
            work()
        return "done"

    notes, passes = [], room()
    passes.tokens("gradient", LENGTH, TOTAL)
    assert halved_if_full(once, lambda: None, passes, Ranks(), notes.append) == "done"
    assert len(notes) == 1 and "half as many tokens" in notes[0]
    with pytest.raises(OutOfMemory, match="the device is out of memory"):
        Ranks().agree(work)
    with pytest.raises(RuntimeError, match="another fault"):
        Ranks().agree(another)
