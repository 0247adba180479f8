"""The trainer: prompts, rollout, rewards, values, advantages, update, metrics, and again.

    for each update:   rollout -> measure old and reference -> values -> advantages
                       -> algorithm.update -> fit the critic -> write, show, save

It never asks which algorithm it runs: an `Algorithm` says how rewards become advantages and how
the policy moves; rollouts, critic, seeds, evaluation, checkpoints and resuming belong here. What
several processes must agree on is in `ranks`, signals are in `interrupts`, what people see at both
ends of a run is in `outcome`.

Between two updates the state of a run is the policy's parameters, the critic's and the algorithm's
state and three counters, nothing else: prompts and random numbers are functions of the seed and of
the update's number. That is what a checkpoint holds, and what is put back when anything stops an
update half-way.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback

from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.cli import check_output_dir, check_run_name
from trpo_lm.config import TrainerConfig, describe
from trpo_lm.core.advantages import returns
from trpo_lm.errors import Interrupted, RunFault, TrpoLMError
from trpo_lm.lm.critic import make_critic
from trpo_lm.lm.loading import load_tokenizer, quiet_loading
from trpo_lm.lm.mdp import (
    MOST_ROWS,
    Batch,
    Rollout,
    TokenMDP,
    end_token_ids,
    ignored_sampling,
    measure,
)
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompts, check_prompts, load_prompts
from trpo_lm.lm.rewards import Rewards
from trpo_lm.seeds import generator
from trpo_lm.storage import append_json_line, read_json_lines, truncate_json_lines
from trpo_lm.training import artifacts as outcome
from trpo_lm.training import checkpoint as checkpoints
from trpo_lm.training.callbacks import Callbacks
from trpo_lm.training.console import Console
from trpo_lm.training.interrupts import Interrupts
from trpo_lm.training.metrics import (
    check_old_policy,
    critic_error,
    known,
    metrics_row,
    no_signal,
    noise_note,
    objective,
)
from trpo_lm.training.ranks import OutOfMemory, Ranks, SharedFault

METRICS, COMPLETIONS, HELD_OUT = "metrics.jsonl", "completions.jsonl", "held_out.jsonl"

# Settings on which nothing of the arithmetic depends: they may change when a run is resumed.
FREE = {
    "output_dir", "run_name", "updates", "logging_steps", "eval_steps", "eval_prompts",
    "save_steps", "save_total_limit", "resume_from_checkpoint", "allow_config_change",
    "overwrite_output_dir", "report_to", "reward_timeout", "ddp_timeout", "reference",
    "reward_models",
}  # fmt: skip


class Algorithm(Protocol):
    """How rewards become advantages, and how the policy moves. `TRPO` and `PPO` are such."""

    @property
    def needs_critic(self) -> bool:
        """Whether advantages look at values."""
        ...

    @property
    def gamma(self) -> float:
        """Discount per token."""
        ...

    def with_lam(self, lam: float) -> Algorithm:
        """Return itself with the critic's lambda where none was chosen."""
        ...

    def init_state(self, policy: Policy) -> dict[str, Any]:
        """Return what must survive between updates: JSON values and tensors."""
        ...

    def rewards(self, batch: Batch, state: dict[str, Any]) -> Tensor:
        """Return the reward of each action, (N, T) float64."""
        ...

    def advantages(self, batch: Batch, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Return A_t, (N, T), from `batch.rewards` and `batch.values`."""
        ...

    def update(
        self,
        policy: Policy,
        batch: Batch,
        reduce: Callable[[Tensor], Tensor],
        state: dict[str, Any],
        seed: tuple[int | str, ...],
    ) -> dict[str, Any]:
        """Move the policy; return metrics."""
        ...


class Trainer:
    """Trains a causal LM to please reward functions.

    Args:
        model: Hugging Face name or path, a causal LM, or a PeftModel.
        reward_funcs: One or several functions or reward models; see `rewards.Rewards`.
        train_dataset: Prompts; see `prompts.load_prompts`.
        args: Everything that is not the algorithm.
        eval_dataset: Held-out prompts.
        processing_class: Tokenizer; the model's own when None.
        callbacks: transformers' `TrainerCallback`s; see `callbacks`.
        peft_config: Adapter to train; LoRA on all linear layers when None.
        algorithm: Update rule with its settings; `TRPO()` when None.
        prompt_column: Column of the datasets that holds the prompt.

    Raises:
        TrpoLMError: For anything that can be found wrong before generating.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any,
        train_dataset: Any,
        args: TrainerConfig | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        peft_config: PeftConfig | None = None,
        algorithm: Algorithm | None = None,
        prompt_column: str = "prompt",
    ):
        self.args = args = args or TrainerConfig()
        self.ranks = Ranks(args.ddp_timeout)
        self.folder = Path(args.output_dir)
        self.console = Console(self.ranks.main, args.updates)
        if args.run_name is not None:
            check_run_name(args.run_name)
        self.ranks.on_main(self._check_folder)
        self.prompts = load_prompts(train_dataset, column=prompt_column)
        self.eval_prompts = None
        if eval_dataset is not None:
            self.eval_prompts = load_prompts(eval_dataset, column=prompt_column)
        self._check_shares()
        with quiet_loading():
            self.rewards = self._make_rewards(reward_funcs)
            self.policy = self._make_policy(model, peft_config)
            self.tokenizer = processing_class or load_tokenizer(self.policy.name)
        self.mdp = TokenMDP(
            self.tokenizer,
            self.rewards,
            eos_token_ids=end_token_ids(self.policy.base, self.tokenizer),
            max_completion_length=args.max_completion_length,
        )
        self.prompts = self._checked(self.prompts)
        self.eval_prompts = self.eval_prompts and self._checked(self.eval_prompts)
        algorithm = algorithm or TRPO()
        self.critic = make_critic(
            args.critic if algorithm.needs_critic else "none",
            can_score_prefixes=self.rewards.can_score_prefixes,
            width=self.policy.base.config.get_text_config().hidden_size,
            length=args.max_completion_length,
        )
        self.algorithm = algorithm.with_lam(self.critic.default_lam)
        self.algorithm_state = self.algorithm.init_state(self.policy)
        self.callbacks = Callbacks(
            callbacks, args, self.ranks, model=self.policy.model, tokenizer=self.tokenizer
        )
        self.interrupts = Interrupts(alone=self.ranks.count == 1)
        self.micro_batch_size = args.micro_batch_size
        self.update = self.completions = self.tokens = 0
        self.rows: list[dict[str, Any]] = []
        self.before: dict[str, Any] | None = None
        self.after: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self._boundary = self._snapshot()

    # ------------------------------------------------------------------ the run

    def train(self) -> list[dict[str, Any]]:
        """Run all updates, write everything that a run leaves behind, and return the metrics rows.

        Raises:
            TrpoLMError: If the folder or the checkpoint to go on from cannot be used.
            RunFault: For a fault at run time; the last accepted policy was saved.
            Interrupted: When a signal stopped the run; the last accepted policy was saved.
        """
        with ExitStack() as stack:
            stack.callback(self.rewards.close)
            stack.callback(self.console.close)
            self.ranks.on_main(lambda: self._claim_folder(stack))
            stack.enter_context(self.interrupts)
            if self._begin():
                self._loop()
                self._finish()
        return self.rows

    def _check_folder(self) -> None:
        resume, overwrite = self.args.resume_from_checkpoint, self.args.overwrite_output_dir
        check_output_dir(self.folder, resume=resume, overwrite=overwrite)

    def _claim_folder(self, stack: ExitStack) -> None:
        check_output_dir(self.folder, overwrite=True)  # it can be written to
        stack.enter_context(checkpoints.OutputLock(self.folder))
        self._check_folder()

    def _begin(self) -> bool:
        """Take up the run where it stands; False when there is nothing left to do."""
        if self.args.resume_from_checkpoint:
            self._resume(self.args.resume_from_checkpoint)
        done = self.update >= self.args.updates
        if done and self.ranks.on_main(lambda: outcome.is_finished(self.folder)):
            self.console.note(
                f"already complete: {self.update} of {self.args.updates} updates are done"
            )
            return False
        self.best = self.ranks.on_main(self._prepare_files)
        self.console.banner(
            outcome.banner(
                self.policy, self.critic, self.algorithm, self.args, processes=self.ranks.count,
                prompts=len(self.prompts), rewards=self.rewards.names,
            )
        )  # fmt: skip
        if self.tokenizer.pad_token_id is None:
            self.console.note("the tokenizer has no pad token: an end token fills the padding")
        ignored = ignored_sampling(self.policy.base)
        if ignored:
            self.console.note(
                f"sampling is neutral in training; the model's own {ignored} is not used"
            )
        scores = (row.get("objective/score_mean") for row in self.rows)
        self.console.first_score = next((s for s in scores if s is not None), None)
        self._boundary = self._snapshot()
        self.callbacks.event("on_train_begin")
        return True

    def _prepare_files(self) -> dict[str, Any] | None:
        """Leave in the folder what belongs to the run as it stands; return its best policy."""
        if self.args.overwrite_output_dir and not self.args.resume_from_checkpoint:
            checkpoints.discard_checkpoints(self.folder)
        for name in (METRICS, COMPLETIONS):
            truncate_json_lines(self.folder / name, self.update)
        if self.eval_prompts is not None:
            held_out = self.eval_prompts.take(self._held_out_rows())
            outcome.save_prompts(self.folder / HELD_OUT, Prompts(*held_out))
        checkpoints.save_settings(self.folder / "config.yaml", self._config())
        return checkpoints.recover_best(self.folder, self.update)

    def _loop(self) -> None:
        """Make the updates that are left; whatever ends them early, update's halves are undone."""
        try:
            if self.eval_prompts and self.update < self.args.updates:
                self.before = self.evaluate(reference=True)
            while self.update < self.args.updates and not self._stops():
                self.callbacks.event("on_step_begin")
                row, rollout = self._with_memory(
                    self.train_step, lambda: self._restore(self._boundary)
                )
                self.callbacks.step_end()
                if self.eval_prompts and (self._stops() or self._flags.should_evaluate):
                    self._evaluate_update(row)
                with self.interrupts.held():
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
        return self.update >= self.args.updates or self._flags.should_training_stop

    def train_step(self) -> tuple[dict[str, Any], Rollout]:
        """Make one update: rollout, measure, values, advantages, update, critic."""
        clock = [time.perf_counter()]
        update = self.update + 1
        rollout, prefix_scores, prefix_seconds = self._rollout(update)
        clock.append(time.perf_counter())
        batch = measure(self.policy, rollout, micro_batch_size=self.micro_batch_size)
        row = {"update": update, **self._objective(batch)}
        if update == 1:
            check_old_policy(self.policy, batch, self.ranks)
        clock.append(time.perf_counter())
        algorithm, mask, valid = self.algorithm, rollout.action_mask, rollout.scores.valid
        batch.rewards = algorithm.rewards(batch, self.algorithm_state)
        targets = returns(batch.rewards, mask, gamma=algorithm.gamma)
        baseline = self.ranks.mean(targets[:, 0][valid])[0]
        hidden = batch.hidden.cpu()
        batch.values = self.critic.values(hidden, prefix_scores, mask, untrained=baseline)
        if self.critic.name != "none":
            row |= critic_error(batch, targets, self.ranks)
        skipped = no_signal(rollout, self.ranks)
        clock.append(time.perf_counter())
        if skipped is None:
            advantages = algorithm.advantages(batch, self.ranks.reduce)
            batch.advantages = advantages[mask].to(batch.old_logprobs)
            seed = (self.args.seed, "update", update, self.ranks.rank)
            row |= algorithm.update(
                self.policy, batch, self.ranks.reduce, self.algorithm_state, seed
            )
        clock.append(time.perf_counter())
        self.critic.fit(hidden, prefix_scores, mask, targets, valid, self.ranks.reduce)
        checksum = self.ranks.same(self.policy.parameters.checksum(), f"update {update}")
        clock.append(time.perf_counter())
        self.update = self.callbacks.state.global_step = update
        row |= {"skipped": skipped, "policy/checksum": checksum}
        row |= _seconds(clock, scoring=rollout.score_seconds + prefix_seconds)
        if row.get("trust_region/kl") is not None:
            row["trust_region/kl_per_token"] = (
                row["trust_region/kl"] / row["objective/completion_length"]
            )
        return metrics_row(row), rollout

    def evaluate(self, *, reference: bool = False) -> dict[str, Any]:
        """Sample held-out prompts with fixed seeds.

        Args:
            reference: Evaluate the model as it was before training.

        Returns:
            `score` and `std` over all ranks (nan if every reward abstained), `ref_kl` (exact, nats
            per completion), and this rank's `rollout`.
        """
        if self.eval_prompts is None:
            raise TrpoLMError("there is nothing to evaluate on", where="eval_dataset")
        rows = self._held_out_rows()[self.ranks.rank :: self.ranks.count]
        held_out = self.eval_prompts.take(rows)
        return self._with_memory(lambda: self._evaluate(*held_out, reference), lambda: None)

    # ------------------------------------------------------------------ parts of an update

    def _evaluate(self, prompts: list, columns: dict, reference: bool) -> dict[str, Any]:
        seed = (self.args.seed, "evaluate", self.ranks.rank)
        with self.policy.reference() if reference else nullcontext():
            rollout = self.mdp.rollout(self.policy, prompts, columns=columns, seed=seed)
            batch = measure(self.policy, rollout, micro_batch_size=self.micro_batch_size)
        score, std = self.ranks.mean(rollout.scores.score[rollout.scores.valid])
        ref_kl = self.ranks.reduce(batch.ref_kl.double().sum().cpu())
        total = self.ranks.reduce(torch.tensor(float(len(rollout)), dtype=torch.float64))
        return {"score": score, "std": std, "ref_kl": float(ref_kl / total), "rollout": rollout}

    def _with_memory(self, work: Callable[[], Any], undo: Callable[[], None]) -> Any:
        """Do something on all ranks; where memory runs out, once more with half the micro-batch.

        Micro-batches are summed, so that their size changes no result but by the order of sums.
        """
        try:
            return self.ranks.agree(work)
        except OutOfMemory:
            size = self.micro_batch_size or MOST_ROWS
            if size == 1:
                raise
        undo()  # the exception is gone by now, and with it the tensors that its frames held
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        self.micro_batch_size = size // 2
        self.console.note(f"out of memory: micro_batch_size is {self.micro_batch_size} now")
        return self.ranks.agree(work)

    def _rollout(self, update: int) -> tuple[Rollout, Tensor | None, float]:
        """Return completions, the scores of their prefixes, and the seconds these took."""
        rows = self._rows(update)[self.ranks.rank :: self.ranks.count]
        prompts, columns = self.prompts.take(rows)
        rollout = self.mdp.rollout(
            self.policy,
            prompts,
            completions_per_prompt=self.args.completions_per_prompt,
            columns=columns,
            seed=(self.args.seed, update, self.ranks.rank),
            trainer_state=self.callbacks.state,
        )
        start = time.perf_counter()
        scores = None
        if "prefix" in self.critic.name:
            scores = self.mdp.prefix_scores(rollout)
        return rollout, scores, time.perf_counter() - start

    def _rows(self, update: int) -> list[int]:
        """Return the prompts of an update: a fresh shuffle each epoch, a function of the seed."""
        count, n = self.args.prompts_per_update, len(self.prompts)
        places = range((update - 1) * count, update * count)
        shuffles = {
            epoch: torch.randperm(n, generator=generator(self.args.seed, "prompts", epoch)).tolist()
            for epoch in {place // n for place in places}
        }
        return [shuffles[place // n][place % n] for place in places]

    def _objective(self, batch: Batch) -> dict[str, Any]:
        """Return what was sampled, and count it."""
        numbers, completions, tokens = objective(batch, self.ranks)
        self.completions, self.tokens = self.completions + completions, self.tokens + tokens
        return {"completions": self.completions, "tokens": self.tokens, **numbers}

    def _evaluate_update(self, row: dict[str, Any]) -> None:
        self.after = self.evaluate()
        numbers = {
            "eval_score_mean": known(self.after["score"]),
            "eval_ref_kl": self.after["ref_kl"],
        }
        row |= {f"objective/{name}": value for name, value in numbers.items()}
        self._flags.should_log = True
        self.callbacks.event("on_evaluate", metrics=numbers)
        self.callbacks.agree()

    def _held_out_rows(self) -> range:
        """Return the held-out prompts of an evaluation: the first ones, always the same."""
        assert self.eval_prompts is not None
        return range(min(len(self.eval_prompts), self.args.eval_prompts))

    def _keep_best(self, row: dict[str, Any]) -> None:
        """Keep the policy in best/ if no evaluated one within the budget has a higher score."""
        facts = {
            "update": self.update,
            "score": row["objective/eval_score_mean"],
            "ref_kl": row["objective/eval_ref_kl"],
            "max_ref_kl": describe(self.algorithm).get("max_ref_kl"),
        }
        if self.args.eval_steps and outcome.is_better(facts, self.best):
            self.ranks.on_main(
                lambda: checkpoints.save_best(
                    self.folder,
                    facts,
                    lambda folder: outcome.save_policy(folder, self.policy, self.critic),
                )
            )
            self.best = facts

    def _record(self, row: dict[str, Any], rollout: Rollout) -> None:
        """Write and show an update; callbacks hear of it."""
        lines = self.ranks.gather(outcome.completion_lines(rollout, self.update))
        self.ranks.on_main(lambda: self._append(row, lines))
        self.rows.append(row)
        reached = [r for r in self.rows if r.get("trust_region/case") in ("ref", "both", "recover")]
        if reached == [row]:
            self.console.note("reference KL budget reached: it shortens steps from here on")
        noisy = noise_note(
            self.rows, self.args.prompts_per_update * self.args.completions_per_prompt
        )
        if noisy is not None:
            self.console.note(noisy)
        if self._stops() or self._flags.should_log:
            limits = {k: describe(self.algorithm).get(k) for k in ("max_kl", "max_ref_kl")}
            self.console.update(row, limits)
            self.callbacks.log(row)
        if not self._stops():
            self.ranks.on_main(lambda: self._show_samples(rollout))

    def _show_samples(self, rollout: Rollout) -> None:
        """Show some of the update's completions beside the reference's, now and then."""
        if self.console.samples_due(self.update):
            seed = (self.args.seed, "samples", self.update)
            rows = outcome.samples(self.policy, self.mdp, rollout, seed=seed)
            self.console.samples(rows, f"samples of update {self.update}")

    def _append(self, row: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            append_json_line(self.folder / COMPLETIONS, line)
        append_json_line(self.folder / METRICS, row)

    # ------------------------------------------------------------------ stopping and going on

    def _snapshot(self) -> dict[str, Any]:
        """Remember the state between two updates: what a checkpoint holds."""
        return {
            "theta": self.policy.parameters.snapshot(),
            "critic": {k: v.clone() for k, v in self.critic.state().items()},
            "algorithm": copy.deepcopy(self.algorithm_state),
            "counts": (self.update, self.completions, self.tokens),
        }

    def _restore(self, boundary: dict[str, Any]) -> None:
        """Be where `_snapshot` was taken, bit for bit."""
        self.policy.parameters.restore(boundary["theta"])
        self.critic.load(boundary["critic"])
        self.algorithm_state = copy.deepcopy(boundary["algorithm"])
        self.update, self.completions, self.tokens = boundary["counts"]
        self.callbacks.state.global_step = self.update
        self.rows = [row for row in self.rows if row["update"] <= self.update]

    def _keep(self, stop: BaseException) -> str:
        """Save the last accepted policy where all ranks can do so together; say how to go on."""
        if self.ranks.count > 1 and not isinstance(stop, Interrupted | SharedFault):
            return "go on from the newest checkpoint with --resume_from_checkpoint auto"
        try:
            folder = self._save_checkpoint()
        except RunFault as fault:
            return f"the last policy could not be saved ({fault.what})"
        return f"saved {folder.name}; go on with --resume_from_checkpoint auto"

    def _stop_if_asked(self) -> None:
        """With several processes, stop between updates once any of them got a signal."""
        asked = max(self.ranks.gather([self.interrupts.asked]))
        if asked:
            self.interrupts.stop(asked)

    def _config(self) -> dict[str, Any]:
        """Return everything that decides what the run computes, as plain values."""
        adapter = self.policy.model.peft_config[str(self.policy.model.active_adapter)]
        targets = adapter.target_modules  # type: ignore[union-attr]
        return {
            "model": self.policy.name,
            "adapter": {
                **{k: getattr(adapter, k, None) for k in ("r", "lora_alpha", "lora_dropout")},
                "target_modules": targets if isinstance(targets, str) else sorted(targets or []),
            },
            "algorithm": type(self.algorithm).__name__,
            "reward_funcs": self.rewards.names,
            "prompts": len(self.prompts),
            "dataset": self.prompts.fingerprint(),
            "world_size": self.ranks.count,
            "reference": "adapter" if self.policy.came_with_adapter else "base model",
            "reward_models": outcome.reward_sources(self.rewards),
            **describe(self.args),
            **describe(self.algorithm),
        }

    def _save_checkpoint(self) -> Path:
        state, tensors = _split_tensors(self.algorithm_state)
        files = {outcome.CRITIC: self.critic.state(), "algorithm": tensors}
        folder = checkpoints.save_checkpoint(
            self.folder,
            self.update,
            tensors={name: held for name, held in files.items() if held and self.ranks.main},
            state={
                "completions": self.completions,
                "tokens": self.tokens,
                "checksum": self.policy.parameters.checksum(),
                "critic": self.critic.name,
                "algorithm": state,
            },
            config=self._config(),
            extra=self.policy.save,
            rank=self.ranks.rank,
            world_size=self.ranks.count,
            barrier=self.ranks.wait,
            share=self.ranks.share,
            keep=self.args.save_total_limit,
        )
        self.callbacks.event("on_save")
        return folder

    def _resume(self, where: str) -> None:
        """Load a checkpoint; 'auto' takes the newest complete one, or starts fresh and says so."""
        path = where
        if where == "auto":
            found = self.ranks.on_main(lambda: checkpoints.newest_checkpoint(self.folder))
            if found is None:
                self.console.note(f"no checkpoint in {self.folder}: starting from the beginning")
                return
            path = found
        saved = self.ranks.agree(lambda: checkpoints.load_checkpoint(Path(path)))
        allowed = {k.strip() for k in (self.args.allow_config_change or "").split(",") if k.strip()}
        then = {k: v for k, v in saved.config.items() if k not in FREE}
        now = {k: v for k, v in self._config().items() if k not in FREE}
        checkpoints.compare_config(then, now, allowed)
        self._load(saved)
        self.rows = self.ranks.on_main(self._read_rows)
        note = f"going on from {saved.path.name}"
        if allowed:
            note += ", settings allowed to differ: not bit-exact with the run that was stopped"
        self.console.note(note)

    def _load(self, saved: checkpoints.Checkpoint) -> None:
        """Take over the state of a checkpoint."""
        state, tensors, name = saved.state, saved.tensors, str(self.policy.model.active_adapter)
        stem = "adapter_model" if name == "default" else f"{name}/adapter_model"
        self.policy.load(tensors.get(stem, {}), where=str(saved.path))
        if self.policy.parameters.checksum() != state["checksum"]:
            raise TrpoLMError("the adapter did not load as it was saved", where=str(saved.path))
        if state["critic"] == self.critic.name:
            self.critic.load(tensors.get(outcome.CRITIC, {}))
        moments = {k: v.to(self.policy.device) for k, v in tensors.get("algorithm", {}).items()}
        algorithm_state = {**state["algorithm"], **moments}
        if algorithm_state.keys() == self.algorithm_state.keys():
            self.algorithm_state = algorithm_state
        self.update = self.callbacks.state.global_step = saved.update
        self.completions, self.tokens = state["completions"], state["tokens"]

    def _read_rows(self) -> list[dict[str, Any]]:
        path = self.folder / METRICS
        rows = read_json_lines(path) if path.exists() else []
        return [row for row in rows if row["update"] <= self.update]

    # ------------------------------------------------------------------ what a run leaves behind

    def _finish(self) -> None:
        """Draw the pictures, save the adapter and all that goes with it, show what changed."""
        self.callbacks.event("on_train_end")
        self.ranks.on_main(self._leave)
        if self.ranks.main:
            outcome.show_outcome(
                self.console, self.folder, self.rows, self.before, self.after, self.best
            )

    def _leave(self) -> None:
        try:
            outcome.draw(self.folder)
            self.save_model()
        except OSError as error:
            raise RunFault(
                f"could not write the results: {error.strerror or error}",
                where=str(error.filename or self.folder),
                hint="the run is complete: --resume_from_checkpoint auto writes them again",
            ) from error

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write adapter, critic, tokenizer, settings and model card; vanilla peft loads them."""
        if self.ranks.main:
            outcome.save_outcome(
                Path(output_dir or self.folder),
                self.folder,
                policy=self.policy,
                critic=self.critic,
                tokenizer=self.tokenizer,
                settings=self._config(),
                samples=outcome.before_and_after(self.before, self.after),
            )

    # ------------------------------------------------------------------ parts of the start

    def _check_shares(self) -> None:
        """Every process needs a prompt of its own."""
        shares = {"prompts_per_update": self.args.prompts_per_update}
        if self.eval_prompts is not None:
            shares["eval_prompts"] = min(len(self.eval_prompts), self.args.eval_prompts)
        for name, prompts in shares.items():
            if prompts < self.ranks.count:
                raise TrpoLMError(
                    f"{prompts} prompts cannot be shared by {self.ranks.count} processes",
                    where=name,
                )

    def _make_rewards(self, reward_funcs: Any) -> Rewards:
        rewards = Rewards(
            reward_funcs,
            self.args.reward_weights,
            on_bad_reward=self.args.on_bad_reward,
            timeout=self.args.reward_timeout,
            reward_model_options={
                "prefix_stride": self.args.prefix_stride,
                "allow_untrained_head": self.args.allow_untrained_reward_head,
                "device": self.ranks.device,
            },
        )
        rewards.check_columns(self.prompts.columns)
        if self.eval_prompts is not None:
            rewards.check_columns(self.eval_prompts.columns)
        return rewards

    def _make_policy(self, model: Any, peft_config: PeftConfig | None) -> Policy:
        return Policy(
            model,
            peft_config,
            temperature=self.args.temperature,
            bf16=self.args.bf16,
            gradient_checkpointing=self.args.gradient_checkpointing,
            seed=self.args.seed,
            device=self.ranks.device,
        )

    def _checked(self, prompts: Prompts) -> Prompts:
        """Return the prompts once all of them can be encoded and fit into the model's context."""
        room = self.policy.context_length
        if room is not None:
            room -= self.args.max_completion_length
            if room < 1:
                raise TrpoLMError(
                    f"{self.args.max_completion_length} tokens leave no room for a prompt in a "
                    f"context of {self.policy.context_length}",
                    where="max_completion_length",
                )
        checked, shortened = check_prompts(
            prompts, self.tokenizer, room=room, truncate=self.args.truncate_prompts
        )
        if shortened:
            self.console.note(f"{shortened} prompts lost their beginning to fit {room} tokens")
        return checked


def TRPOTrainer(*args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
    """Return `Trainer(..., algorithm=TRPO(**settings))`, under the name people look for."""
    return Trainer(*args, algorithm=TRPO(**(settings or {})), **kwargs)


def PPOTrainer(*args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
    """Return `Trainer(..., algorithm=PPO(**settings))`, under the name people look for."""
    return Trainer(*args, algorithm=PPO(**(settings or {})), **kwargs)


def _seconds(clock: Sequence[float], *, scoring: float) -> dict[str, float]:
    """Name the times between start, sampled, measured, valued, moved and end of an update."""
    start, sampled, measured, valued, moved, end = clock
    return {
        "time/rollout": sampled - start - scoring,
        "time/score": scoring,
        "time/update": (measured - sampled) + (moved - valued),
        "time/value": (valued - measured) + (end - moved),
        "time/total": end - start,
    }


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return {k: v for k, v in state.items() if k not in tensors}, tensors
