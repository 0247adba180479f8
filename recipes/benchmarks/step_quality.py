"""The gain of truncated solves, beside that of an exact solve of the same batch.

    F=path/to/film; python recipes/benchmarks/step_quality.py --model $F/lm --reward_model $F/rm \\
        --dataset $F/prompts_train.jsonl

TRPO trains for some updates. At the resulting policy, the step of one batch is computed with
several numbers of completions in the Fisher and of CG iterations, with the run's own damping and
metric. A step is evaluated on other batches: its gain by their mean gradient, and its KL, to which
all steps are scaled, by Fisher products on the whole of another batch. Net gain is g.x minus the
price of the step's change of R (at the policy's multiplier, 0 far below the budget), in standard
deviations of the advantage. Exact means all completions and a residual of 1e-4.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp

import torch

from trpo_lm import TrainerConfig, TRPOTrainer
from trpo_lm.cli import main, parse
from trpo_lm.config import option
from trpo_lm.core.adaptation import budget_on_batch
from trpo_lm.core.fisher import ScoreFisher
from trpo_lm.core.natural_step import farthest_step, solve
from trpo_lm.lm.rewards import load_reward

DATA = Path(__file__).resolve().parent.parent.parent / "data"
EXACT, RESIDUAL = 40, 1e-4  # CG iterations at most, and where an exact solve ends
NEAR = 0.1  # nats below the budget at which R begins to cost


@dataclass(frozen=True)
class Arguments:
    """Where the policy comes from, and which steps are tried."""

    model: str = option(str(DATA / "lm"), "causal LM")
    reward_model: str = option(str(DATA / "reward_model"), "sequence classifier")
    reward_function: str | None = option(
        None, "module:callable to import as the reward instead of the reward model"
    )
    dataset: str = option(str(DATA / "prompts_train.jsonl"), "prompts")
    max_ref_kl: float = option(1.5, "budget of the run, nats")
    seed: int = option(0, "of the run")
    prompts_per_update: int = option(256, "prompts of a batch")
    completions_per_prompt: int = option(1, "completions of each")
    max_completion_length: int = option(24, "tokens of a completion")
    max_kl: float = option(0.1, "trust region of the run, nats")
    batches: int = option(6, "batches; each makes steps, and judges those of the others")
    updates: list[int] = field(
        default_factory=lambda: [5, 14], metadata={"help": "updates after which steps are judged"}
    )
    fisher_completions: list[int] = field(
        default_factory=lambda: [16, 32, 64], metadata={"help": "completions in the Fisher"}
    )
    cg_iterations: list[int] = field(
        default_factory=lambda: [2, 3, 4, 8], metadata={"help": "iterations of each solve"}
    )
    output: str | None = option(None, "JSON file for the table")


def run() -> None:
    """Train, judge, print, train on."""
    (a,) = parse((Arguments,), description=__doc__)
    args = TrainerConfig(
        output_dir=mkdtemp(), seed=a.seed, prompts_per_update=a.prompts_per_update,
        completions_per_prompt=a.completions_per_prompt,
        max_completion_length=a.max_completion_length, updates=max(a.updates),
    )  # fmt: skip
    settings = {"max_ref_kl": a.max_ref_kl, "max_kl": a.max_kl}
    reward = a.reward_model if a.reward_function is None else load_reward(a.reward_function)
    trainer = TRPOTrainer(a.model, reward, train_dataset=a.dataset, args=args, settings=settings)
    tables = {}
    for stop in sorted(a.updates):
        while trainer.updates_done < stop:
            trainer.train_step()
        tables[stop] = judge(trainer, a)
        print(f"after {stop} updates; net gain, and its difference to the exact solve's")
        exact, *_ = tables[stop].values()
        for name, gains in tables[stop].items():
            less = [gain - best for gain, best in zip(gains, exact, strict=True)]
            error = statistics.stdev(less) / len(less) ** 0.5
            mean, difference = statistics.mean(gains), statistics.mean(less)
            print(f"  {name:32} {mean:8.4f} {difference:+8.4f} +- {error:.4f}")
    if a.output:
        Path(a.output).write_text(json.dumps(tables, indent=1))


def judge(trainer, a: Arguments) -> dict[str, list[float]]:
    """Return the net gain of each way to solve, from each of several batches."""
    rule, N = trainer.algorithm, a.prompts_per_update * a.completions_per_prompt
    objectives = collect(trainer, a.batches)
    sums = [objective.gradients(reference=True) for objective in objectives]
    g, b = (torch.stack([s[i].sum(0) / N for s in sums]) for i in (0, 1))
    fixed = replace(rule, cg_tolerance=0.0)
    ways = {"exact": (N, None), "the trainer's own": (None, rule)} | {
        f"{m} completions, {c} iterations": (m, replace(fixed, cg_iterations=c))
        for m in a.fisher_completions
        for c in a.cg_iterations
    }
    ways["scores, 8 iterations"] = (0, replace(fixed, cg_iterations=8))
    gains: dict[str, list[float]] = {name: [] for name in ways}
    for i, objective in enumerate(objectives):
        others = [j for j in range(len(objectives)) if j != i]
        R, error = objective.reference_kl()
        state = trainer.algorithm_state
        _, budget = budget_on_batch(state.reference, k=R, error=error, budget=a.max_ref_kl)
        _, limits = rule.step_limits(state, sums[i][0], R, budget, N)
        limits = replace(limits, radius=rule.max_kl)
        truth = objectives[others[0]].fisher(N)
        g_true, b_true = (x[others].double().mean(0) for x in (g, b))
        exact = replace(rule, cg_iterations=EXACT, cg_tolerance=RESIDUAL)
        worth, near = 0.0, a.max_ref_kl - NEAR < R
        if near:
            w = solve(truth, b_true.float(), limits, exact).x.double()
            worth = float(g_true @ w / (b_true @ w))
        for name, (completions, settings) in ways.items():
            F = scores(objective, N) if completions == 0 else objective.fisher(completions)
            v = solve(F, g[i], limits, settings or exact)
            w = solve(F, b[i], limits, settings or exact) if near else None
            x = farthest_step(F, v, w, g[i], b[i] if near else None, limits)[0].double()
            kl = float(x @ truth(x.float()).double()) / 2
            x *= (rule.max_kl / kl) ** 0.5
            dear = float(b_true @ x) + rule.max_kl  # b.x + 1/2 x.Fx
            gains[name].append(float(g_true @ x) - worth * dear)
    return gains


def scores(objective, N: float) -> ScoreFisher:
    """Return products of sampled scores, as the trainer makes them where no exact ones work."""
    return ScoreFisher(objective.scores(), count=N)


def collect(trainer, count: int) -> list:
    """Return objectives of fresh batches at the present policy, which stays where it is."""
    objectives, rule, update = [], trainer.algorithm, trainer.updates_done

    class Collector(type(rule)):
        def update(self, objective, state):
            objectives.append(objective)
            return state, {}

    trainer.algorithm = Collector(**vars(rule))
    for _ in range(count):
        trainer.train_step()
    trainer.algorithm, trainer.updates_done = rule, update
    return objectives


if __name__ == "__main__":
    main(run)
