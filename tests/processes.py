"""Processes for the tests: forked from a server that has imported torch once.

`run(function, *args)` calls a top-level function of a test module in a process of its own,
`ranks(count, function, *args)` in several that form a gloo group, as `accelerate launch` would.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["runs"])


def _target(function, args, environment, pipe, log):
    os.environ.update(environment)
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    try:
        pipe.send((True, function(*args)))
    except BaseException as error:
        traceback.print_exc()
        pipe.send((False, (type(error).__name__, getattr(error, "exit_code", None), str(error))))
    finally:
        sys.stdout.flush()
        pipe.close()


class Running:
    """A process that was started; `result` waits for it."""

    def __init__(self, function, args, environment=None, log=os.devnull):
        self.pipe, theirs = server.Pipe(duplex=False)
        environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | (environment or {})
        self.process = server.Process(
            target=_target, args=(function, args, environment, theirs, str(log)), daemon=True
        )
        self.process.start()
        theirs.close()

    def result(self, timeout=180):
        """Return (True, value), (False, (type, exit code, message)) or (None, exit status)."""
        try:
            if not self.pipe.poll(timeout):
                self.process.kill()
                raise TimeoutError(f"no answer within {timeout} s")
            answer = self.pipe.recv()
        except EOFError:
            answer = None
        self.process.join(timeout)
        return (None, self.process.exitcode) if answer is None else answer

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)


def run(function, *args, timeout=180, log=os.devnull):
    return Running(function, args, log=log).result(timeout)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(count, function, *args, logs=None):
    port = str(free_port())
    return [
        Running(
            function,
            args,
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            os.devnull if logs is None else logs / f"rank{rank}.log",
        )
        for rank in range(count)
    ]


def ranks(count, function, *args, timeout=180, logs=None):
    """Return what every rank returned or raised."""
    return [p.result(timeout) for p in start_ranks(count, function, *args, logs=logs)]
