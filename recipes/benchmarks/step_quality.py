"""How good is a cheap step? Its gain beside that of an exact solve of the same batch.

    F=path/to/film; python recipes/benchmarks/step_quality.py --model $F/lm --reward_model $F/rm \\
        --dataset $F/prompts_train.jsonl

TRPO trains for some updates. At the policy that it has reached, the step of one batch is solved for
in several ways, completions in the Fisher x CG iterations, with the run's own damping and metric.
A step is judged by what it was not made from: gradients averaged over the other batches, and Fisher
products on the whole of another batch, by which all steps are scaled to the same KL. Net gain is
g.x less what the step's change of R is worth (at the policy's multiplier, 0 far below the budget),
in standard deviations of the advantage. Exact means all completions and 40 iterations.
"""

from __future__ import annotations

import copy
import json
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp

import torch

from trpo_lm import TrainerConfig, TRPOTrainer
from trpo_lm.algorithms.trpo import solve, spanning
from trpo_lm.cli import main, parse
from trpo_lm.config import option
from trpo_lm.core.adaptation import budget_on_batch, running_rms, wiener_damping
from trpo_lm.core.trust_region import plane_step
from trpo_lm.lm.objective import fisher, gradients, noise, reference_kl

DATA = Path(__file__).resolve().parent.parent.parent / "data"
EXACT = 40  # CG iterations
NEAR = 0.1  # nats below the budget at which R begins to cost


@dataclass(frozen=True)
class Arguments:
    """Where the policy comes from, and which steps are tried."""

    model: str = option(str(DATA / "lm"), "causal LM")
    reward_model: str = option(str(DATA / "reward_model"), "sequence classifier")
    dataset: str = option(str(DATA / "prompts_train.jsonl"), "prompts")
    max_ref_kl: float = option(1.5, "budget of the run, nats")
    seed: int = option(0, "of the run")
    prompts_per_update: int = option(256, "completions in a batch")
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
        max_completion_length=24, updates=max(a.updates),
    )  # fmt: skip
    settings = {"max_ref_kl": a.max_ref_kl}
    trainer = TRPOTrainer(a.model, a.reward_model, a.dataset, args, settings=settings)
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
    policy, reduce, N = trainer.policy, trainer.ranks.reduce, float(a.prompts_per_update)
    batches = collect(trainer, a.batches)
    sums = [gradients(policy, batch, reduce, N, reference=True) for batch in batches]
    g, b = (torch.stack([s[i].sum(0) / N for s in sums]) for i in (0, 1))
    ways = {f"{int(N)} completions, {EXACT} iterations": (int(N), EXACT)} | {
        f"{m} completions, {c} iterations": (m, c)
        for m in a.fisher_completions
        for c in a.cg_iterations
    }
    gains: dict[str, list[float]] = {name: [] for name in ways}
    for i, batch in enumerate(batches):
        others = [j for j in range(len(batches)) if j != i]
        solve_for, step_of = solver(trainer, batch, sums[i][0], g[i], b[i], N)
        truth = fisher(policy, batches[others[0]], reduce, int(N))
        g_true, b_true = (x[others].double().mean(0) for x in (g, b))
        k = reference_kl(batch, reduce, N)[0]
        worth = 0.0
        if k > a.max_ref_kl - NEAR:
            w = solve_for(truth, EXACT, b_true.float()).x.double()
            worth = float(g_true @ w / (b_true @ w))
        for name, (completions, iterations) in ways.items():
            x = step_of(fisher(policy, batch, reduce, completions), iterations)
            kl = float(x @ truth(x.float()).double()) / 2
            x *= (trainer.algorithm.max_kl / kl) ** 0.5
            dear = float(b_true @ x) + trainer.algorithm.max_kl  # b.x + 1/2 x.Fx
            gains[name].append(float(g_true @ x) - worth * dear)
    return gains


def solver(trainer, batch, halves_g, g, b, N: float):
    """Return two functions of F and iterations: its solve for a vector, and the run's own step."""
    rule, state = trainer.algorithm, copy.deepcopy(trainer.algorithm_state)
    metric = running_rms(state, g)
    seen = noise(halves_g * metric.rsqrt(), N)
    damping = wiener_damping(state["noise"], signal=seen.signal, variance=seen.variance, N=N)
    k, error = reference_kl(batch, trainer.ranks.reduce, N)
    K = budget_on_batch(state["reference"], k=k, error=error, budget=rule.max_ref_kl)

    def solve_for(F, iterations: int, rhs: torch.Tensor):
        return solve(F, rhs, damping, metric, replace(rule, cg_iterations=iterations))

    def step_of(F, iterations: int) -> torch.Tensor:
        v, w = (solve_for(F, iterations, rhs) for rhs in (g, b))
        plane, curved = spanning(F, v, w)
        slopes = plane @ g.double(), plane @ b.double()
        step = plane_step(plane @ curved.T, *slopes, delta=rule.max_kl, excess=k - K)
        return torch.tensor(step.multipliers, dtype=torch.float64) @ plane

    return solve_for, step_of


def collect(trainer, count: int) -> list:
    """Return measured batches with advantages at the present policy, which stays where it is."""
    found, rule, update = [], trainer.algorithm, trainer.updates_done

    class Collector(type(rule)):
        def update(self, policy, batch, reduce, state, seed=()):
            found.append(batch)
            return {}

    trainer.algorithm = Collector(**vars(rule))
    for _ in range(count):
        trainer.train_step()
    trainer.algorithm, trainer.updates_done = rule, update
    return found


if __name__ == "__main__":
    main(run)
