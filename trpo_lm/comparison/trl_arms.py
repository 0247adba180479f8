"""TRL's own trainers as arms of a comparison: they train, everything is measured as for the others.

TRL gets the model, LoRA with the same initial values, each update's prompts in the same order, the
reward as a function, and one batch of completions for each optimiser step. What it samples and
where its steps lead is measured by the exact code that measures every other arm, on a policy of our
own that follows TRL's parameters; the time this takes is not counted as TRL's. Metrics that mean
nothing for TRL are null. A run that was stopped starts over.

TRL is an optional extra, imported here alone and only when an arm asks for it. Its trainers report
each start to a server; that is switched off.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import warnings
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import huggingface_hub.constants
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from trpo_lm.config import TrainerConfig, TRLSettings
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.loading import default_lora
from trpo_lm.lm.mdp import MOST_ROWS, measure
from trpo_lm.lm.objective import measure_at
from trpo_lm.lm.prompts import encode_prompt
from trpo_lm.seeds import derive_seed
from trpo_lm.storage import append_json_line, truncate_json_lines
from trpo_lm.training.artifacts import completion_lines
from trpo_lm.training.checkpoint import OutputLock
from trpo_lm.training.metrics import metrics_row, objective
from trpo_lm.training.trainer import COMPLETIONS, METRICS, Trainer


def check_trl() -> None:
    """Say so if TRL's trainers cannot run here.

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
    trainer: Trainer,
    model: PreTrainedModel | PeftModel,
    settings: TRLSettings,
    algorithm: str,
) -> list[dict[str, Any]]:
    """Let TRL train; leave `trainer.policy` where TRL ended, and its run in `trainer.folder`.

    Args:
        trainer: Fresh; lends its prompts, reward and adapter, and does not train.
        model: The model that `trainer` was made of, loaded once more; TRL patches it.
        settings: Of TRL's trainer.
        algorithm: `trl-grpo` or `trl-rloo`.

    Returns:
        The metrics rows, one for each update.

    Raises:
        RunFault: If the policy becomes non-finite, or the reward fails.
        Interrupted: When a signal stopped it.
    """
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # read when a trainer is made
    trl = importlib.import_module("trl")
    config, kind = {
        "trl-grpo": (trl.GRPOConfig, trl.GRPOTrainer),
        "trl-rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    }[algorithm]
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.base_model.register_forward_pre_hook(_positions, with_kwargs=True)
    observer = _Observer(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        theirs = kind(
            model=model,
            reward_funcs=observer.score,
            args=config(**_arguments(trainer.args, settings)),
            train_dataset=_prompts_in_order(trainer),
            processing_class=trainer.tokenizer,
            callbacks=[observer],
            peft_config=None if base is not model else default_lora(),
        )
    theirs.remove_callback(PrinterCallback)
    observer.parameters = [p for p in theirs.model.parameters() if p.requires_grad]
    with torch.no_grad():
        ours = trainer.policy.parameters.tensors
        for p, initial in zip(observer.parameters, ours, strict=True):
            p.copy_(initial)
    with ExitStack() as stack:
        stack.callback(trainer.rewards.close)
        stack.enter_context(OutputLock(trainer.folder))
        stack.enter_context(trainer.interrupts)
        for name in (METRICS, COMPLETIONS):
            truncate_json_lines(trainer.folder / name, 0)
        observer.clock = perf_counter()
        theirs.train()
    trainer.policy.save(trainer.folder)
    return observer.rows


def _arguments(args: TrainerConfig, settings: TRLSettings) -> dict[str, Any]:
    """Return what makes TRL's run the same experiment; what is absent is TRL's default."""
    N = args.prompts_per_update * args.completions_per_prompt
    most = min(N, args.micro_batch_size or MOST_ROWS)
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


def _prompts_in_order(trainer: Trainer) -> Dataset:
    """Return the prompts of all updates, in the order in which every other arm meets them."""
    rows = [row for i in range(trainer.args.updates) for row in trainer._rows(i + 1)]
    prompts, columns = trainer.prompts.take(rows)
    return Dataset.from_dict({**columns, "prompt": prompts})


def _positions(module: Any, inputs: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a model the positions of left-padded tokens, which TRL's loss leaves out.

    Absolute position embeddings would otherwise count the padding, and the loss would be that of
    another policy than the one that sampled.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs, kwargs


class _Observer(TrainerCallback):
    """Scores TRL's completions, and writes a row of metrics after each of its steps."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.parameters: list[Tensor] = []  # TRL's; ours follow
        self.rows: list[dict[str, Any]] = []
        self.completions = self.tokens = 0
        self.clock = 0.0  # since when TRL has been working

    def score(
        self, prompts: list, completions: list, completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """Score a batch; it is TRL's reward function.

        Args:
            prompts: Of each completion, (N,).
            completions: As TRL shows them to a reward function; the tokens decide.
            completion_ids: Tokens of the completions, without padding.
            columns: The dataset's, and what else TRL hands over.
        """
        sampled_at, trainer, mdp = perf_counter(), self.trainer, self.trainer.mdp
        T, pad = mdp.max_completion_length, mdp.pad_token_id
        self.rollout = mdp.scored(
            prompts,
            *mdp.left_pad([encode_prompt(mdp.tokenizer, prompt) for prompt in prompts]),
            torch.tensor([ids + [pad] * (T - len(ids)) for ids in completion_ids]),
            torch.arange(len(prompts)) // trainer.args.completions_per_prompt,
            {name: columns[name] for name in trainer.prompts.columns},
            columns.get("trainer_state"),
        )
        size = trainer.args.micro_batch_size
        self.batch = measure(trainer.policy, self.rollout, micro_batch_size=size)
        self.seconds = {
            "time/rollout": sampled_at - self.clock,
            "time/score": self.rollout.score_seconds,
        }
        self.clock = perf_counter()
        scores = self.rollout.scores
        pairs = zip(scores.score.tolist(), scores.valid.tolist(), strict=True)
        return [score if valid else None for score, valid in pairs]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow TRL's step, measure it, and write the update's row."""
        self.seconds["time/update"] = perf_counter() - self.clock
        trainer, policy, ranks = self.trainer, self.trainer.policy, self.trainer.ranks
        numbers, completions, tokens = objective(self.batch, ranks)
        self.completions, self.tokens = self.completions + completions, self.tokens + tokens
        policy.parameters.restore(self.parameters)
        after = measure_at(policy, self.batch, ranks.reduce, completions)
        if not math.isfinite(after.kl):
            raise RunFault(
                "non-finite logits after a step of TRL", where=f"update {len(self.rows) + 1}"
            )
        trainer.update = len(self.rows) + 1
        row = metrics_row(
            {
                "update": trainer.update,
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
        for line in completion_lines(self.rollout, trainer.update):
            append_json_line(trainer.folder / COMPLETIONS, line)
        append_json_line(trainer.folder / METRICS, row)
        self.rows.append(row)
        trainer.console.update(row, {})
        self.clock = perf_counter()
