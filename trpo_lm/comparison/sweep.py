"""Many runs in one folder: every arm with every seed, measured alike, and none run twice.

    FOLDER/reference.json              the reference on held-out prompts, and the limit
    FOLDER/runs/ARM/seed-N/            a run's own folder, written by the trainer
    FOLDER/runs/ARM/seed-N/result.json written last: this run is finished

An arm is an algorithm with its settings. Prompts, reward, critic, batch and seeds are common to
all, each run gets a trainer of its own, and randomness is derived from the seed: an arm's result
does not depend on which others ran before it. A run whose result was made with other settings is
an error, never overwritten. `comparison` draws the page.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from trpo_lm.algorithms.algorithm import Algorithm
from trpo_lm.analysis.probe import probe
from trpo_lm.comparison.limit import limit_curve, reference_scores
from trpo_lm.comparison.trl_arms import Task, check_trl, train_with_trl
from trpo_lm.config import Limits, TrainerConfig, TRLSettings, describe
from trpo_lm.errors import Interrupted, RunFault, TrpoLMError
from trpo_lm.lm.loading import load_model, quiet_loading
from trpo_lm.lm.prompts import Prompts
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.rollout import Rollout
from trpo_lm.storage import Row, replace_file
from trpo_lm.training.assembly import Parts, assemble, fit_data, load_data, make_rewards
from trpo_lm.training.folder import require_usable
from trpo_lm.training.ranks import Ranks
from trpo_lm.training.state import FREE
from trpo_lm.training.trainer import Trainer

SHOWN = 8  # held-out samples kept of each run


@dataclass(frozen=True)
class Arm:
    """One column of a comparison.

    Attributes:
        name: As it was asked for: `ppo beta=0.1`.
        algorithm: First word of the name: arms of one algorithm form a family.
        given: The settings that were asked for, as text.
        rule: The update rule with all its settings, or those of TRL's trainer.
        args: The trainer's settings; seed and folder are set here.
    """

    name: str
    algorithm: str
    given: dict[str, str]
    rule: Algorithm | TRLSettings
    args: TrainerConfig


class Progress:
    """The `Display` of all runs together: one line.

    On a terminal the line is rewritten; elsewhere there is a new one at most every 20 seconds, and
    one for each run that ends. Only updates are shown.
    """

    def __init__(self, updates: int, *, enabled: bool):
        self.total, self.done, self.label = updates, 0, ""
        self.enabled, self.terminal = enabled, enabled and sys.stdout.isatty()
        self._timed, self._seconds, self._last = 0, 0.0, time.monotonic()
        self._shown = 0.0

    def start(self, label: str) -> None:
        """Begin something; the time of its first update counts from here."""
        self.label, self._last = label, time.monotonic()

    def update(self, row: Row, limits: Limits) -> None:
        """Count an update and show it."""
        now = time.monotonic()
        self._seconds, self._timed = self._seconds + now - self._last, self._timed + 1
        self._last = now
        self.done += 1
        score, kl = row.get("objective/score_mean"), row.get("objective/ref_kl")
        text = "" if score is None or kl is None else f"  score {score:.3f}  ref_kl {kl:.2f}"
        self.say(f"update {row['update']}{text}", now=False)

    def say(self, text: str, *, now: bool = True) -> None:
        """Show how far the sweep is."""
        moment = time.monotonic()
        if not self.enabled or not (now or self.terminal or moment - self._shown > 20):
            return
        self._shown = moment
        left = ""
        if self._timed:
            minutes = self._seconds / self._timed * (self.total - self.done) / 60
            left = f"  about {minutes:.0f} min left"
        line = f"{self.done / max(1, self.total):4.0%}{left}  {self.label}  {text}"
        print(
            f"\r\x1b[2K{line[:110]}" if self.terminal else line, end="" if self.terminal else "\n"
        )
        sys.stdout.flush()

    def banner(self, facts: Any, first_score: Any) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def samples_due(self, update: int) -> bool:
        """Show none."""
        return False

    def samples(self, rows: Any, title: str) -> None:
        """Show nothing."""

    def table(self, title: str, header: Any, rows: Any) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing: the line is that of the next run too."""


