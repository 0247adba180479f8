"""Compare update rules on the same prompts, reward and number of completions.

    accelerate launch recipes/compare.py            # or: python recipes/compare.py
    python recipes/compare.py --quick               # about two and a half minutes, two cores
    python recipes/compare.py --arms trpo:max_ref_kl=0.7,1.5 ppo:learning_rate=3e-4,1e-3:beta=0.1

An arm is an algorithm (trpo, npg, ppo, grpo, rloo, reinforce; with the extra `trl` installed also
trl-grpo and trl-rloo, TRL's own trainers) and its settings after colons; several values, with
commas, make a grid. Every arm runs with every seed. Finished runs are kept: the same command
resumes an interrupted comparison. It writes `comparison.html`, the pictures and their numbers;
`python -m trpo_lm.comparison_page FOLDER` draws them again.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from trpo_lm.cli import main, parse
from trpo_lm.config import (
    PPOSettings,
    TrainerConfig,
    TRLSettings,
    TRPOSettings,
    describe,
    option,
)
from trpo_lm.errors import TrpoLMError

DATA = Path(__file__).resolve().parent.parent / "data"
QUICK = (
    "--seeds=2 --updates=20 --prompts_per_update=128 --held_out=256 --held_out_completions=2 "
    "--limit_prompts=64"
)
ONE_STEP = {"epochs": "1", "minibatches": "1"}
# advantage estimator x update rule: the settings class, and the settings that make the row
ALGORITHMS: dict[str, tuple[type, dict[str, str]]] = {
    "trpo": (TRPOSettings, {}),
    "npg": (TRPOSettings, {"line_search_trials": "0"}),
    "ppo": (PPOSettings, {}),
    "grpo": (PPOSettings, {"advantage": "group_normalised", **ONE_STEP}),
    "rloo": (PPOSettings, {"advantage": "leave_one_out", **ONE_STEP, "clip": "none"}),
    "reinforce": (PPOSettings, {**ONE_STEP, "clip": "none", "lam": "1"}),
    "trl-grpo": (TRLSettings, {}),
    "trl-rloo": (TRLSettings, {"beta": "0.05"}),
}
GROUPS = {
    "grpo": 8,
    "rloo": 4,
    "trl-grpo": 8,
    "trl-rloo": 4,
}  # completions of a prompt, where the common setting is 1
PER_ARM = {"critic", "completions_per_prompt"}  # of the trainer's settings, an arm's own


@dataclass(frozen=True)
class Arguments:
    """What is compared, on what."""

    arms: list[str] | None = option(
        None, "algorithm:setting=value,value:setting=... for each arm or grid; default: trpo ppo"
    )
    seeds: int = option(3, "runs of each arm, with seed, seed + 1, ...")
    quick: bool = option(False, f"a small comparison: {QUICK}")
    model: str = option(str(DATA / "lm"), "causal LM: folder or hub id")
    reward_model: str = option(str(DATA / "reward_model"), "sequence classifier: folder or hub id")
    judge: str | None = option(
        None, "classifier that nothing is trained on; default: the embedded one with its kind"
    )
    dataset: str = option(str(DATA / "prompts_train.jsonl"), "prompts: file or hub id")
    eval_dataset: str | None = option(
        None, "held-out prompts; default: the embedded ones, or the last rows of the dataset"
    )
    prompt_column: str = option("prompt", "column of the datasets that holds the prompt")
    held_out: int = option(512, "held-out prompts on which every trained policy is measured")
    held_out_completions: int = option(4, "completions of each of them")
    limit_prompts: int = option(128, "held-out prompts from which the limit is computed")
    limit_samples: int = option(64, "samples of the reference for each; good up to log(n)/2 nats")


@dataclass(frozen=True)
class Defaults(TrainerConfig):
    """The trainer's settings with this recipe's own output folder."""

    output_dir: str = option("runs/compare", "folder that receives everything")


def expand(text: str, args: TrainerConfig) -> list[tuple[str, dict[str, str], Any, TrainerConfig]]:
    """Turn `algorithm:setting=value,value:...` into (algorithm, given, settings, args), checked."""
    where = f"arm {text}"
    algorithm, *parts = text.split(":")
    if algorithm not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise TrpoLMError(f"unknown algorithm {algorithm!r}; there are {known}", where=where)
    cls, row = ALGORITHMS[algorithm]
    names = [part.partition("=")[0] for part in parts]
    values = [part.partition("=")[2].split(",") for part in parts]
    arms = []
    for combination in itertools.product(*values):
        given = dict(zip(names, combination, strict=True))
        words = [f"--{name}={value}" for name, value in {**row, **given}.items()]
        try:
            settings, trainer = parse((cls, TrainerConfig), words)
        except TrpoLMError as error:
            raise TrpoLMError(error.what, where=where) from None
        others = {*given} - {f.name for f in fields(cls)}
        if others - PER_ARM:
            raise TrpoLMError(
                f"{min(others - PER_ARM)} cannot differ between arms", where=where,
                hint=f"of the trainer's settings an arm may set {', '.join(sorted(PER_ARM))}",
            )  # fmt: skip
        each = args.completions_per_prompt
        each = trainer.completions_per_prompt if "completions_per_prompt" in given else each
        each = GROUPS.get(algorithm, 1) if each == 1 else each
        if batch(args) % each:
            raise TrpoLMError(
                f"an update has {batch(args)} completions, which is not a multiple of {each}",
                where=where, hint="set prompts_per_update or completions_per_prompt",
            )  # fmt: skip
        own = replace(
            args,
            critic=trainer.critic if "critic" in given else args.critic,
            completions_per_prompt=each,
            prompts_per_update=batch(args) // each,  # every arm samples the same number
        )
        arms.append((algorithm, given, settings, own))
    return arms


def batch(args: TrainerConfig) -> int:
    return args.prompts_per_update * args.completions_per_prompt


def run() -> None:
    """Parse, run what is missing, draw the page."""
    words = sys.argv[1:]
    words = [*QUICK.split(), *words] if "--quick" in words else words
    a, args = parse((Arguments, Defaults), words, description=__doc__)
    expanded = [arm for text in a.arms or ["trpo", "ppo"] for arm in expand(text, args)]
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process:
        what = f"{len(expanded)} arms x {a.seeds} seeds x {args.updates} updates of {batch(args)}"
        print(f"{what} completions, into {args.output_dir}\nloading torch and transformers ...")
        sys.stdout.flush()

    from trpo_lm import PPO, TRPO
    from trpo_lm.comparison.sweep import Arm, Sweep
    from trpo_lm.lm.prompts import Prompts, load_both

    own = str(DATA / "prompts_test.jsonl") if a.dataset == Arguments.dataset else None
    prompts, held_out = load_both(
        a.dataset, a.eval_dataset or own, column=a.prompt_column, split_off=a.held_out
    )
    judge = a.judge
    if judge is None and a.reward_model == Arguments.reward_model:
        judge = str(DATA / "judge")
    rules = {TRPOSettings: TRPO, PPOSettings: PPO, TRLSettings: TRLSettings}
    arms = [
        Arm(
            " ".join([algorithm, *(f"{name}={value}" for name, value in given.items())]),
            algorithm, given, rules[type(settings)](**describe(settings)), own,
        )
        for algorithm, given, settings, own in expanded
    ]  # fmt: skip
    Sweep(
        a.model, a.reward_model, prompts,
        Prompts(*held_out.take(range(min(len(held_out), a.held_out)))), args, arms,
        seeds=a.seeds, judge=judge, completions=a.held_out_completions,
        limit_prompts=a.limit_prompts, limit_samples=a.limit_samples,
    ).run()  # fmt: skip
    if main_process:
        from trpo_lm.comparison.page import write_page

        print(f"\ncomparison: {write_page(args.output_dir)}")


if __name__ == "__main__":
    main(run)
