"""Following a run from outside: whether it goes on, and its page kept up to date.

Imports no torch: what watches a run costs it nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trpo_lm.errors import TrpoLMError
from trpo_lm.report.log_tail import MetricsTail
from trpo_lm.report.page_sections import State
from trpo_lm.report.run_page import RunPage
from trpo_lm.storage import read_json
from trpo_lm.training.folder import RunFolder, is_running
from trpo_lm.training.manifest import MANIFEST


def find_run(folder: str | None) -> Path:
    """Return the folder of a run, which may have made no update yet.

    Raises:
        TrpoLMError: If it is none.
    """
    if folder is None:
        raise TrpoLMError("the folder of a run is needed", where="run")
    path = Path(os.path.expanduser(folder))
    if not os.path.isdir(path):
        what = "is a file, not a folder" if os.path.lexists(path) else "does not exist"
        hint = "name the output_dir of a training"
        raise TrpoLMError(f"{folder!r} {what}", where="run", hint=hint)
    run = RunFolder(path)
    if not (run.metrics.exists() or run.settings.exists() or is_running(path)):
        raise TrpoLMError(
            f"{folder!r} is not a run: it holds neither metrics.jsonl nor config.yaml",
            where="run",
            hint="name the output_dir of a training; of a comparison, one of its runs/ARM/seed-N",
        )
    return path


def run_state(folder: Path) -> State:
    """Return whether a process of this machine trains there, or else whether the run is complete.

    A run is finished when its results are those of the last update in its log.
    """
    if is_running(folder):
        return State("running")
    with suppress(TrpoLMError):
        update = read_json(folder / MANIFEST).get("update")
        if type(update) is int and update >= _last_update(folder):
            return State("finished")
    return State(
        "stopped",
        "No process of this machine trains here, and the results were not written: the run failed, "
        "was interrupted or killed, or it is on another machine.",
    )


def _last_update(folder: Path) -> int:
    tail = MetricsTail(RunFolder(folder).metrics)
    tail.read()
    return tail.rows[-1]["update"] if tail.rows else 0


def watch(page: RunPage, *, interval: float, told: Callable[[str], None] = print) -> State:
    """Write the page whenever its run has moved, until the run ends; return how it ended.

    Args:
        page: Of the run.
        interval: Between two looks, seconds.
        told: Gets a line when the page cannot be written, which may be for a moment only.
    """
    seen: object = None
    while True:
        state = run_state(page.folder)
        now = state, _signature(page.folder)
        if now != seen:
            try:
                page.write(state)
                seen = now
            except OSError as error:
                told(f"{page.folder}: the page could not be written: {error.strerror or error}")
                if state.kind != "running":
                    raise
        if state.kind != "running":
            return state
        time.sleep(interval)


def _signature(folder: Path) -> tuple[tuple[float, int], ...]:
    """Return time and size of every file that the page shows."""
    run = RunFolder(folder)
    found = []
    for path in (run.settings, run.metrics, run.completions, run.samples, folder / MANIFEST,
                 folder / "evaluation.json", folder / "token_view"):  # fmt: skip
        status = None
        with suppress(OSError):
            status = path.stat()
        found.append((0.0, -1) if status is None else (status.st_mtime, status.st_size))
    return tuple(found)
