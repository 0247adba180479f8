"""Run reward functions: in process, concurrently if async, or in killable workers.

A function that hangs cannot be stopped from within its own process, so a function with a time limit
runs in a worker process, which is killed when its time is up.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from torch import Tensor

from trpo_lm.errors import RunFault, TrpoLMError

_START_SECONDS = 120  # a worker process first imports torch and the function's module


class RemoteFailure(Exception):
    """Type and text of an exception in a worker process; its cause holds the traceback."""


class Worker:
    """A process for one function, so that a call that hangs can be killed.

    Spawned, not forked: the fork of a process with torch's threads may hang.
    """

    def __init__(self, function: Callable, name: str):
        context = multiprocessing.get_context("spawn")
        self.name, self.seconds, self.deadline, self.ready = name, 0.0, 0.0, False
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

    def ask(self, keywords: dict[str, Any], seconds: float) -> None:
        """Start a call with a limit in seconds, which excludes the start of the process."""
        if not self.ready:
            self._receive(_START_SECONDS, "did not start")
            self.ready = True
        if "log_metric" in keywords:
            keywords = {**keywords, "log_metric": None}
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.pipe.send(keywords)

    def answer(self) -> tuple[Any, dict[str, list[float]]]:
        """Return the function's result, or its exception, and its metrics."""
        fault = f"took more than {self.seconds:g} s and was stopped"
        result, failure, metrics = self._receive(self.deadline - time.monotonic(), fault)
        if failure:
            result = RemoteFailure(failure[0])
            result.__cause__ = RuntimeError(failure[1])
        return result, metrics

    def _receive(self, seconds: float, fault: str) -> Any:
        hint = "in a script, start training under `if __name__ == '__main__':`"
        try:
            if self.pipe.poll(max(0.0, seconds)):
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1)
            fault = f"lost its worker process (exit code {self.process.exitcode})"
        raise RunFault(f"reward {self.name!r} {fault}", hint=None if self.ready else hint)

    def close(self) -> None:
        """Kill the process and its children."""
        if self.process.pid and hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()


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
    if isinstance(value, Tensor):
        return value.detach().to_dense().double().cpu().numpy()
    return [_on_host(v) for v in value] if isinstance(value, (list, tuple)) else value


def collect_metric(metrics: dict[str, list[float]], name: str, value: float) -> None:
    """Add a value to the metrics; functions get it as `log_metric(name, value)`."""
    metrics.setdefault(name, []).append(float(value))
