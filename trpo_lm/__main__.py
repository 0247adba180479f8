"""The command `trpo-lm`: every recipe as a word, wherever the package is installed.

    trpo-lm sentiment --output_dir runs/mine
    accelerate launch -m trpo_lm sentiment
    torchrun --nproc_per_node 2 -m trpo_lm sentiment

The recipes are those of the clone, or of the package where there is no clone; each is run as
`python recipes/NAME.py` would run it.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from trpo_lm import __version__, cli
from trpo_lm.errors import TrpoLMError


class Command(NamedTuple):
    """A recipe, and what is added to its command line."""

    script: Path
    summary: str
    flags: tuple[str, ...] = ()


def commands() -> dict[str, Command]:
    """Return the commands by name: one for each recipe, and the two that train nothing."""
    found = {}
    for script in sorted(cli.recipes().glob("*.py")):
        text = script.read_text(encoding="utf-8")
        if "__main__" in text:  # else it is a part of a recipe
            summary = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            found[script.stem.replace("_", "-")] = Command(script, summary)
    if sentiment := found.get("sentiment"):
        plan = "Say what a run needs of memory and what fits: sentiment --dry_run."
        found["plan"] = Command(sentiment.script, plan, ("--dry_run",))
        examine = "Make all checks of a run's start, and print them: sentiment --examine."
        found["examine"] = Command(sentiment.script, examine, ("--examine",))
    return found


def run() -> None:
    """Run the recipe that the command line names, or list the recipes.

    Raises:
        TrpoLMError: If there is no such recipe.
    """
    found = commands()
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print("usage: trpo-lm COMMAND [--config FILE.yaml] [--setting value ...]\n")
        for command, (_, summary, _) in found.items():
            print(f"  {command:<16}{summary}")
        print("\ntrpo-lm COMMAND --help lists the settings of a command.")
        print("Several processes: torchrun --nproc_per_node 2 -m trpo_lm COMMAND ...")
        return
    if name == "--version":
        print(f"trpo_lm {__version__}")
        return
    name = name.replace("_", "-")
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        raise TrpoLMError(
            f"unknown command {name!r}" + (f"; did you mean {close[0]}?" if close else ""),
            where="command line",
            hint="trpo-lm --help lists the commands",
        )
    script, _, flags = found[name]
    sys.argv = [str(script), *words, *flags]
    sys.path.insert(0, str(script.parent))  # as Python does for a script: recipes share code
    runpy.run_path(str(script), run_name="__main__")


def main() -> NoReturn:
    """Run a command, and exit with its exit code."""
    cli.main(run)


if __name__ == "__main__":
    main()
