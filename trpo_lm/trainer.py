"""The trainer: prompts, rollout, rewards, values, advantages, update, metrics, and again.

    for each update:   rollout -> measure old and reference -> values -> advantages
                       -> algorithm.update -> fit the critic -> write and show

It never asks which algorithm it runs: an `Algorithm` says how rewards become advantages and how
the policy moves; rollouts, critic, seeds, sums over ranks, files and the screen belong here. The
policy is not wrapped for distributed training: every rank computes sums, `reduce` adds them up,
and decisions are taken on reduced numbers only, so all ranks take the same branch.
"""

from __future__ import annotations

import copy
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from trpo_lm import checkpoint as checkpoints
from trpo_lm.advantages import returns
from trpo_lm.cli import check_output_dir, check_run_name, command_line
from trpo_lm.config import TrainerConfig, describe
from trpo_lm.critic import make_critic
from trpo_lm.errors import Interrupted, RunFault, TrpoLMError
from trpo_lm.mdp import Batch, Rollout, TokenMDP, end_token_ids, measure
from trpo_lm.metrics import Console, append_json_line, metrics_row, truncate_json_lines
from trpo_lm.policy import Policy
from trpo_lm.ppo import PPO
from trpo_lm.prompts import Prompts, check_prompts, load_prompts
from trpo_lm.report import model_card, plot_run, summary
from trpo_lm.rewards import Rewards
from trpo_lm.seeds import generator
from trpo_lm.trpo import TRPO, measure_at


