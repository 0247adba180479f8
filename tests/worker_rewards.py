"""Reward functions for worker processes, which import this module and so no torch."""

import asyncio
import os


def hang(completions):
    os.system("sleep 600 &")  # what a function leaves behind is killed with it
    while True:
        pass


def worker_raises(completions):
    raise KeyError("lost")


def worker_exits(completions):
    os._exit(7)


def hangs_on_w8(completions, answer):
    if any("w8" in c for c in completions):
        hang(completions)
    return [float(len(c)) + a for c, a in zip(completions, answer, strict=True)]


def own_pid(completions, log_metric):
    log_metric("calls", len(completions))
    return [float(os.getpid())] * len(completions)


def chunks_only(completions):
    return [1.0] * (len(completions) - 1)


class Flaky:
    """Fails, or dies, in its first calls; a file counts them over all processes."""

    def __init__(self, file, failures, dies):
        self.file, self.failures, self.dies = file, failures, dies

    def __call__(self, completions):
        with open(self.file, "a") as calls:
            calls.write("x")
        if os.path.getsize(self.file) <= self.failures:
            os._exit(7) if self.dies else 1 / 0
        return [1.0] * len(completions)


def chat_in_worker(completions):
    return [float(len(c[0]["content"])) for c in completions]


def nap(completions):
    os.system("sleep 600 & sleep 600")


def worker_kit(completions, log_metric, answer):
    import torch

    log_metric("pid", os.getpid())
    return torch.tensor([float(a) for a in answer]) + 1


async def slow(completions):
    await asyncio.sleep(0.1)
    return [float(len(c.split())) for c in completions]
