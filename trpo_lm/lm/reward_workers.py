"""Run reward functions: in process, concurrently if async, or in killable workers.

A function that hangs cannot be stopped from within its own process, so a function with a time limit
runs in worker processes. One that runs out of time is killed with all that it started (pools of
other libraries kill the worker alone), and its completions are scored again one by one: only those
that hang by themselves go without a score. No torch here, so that a worker starts at once.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import multiprocessing
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from trpo_lm.errors import RunFault, TrpoLMError

_START_SECONDS = 120  # a worker process first imports the function's module
_HANGS = 3  # completions that hang alone, and none that does not: the function is broken


class RemoteFailure(Exception):
    """Type and text of an exception in a worker process; its cause holds the traceback."""


class Worker:
    """A process for one function, so that a call that hangs can be killed.

    Spawned, not forked: the fork of a process with torch's threads may hang. A shell that waits for
    the end of this process kills the worker and all it started, however this process dies.
    """

    def __init__(self, function: Callable, name: str):
        context = multiprocessing.get_context("spawn")
        self.name, self.deadline, self.ready = name, 0.0, False
        self.pipe, remote_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(remote_end, function), daemon=True)
        try:
            self.process.start()
        except Exception as error:
            raise TrpoLMError(
                f"reward {name!r} cannot be sent to a worker process: {error}",
                hint="define it at the top level of a module, or leave reward_timeout unset",
            ) from error
        finally:
            remote_end.close()
        pid = self.process.pid
        self.guard = subprocess.Popen(
            ["sh", "-c", f"read _; kill -9 -{pid}; kill -9 {pid}"],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def ask(self, keywords: dict[str, Any], seconds: float) -> None:
        """Start a call with a limit in seconds, which excludes the start of the process."""
        if not self.ready:
            try:
                if not self.pipe.poll(_START_SECONDS):
                    raise RunFault(f"reward {self.name!r} did not start")
                self.pipe.recv()
            except (EOFError, OSError):
                hint = "in a script, start training under `if __name__ == '__main__':`"
                raise RunFault(self.lost(), hint=hint) from None
            self.ready = True
        self.deadline = time.monotonic() + seconds
        self.pipe.send(keywords)

    def lost(self) -> str:
        """Say that the process has died."""
        self.process.join(1)
        return f"reward {self.name!r} lost its worker process (exit code {self.process.exitcode})"

    def close(self) -> None:
        """Kill the process and its children."""
        if self.process.pid and hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.guard.kill()
        self.guard.communicate()


class _Task(NamedTuple):
    """Some completions of a call."""

    rows: list[int]
    attempts: int = 1


class Answer(NamedTuple):
    """What a function in workers returned.

    Attributes:
        result: Its rewards, or its exception.
        metrics: What it passed to `log_metric`, by name.
        timed_out: Completions that it could not score in time; their reward is None.
    """

    result: Any
    metrics: dict[str, list[float]]
    timed_out: int


class Pool:
    """The workers of one function.

    Args:
        function: Must be importable by its module.
        name: For messages.
        count: Processes; completions are shared between them in order.
        seconds: Limit of one call.
        retries: Further attempts when a call raises, or its process is lost.

    Raises:
        TrpoLMError: If the function cannot be sent to a process.
    """

    def __init__(self, function: Callable, name: str, *, count: int, seconds: float, retries: int):
        self.function, self.name = function, name
        self.seconds, self.retries = seconds, retries
        self.idle: list[Worker] = []
        self.busy: dict[Any, tuple[Worker, _Task]] = {}  # by pipe
        try:
            for _ in range(count):
                self.idle.append(Worker(function, name))
        except TrpoLMError:
            self.close()
            raise

    def close(self) -> None:
        """Kill all processes."""
        for worker in [*self.idle, *(worker for worker, _ in self.busy.values())]:
            worker.close()
        self.idle, self.busy = [], {}

    def run(self, keywords: dict[str, Any], count: int) -> Answer:
        """Score `count` completions.

        Args:
            keywords: Arguments of the function; all but trainer_state and log_metric are lists of
                `count` values.
            count: Number of completions.

        Raises:
            RunFault: If a process is lost more often than may be retried, or the function hangs on
                every completion.
        """
        share = -(-count // len(self.idle))
        rows = list(range(count))
        waiting = [_Task(rows[k : k + share]) for k in range(0, count, share)]
        results: dict[int, Any] = {}
        metrics: dict[str, list[float]] = {}
        timed_out = alone = 0
        while waiting or self.busy:
            while waiting and self.idle:
                worker, task = self.idle.pop(), waiting.pop(0)
                self.busy[worker.pipe] = worker, task
                worker.ask(_part(keywords, task.rows), self.seconds)
            first = min(worker.deadline for worker, _ in self.busy.values())
            wait(list(self.busy), max(0.0, first - time.monotonic()))
            for worker, task in [*self.busy.values()]:
                answer, lost = None, ""
                try:
                    answer = worker.pipe.recv() if worker.pipe.poll() else None
                except (EOFError, OSError):
                    lost = worker.lost()
                if answer is None and not lost and time.monotonic() < worker.deadline:
                    continue
                del self.busy[worker.pipe]
                if answer is None:
                    worker.close()
                    worker = Worker(self.function, self.name)
                self.idle.append(worker)
                if answer is None and not lost:  # out of time
                    if len(task.rows) > 1:
                        waiting += [_Task([row]) for row in task.rows]
                        continue
                    results[task.rows[0]] = None
                    timed_out += 1
                    if timed_out >= _HANGS and not alone:
                        raise RunFault(
                            f"reward {self.name!r} took more than {self.seconds:g} s and was "
                            f"stopped, for each of {timed_out} completions alone"
                        )
                    continue
                result: Any
                result, failure, logged = answer or (None, None, {})
                if (lost or failure) and task.attempts <= self.retries:
                    waiting.append(_Task(task.rows, task.attempts + 1))
                    continue
                if lost:
                    raise RunFault(lost)
                if failure:
                    exception = RemoteFailure(failure[0])
                    exception.__cause__ = RuntimeError(failure[1])
                    return Answer(exception, metrics, timed_out)
                alone += len(task.rows) == 1
                for name, values in logged.items():
                    metrics.setdefault(name, []).extend(values)
                if len(task.rows) == count:
                    return Answer(result, metrics, timed_out)
                if not _matches(result, task.rows):
                    what = f"returned {result!r:.60} for {len(task.rows)} completions"
                    raise RunFault(f"reward {self.name!r} {what}")
                results |= dict(zip(task.rows, result, strict=True))
        return Answer([results[row] for row in rows], metrics, timed_out)


def _part(keywords: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Return the arguments for some of the completions."""
    whole = {"trainer_state", "log_metric"}
    part = {n: v if n in whole else [v[row] for row in rows] for n, v in keywords.items()}
    return part | {"log_metric": None} if "log_metric" in part else part


