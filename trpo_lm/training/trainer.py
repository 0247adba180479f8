"""The trainer: prompts, rollout, rewards, values, advantages, update, metrics, and again.

    for each update:   rollout -> measure old and reference -> values -> advantages
                       -> algorithm.update -> fit the critic -> write, show, save

It never asks which algorithm it runs: an `Algorithm` defines how rewards become advantages and how
the policy moves. The rest has modules of its own: `assembly` loads the parts, `state` is what an
update changes, `archive` writes and resumes, `ranks` are the processes, `display` shows a run.

Between two updates the whole state of a run is a `TrainState`. A checkpoint holds one, and when an
update fails or is interrupted half-way, the last one is restored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar, cast

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback

from trpo_lm.algorithms.algorithm import Algorithm, with_default_lam
from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.config import TrainerConfig
from trpo_lm.core.advantages import returns
from trpo_lm.errors import Interrupted, RunFault, TrpoLMError, first_line
from trpo_lm.lm.examination import Examination, examination
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.rollout import Batch, Rollout
from trpo_lm.report.page_sections import State
from trpo_lm.storage import Row
from trpo_lm.training import assembly, metrics
from trpo_lm.training.archive import Archive
from trpo_lm.training.best import BestPolicy, is_better
from trpo_lm.training.callbacks import Callbacks
from trpo_lm.training.console import Console
from trpo_lm.training.display import (
    Display,
    banner,
    before_and_after,
    product_notes,
    samples,
    sampling_notes,
    show_outcome,
)
from trpo_lm.training.folder import gaps, require_usable
from trpo_lm.training.hub import create_repository, require_hub, upload
from trpo_lm.training.interrupts import Interrupts
from trpo_lm.training.memory import halved_if_full
from trpo_lm.training.metrics import Evaluation
from trpo_lm.training.plan import Plan, longest_prompt, make_plan, processes, rewards_score_prefixes
from trpo_lm.training.ranks import Ranks, SharedFault
from trpo_lm.training.sharding import shards_of
from trpo_lm.training.stages import Stages
from trpo_lm.training.state import TrainState, flat, restore, snapshot

LOGGED_PAIRS = 32  # held-out prompts of an evaluation, beside the reference's completions
LONG = 2.0  # seconds that the examination may take without a word
CallbackLike = TrainerCallback | type[TrainerCallback]


F = TypeVar("F", bound=Callable[..., Any])


def _named(function: F) -> F:
    """Let a third positional argument be an error that names it, where Python only counts."""
    parameters = [p for p in signature(function).parameters.values() if p.name != "self"]
    after = next(i for i, p in enumerate(parameters) if p.kind is Parameter.KEYWORD_ONLY)

    @wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        given = args[1:] if function.__name__ == "__init__" else args
        if len(given) > after:
            names = ", ".join(f"{p.name}=..." for p in parameters[after : len(given)])
            raise TypeError(
                f"Trainer takes only model and reward_funcs without their names; write {names}"
            )
        return function(*args, **options)

    return cast(F, checked)


class Trainer:
    """Trains a causal LM to raise the score of its completions.

    Args:
        model: Hugging Face name or path, a causal LM, or a PeftModel.
        reward_funcs: One or several functions or reward models; see `rewards.Rewards`. What
            follows is given by name.
        train_dataset: Prompts; see `prompts.load_prompts`.
        args: Everything that is not the algorithm.
        eval_dataset: Held-out prompts.
        processing_class: Tokenizer, a processor that has one, or the name or path of either; the
            model's own when None.
        callbacks: One or several `TrainerCallback`s of transformers; see `callbacks`.
        peft_config: Adapter to train; LoRA on all linear layers when None.
        algorithm: Update rule with its settings; `TRPO()` when None.
        prompt_column: Column of the datasets that holds the prompt.
        display: Where the run shows its progress; a `Console` when None.
        plots: Whether to write the page of the run, and to draw figures at the end.

    Raises:
        TrpoLMError: For every mistake that can be found before generating.
    """

    before: Evaluation | None = None  # of the reference
    after: Evaluation | None = None  # of the policy, the latest
    best: BestPolicy | None = None
    repository: str | None = None  # on a hub, where the results will be uploaded

    @_named
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any,
        *,
        train_dataset: Any,
        args: TrainerConfig | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: CallbackLike | Sequence[CallbackLike] = (),
        peft_config: PeftConfig | None = None,
        algorithm: Algorithm[Any] | None = None,
        prompt_column: str = "prompt",
        display: Display | None = None,
        plots: bool = True,
    ):
        self.args = args = args or TrainerConfig()
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.stage = Stages()
        self.ranks = Ranks(args.ddp_timeout, self.stage)
        self.display: Display = display or Console(self.ranks.main, args.updates)
        self.ranks.on_main(lambda: require_usable(args))
        if args.push_to_hub:
            self.ranks.on_main(lambda: require_hub(args))
        data = assembly.load_data(
            train_dataset, eval_dataset, prompt_column, args, self.ranks.count
        )
        algorithm = algorithm or TRPO()
        needed = args if algorithm.needs_critic else replace(args, critic="none")
        shards = shards_of(self.ranks, args.ddp_timeout) if args.shard_base else None
        if args.shard_base and shards is None:
            self.display.note("shard_base: one process holds the whole base, as without it")
        with examination() as examined:
            self.rewards = assembly.make_rewards(reward_funcs, data, args, self.ranks.device)
            self.parts = parts = assembly.assemble(
                model, self.rewards, needed,
                device=self.ranks.device, peft_config=peft_config, tokenizer=processing_class,
                shards=shards,
            )  # fmt: skip
            data = assembly.fit_data(data, parts, args, self.display.note)
            self.servers = assembly.join_servers(data, parts, args, self.ranks)
        if examined.seconds > LONG:
            self.display.note(f"{len(examined.findings)} checks took {examined.seconds:.1f} s")
        self.policy, self.tokenizer = parts.policy, parts.tokenizer
        self.mdp, self.critic = parts.mdp, parts.critic
        self.prompts, self.eval_prompts = data.train, data.held_out
        self.algorithm = with_default_lam(algorithm, self.critic.default_lam)
        self.algorithm_state = self.algorithm.init_state(self.policy.parameters)
        settings = assembly.run_settings(
            parts, self.algorithm, args, self.prompts, self.ranks.count
        )
        held_out = self.eval_prompts and self.eval_prompts.fingerprint()
        start = {"held_out": held_out, "initial_adapter": self.policy.parameters.checksum()}
        self.ranks.require_same(flat({**settings, **start}))
        if note := assembly.unsaved_model_note(model, self.policy):
            self.display.note(note)
        self.archive = Archive(args, settings, parts, self.ranks, self.stage, plots=plots)
        self.callbacks = Callbacks(
            callbacks, args, self.ranks, evaluates=self.eval_prompts is not None,
            model=self.policy.model, tokenizer=self.tokenizer,
        )  # fmt: skip
        self.interrupts = Interrupts(alone=self.ranks.count == 1)
        self.updates_done = self.completions = self.tokens = 0
        self.rows: list[Row] = []
        self._boundary = self._snapshot()

    @staticmethod
    @_named
    def plan(
        model: Any,
        reward_funcs: Any = None,
        *,
        train_dataset: Any = None,
        args: TrainerConfig | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Any = (),
        peft_config: PeftConfig | None = None,
        algorithm: Algorithm[Any] | None = None,
        prompt_column: str = "prompt",
        memory: str | float | None = None,
        **_: Any,
    ) -> Plan:
        """Say what `Trainer` with the same arguments would need, and load nothing but a config.

        Args:
            model: As for `Trainer`, or a config; so are the others.
            reward_funcs: Only whether it scores unfinished text counts.
            train_dataset: Its longest prompt counts, where dataset and tokenizer are local.
            args: Settings of the run.
            eval_dataset: Does not count, nor do callbacks.
            processing_class: Counts the tokens of prompts.
            callbacks: Ignored.
            peft_config: Adapter to train.
            algorithm: Update rule.
            prompt_column: Column of the prompt.
            memory: Of another device, e.g. "24GiB"; see `plan.make_plan`.

        Raises:
            TrpoLMError: If config, prompts or memory cannot be read.
        """
        return make_plan(
            model,
            args or TrainerConfig(),
            algorithm,
            peft_config=peft_config,
            prompt_length=longest_prompt(train_dataset, prompt_column, model, processing_class),
            scores_prefixes=rewards_score_prefixes(reward_funcs),
            memory=memory,
            processes=processes(),
        )

    @classmethod
    def examine(cls, *arguments: Any, **options: Any) -> Examination:
        """Make every check that `Trainer` with the same arguments makes, and leave it at that.

        Nothing is generated, and the output folder stays empty. The result prints as a table; its
        `error` is what constructing the trainer raised, if anything.
        """
        with examination() as examined:
            try:
                cls(*arguments, **options)
            except TrpoLMError as error:
                examined.error = error
        return examined

    # ------------------------------------------------------------------ the run

    def train(self) -> list[Row]:
        """Make all updates, write the results, and return the metrics rows.

        Raises:
            TrpoLMError: If the folder or the checkpoint to resume from cannot be used.
            RunFault: For a fault at run time; the last accepted policy was saved.
            Interrupted: When a signal stopped the run; the last accepted policy was saved.
        """
        with ExitStack() as stack:
            stack.callback(self.rewards.close)
            if self.servers is not None and self.ranks.main:
                stack.callback(self.servers.withdraw)
            stack.callback(self.display.close)
            self.archive.claim(stack)
            stack.enter_context(self.interrupts)
            with self.stage("start"):
                begun = self._begin()
            if begun:
                try:
                    with self.stage("updates"):
                        self._loop()
                    with self.stage("end"):
                        self._finish()
                except BaseException as stop:
                    self._write_page("stopped", first_line(stop))
                    raise
                self._write_page("finished")
        return self.rows

    def _begin(self) -> bool:
        """Start or resume; return False if the run is already complete."""
        args = self.args
        if args.resume_from_checkpoint:
            state, note = self.archive.resume(self.algorithm_state)
            if state is not None:
                self._restore(state)
                self.rows = self.archive.rows(state.update)
            self.display.note(note)
            if missing := gaps(self.rows, self.updates_done):
                self.display.note(missing)
        if self.updates_done >= args.updates and self.archive.is_finished(self.updates_done):
            self.display.note(
                f"already complete: {self.updates_done} of {args.updates} updates are done"
            )
            return False
        if args.push_to_hub:
            self.repository = self.ranks.on_main(lambda: create_repository(args))
        self.best = self.archive.prepare(self.updates_done, self.eval_prompts)
        scores = (row.get("objective/score_mean") for row in self.rows)
        first_score = next((score for score in scores if score is not None), None)
        settings = self.archive.settings
        self.display.banner(banner(self.parts, self.algorithm.limits, settings), first_score)
        for note in (*sampling_notes(self.parts), *product_notes(self.policy, settings)):
            self.display.note(note)
        if self.archive.plots:
            self.display.note(f"page        {self.archive.folder.page}")
        self._write_page("running")
        self._boundary = self._snapshot()
        self.callbacks.event("on_train_begin")
        self.callbacks.resumed(self.rows)
        return True

    def _loop(self) -> None:
        """Make the remaining updates; if one fails, roll back to the last completed one."""
        try:
            if self.eval_prompts and self.updates_done < self.args.updates:
                self.before = self.evaluate(reference=True)
            while self.updates_done < self.args.updates and not self._stops():
                self.callbacks.event("on_step_begin")
                row, rollout = self._fitting(self.train_step, lambda: self._restore(self._boundary))
                self.callbacks.step_end()
                if self.eval_prompts and (self._stops() or self._flags.should_evaluate):
                    self._evaluate_update(row)
                with self.interrupts.held():
                    with self.stage("record"):
                        self._keep_best(row)
                        self._record(row, rollout)
                    self._boundary = self._snapshot()
                    if self._stops() or self._flags.should_save:
                        self._save_checkpoint()
                self._stop_if_asked()
        except BaseException as stop:
            self._restore(self._boundary)
            if isinstance(stop, Interrupted):
                signum = stop.exit_code - 128
                raise Interrupted(f"{stop}; {self._keep(stop)}", signum=signum) from None
            if isinstance(stop, RunFault):
                hint = f"{stop.hint}; {self._keep(stop)}" if stop.hint else self._keep(stop)
                raise RunFault(stop.what, where=stop.where, hint=hint) from stop
            raise

    @property
    def _flags(self) -> Any:
        return self.callbacks.control

    def _stops(self) -> bool:
        """Whether the update just made is the last one."""
        return self.updates_done >= self.args.updates or self._flags.should_training_stop

    def train_step(self) -> tuple[Row, Rollout]:
        """Make one update: rollout, measure, values, advantages, update, critic."""
        update, algorithm, stage = self.updates_done + 1, self.algorithm, self.stage
        with stage("rollout"):
            rollout = self._rollout(update)
        with stage("score"):
            prefix_scores = self.mdp.prefix_scores(rollout) if self.critic.reads_prefixes else None
        with stage("measure"):
            batch = Batch.from_rollout(self.policy, rollout)
            row = {"update": update, **self._count(batch)}
            if self.servers is not None:
                metrics.check_sampler(row, algorithm.limits.max_kl)
            if update == 1:
                here = self.servers is None
                metrics.check_old_policy(self.policy, batch, self.ranks, in_process=here)
        with stage("values"):
            mask, valid = rollout.action_mask, rollout.scores.valid
            rewards = algorithm.rewards(batch, self.algorithm_state)
            targets = returns(rewards, mask, gamma=algorithm.gamma)
            baseline = self.ranks.mean(targets[:, 0][valid])[0]
            hidden = batch.hidden.cpu()
            values = self.critic.values(hidden, prefix_scores, mask, untrained=baseline)
            if self.critic.name != "none":
                row |= metrics.critic_error(rollout, values, targets, self.ranks)
            skipped = metrics.no_signal(rollout, self.ranks)
        with stage("update"):
            if skipped is None:
                reduce = self.ranks.reduce
                advantages = algorithm.advantages(rollout, rewards, values, reduce)
                if self.servers is not None:
                    weights = metrics.sampler_weights(batch, row, self.ranks)
                    advantages = advantages if weights is None else advantages * weights[:, None]
                seed = (self.args.seed, "update", update, self.ranks.rank)
                objective = BatchObjective(self.policy, batch, advantages, reduce, seed)
                self.algorithm_state, moved = algorithm.update(objective, self.algorithm_state)
                row |= moved
        with stage("critic"):
            self.critic.fit(hidden, prefix_scores, mask, targets, valid, self.ranks.reduce)
            checksum = self.ranks.same(self.policy.parameters.checksum(), f"update {update}")
        self.updates_done = self.callbacks.state.global_step = update
        row |= {"skipped": skipped, "policy/checksum": checksum}
        row |= metrics.times(stage.seconds, scoring=rollout.score_seconds)
        if row.get("trust_region/kl") is not None:
            row["trust_region/kl_per_token"] = (
                row["trust_region/kl"] / row["objective/completion_length"]
            )
        return metrics.metrics_row(row), rollout

    def evaluate(self, *, reference: bool = False) -> Evaluation:
        """Sample held-out prompts with fixed seeds, from the policy or from the reference."""
        if self.eval_prompts is None:
            raise TrpoLMError("there are no held-out prompts", where="eval_dataset")
        own = range(self.ranks.rank, len(self.eval_prompts), self.ranks.count)
        held_out = self.eval_prompts.take(own)
        return self._fitting(lambda: self._evaluate(*held_out, reference))

    def _fitting(self, work: Callable[[], Any], undo: Callable[[], None] = lambda: None) -> Any:
        """Do something, with smaller passes where memory runs out."""
        return halved_if_full(work, undo, self.policy.room, self.ranks, self.display.note)

    # ------------------------------------------------------------------ parts of an update

    def _rollout(self, update: int) -> Rollout:
        """Sample and score this rank's prompts of an update."""
        self._publish()
        rows = assembly.prompts_of_update(update, self.args, len(self.prompts))
        prompts, columns = self.prompts.take(rows[self.ranks.rank :: self.ranks.count])
        return self.mdp.rollout(
            self.policy,
            prompts,
            completions_per_prompt=self.args.completions_per_prompt,
            columns=columns,
            seed=(self.args.seed, update, self.ranks.rank),
            trainer_state=self.callbacks.state,
            sampler=self.servers,
        )

    def _publish(self, version: str | None = None) -> None:
        """Let the servers, if there are any, sample from the policy as it is."""
        if self.servers is not None:
            self.servers.publish(self.policy, version or f"{self.updates_done:06d}")

    def _count(self, batch: Batch) -> Row:
        """Count what was sampled; return its metrics."""
        numbers, completions, tokens = metrics.rollout_metrics(batch, self.ranks)
        self.completions, self.tokens = self.completions + completions, self.tokens + tokens
        return {"completions": self.completions, "tokens": self.tokens, **numbers}

    def _evaluate(self, prompts: list, columns: dict, reference: bool) -> Evaluation:
        seed = (self.args.seed, "evaluate", self.ranks.rank)
        with self.stage("evaluate"), self.policy.reference() if reference else nullcontext():
            self._publish("reference" if reference else None)
            rollout = self.mdp.rollout(
                self.policy, prompts, columns=columns, seed=seed, sampler=self.servers
            )
            batch = Batch.from_rollout(self.policy, rollout)
            if self.servers is not None:
                distance = metrics.sampler_distance(batch, self.ranks)
                metrics.check_sampler(distance, self.algorithm.limits.max_kl)
            return metrics.evaluation(batch, self.ranks)

    def _evaluate_update(self, row: Row) -> None:
        self.after = self.evaluate()
        numbers = {
            "eval_score_mean": metrics.none_if_nan(self.after.score),
            "eval_ref_kl": self.after.ref_kl,
        }
        row |= {f"objective/{name}": value for name, value in numbers.items()}
        pairs = before_and_after(self.before, self.after, LOGGED_PAIRS)
        self.archive.log_samples(pairs, self.updates_done, "held-out prompt")
        self._flags.should_log = True
        self.callbacks.evaluated(numbers)

    def _keep_best(self, row: Row) -> None:
        """Save the policy if it is the best evaluated one within the budget."""
        policy = BestPolicy(
            self.updates_done,
            row["objective/eval_score_mean"],
            row["objective/eval_ref_kl"],
            self.algorithm.limits.max_ref_kl,
        )
        if self.args.eval_steps and is_better(policy, self.best):
            self.archive.save_best(policy)
            self.best = policy

    def _record(self, row: Row, rollout: Rollout) -> None:
        """Log and show an update, and pass it to the callbacks."""
        self.archive.log(row, rollout)
        self.rows.append(row)
        size = self.args.prompts_per_update * self.args.completions_per_prompt
        for note in metrics.notes(self.rows, size):
            self.display.note(note)
        if self._stops() or self._flags.should_log:
            self.display.update(row, self.algorithm.limits)
            self.callbacks.log(row)
            self._write_page("running")
        if not self._stops():
            self._show_samples(rollout)

    def _show_samples(self, rollout: Rollout) -> None:
        """Sample on all ranks, which may share the base, and show those of the first."""
        update = self.updates_done
        if self.ranks.on_main(lambda: self.display.samples_due(update)):
            seed = (self.args.seed, "samples", update)
            rows = self.ranks.agree(lambda: samples(self.policy, self.mdp, rollout, seed=seed))
            self.archive.log_samples(rows, update, "training prompt")
            self.ranks.on_main(lambda: self.display.samples(rows, f"samples of update {update}"))

    def _write_page(self, kind: str, note: str = "") -> None:
        if told := self.archive.write_page(State(kind, note)):
            self.display.note(told)

    # ------------------------------------------------------------------ stopping and resuming

    def _snapshot(self) -> TrainState:
        counts = self.updates_done, self.completions, self.tokens
        return snapshot(self.policy, self.critic, self.algorithm_state, *counts)

    def _restore(self, state: TrainState) -> None:
        """Restore a snapshot exactly."""
        self.algorithm_state = restore(state, self.policy, self.critic)
        self.updates_done = self.callbacks.state.global_step = state.update
        self.completions, self.tokens = state.completions, state.tokens
        self.rows = [row for row in self.rows if row["update"] <= state.update]

    def _keep(self, stop: BaseException) -> str:
        """Save the last accepted policy where all ranks still act together; say how to resume."""
        if self.ranks.count > 1 and not isinstance(stop, Interrupted | SharedFault):
            return "resume from the newest checkpoint with --resume_from_checkpoint auto"
        try:
            folder = self._save_checkpoint()
        except RunFault as fault:
            return f"the last policy could not be saved ({fault.what})"
        return f"saved {folder.name}; resume with --resume_from_checkpoint auto"

    def _stop_if_asked(self) -> None:
        """With several processes, stop between updates once any of them got a signal."""
        asked = max(self.ranks.gather([self.interrupts.asked]))
        if asked:
            self.interrupts.stop(asked)

    def _save_checkpoint(self) -> Path:
        with self.stage("checkpoint"):
            folder = self.archive.save(self._boundary)
        self.callbacks.event("on_save")
        return folder

    def _finish(self) -> None:
        """Write the results, and show what changed."""
        self.callbacks.event("on_train_end")
        self.archive.finish(self.updates_done, before_and_after(self.before, self.after))
        if self.ranks.main:
            folder = self.archive.folder
            show_outcome(self.display, folder, self.rows, self.before, self.after, self.best)
            if self.repository is not None:
                self.display.note(upload(folder.path, self.repository))

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write adapter, critic, tokenizer, settings and model card; vanilla peft loads them."""
        folder = self.archive.folder.path if output_dir is None else Path(output_dir).expanduser()
        shown = before_and_after(self.before, self.after)
        self.archive.save_model(folder, self.updates_done, shown)


def TRPOTrainer(*args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
    """Return `Trainer(..., algorithm=TRPO(**settings))`, under the name people look for."""
    return Trainer(*args, algorithm=TRPO(**(settings or {})), **kwargs)


def PPOTrainer(*args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
    """Return `Trainer(..., algorithm=PPO(**settings))`, under the name people look for."""
    return Trainer(*args, algorithm=PPO(**(settings or {})), **kwargs)
