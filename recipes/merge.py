"""Merge a finished run's adapter into its base: a plain transformers model, no peft needed.

    python recipes/merge.py runs/sentiment merged
    python recipes/merge.py runs/sentiment merged --checkpoint best

The weights are written in float32, so that the merged logits equal the policy's; a base that was
quantised for the training is written as the weights it was quantised to. Sample the merged model at
the temperature of the training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trpo_lm.cli import main, parse
from trpo_lm.config import option
from trpo_lm.errors import TrpoLMError
from trpo_lm.storage import writable_folder


@dataclass(frozen=True)
class Arguments:
    """Which policy, and where to."""

    run: str | None = option(None, "folder of a run")
    out: str | None = option(None, "new folder for the merged model and its tokenizer")
    checkpoint: str = option("last", "'last', 'best', or the number of a checkpoint")


def run() -> None:
    """Parse, load, merge, write."""
    (a,) = parse((Arguments,), description=__doc__, positional=("run", "out"))
    if a.run is None or a.out is None:
        raise TrpoLMError("a run and a folder for the merged model are needed", where="run, out")
    writable_folder(Path(a.out).resolve(), new=True, where="out")
    print(f"merging {a.run}: loading torch and transformers ...", flush=True)

    from trpo_lm.analysis.saved_run import merge, open_run

    opened = open_run(a.run, a.checkpoint, plain=True)
    merge(opened, a.out)
    print(f"{a.checkpoint} policy (update {opened.update}) merged: {a.out}")
    temperature = opened.settings["temperature"]
    if temperature != 1:
        print(f"it was trained at temperature {temperature}: sample it there")


if __name__ == "__main__":
    main(run)
