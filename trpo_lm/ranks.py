"""The processes of a run, seen from one of them: sums, agreement, and failures that all share.

The policy is not wrapped for distributed training: every rank computes sums over its own
completions and `reduce` adds them up. A decision is taken on reduced numbers only, so that all
ranks take the same branch; what a rank does alone goes through `agree`, so that its failure ends
the run everywhere, under the same message, instead of leaving the others to wait for it. With one
process everything here is the identity.

This is the only module that imports accelerate.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from trpo_lm.errors import RunFault, TrpoLMError


class SharedFault(RunFault):
    """A fault that every rank has raised at the same place: they can still act together."""


class Ranks:
    """This process among those of the run.

    Attributes:
        rank: Number of this process, from 0.
        count: Processes of the run.
        main: Whether this one writes the files and the screen.
        device: Where its model lives.

    Raises:
        TrpoLMError: If several processes were asked for and this is the only one.
    """

    def __init__(self):
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        # Without being told, accelerate forms no group on a machine that has no accelerator.
        self.accelerator = Accelerator(cpu=several and not torch.accelerator.is_available())
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

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks; the result lies where the tensor lay."""
        if self.count == 1:
            return tensor
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
        return items if self.count == 1 else gather_object(items)

    def share(self, value: Any) -> Any:
        """Return on every rank what rank 0 passed."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Return once every rank is here."""
        self.accelerator.wait_for_everyone()

    def agree(self, work: Callable[[], Any]) -> Any:
        """Do something without collectives; if it fails on one rank, fail on all, naming it.

        Raises:
            SharedFault: If it failed at run time on some rank.
            TrpoLMError: If it failed for a mistake of the user.
        """
        if self.count == 1:
            return work()
        result, error, said = None, None, []
        try:
            result = work()
        except Exception as failure:
            error = failure
            known = isinstance(error, TrpoLMError)
            what = error.what if known else f"{type(error).__name__}: {error}"
            where, hint = (error.where, error.hint) if known else (None, None)
            where = f"rank {self.rank}" if where is None else f"{where}, rank {self.rank}"
            said = [(known and not isinstance(error, RunFault), what, where, hint)]
        failed = self.gather(said)
        if failed:
            mistake, what, where, hint = failed[0]
            kind = TrpoLMError if mistake else SharedFault
            raise kind(what, where=where, hint=hint) from error
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