class Sweep:
    """Runs every arm and seed that a folder lacks.

    Args:
        model: As for `Trainer`, by name: every run loads it anew.
        reward: Likewise.
        prompts: What all runs train on.
        held_out: What every trained policy is measured on.
        args: The trainer's settings; `output_dir` is the folder of the whole.
        arms: What to compare; names are distinct.
        seeds: Runs of each arm, with `args.seed` and those after it.
        judge: Name of a reward model that nothing is trained on, or None.
        completions: Sampled for each held-out prompt.
        limit_prompts: Held-out prompts that the limit is computed from.
        limit_samples: Samples of the reference for each of them.

    Raises:
        TrpoLMError: If two arms share a name, or one needs TRL where it cannot run.
    """

    def __init__(
        self,
        model: str,
        reward: str,
        prompts: Prompts,
        held_out: Prompts,
        args: TrainerConfig,
        arms: Sequence[Arm],
        *,
        seeds: int = 3,
        judge: str | None = None,
        completions: int = 4,
        limit_prompts: int = 128,
        limit_samples: int = 64,
    ):
        names = [arm.name for arm in arms]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise TrpoLMError(f"duplicate arm {twice[0]!r}", where="arms")
        if any(isinstance(arm.rule, TRLSettings) for arm in arms):
            check_trl()
        self.model, self.reward, self.prompts, self.held_out = model, reward, prompts, held_out
        self.args, self.arms, self.seeds = args, arms, seeds
        self.folder = Path(args.output_dir)
        with quiet_loading():
            self.judge = RewardModel(judge) if judge is not None else None
        self.completions = completions
        self.limit_prompts, self.limit_samples = limit_prompts, limit_samples
        self.ranks = Ranks(args.ddp_timeout)
        self.progress = Progress(seeds * len(arms) * args.updates, enabled=self.ranks.main)
        common = {
            **describe(args), "model": model, "reward_model": reward, "judge": judge,
            "prompts": len(prompts), "held_out": len(held_out), "completions": completions,
        }  # fmt: skip
        free = {*FREE, "seed", "micro_batch_tokens"} - {"updates"}
        self.common = {k: v for k, v in common.items() if k not in free}
        self._text: Rollout | None = None  # the reference's own held-out completions

    def run(self) -> None:
        """Measure the reference, then run every arm with every seed, seed by seed.

        Raises:
            TrpoLMError: If something finished was made with other settings.
            Interrupted: When a signal stopped it; the same call resumes from there.
        """
        self._reference()
        for seed in range(self.args.seed, self.args.seed + self.seeds):
            for arm in self.arms:
                self._run(arm, seed)

    def _reference(self) -> None:
        self.progress.start("reference")
        parts = self._task(replace(self.args, output_dir=str(self.folder / "runs"))).parts
        self._text = self._sample(parts)
        few = range(min(self.limit_prompts, len(self.held_out)))
        spec = {**self.common, "limit_prompts": len(few), "limit_samples": self.limit_samples}
        if self.is_finished(self.folder / "reference.json", spec):
            return
        prompts, columns = self.held_out.take(few)
        scores = reference_scores(
            parts.policy, parts.mdp, prompts, columns,
            samples=self.limit_samples, seed=(0, "limit"),
            progress=lambda n: self.progress.say(f"limit: {n} of {len(few)} prompts", now=False),
        )  # fmt: skip
        result = {"spec": spec, **self._measured(parts, self._text)}
        self._write(self.folder / "reference.json", {**result, "limit": limit_curve(scores)})

    def _run(self, arm: Arm, seed: int) -> None:
        """Train one arm with one seed, measure what came out, and write its result."""
        folder = self.folder / "runs" / arm.name.replace(" ", "_") / f"seed-{seed}"
        own = {k: v for k, v in describe(arm.args).items() if k in self.common}
        spec = {**self.common, **own, "algorithm": arm.algorithm, **describe(arm.rule)}
        self.progress.start(f"{arm.name}, seed {seed}")
        before = self.progress.done
        if self.is_finished(folder / "result.json", spec, arm.rule):
            self.progress.done = before + self.args.updates
            return
        result: Row = {
            "spec": spec, "arm": arm.name, "algorithm": arm.algorithm, "given": arm.given,
            "seed": seed,
        }  # fmt: skip
        args, rule = replace(arm.args, seed=seed, output_dir=str(folder)), arm.rule
        if isinstance(rule, TRLSettings):
            task = self._task(args)
            with quiet_loading():
                model = load_model(self.model, args, device=self.ranks.device)
            train, parts = partial(train_with_trl, task, model, rule, arm.algorithm), task.parts
            passes = _count_passes(model)
        else:
            trainer = self._trainer(args, rule)
            train, parts = trainer.train, trainer.parts
            trainer.policy.passes = passes = [0]
        try:
            rows = train()
            size = arm.args.prompts_per_update * arm.args.completions_per_prompt
            resumed = len(rows) < self.args.updates
            result["passes"] = None if resumed else passes[0] / (size * len(rows))
            result |= self._measured(parts, self._sample(parts))
        except Interrupted as stop:
            message = f"{str(stop).partition(';')[0]}; the same command resumes from here"
            raise Interrupted(message, signum=stop.exit_code - 128) from None
        except RunFault as fault:
            if "non-finite" not in str(fault):
                raise
            result["fault"] = str(fault)  # a policy that blew up is a result
        self.progress.done = before + self.args.updates
        self._write(folder / "result.json", result)
        held_out = result.get("held_out")
        self.progress.say(
            f"failed: {result['fault']}" if held_out is None else
            f"held-out score {held_out['score']:.3f} at {held_out['ref_kl']:.2f} nats"
        )  # fmt: skip

    def _trainer(self, args: TrainerConfig, rule: Algorithm) -> Trainer:
        args = replace(args, resume_from_checkpoint="auto", logging_steps=1, save_total_limit=1)
        return Trainer(
            self.model,
            self.reward,
            train_dataset=self.prompts,
            args=args,
            algorithm=rule,
            display=self.progress,
        )

    def _task(self, args: TrainerConfig) -> Task:
        """Return the parts and prompts of a run, before training."""
        args = replace(args, resume_from_checkpoint="auto")
        self.ranks.on_main(lambda: require_usable(args))
        data = load_data(self.prompts, None, "prompt", args, self.ranks.count)
        rewards = make_rewards(self.reward, data, args, self.ranks.device)
        parts = assemble(self.model, rewards, args, device=self.ranks.device)
        prompts = fit_data(data, parts, args, self.progress.say).train
        return Task(parts, prompts, args, self.ranks, self.progress)

    def _sample(self, parts: Parts) -> Rollout:
        """Sample the held-out prompts with fixed seeds; every rank does the same."""
        return parts.mdp.rollout(
            parts.policy,
            self.held_out.prompts,
            columns=self.held_out.columns,
            completions_per_prompt=self.completions,
            seed=(0, "compare"),
        )

    def _measured(self, parts: Parts, rollout: Rollout) -> Row:
        assert self._text is not None
        held_out = probe(parts.policy, rollout, self._text, judge=self.judge)
        samples = [
            {
                "prompt": rollout.prompts[i],
                "completion": rollout.completions[i],
                "score": float(rollout.scores.score[i]) if rollout.scores.valid[i] else None,
            }
            for i in range(0, len(rollout), max(1, len(rollout) // SHOWN))
        ]
        return {"held_out": held_out, "samples": samples[:SHOWN]}

    def is_finished(self, file: Path, spec: Row, rule: Any = None) -> bool:
        """Whether a result exists, made with the same settings."""
        if not file.is_file():
            return False
        old = json.loads(file.read_text(encoding="utf-8"))["spec"]
        if old.pop("bf16", False):  # of an earlier version
            old["dtype"] = "bfloat16"
        new = json.loads(json.dumps(spec))
        # A setting that was added after the result was written had its default.
        defaults = describe(TrainerConfig()) | ({} if rule is None else describe(type(rule)()))
        old = {name: defaults.get(name) for name in new} | old
        changed = [
            f"{name}: {old[name]} -> {new.get(name)}" for name in old if old[name] != new.get(name)
        ]
        if changed:
            raise TrpoLMError(
                f"it was made with other settings; {'; '.join(changed)}", where=str(file.parent),
                hint="set them back, delete that folder, or choose another --output_dir",
            )  # fmt: skip
        return True

    def _write(self, file: Path, value: Row) -> None:
        if self.ranks.main:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(value, indent=1, allow_nan=False).encode())


def _count_passes(model: Any) -> list[int]:
    """Count completions that pass through TRL's model outside sampling, in the list returned."""
    rows = [0]

    def count(module: Any, inputs: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("use_cache") is False:  # sampling uses the cache
            rows[0] += kwargs["input_ids"].shape[0]

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.base_model.register_forward_pre_hook(count, with_kwargs=True)
    return rows