def _matches(result: Any, rows: list[int]) -> bool:
    """Whether a result has one entry for each completion."""
    return getattr(result, "ndim", 1) == 1 and hasattr(result, "__len__") and (
        not isinstance(result, str) and len(result) == len(rows)
    )  # fmt: skip


def _serve(pipe: Any, function: Callable) -> None:
    """Serve calls until the other end closes; runs in the worker process."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own: killed as a whole, and out of reach of Ctrl-C
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            keywords, metrics, failure = pipe.recv(), {}, None
            if "log_metric" in keywords:
                keywords["log_metric"] = functools.partial(collect_metric, metrics)
            (result,) = call([(function, keywords)])
            if isinstance(result, BaseException):
                text = "".join(traceback.format_exception(result))
                result, failure = None, (f"{type(result).__name__}: {result}", text)
            pipe.send((result, failure, metrics))


def call(calls: list[tuple[Callable, dict[str, Any]]]) -> list[Any]:
    """Call functions in turn, async ones concurrently; exceptions are returned."""
    results: list[Any] = []
    for function, keywords in calls:
        try:
            results.append(function(**keywords))
        except Exception as error:
            results.append(error)
    waiting = [k for k, result in enumerate(results) if inspect.isawaitable(result)]
    for k, result in zip(waiting, _await_all([results[k] for k in waiting]), strict=True):
        results[k] = result
    for k, result in enumerate(results):
        try:
            results[k] = _on_host(result)
        except Exception as error:  # a tensor without values
            results[k] = error
    return results


def _await_all(awaitables: list[Any]) -> list[Any]:
    """Await all concurrently; exceptions are returned."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(gather()) if awaitables else []
    with ThreadPoolExecutor(1) as pool:  # a notebook's thread already runs a loop
        return pool.submit(lambda: asyncio.run(gather())).result()


def _on_host(value: Any) -> Any:
    """Turn tensors into arrays and tuples into lists."""
    if hasattr(value, "detach"):
        return value.detach().to_dense().double().cpu().numpy()
    return [_on_host(v) for v in value] if isinstance(value, (list, tuple)) else value


def collect_metric(metrics: dict[str, list[float]], name: str, value: float) -> None:
    """Add a value to the metrics; functions get it as `log_metric(name, value)`."""
    metrics.setdefault(name, []).append(float(value))
