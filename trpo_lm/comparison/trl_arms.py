"""TRL's own trainers as arms of a comparison, measured by the same code as every other arm.

TRL gets the model, LoRA with the same initial values, each update's prompts in the same order, the
reward as a function, and one batch of completions for each optimiser step. Its completions and
steps are measured on a policy of our own that copies TRL's parameters; the time this takes is not
counted as TRL's. Metrics that do not apply to TRL are null. A run that was stopped starts over.

TRL is an optional extra, imported only here and only when an arm asks for it. Its trainers report
each start to a server; that is switched off.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import huggingface_hub.constants
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from trpo_lm.config import Limits, TrainerConfig, TRLSettings
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.loading import default_lora
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.prompts import Prompts
from trpo_lm.lm.rollout import Batch
from trpo_lm.seeds import derive_seed
from trpo_lm.storage import Row
from trpo_lm.training.artifacts import completion_lines
from trpo_lm.training.assembly import Parts, prompts_of_update
from trpo_lm.training.display import Display
from trpo_lm.training.folder import OutputLock, RunFolder
from trpo_lm.training.interrupts import Interrupts
from trpo_lm.training.metrics import metrics_row, rollout_metrics
from trpo_lm.training.ranks import Ranks

MOST_ROWS = 64  # completions in one pass of TRL's


@dataclass(frozen=True)
class Task:
    """The parts of a run that TRL's trainer shares with every other arm.

    Attributes:
        parts: Its policy copies TRL's parameters and is measured.
        prompts: Those to train on, all of which fit.
        args: Settings of the trainer; the folder is the run's own.
        ranks: The only process.
        display: Where progress is shown.
    """

    parts: Parts
    prompts: Prompts
    args: TrainerConfig
    ranks: Ranks
    display: Display


def check_trl() -> None:
    """Check that TRL's trainers can run here.

    Raises:
        TrpoLMError: If TRL is not installed, or there are several processes.
    """
    if importlib.util.find_spec("trl") is None:
        raise TrpoLMError(
            "TRL is not installed", where="arms trl-grpo and trl-rloo",
            hint="pip install 'trpo_lm[trl]', from a clone pip install -e '.[trl]'",
        )  # fmt: skip
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrpoLMError(
            "TRL's trainers are compared in one process", where="arms trl-grpo and trl-rloo",
            hint="start without a launcher, or leave these arms out",
        )  # fmt: skip


def train_with_trl(
    task: Task, model: PreTrainedModel | PeftModel, settings: TRLSettings, algorithm: str
) -> list[Row]:
    """Let TRL train; leave our policy at its last parameters, and the run in its folder.

    Args:
        task: Prompts, reward and adapter.
        model: The policy's model, loaded once more; TRL patches it.
        settings: Of TRL's trainer.
        algorithm: `trl-grpo` or `trl-rloo`.

    Returns:
        The metrics rows, one for each update.

    Raises:
        RunFault: If the policy becomes non-finite, or the reward fails.
        Interrupted: When a signal stopped it.
    """
    parts, folder = task.parts, RunFolder(task.args.output_dir)
    observer = _Observer(task, folder)
    theirs = _trainer(task, observer, model, settings, algorithm)
    observer.parameters = [p for p in theirs.model.parameters() if p.requires_grad]
    with torch.no_grad():
        ours = parts.policy.parameters.tensors
        for p, initial in zip(observer.parameters, ours, strict=True):
            p.copy_(initial)
    with ExitStack() as stack:
        stack.callback(parts.rewards.close)
        stack.enter_context(OutputLock(folder.path))
        stack.enter_context(Interrupts(alone=True))
        folder.truncate(0)
        observer.clock = perf_counter()
        theirs.train()
    parts.policy.save(folder.path)
    return observer.rows


def _trainer(
    task: Task, observer: _Observer, model: Any, settings: TRLSettings, algorithm: str
) -> Any:
    """Make TRL's trainer."""
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # read when a trainer is made
    trl = importlib.import_module("trl")
    config, kind = {
        "trl-grpo": (trl.GRPOConfig, trl.GRPOTrainer),
        "trl-rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    }[algorithm]
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.base_model.register_forward_pre_hook(_positions, with_kwargs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        theirs = kind(
            model=model,
            reward_funcs=observer.score,
            args=config(**trl_arguments(task.args, settings)),
            train_dataset=_prompts_in_order(task),
            processing_class=task.parts.tokenizer,
            callbacks=[observer],
            peft_config=None if base is not model else default_lora(task.args),
        )
    theirs.remove_callback(PrinterCallback)
    return theirs


def trl_arguments(args: TrainerConfig, settings: TRLSettings) -> dict[str, Any]:
    """Return the settings that make TRL's run the same experiment; the rest are its defaults."""
    N = args.prompts_per_update * args.completions_per_prompt
    most = min(N, MOST_ROWS)
    micro = max(n for n in range(1, most + 1) if N % n == 0)
    return {
        "output_dir": args.output_dir,
        "seed": derive_seed(args.seed, "trl") % 2**32,
        "max_steps": args.updates,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": N // micro,  # one step for each batch of completions
        "num_generations": args.completions_per_prompt,
        "max_completion_length": args.max_completion_length,
        "temperature": args.temperature,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",  # as in every other arm
        "beta": settings.beta,
        "shuffle_dataset": False,
        "disable_dropout": True,  # as in every other arm
        "bf16": False,  # it would be autocast; the base's dtype is the model's
        "gradient_checkpointing": args.gradient_checkpointing,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _prompts_in_order(task: Task) -> Dataset:
    """Return the prompts of all updates, in the order of every other arm."""
    args, count = task.args, len(task.prompts)
    rows = [row for i in range(args.updates) for row in prompts_of_update(i + 1, args, count)]
    prompts, columns = task.prompts.take(rows)
    return Dataset.from_dict({**columns, "prompt": prompts})


def _positions(module: Any, inputs: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a model the positions of left-padded tokens, which TRL's loss omits.

    Absolute position embeddings would otherwise count the padding, and the loss would not be that
    of the policy that sampled.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs, kwargs


class _Observer(TrainerCallback):
    """Scores TRL's completions, and writes a row of metrics after each of its steps."""

    def __init__(self, task: Task, folder: RunFolder):
        self.task, self.folder = task, folder
        self.parameters: list[Tensor] = []  # TRL's; ours copy them
        self.rows: list[Row] = []
        self.completions = self.tokens = 0
        self.clock = 0.0  # start of TRL's own work

    def score(
        self, prompts: list, completions: list, completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """Score a batch; it is TRL's reward function.

        Args:
            prompts: Of each completion, (N,).
            completions: As TRL passes them to a reward function; not used, the tokens decide.
            completion_ids: Tokens of the completions, without padding.
            columns: The dataset's, and whatever else TRL passes.
        """
        sampled_at, task, mdp = perf_counter(), self.task, self.task.parts.mdp
        T, pad = mdp.max_completion_length, mdp.pad_token_id
        self.rollout = mdp.scored(
            prompts,
            *mdp.left_pad(mdp.encode(prompts, columns)),
            torch.tensor([ids + [pad] * (T - len(ids)) for ids in completion_ids]),
            torch.arange(len(prompts)) // task.args.completions_per_prompt,
            {name: columns[name] for name in task.prompts.columns},
            columns.get("trainer_state"),
        )
        self.batch = Batch.from_rollout(task.parts.policy, self.rollout)
        self.seconds = {
            "time/rollout": sampled_at - self.clock,
            "time/score": self.rollout.score_seconds,
        }
        self.clock = perf_counter()
        scores = self.rollout.scores
        pairs = zip(scores.score.tolist(), scores.valid.tolist(), strict=True)
        return [score if valid else None for score, valid in pairs]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy TRL's parameters, measure its step, and log the update."""
        self.seconds["time/update"] = perf_counter() - self.clock
        policy, ranks, update = self.task.parts.policy, self.task.ranks, len(self.rows) + 1
        numbers, completions, tokens = rollout_metrics(self.batch, ranks)
        self.completions, self.tokens = self.completions + completions, self.tokens + tokens
        policy.parameters.restore(self.parameters)
        after = BatchObjective(policy, self.batch, None, ranks.reduce).measure()
        if not math.isfinite(after.kl):
            raise RunFault("non-finite logits after a step of TRL", where=f"update {update}")
        row = metrics_row(
            {
                "update": update,
                "completions": self.completions,
                "tokens": self.tokens,
                **numbers,
                "trust_region/kl": after.kl,
                "trust_region/kl_per_token": after.kl / numbers["objective/completion_length"],
                "trust_region/kl_max": after.kl_max,
                "trust_region/ref_kl_after": after.ref_kl,
                "policy/checksum": policy.parameters.checksum(),
                **self.seconds,
                "time/total": sum(self.seconds.values()),
            }
        )
        self.folder.append(row, completion_lines(self.rollout, update))
        self.rows.append(row)
        self.task.display.update(row, Limits())
        self.clock = perf_counter()
