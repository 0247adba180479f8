"""Write the page of a run: one HTML file to read in a browser, without a server.

    python recipes/view.py runs/sentiment
    python recipes/view.py runs/sentiment --watch
    python recipes/view.py runs/sentiment --completions_mb 100

The page has scores against the reference's, both KLs against their limits, every other metric, what
became of each step and why, and completions to page and search through. A run writes its page by
itself; this recipe writes it for a run that is over, for one that was killed, or with more
completions on it. It reads the run's files and loads no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from trpo_lm.cli import main, parse
from trpo_lm.config import option
from trpo_lm.errors import RunFault, TrpoLMError


@dataclass(frozen=True)
class Arguments:
    """Which run, and how much of it."""

    run: str | None = option(None, "folder of a run")
    watch: bool = option(False, "write the page again while the run goes on, and end with it")
    interval: float = option(5.0, "seconds between two looks at the run with --watch, at least 0.5")
    completions_mb: float = option(
        4.0, "megabytes of completions.jsonl on the page: the newest, and an even sample of others"
    )


def run() -> None:
    """Parse, read, write."""
    (a,) = parse((Arguments,), description=__doc__, positional=("run",))
    if not 0.5 <= a.interval <= 3600:
        raise TrpoLMError(f"interval = {a.interval} must be 0.5 to 3600 s", where="interval")
    if not 0 <= a.completions_mb <= 2000:
        what = f"completions_mb = {a.completions_mb} must be 0 to 2000"
        raise TrpoLMError(what, where="completions_mb")

    from trpo_lm.report.run_page import RunPage
    from trpo_lm.training.follow import find_run, run_state, watch

    folder = find_run(a.run)
    page = RunPage(folder, room=int(a.completions_mb * 1e6))
    state = run_state(folder)
    try:
        path = page.write(state)
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): the run is {state.kind}", flush=True)
        if a.watch and state.kind == "running":
            print("watching; Ctrl-C stops the watching, not the run", flush=True)
            state = watch(page, interval=a.interval)
            print(f"{path}: the run is {state.kind}")
    except OSError as error:
        raise RunFault(
            f"the page could not be written: {error.strerror or error}", where=str(folder)
        ) from error
    print(f"open {path.resolve().as_uri()}")


if __name__ == "__main__":
    main(run)
