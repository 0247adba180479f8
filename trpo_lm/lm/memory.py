"""How many tokens go through the model at once, phase by phase, so that it fits in memory.

What a pass holds is measured on a short probe, once, and grows with its tokens, and with their
square where attention keeps its weights. Each phase of an update has a size of its own:

    rollout    keys and values of the completions that are sampled together
    forward    passes without a graph: old policy, reference, line search
    gradient   passes with a graph
    fisher     the graph that Fisher products retain
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SHARE = 1 / 8  # of the memory that the weights leave, for one phase; the rest is for the others
MOST_TOKENS = 1 << 14  # more at once are no faster
MOST_TOKENS_CPU = 1 << 9  # nor are these on a CPU: the same from 256 to 2,048, in less memory
PHASES = ("rollout", "forward", "gradient", "fisher")
PROBE_LENGTH = 48  # tokens of the rows on which memory is measured, and a third of it
PULLBACK = 1.15  # what a retained graph holds, over the graph of the outputs alone


@dataclass(frozen=True)
class Cost:
    """Bytes that a row of L tokens takes: linear * L + square * L^2."""

    linear: float
    square: float = 0.0

    def per_token(self, length: int) -> float:
        """Return the bytes of a token in rows of that length."""
        return self.linear + self.square * length

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.linear + other.linear, self.square + other.square)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.linear * factor, self.square * factor)


def fitted(lengths: tuple[int, int], bytes_of_row: Callable[[int], float]) -> Cost:
    """Return the cost that two measured lengths imply."""
    (a, b), (at_a, at_b) = lengths, [bytes_of_row(n) / n for n in lengths]
    square = max(0.0, (at_b - at_a) / (b - a)) if b > a else 0.0
    return Cost(at_a - square * a, square)


def saved_bytes(work: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    """Return the bytes that the graph of some work keeps for its backward pass.

    It takes tensors on the meta device too, whose graphs keep what real ones would.

    Args:
        work: Builds a graph; it is not kept.
        weights: Tensors that do not count.
    """
    known, kept = {_storage(p) for p in weights}, list[weakref.ref[Tensor]]()

    def count(tensor: Tensor) -> Tensor:
        held = tensor.detach()  # the tensor itself would make a cycle that nothing frees
        kept.append(weakref.ref(held))
        return held

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with torch.enable_grad(), hooks:
        graph = work()
    alive = [held for ref in kept if (held := ref()) is not None]  # not of graphs within, now gone
    del graph
    storages = {_storage(held): held.untyped_storage().nbytes() for held in alive}
    return sum(size for storage, size in storages.items() if storage not in known)


def _storage(tensor: Tensor) -> int:
    """Return a number of a tensor's storage; those on the meta device have no address."""
    return tensor.untyped_storage()._cdata


def measured_costs(
    graphs: Mapping[str, Callable[[int], Any]],
    weights: Iterable[Tensor],
    *,
    longest: int | None,
    layers: int,
    cached: float,
) -> dict[str, Cost]:
    """Measure what a pass of each phase holds, on two short rows.

    Args:
        graphs: Build a graph over a row of so many tokens: 'plain', 'linearised' as Fisher products
            retain it, and 'recomputed' where activations are.
        weights: What does not count.
        longest: Tokens that the model can read; None: any number.
        layers: Of the model.
        cached: Bytes of a token's keys and values.

    Returns:
        The cost of each of `PHASES`.
    """
    most, weights = min(PROBE_LENGTH, longest or PROBE_LENGTH), list(weights)
    held = {
        name: fitted((most // 3, most), lambda n, run=run: saved_bytes(lambda: run(n), weights))
        for name, run in graphs.items()
    }
    layer = held["plain"] * (1 / max(1, layers))
    return {
        "rollout": Cost(cached) + layer * 2.0,  # of the pass over the prompts
        "forward": layer * 2.0,
        "gradient": held["recomputed"] + layer if "recomputed" in held else held["plain"],
        "fisher": held["linearised"] * PULLBACK,
    }


@dataclass
class Room:
    """The size of each phase, halved where it turned out too large.

    Args:
        budget: Bytes that one phase may fill.
        costs: Of a token in each phase.
        most: Tokens set by the user; None: `default`, or fewer where memory is short.
        default: Tokens beyond which a pass is no faster.

    Attributes:
        limits: Tokens of the phases that ran out of memory.
        phase: The latest that asked for its size.
        asked: Tokens at once that it got, and those of its longest row.
    """

    budget: float
    costs: dict[str, Cost]
    most: int | None = None
    default: int = MOST_TOKENS
    limits: dict[str, int] = field(default_factory=dict)
    phase: str = PHASES[0]
    asked: tuple[int, int] = (1, 1)

    def tokens(self, phase: str, length: int, total: int) -> int:
        """Return how many tokens a phase may take at once, at least one row.

        Completions are sampled a token of each at a time: the more at once the faster, and only
        memory limits them, so that no setting of passes changes what is drawn.

        Args:
            phase: Of `PHASES`; it is under way from now on.
            length: Of the longest row, tokens.
            total: Of all rows.
        """
        size = self.fits(phase, length)
        if phase != "rollout":
            size = min(self.default, size) if self.most is None else self.most
        size = max(length, min(size, self.limits.get(phase, size)))
        self.phase, self.asked = phase, (min(size, total), length)
        return size

    def fits(self, phase: str, length: int) -> int:
        """Return how many tokens of a phase fit in memory, in rows of at most `length`."""
        fits = int(self.budget / self.costs[phase].per_token(length))
        return min(fits, self.limits.get(phase, fits))

    def holds(self, phase: str, total: int, length: int) -> bool:
        """Return whether so many tokens fit at once, in rows of at most `length`."""
        self.phase, self.asked = phase, (total, 0)
        if total > self.limits.get(phase, total):
            return False
        return total * self.costs[phase].per_token(length) <= self.budget

    def halve(self) -> str | None:
        """Halve the size of the phase that is under way; return its name, None at one row."""
        tokens, length = self.asked
        if tokens <= max(length, 1):
            return None
        self.limits[self.phase] = tokens // 2
        return self.phase

    def floor(self) -> str:
        """Return what the phase under way needs at the least, as text."""
        cost, left = self.costs[self.phase], self.budget / SHARE
        return (
            f"the {self.phase} phase takes one completion at a time, "
            f"{cost.linear / 2**20:.3g} MiB a token, of {left / 2**30:.1f} GiB beside the weights"
        )


def is_full(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device, or of its host, is full.

    torch has a class of its own for devices; of its host it raises a RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory")
    return isinstance(error, RuntimeError | OSError) and any(w in str(error) for w in words)


def fastest(device: torch.device) -> int:
    """Return the tokens beyond which a pass on a device is no faster."""
    return MOST_TOKENS_CPU if device.type == "cpu" else MOST_TOKENS


def rows_within(lengths: list[int], tokens: int) -> int:
    """Return how many of the first rows, by ascending length, fit into a padded batch; one does."""
    fit = (n for n, longest in enumerate(lengths, 1) if n > 1 and n * longest > tokens)
    return next(fit, len(lengths) + 1) - 1


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
