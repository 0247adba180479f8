"""Evaluate a finished run on held-out prompts: its policy and reference, by its reward and a judge.

    python recipes/evaluate.py runs/sentiment
    python recipes/evaluate.py runs/sentiment --checkpoint best --judge data/judge

Model, reward, temperature and prompts are those of the run. The judge is a reward model used in no
training: if the score rises and the judge's does not, the policy exploits the reward instead of
improving the text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trpo_lm.cli import main, parse
from trpo_lm.config import option
from trpo_lm.errors import TrpoLMError
from trpo_lm.storage import replace_file, writable_file

DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Arguments:
    """What is judged, on what, by whom."""

    run: str | None = option(None, "folder of a run")
    checkpoint: str = option("last", "'last', 'best', or the number of a checkpoint")
    eval_dataset: str | None = option(
        None, "held-out prompts: file or hub id; default: those that the run was evaluated on"
    )
    prompt_column: str = option("prompt", "column of eval_dataset that holds the prompt")
    prompts: int | None = option(None, "how many of them, from the first one; default: all")
    completions: int = option(4, "completions sampled for each prompt")
    reward_model: str | None = option(None, "folder or hub id; default: the run's own rewards")
    reward_function: str | None = option(
        None, "module:callable to import as the reward, where the run's was one; runs its code"
    )
    judge: str | None = option(
        None, "reward model that nothing was trained on; default: the embedded one with its kind"
    )
    seed: int = option(0, "every random number derives from it")
    output: str | None = option(None, "file for the figures; default: RUN/evaluation.json")


# Name in the JSON, words for it, and its unit.
MEASURES = (
    ("score", "score", "reward"),
    ("greedy", "score, greedy", "reward"),
    ("judge", "score by the judge", "judge"),
    ("ref_kl", "KL to reference", "nats/completion"),
    ("entropy", "entropy", "nats/token"),
    ("length", "length", "tokens"),
    ("eos_rate", "ended by EOS", "share"),
    ("distinct_2", "distinct pairs", "share"),
    ("duplicates", "repeated", "share"),
    ("nll", "nll, reference text", "nats/token"),
)


def run() -> None:
    """Parse, sample, measure, print, write."""
    (a,) = parse((Arguments,), description=__doc__, positional=("run",))
    for name in ("completions", "prompts"):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            raise TrpoLMError(f"{name} = {getattr(a, name)} must be at least 1", where=name)
    output = None if a.output is None else writable_file(a.output)
    print(f"evaluating {a.run}: loading torch and transformers ...", flush=True)

    from trpo_lm.analysis.saved_run import evaluate, held_out_prompts, open_run
    from trpo_lm.lm.loading import quiet_loading
    from trpo_lm.lm.prompts import Prompts, load_prompts
    from trpo_lm.lm.reward_models import RewardModel
    from trpo_lm.lm.rewards import load_reward
    from trpo_lm.training.console import Console

    reward = a.reward_model if a.reward_function is None else load_reward(a.reward_function)
    opened = open_run(a.run, a.checkpoint, reward=reward)
    output = output or writable_file(opened.folder / "evaluation.json")
    if a.eval_dataset is not None:
        prompts = load_prompts(a.eval_dataset, column=a.prompt_column)
    else:
        prompts = held_out_prompts(opened)
    if prompts is None:
        raise TrpoLMError(
            "the run had no held-out prompts", where=a.run, hint="name some with --eval_dataset"
        )
    if a.prompts is not None:
        prompts = Prompts(*prompts.take(range(min(a.prompts, len(prompts)))))
    judge = a.judge
    sources = [source["model"] for source in opened.settings["reward_models"] if source]
    if judge is None and [Path(s).resolve() for s in sources] == [DATA / "reward_model"]:
        judge = str(DATA / "judge")
    with quiet_loading():
        model = None if judge is None else RewardModel(judge, device=opened.policy.device)
    found = evaluate(opened, prompts, completions=a.completions, seed=a.seed, judge=model)

    budget = opened.settings.get("max_ref_kl")
    console = Console(True, 1)
    title = f"{a.checkpoint} policy, update {opened.update}, and its reference"
    show(console, found, f"{title} on {len(prompts)} held-out prompts x {a.completions}")
    if budget is not None:
        console.note(f"budget: {budget} nats per completion from the reference")
    if judge is None:
        console.note("no judge: --judge NAME, a reward model that was not trained on")
    facts = {
        "checkpoint": a.checkpoint,
        "update": opened.update,
        "prompts": len(prompts),
        "completions_per_prompt": a.completions,
        "seed": a.seed,
        "rewards": opened.rewards.names,
        "judge": judge,
        "max_ref_kl": budget,
    }
    replace_file(output, json.dumps({**facts, **found}, indent=1, allow_nan=False).encode())
    console.note(f"figures: {output}")


def show(console: Any, found: dict, title: str) -> None:
    """Print what `evaluate` found, as a table."""
    rows = [
        [words, unit, *(_shown(found[side], name) for side in found)]
        for name, words, unit in MEASURES
        if found["policy"][name] is not None
    ]
    console.table(title, ["", "unit", "reference", "policy", "difference"], rows)
    console.note("[ ]: 95% bootstrap interval over prompts; differences prompt by prompt")


def _shown(side: dict, name: str) -> str:
    from trpo_lm.report.format import number

    if side.get(name) is None:
        return ""
    interval = side.get(f"{name}_interval")
    shown = "" if interval is None else f" [{number(interval[0])}, {number(interval[1])}]"
    return f"{number(side[name])}{shown}"


if __name__ == "__main__":
    main(run)
