"""Collectives, and errors that are raised on every rank together.

The policy is not wrapped for distributed training: every rank computes sums over its own
completions and `reduce` adds them up. Decisions are made on reduced numbers only, so that all
ranks take the same branch. Work that may fail on one rank alone goes through `agree`: before every
collective the ranks exchange whether one of them failed, so that a failure ends the run everywhere,
under the same message, instead of leaving the others waiting. With one process everything here is
the identity.

This is the only module that imports accelerate.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor

from trpo_lm.errors import RunFault, TrpoLMError, first_line
from trpo_lm.lm.memory import is_full
from trpo_lm.training.stages import Stages


class SharedFault(RunFault):
    """A fault that every rank raises at the same place, so that they can still act together."""


class OutOfMemory(SharedFault):
    """The device of some rank is out of memory."""


class LostRanks(RunFault):
    """Other ranks did not reach a collective: they can no longer act together."""


class Ranks:
    """The processes of a run, and which of them this one is.

    Args:
        timeout: Seconds after which a rank that waits for the others gives up; None: torch's own,
            1800 with gloo and 600 with NCCL.
        stage: Names what is under way, for the error when other ranks are lost.

    Attributes:
        rank: Number of this process, from 0.
        count: Processes of the run.
        main: Whether this one writes the files and the screen.
        device: Device of its model.

    Raises:
        TrpoLMError: If the launcher was to start several processes and started this one only, or
            was told to change how a model is trained.
    """

    def __init__(self, timeout: float | None = None, stage: Stages | None = None):
        self._stage = stage or Stages()
        _answer_launcher()
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        handlers = []
        if timeout is not None:
            handlers.append(InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)))
        # Without cpu=True accelerate forms no group on a machine that has no accelerator.
        cpu = several and not torch.accelerator.is_available()
        self.accelerator = Accelerator(cpu=cpu, kwargs_handlers=handlers)
        launched = "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ
        if self.accelerator.num_processes == 1 and (several or launched):
            raise TrpoLMError(  # accelerate launch --cpu --num_processes 2 starts one, silently
                "launched for several processes, but only one started",
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
        """Sum a tensor over ranks, on the tensor's own device."""
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

    def most(self, number: int) -> int:
        """Return the largest of the numbers that the ranks pass."""
        own = torch.zeros(self.count, dtype=torch.float64)
        own[self.rank] = number
        return int(self.reduce(own).max())

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
        """Return once every rank has called this."""
        if self.count > 1:
            with self._collective():
                self.accelerator.wait_for_everyone()

    def agree(self, work: Callable[[], Any]) -> Any:
        """Do something on every rank; if it fails on some, fail on all, naming the first.

        Raises:
            OutOfMemory: If the device of a rank is out of memory.
            SharedFault: If it failed at run time on some rank.
            TrpoLMError: If it failed for a mistake of the user.
            LostRanks: If other ranks did not arrive.
        """
        try:
            result = work()
        except (SharedFault, LostRanks):
            raise
        except Exception as failure:
            if self.count > 1:
                self._check_in(failure)
            if is_full(failure):
                raise _shared(failure) from failure
            raise
        if self.count > 1:
            self._check_in()
        return result

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do something on rank 0 and return its result on every rank; all fail if it fails."""
        return self.share(self.agree(work if self.main else lambda: None))

    def same(self, text: str, where: str) -> str:
        """Return a text that must be the same on every rank.

        Raises:
            RunFault: If it is not.
        """
        if len(set(self.gather([text]))) > 1:
            raise RunFault("the ranks' parameters differ", where=where)
        return text

    def require_same(self, facts: dict[str, Any]) -> None:
        """Check that every rank was given the same, before they act together.

        Args:
            facts: By name; compared as text.

        Raises:
            TrpoLMError: On every rank; names what differs, between which ranks.
        """
        texts = self.gather([{name: repr(value) for name, value in facts.items()}])
        rows = []
        for name in sorted({name for given in texts for name in given}):
            values = [given.get(name, "(absent)") for given in texts]
            other = next((r for r, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                rows.append(
                    f"\n  {name}: {values[0]:.60} on rank 0, {values[other]:.60} on rank {other}"
                )
        if rows:
            raise TrpoLMError(
                f"the ranks were not given the same:{''.join(rows)}",
                where="launcher",
                hint="every process needs the same settings, data, model and tokenizer",
            )

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Enter a collective once every rank has reported no failure."""
        self._check_in()
        with self._together():
            yield

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Turn the failure of a collective into `LostRanks`."""
        try:
            yield
        except RuntimeError as error:
            raise LostRanks(
                f"rank {self.rank} got no answer from the others: {first_line(error)}",
                where=f"stage {self._stage.name}",
                hint="a rank was killed, or needed longer than ddp_timeout",
            ) from error

    def _check_in(self, failure: Exception | None = None) -> None:
        """Exchange failures with the other ranks; raise the first one."""
        with self._together():
            failures = self.accelerator.reduce(
                torch.tensor(float(failure is not None), device=self.device), "sum"
            )
            if not failures:
                return
            faults = gather_object([] if failure is None else [(self.rank, _shared(failure))])
        rank, error = faults[0]
        if len(faults) < self.count:  # else it happened on all of them
            rank = f"rank {rank}"
            where = rank if error.where is None else f"{error.where}, {rank}"
            error = type(error)(error.what, where=where, hint=error.hint)
        raise error from failure


def _answer_launcher() -> None:
    """Refuse what a launcher can ask for and a run does not do."""
    asked = {
        name: os.environ.get(f"ACCELERATE_{name.upper()}", "").lower()
        for name in (
            "mixed_precision", "dynamo_backend", "gradient_accumulation_steps", "use_fsdp",
            "use_deepspeed", "use_megatron_lm", "use_parallelism_config",
        )
    }  # fmt: skip
    refused = [f"{k} {v}" for k, v in asked.items() if v not in ("", "no", "false", "0", "1")]
    if refused:
        dividing = {"use_fsdp", "use_deepspeed", "use_megatron_lm", "use_parallelism_config"}
        instead = "the adapters train in float32, and dtype is the precision of the base"
        if dividing & {name.split()[0] for name in refused}:
            instead = (
                "shard_base divides the frozen base among the processes of a node, the batch is "
                "divided anyway, and gradient_checkpointing and micro_batch_tokens save memory"
            )
        raise TrpoLMError(
            f"the launcher's settings ask for {', '.join(refused)}, which a run does not do",
            where="launcher",
            hint=f"launch without (accelerate launch --multi_gpu --mixed_precision no); {instead}",
        )


def _leave() -> None:
    """Stop the threads of the process group: one still running when Python exits aborts it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _shared(failure: Exception) -> TrpoLMError:
    """Return the error that all ranks raise when one of them failed."""
    if isinstance(failure, TrpoLMError):
        kind = SharedFault if isinstance(failure, RunFault) else TrpoLMError
        return kind(failure.what, where=failure.where, hint=failure.hint)
    if is_full(failure):
        return OutOfMemory(
            f"the device is out of memory{_peak()}: {failure}".removesuffix(": "),
            hint="lower max_completion_length, or a smaller model",
        )
    return SharedFault(f"{type(failure).__name__}: {failure}")


def _peak() -> str:
    """Return the peak of memory in use, as text."""
    if not torch.accelerator.is_available():
        return ""
    return f" (peak {torch.accelerator.max_memory_allocated() / 2**30:.1f} GiB)"