class Algorithm(Protocol):
    """How rewards become advantages, and how the policy moves. `TRPO` and `PPO` are such."""

    needs_critic: bool
    gamma: float

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
        callbacks: transformers' `TrainerCallback`s.
        peft_config: Adapter to train; LoRA on all linear layers when None.
        algorithm: Update rule with its settings.
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
        callbacks: Sequence[TrainerCallback] = (),
        peft_config: PeftConfig | None = None,
        algorithm: Algorithm | None = None,
        prompt_column: str = "prompt",
    ):
        self.args = args = args or TrainerConfig()
        if args.run_name is not None:
            check_run_name(args.run_name)
        self.accelerator = Accelerator()
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        device = self.accelerator.device
        if args.prompts_per_update < self.world_size:
            raise TrpoLMError(
                f"{args.prompts_per_update} prompts cannot be shared by {self.world_size} processes",
                where="prompts_per_update",
            )
        self.rewards = Rewards(
            reward_funcs,
            args.reward_weights,
            on_bad_reward=args.on_bad_reward,
            timeout=args.reward_timeout,
            reward_model_options={"prefix_stride": args.prefix_stride, "device": device},
        )
        self.prompts = load_prompts(train_dataset, column=prompt_column)
        self.rewards.check_columns(self.prompts.columns)
        self.policy = Policy(
            model,
            peft_config,
            temperature=args.temperature,
            bf16=args.bf16,
            gradient_checkpointing=args.gradient_checkpointing,
            seed=args.seed,
            device=device,
        )
        self.tokenizer = processing_class or load_tokenizer(self.policy.name)
        self.mdp = TokenMDP(
            self.tokenizer,
            self.rewards,
            eos_token_ids=end_token_ids(self.policy.base, self.tokenizer),
            max_completion_length=args.max_completion_length,
        )
        self.prompts = self._checked(self.prompts)
        self.eval_prompts = None
        if eval_dataset is not None:
            self.eval_prompts = self._checked(load_prompts(eval_dataset, column=prompt_column))
        algorithm = algorithm or TRPO()
        self.critic = make_critic(
            args.critic if algorithm.needs_critic else "none",
            can_score_prefixes=self.rewards.can_score_prefixes,
            width=self.policy.base.config.get_text_config().hidden_size,
            length=args.max_completion_length,
        )
        self.algorithm = algorithm.with_lam(self.critic.default_lam)
        self.algorithm_state = self.algorithm.init_state(self.policy)
        self.folder = Path(args.output_dir)
        self.update = self.completions = self.tokens = 0
        self.rows: list[dict[str, Any]] = []
        self.first_score: float | None = None
        self.console = Console(self.accelerator.is_main_process, args.updates)
        self._callbacks, self._callback_args = self._callback_handler(callbacks)
        self.state = TrainerState(max_steps=args.updates, num_train_epochs=1)
        self.state.is_world_process_zero = self.accelerator.is_main_process
        self.control = TrainerControl()
        self._stop_signal: int | None = None

    # ------------------------------------------------------------------ the run

    def train(self) -> list[dict[str, Any]]:
        """Run all updates, write everything that a run leaves behind, and return the metrics rows.

        Raises:
            RunFault: For a fault at run time; the last accepted policy was saved.
            Interrupted: When a signal stopped the run; the last accepted policy was saved.
        """
        args = self.args
        resume, overwrite = args.resume_from_checkpoint, args.overwrite_output_dir
        if self.accelerator.is_main_process:
            check_output_dir(self.folder, resume=resume, overwrite=overwrite)
        self.accelerator.wait_for_everyone()
        lock = checkpoints.OutputLock(self.folder)
        with lock if self.accelerator.is_main_process else _nothing(), self._signals():
            try:
                if self._begin():
                    self._loop()
                    self._finish()
            finally:
                self.console.close()
                self.rewards.close()
        return self.rows

    def _begin(self) -> bool:
        """Take up the run where it stands; False when there is nothing left to do."""
        args = self.args
        if args.resume_from_checkpoint:
            self._resume(args.resume_from_checkpoint)
        elif self.accelerator.is_main_process and args.overwrite_output_dir:
            checkpoints.discard_checkpoints(self.folder)
        if self.accelerator.is_main_process:
            truncate_json_lines(self.folder / "metrics.jsonl", self.update)
            truncate_json_lines(self.folder / "completions.jsonl", self.update)
        if self.update >= args.updates:
            self.console.note(f"already complete: {self.update} of {args.updates} updates are done")
            return False
        self.console.banner(self._facts())
        self.console.first_score = self.first_score
        self._boundary = self._snapshot()
        self._event("on_train_begin")
        return True

    def _loop(self) -> None:
        args = self.args
        self.before = self.evaluate(reference=True) if self.eval_prompts else None
        try:
            while self.update < args.updates and not self.control.should_training_stop:
                row = self.train_step()
                last = self.update == args.updates
                if self.eval_prompts and (last or _due(self.update, args.eval_steps)):
                    self.after = self.evaluate()
                    row["objective/eval_score_mean"] = self.after["score"]
                    row["objective/eval_ref_kl"] = self.after["ref_kl"]
                self._boundary = self._snapshot()
                self._record(row)
                if last or _due(self.update, args.save_steps):
                    self._save_checkpoint()
                self._stop_if_asked()
        except Interrupted as stop:
            saved = self._save_last_accepted()
            raise Interrupted(f"{stop}; {saved}", signum=stop.exit_code - 128) from None
        except RunFault as fault:
            saved = self._save_last_accepted()
            raise RunFault(
                fault.what, where=fault.where, hint=f"{fault.hint or 'mend it'}; {saved}"
            ) from fault

    def train_step(self) -> dict[str, Any]:
        """Make one update: rollout, measure, values, advantages, update, critic. Returns its row."""
        start = time.perf_counter()
        update = self.update + 1
        rollout, prefix_scores, prefix_seconds = self._agree(lambda: self._rollout(update))
        sampled = time.perf_counter()
        policy, algorithm, mask = self.policy, self.algorithm, rollout.action_mask
        batch = measure(policy, rollout, micro_batch_size=self.args.micro_batch_size)
        row = {"update": update, **self._objective(batch)}
        if update == 1:
            self._check_old_policy(batch)
        measured = time.perf_counter()
        batch.rewards = algorithm.rewards(batch, self.algorithm_state)
        targets = returns(batch.rewards, mask, gamma=algorithm.gamma)
        valid = rollout.scores.valid
        baseline = self._mean(targets[:, 0][valid])[0]
        hidden = batch.hidden.cpu()
        batch.values = self.critic.values(hidden, prefix_scores, mask, untrained=baseline)
        row |= self._critic_metrics(batch, targets)
        skipped = self._no_signal(rollout)
        valued = time.perf_counter()
        if skipped is None:
            advantages = algorithm.advantages(batch, self._reduce)
            batch.advantages = advantages[mask].to(batch.old_logprobs)
            seed = (self.args.seed, "update", update, self.rank)
            row |= algorithm.update(policy, batch, self._reduce, self.algorithm_state, seed)
        moved = time.perf_counter()
        if valid.any() or self.world_size > 1:
            self.critic.fit(hidden, prefix_scores, mask, targets, valid, self._reduce)
        self.update, self.state.global_step = update, update
        row |= {
            "skipped": skipped,
            "policy/checksum": self._same_everywhere(policy.parameters.checksum()),
            "time/rollout": sampled - start - rollout.score_seconds - prefix_seconds,
            "time/score": rollout.score_seconds + prefix_seconds,
            "time/update": (measured - sampled) + (moved - valued),
            "time/value": (valued - measured) + (time.perf_counter() - moved),
            "time/total": time.perf_counter() - start,
        }
        if row.get("trust_region/kl") is not None:
            row["trust_region/kl_per_token"] = (
                row["trust_region/kl"] / row["objective/completion_length"]
            )
        self._write_completions(rollout, update)
        return metrics_row(row)

    def evaluate(self, *, reference: bool = False) -> dict[str, Any]:
        """Sample held-out prompts with fixed seeds: mean score, exact reference KL, completions."""
        assert self.eval_prompts is not None, "no eval_dataset was given"
        rows = list(range(min(len(self.eval_prompts), self.args.eval_prompts)))

        def sample() -> Rollout:
            prompts, columns = self.eval_prompts.take(rows[self.rank :: self.world_size])  # type: ignore
            seed = (self.args.seed, "evaluate", self.rank)
            return self.mdp.rollout(self.policy, prompts, columns=columns, seed=seed)

        with self.policy.reference() if reference else _nothing():
            rollout = self._agree(sample)
            batch = measure(self.policy, rollout, micro_batch_size=self.args.micro_batch_size)
        valid = rollout.scores.valid
        score, std = self._mean(rollout.scores.score[valid])
        total = self._reduce(torch.stack([batch.ref_kl.double().sum().cpu(), _count(rollout)]))
        return {
            "score": score,
            "std": std,
            "ref_kl": float(total[0] / total[1]),
            "rollout": rollout,
        }

    # ------------------------------------------------------------------ parts of an update

    def _rollout(self, update: int) -> tuple[Rollout, Tensor | None, float]:
        prompts, columns = self.prompts.take(self._rows(update)[self.rank :: self.world_size])
        rollout = self.mdp.rollout(
            self.policy,
            prompts,
            completions_per_prompt=self.args.completions_per_prompt,
            columns=columns,
            seed=(self.args.seed, update, self.rank),
            trainer_state=self.state,
        )
        start = time.perf_counter()
        scores = None
        if "prefix" in self.critic.name:
            prefixes = self.mdp.prefix_texts(rollout)
            told = self.rewards.score_prefixes(rollout.prompts, rollout.completions, prefixes)
            scores = torch.zeros_like(rollout.rewards)
            scores[rollout.action_mask] = torch.tensor(sum(told, []), dtype=torch.float64)
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
        r = batch.rollout
        score, std = self._mean(r.scores.score[r.scores.valid])
        if self.first_score is None:
            self.first_score = score
        sums = torch.stack(
            [
                _count(r),
                r.lengths.double().sum(),
                batch.ref_kl.double().sum().cpu(),
                batch.entropy.double().sum().cpu(),
                (~r.truncated).double().sum(),
            ]
        )
        N, tokens, ref_kl, entropies, ended = self._reduce(sums).tolist()
        self.completions, self.tokens = self.completions + int(N), self.tokens + int(tokens)
        columns = {
            f"rewards/{name}": self._mean(_numbers(values))[0]
            for name, values in r.scores.columns.items()
        }
        return {
            "completions": self.completions,
            "tokens": self.tokens,
            "objective/score_mean": score,
            "objective/score_std": std,
            "objective/ref_kl": ref_kl / N,
            "objective/ref_kl_per_token": ref_kl / tokens,
            "objective/entropy": entropies / tokens,
            "objective/completion_length": tokens / N,
            "objective/eos_rate": ended / N,
            **columns,
            **r.scores.logged,
        }

    def _critic_metrics(self, batch: Batch, targets: Tensor) -> dict[str, float | None]:
        """Return how well values explain returns that the critic has not seen yet."""
        mask = batch.rollout.action_mask & batch.rollout.scores.valid[:, None]
        if self.critic.name == "none":
            return {}
        error = self._mean((targets - batch.values)[mask])
        spread = self._mean(targets[mask])[1] ** 2
        return {
            "critic/loss": error[1] ** 2 + error[0] ** 2,
            "critic/explained_variance": 1 - error[1] ** 2 / spread if spread > 0 else None,
        }

    def _no_signal(self, rollout: Rollout) -> str | None:
        """Say why this batch cannot teach anything, or None; the same on every rank."""
        valid, scores = rollout.scores.valid, rollout.rewards.sum(-1)[rollout.scores.valid]
        counts = self._reduce(torch.stack([valid.double().sum(), _count(rollout)]))
        if counts[0] == 0:
            return f"no reward: all {int(counts[1])} completions abstained"
        gathered = gather_object([[float(scores.min()), float(scores.max())]] if len(scores) else [])
        low, high = min(a for a, _ in gathered), max(b for _, b in gathered)
        token_rewards = rollout.scores.token_rewards is not None
        return "zero advantage: every completion got the same reward" if (
            high - low <= 1e-12 * max(abs(low), abs(high)) and not token_rewards
        ) else None  # fmt: skip

    def _check_old_policy(self, batch: Batch) -> None:
        """Assert ratio == 1 and D == 0 at theta_old: no dropout, no other source of noise."""
        at_old = measure_at(self.policy, batch, self._reduce, 1.0)
        if not (abs(at_old.gain) <= 1e-3 and at_old.kl <= 1e-5):
            raise RunFault(
                f"two passes of the same policy differ: KL {at_old.kl:.2g}",
                where="first update",
                hint="something in the model is random or changes between passes (dropout, noise)",
            )

    # ------------------------------------------------------------------ several processes

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks; every accept or stop decision uses such sums only."""
        if self.world_size == 1:
            return tensor
        device = self.accelerator.device
        out = self.accelerator.reduce(tensor.detach().clone().to(device), "sum")
        return out.to(tensor.device)  # type: ignore[union-attr]

    def _mean(self, values: Tensor) -> tuple[float, float]:
        """Return mean and standard deviation over all ranks; nan without any value."""
        values = values.double()
        total, count = self._reduce(torch.stack([values.sum(), _count(values)])).tolist()
        if not count:
            return float("nan"), float("nan")
        mean = total / count
        square = float(self._reduce((values - mean).square().sum()))
        return mean, (square / count) ** 0.5

    def _agree(self, work: Callable[[], Any]) -> Any:
        """Do something without collectives; if it fails on one rank, fail on all, naming it."""
        if self.world_size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as failure:
            error = failure
        said = [(self.rank, str(error))] if error is not None else []
        failed = gather_object(said)
        if failed:
            rank, text = failed[0]
            raise RunFault(text, where=f"rank {rank}") from error
        return result

    def _same_everywhere(self, checksum: str) -> str:
        if self.world_size > 1 and len(set(gather_object([checksum]))) > 1:
            raise RunFault("the ranks' parameters differ", where=f"update {self.update + 1}")
        return checksum

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
        self.policy.parameters.restore(boundary["theta"])
        self.critic.load(boundary["critic"])
        self.algorithm_state = boundary["algorithm"]
        self.update, self.completions, self.tokens = boundary["counts"]

    def _save_last_accepted(self) -> str:
        self._restore(self._boundary)
        if self.world_size > 1 and self._stop_signal is None:
            return "go on from the newest checkpoint with --resume_from_checkpoint auto"
        folder = self._save_checkpoint()
        return f"saved {folder.name}; go on with --resume_from_checkpoint auto"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into `Interrupted`; a second one stops at once."""

        def handle(signum: int, frame: Any) -> None:
            signal.signal(signum, signal.SIG_DFL)
            self._stop_signal = signum
            if self.world_size == 1:
                raise Interrupted(f"stopped by {signal.Signals(signum).name}", signum=signum)

        before = {}
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                before[signum] = signal.signal(signum, handle)
        except ValueError:  # not the main thread: signals are somebody else's business
            pass
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _stop_if_asked(self) -> None:
        """With several processes, stop between updates once any of them got a signal."""
        if self.world_size > 1:
            asked = int(max(gather_object([self._stop_signal or 0])))
            if asked:
                self._stop_signal = asked
                raise Interrupted(f"stopped by {signal.Signals(asked).name}", signum=asked)

    def _config(self) -> dict[str, Any]:
        return {
            "model": self.policy.name,
            "algorithm": type(self.algorithm).__name__,
            "reward_funcs": self.rewards.names,
            "prompts": len(self.prompts),
            "world_size": self.world_size,
            **describe(self.args),
            **describe(self.algorithm),
        }

    def _save_checkpoint(self) -> Path:
        state, tensors = _split_tensors(self.algorithm_state)
        self._event("on_save")
        return checkpoints.save_checkpoint(
            self.folder,
            self.update,
            tensors={"critic": self.critic.state(), "algorithm": tensors}
            if self.accelerator.is_main_process
            else {},
            state={
                "completions": self.completions,
                "tokens": self.tokens,
                "first_score": self.first_score,
                "checksum": self.policy.parameters.checksum(),
                "algorithm": state,
            },
            config=self._config(),
            extra=self.policy.save,
            rank=self.rank,
            world_size=self.world_size,
            barrier=self.accelerator.wait_for_everyone,
            share=self._share,
            keep=self.args.save_total_limit,
        )

    def _share(self, text: str) -> str:
        return text if self.world_size == 1 else broadcast_object_list([text])[0]

    def _resume(self, where: str) -> None:
        """Load a checkpoint; 'auto' takes the newest complete one, or starts fresh and says so."""
        path = where
        if where == "auto":
            found = checkpoints.newest_checkpoint(self.folder) if self.rank == 0 else None
            path = self._share(str(found or ""))
            if not path:
                self.console.note(f"no checkpoint in {self.folder}: starting from the beginning")
                return
        saved = checkpoints.load_checkpoint(Path(path))
        allowed = {k.strip() for k in (self.args.allow_config_change or "").split(",") if k.strip()}
        free = {  # nothing of the arithmetic depends on these
            "output_dir", "run_name", "updates", "logging_steps", "eval_steps", "eval_prompts",
            "save_steps", "save_total_limit", "resume_from_checkpoint", "allow_config_change",
            "overwrite_output_dir", "report_to", "reward_timeout",
        }  # fmt: skip
        config = {k: v for k, v in self._config().items() if k not in free}
        old = {k: v for k, v in saved.config.items() if k not in free}
        checkpoints.compare_config(old, config, allowed)
        set_peft_model_state_dict(self.policy.model, load_peft_weights(str(saved.path)))
        if self.policy.parameters.checksum() != saved.state["checksum"]:
            raise TrpoLMError("the adapter did not load as it was saved", where=str(saved.path))
        self.critic.load(saved.tensors["critic"])
        self.algorithm_state = {**saved.state["algorithm"], **saved.tensors.get("algorithm", {})}
        self.update = self.state.global_step = saved.update
        self.completions, self.tokens = saved.state["completions"], saved.state["tokens"]
        self.first_score = saved.state["first_score"]
        self.console.note(f"going on from {saved.path.name}")

    # ------------------------------------------------------------------ what people see

    def _facts(self) -> dict[str, str]:
        policy, args, settings = self.policy, self.args, describe(self.algorithm)
        total = sum(p.numel() for p in policy.model.parameters())
        budget = settings.get("max_ref_kl")
        facts = {
            "model": policy.name,
            "parameters": f"{total:,}, of which {len(policy.parameters):,} trainable "
            f"({len(policy.parameters) / total:.1%})",
            "device": f"{policy.device}, base in {str(policy.base.dtype).removeprefix('torch.')}, "
            f"{self.world_size} process{'es' * (self.world_size > 1)}",
            "prompts": f"{len(self.prompts):,}",
            "rewards": ", ".join(self.rewards.names),
            "critic": f"{self.critic.name}, lambda {getattr(self.algorithm, 'lam', None)}",
            "algorithm": type(self.algorithm).__name__,
        }
        if "max_kl" in settings:
            facts["max_kl"] = f"{settings['max_kl']} nats per completion, each update"
            facts["max_ref_kl"] = (
                "none" if budget is None else f"{budget} nats per completion, whole run"
            )
        each = args.prompts_per_update * args.completions_per_prompt
        facts["batch"] = f"{each} completions an update ({args.prompts_per_update} prompts x "
        facts["batch"] += f"{args.completions_per_prompt}), at most {args.max_completion_length} tokens"
        facts["output"] = str(self.folder)
        return facts

    def _record(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.accelerator.is_main_process:
            append_json_line(self.folder / "metrics.jsonl", row)
        if self.update % self.args.logging_steps == 0 or self.update == self.args.updates:
            limits = {k: describe(self.algorithm).get(k) for k in ("max_kl", "max_ref_kl")}
            self.console.update(row, limits)
        numbers = {
            k: v for k, v in row.items() if isinstance(v, int | float) and k != "update"
        }
        self._event("on_log", logs=numbers)
        self._event("on_step_end")

    def _write_completions(self, rollout: Rollout, update: int) -> None:
        lines = [
            {
                "update": update,
                "prompt": prompt,
                "completion": completion,
                "score": float(score),
                **{f"rewards/{k}": v[i] for k, v in rollout.scores.columns.items()},
            }
            for i, (prompt, completion, score) in enumerate(
                zip(rollout.prompts, rollout.completions, rollout.scores.score, strict=True)
            )
        ]
        lines = lines if self.world_size == 1 else gather_object(lines)
        if self.accelerator.is_main_process:
            for line in lines:
                append_json_line(self.folder / "completions.jsonl", line)

    def _finish(self) -> None:
        """Save the adapter, critic, tokenizer, pictures and model card into the output folder."""
        self._event("on_train_end")
        if not self.accelerator.is_main_process:
            return
        self.save_model()
        plots = plot_run(self.folder)
        if self.before and self.after:
            self._show_before_and_after()
        self.console.table("what changed", ["", "first", "last"], summary(self.rows))
        self.console.note(f"pictures: {plots[0].parent}/")
        self.console.note(f"adapter:  {self.folder}/adapter_model.safetensors")

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write adapter, critic, tokenizer, settings and model card; vanilla peft loads them."""
        folder = Path(output_dir or self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save(folder)
        self.tokenizer.save_pretrained(str(folder))
        checkpoints.save_tensors(folder / "value_head.safetensors", self.critic.state())
        checkpoints.save_settings(folder / "config.yaml", self._config())
        facts = {
            "base_model": self.policy.name,
            "command": command_line(),
            "algorithm": type(self.algorithm).__name__,
            "rewards": self.rewards.names,
            "data": f"{len(self.prompts)} prompts",
            "seed": self.args.seed,
            "versions": {
                "python": platform.python_version(),
                **{p: version(p) for p in ("trpo_lm", "torch", "transformers", "peft")},
            },
            "settings": self._config(),
        }
        (folder / "README.md").write_text(model_card(self.folder, facts), encoding="utf-8")

    def _show_before_and_after(self) -> None:
        before, after = self.before["rollout"], self.after["rollout"]  # type: ignore[index]
        rows = [
            {
                "prompt": before.prompts[i],
                "reference": before.completions[i],
                "policy": after.completions[i],
                "score_before": float(before.scores.score[i]),
                "score_after": float(after.scores.score[i]),
            }
            for i in range(min(6, len(before)))
        ]
        self.console.samples(rows, "held-out prompts, before and after")
        self.console.table(
            f"{len(before)} held-out prompts",
            ["", "score", "reference KL, nats per completion"],
            [
                ["reference", self.before["score"], self.before["ref_kl"]],  # type: ignore[index]
                ["policy", self.after["score"], self.after["ref_kl"]],  # type: ignore[index]
            ],
        )

    def _checked(self, prompts: Prompts) -> Prompts:
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
        if shortened and self.accelerator.is_main_process:
            print(f"{shortened} prompts lost their beginning to fit {room} tokens")
        return checked

    def _callback_handler(self, callbacks: Sequence[TrainerCallback]) -> tuple[Any, Any]:
        trackers = [t.strip() for t in self.args.report_to.split(",") if t.strip() != "none"]
        if not trackers and not callbacks:
            return None, None
        from transformers import TrainingArguments
        from transformers.integrations import get_reporting_integration_callbacks

        arguments = TrainingArguments(
            output_dir=self.args.output_dir,
            run_name=self.args.run_name,
            report_to=trackers or "none",
            seed=self.args.seed,
            logging_steps=self.args.logging_steps,
        )
        found = [*get_reporting_integration_callbacks(trackers), *callbacks]
        return CallbackHandler(found, self.policy.model, self.tokenizer, None, None), arguments

    def _event(self, name: str, **kwargs: Any) -> None:
        if self._callbacks is not None:
            positional = [kwargs.pop("logs")] if name == "on_log" else []
            call = getattr(self._callbacks, name)
            call(self._callback_args, self.state, self.control, *positional, **kwargs)


def TRPOTrainer(*args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
    """Return `Trainer(..., algorithm=TRPO(**settings))`, under the name people look for."""
    return Trainer(*args, algorithm=TRPO(**(settings or {})), **kwargs)


def PPOTrainer(*args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
    """Return `Trainer(..., algorithm=PPO(**settings))`, under the name people look for."""
    return Trainer(*args, algorithm=PPO(**(settings or {})), **kwargs)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model, without code of its own.

    Raises:
        TrpoLMError: If there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TrpoLMError(
            f"no tokenizer for {name!r}: {str(error).splitlines()[0]}", where="processing_class",
            hint="pass processing_class=AutoTokenizer.from_pretrained(...)",
        ) from error  # fmt: skip


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _due(update: int, every: int) -> bool:
    return every > 0 and update % every == 0


def _count(rows: Any) -> Tensor:
    return torch.tensor(float(len(rows)), dtype=torch.float64)


def _numbers(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([v for v in values if v is not None], dtype=torch.float64)


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return {k: v for k, v in state.items() if k not in tensors}, tensors
