"""The processes of a run, seen from one of them: sums, agreement, and failures that all share.

The policy is not wrapped for distributed training: every rank computes sums over its own
completions and `reduce` adds them up. A decision is taken on reduced numbers only, so that all
ranks take the same branch. What may fail on one rank alone goes through `agree`: ranks tell each
other that they are well before every collective, so that a failure ends the run everywhere, under
the same message, instead of leaving the others to wait. With one process everything here is the
identity.

This is the only module that imports accelerate.
"""

from __future__ import annotations

import atexit
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor

from trpo_lm.errors import RunFault, TrpoLMError

_HERE = Path(__file__).resolve().parents[1]


class SharedFault(RunFault):
    """A fault that every rank has raised at the same place: they can still act together."""


class OutOfMemory(SharedFault):
    """The memory of some rank's device is full."""


class LostRanks(RunFault):
    """Other ranks did not come to a collective: nothing can be done together any more."""


class Ranks:
    """This process among those of the run.

    Args:
        timeout: Seconds after which a rank that waits for the others gives up; None: torch's own,
            1800 with gloo and 600 with NCCL.

    Attributes:
        rank: Number of this process, from 0.
        count: Processes of the run.
        main: Whether this one writes the files and the screen.
        device: Where its model lives.

    Raises:
        TrpoLMError: If several processes were asked for and this is the only one.
    """

    def __init__(self, timeout: float | None = None):
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        handlers = []
        if timeout is not None:
            handlers.append(InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)))
        # Without being told, accelerate forms no group on a machine that has no accelerator.
        cpu = several and not torch.accelerator.is_available()
        self.accelerator = Accelerator(cpu=cpu, kwargs_handlers=handlers)
        launched = "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ
        if self.accelerator.num_processes == 1 and (several or launched):
            raise TrpoLMError(  # accelerate launch --cpu --num_processes 2 starts one, silently
                "several processes were asked for, and this one is alone",
                where="launcher",
                hint="on the CPU: torchrun --nproc_per_node N, or accelerate launch --multi_gpu "
                "--num_processes N on a machine without a GPU",
            )
        self.rank = self.accelerator.process_index
        self.count = self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        atexit.register(_leave)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks; the result lies where the tensor lay."""
        if self.count == 1:
            return tensor
        with self._collective():
            total = self.accelerator.reduce(tensor.detach().to(self.device), "sum")
        return total.to(tensor.device)  # type: ignore[union-attr]

    def mean(self, values: Tensor) -> tuple[float, float]:
        """Return mean and standard deviation of the values of all ranks; nan without any value."""
        values = values.double()
        count = torch.tensor(float(len(values)), dtype=torch.float64)
        total, count = self.reduce(torch.stack([values.sum().cpu(), count])).tolist()
        if not count:
            return float("nan"), float("nan")
        mean = total / count
        square = float(self.reduce((values - mean).square().sum()))
        return mean, (square / count) ** 0.5

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the items of all ranks, in the order of ranks."""
        if self.count == 1:
            return items
        with self._collective():
            return gather_object(items)

    def share(self, value: Any) -> Any:
        """Return on every rank what rank 0 passed."""
        if self.count == 1:
            return value
        with self._collective():
            return broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.count > 1:
            with self._collective():
                self.accelerator.wait_for_everyone()

    def agree(self, work: Callable[[], Any]) -> Any:
        """Do something on every rank; if it fails on some, fail on all, naming the first.

        Raises:
            OutOfMemory: If the memory of a rank's device is full.
            SharedFault: If it failed at run time on some rank.
            TrpoLMError: If it failed for a mistake of the user.
            LostRanks: If other ranks did not come, or are gone.
        """
        try:
            result = work()
        except (SharedFault, LostRanks):
            raise
        except Exception as failure:
            if self.count > 1:
                self._check_in(failure)
            if isinstance(failure, torch.OutOfMemoryError):
                raise _told(failure) from failure
            raise
        if self.count > 1:
            self._check_in()
        return result

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do something on rank 0 and return its result everywhere; its failure is everyone's."""
        return self.share(self.agree(work if self.main else lambda: None))

    def same(self, text: str, where: str) -> str:
        """Return a text that must be the same on every rank.

        Raises:
            RunFault: If it is not.
        """
        if len(set(self.gather([text]))) > 1:
            raise RunFault("the ranks' parameters differ", where=where)
        return text

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Enter a collective once every rank is well; tell it apart when the others are lost."""
        self._check_in()
        with self._together():
            yield

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostRanks(
                f"rank {self.rank} got no answer from the others: {str(error).splitlines()[0]}",
                where=_under_way(),
                hint="a rank was killed, or took longer than ddp_timeout for its share",
            ) from error

    def _check_in(self, failure: Exception | None = None) -> None:
        """Meet the other ranks; raise if any of them comes with a failure."""
        with self._together():
            failures = self.accelerator.reduce(
                torch.tensor(float(failure is not None), device=self.device), "sum"
            )
            if not failures:
                return
            told = gather_object([] if failure is None else [(self.rank, _told(failure))])
        rank, error = told[0]
        if len(told) < self.count:  # else it happened to all of them
            rank = f"rank {rank}"
            where = rank if error.where is None else f"{error.where}, {rank}"
            error = type(error)(error.what, where=where, hint=error.hint)
        raise error from failure


def _leave() -> None:
    """Stop the threads of the process group: one that still runs when Python ends aborts it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _told(failure: Exception) -> TrpoLMError:
    """Return what all ranks raise when one of them failed."""
    if isinstance(failure, torch.OutOfMemoryError):
        return OutOfMemory(
            f"the memory of the device is full{_peak()}: {failure}",
            hint="lower micro_batch_size, fisher_completions or max_completion_length",
        )
    if not isinstance(failure, TrpoLMError):
        return SharedFault(f"{type(failure).__name__}: {failure}")
    kind = SharedFault if isinstance(failure, RunFault) else TrpoLMError
    return kind(failure.what, where=failure.where, hint=failure.hint)


def _peak() -> str:
    """Say how much memory was in use at most."""
    if not torch.accelerator.is_available():
        return ""
    return f" (peak {torch.accelerator.max_memory_allocated() / 2**30:.1f} GiB)"


def _under_way() -> str:
    """Name what this process is doing: the innermost function of each module, outermost first."""
    found: dict[str, str] = {}
    for frame in traceback.extract_stack():
        module = Path(frame.filename)
        if module.is_relative_to(_HERE) and module.stem != "ranks" and frame.name[0] != "<":
            found.pop(module.stem, None)
            found[module.stem] = f"{module.stem}.{frame.name}"
    return " > ".join(found.values())
