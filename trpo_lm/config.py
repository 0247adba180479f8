"""Settings: frozen dataclasses that validate themselves. This module never imports torch.

`--help` must answer in under a second, so the settings of a command line are kept apart from code
that needs tensors. Each field carries its help text in its metadata, once; `cli.py` turns the
classes into flags. `TRPO` and `PPO` (trpo.py, ppo.py) are the settings below plus their update.
"""

from __future__ import annotations

import math
import numbers
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from trpo_lm.errors import TrpoLMError


def option(default: Any, help: str) -> Any:
    """Declare a field with the text that `--help` shows for it."""
    return field(default=default, metadata={"help": help})


def _check(settings: Any, rules: dict[str, tuple[bool, str]]) -> None:
    """Raise one error that lists every broken rule of `{field: (holds, allowed values)}`.

    Paths become text, and numbers of other libraries Python's own.
    """
    broken = [
        f"{name} = {getattr(settings, name)!r} is not allowed: it must be {allowed}"
        for name, (holds, allowed) in rules.items()
        if not holds
    ]
    if broken:
        raise TrpoLMError("; ".join(broken), where=type(settings).__name__)
    for f in fields(settings):
        object.__setattr__(settings, f.name, _plain(getattr(settings, f.name)))  # it is frozen


def _whole(value: Any, least: int) -> bool:
    return (
        isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least
    )


def _number(
    value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        value = float(value)
    except OverflowError:
        return False
    return math.isfinite(value) and value > above and least <= value <= most


def _urls(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(url, str) for url in value):
        return False
    different = len({url.rstrip("/") for url in value}) == len(value) > 0
    return different and all(re.fullmatch(r"https?://[^/\s@]+(/\S*)?", url) for url in value)


# Settings of TRL and transformers, and what does their job here.
ELSEWHERE = {
    "beta": "max_ref_kl is the budget of the reference KL, in nats; there is no price to set",
    "bf16": "use dtype, on the command line --dtype bfloat16",
    "dataset_name": "use dataset",
    "fp16": "use dtype, on the command line --dtype float16",
    "generation_batch_size": "use prompts_per_update and completions_per_prompt",
    "gradient_accumulation_steps": "prompts_per_update is the size of an update, and "
    "micro_batch_tokens that of a forward pass",
    "hub_strategy": "push_to_hub uploads once, at the end",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN",
    "init_kl_coef": "max_ref_kl is the budget of the reference KL, in nats",
    "kl_coef": "max_ref_kl is the budget of the reference KL, in nats",
    "learning_rate": "there is none in TRPO: max_kl is the size of an update, in nats",
    "lora_dropout": "there is none: dropout is off in every pass",
    "lr_scheduler_type": "there is no learning rate in TRPO: max_kl is the size of an update",
    "max_grad_norm": "max_kl bounds each update in TRPO",
    "max_length": "use max_completion_length",
    "max_new_tokens": "use max_completion_length",
    "max_prompt_length": "use truncate_prompts",
    "max_steps": "use updates",
    "micro_batch_size": "use micro_batch_tokens: long and short completions cost their own tokens",
    "model_name_or_path": "use model",
    "num_generations": "use completions_per_prompt",
    "num_train_epochs": "use updates",
    "per_device_eval_batch_size": "use micro_batch_tokens",
    "per_device_train_batch_size": "prompts_per_update is the size of an update, of all processes "
    "together, and micro_batch_tokens that of a forward pass",
    "response_length": "use max_completion_length",
    "reward_model_path": "use reward_model",
    "top_k": "completions are sampled from the policy itself: there is only temperature",
    "top_p": "completions are sampled from the policy itself: there is only temperature",
    "torch_dtype": "use dtype",
    "total_episodes": "use updates",
    "use_peft": "an adapter is always trained: see lora_r",
    "use_vllm": "use rollout_servers; `trpo-lm serve` starts one",
    "vllm_server_base_url": "use rollout_servers",
    "warmup_ratio": "there is no learning rate in TRPO: max_kl is the size of an update",
    "warmup_steps": "there is no learning rate in TRPO: max_kl is the size of an update",
}


class _Settings:
    """Base of the settings: a name of another library is answered with the one to use here."""

    def __new__(cls, *args: Any, **values: Any):
        unknown = values.keys() - {f.name for f in fields(cls)}  # type: ignore[arg-type]
        for name in sorted(unknown & ELSEWHERE.keys()):
            raise TrpoLMError(f"unknown setting {name!r}: {ELSEWHERE[name]}", where=cls.__name__)
        return super().__new__(cls)


class Limits(NamedTuple):
    """The distances that an algorithm keeps to, nats per completion; None: not limited."""

    max_kl: float | None = None
    max_ref_kl: float | None = None


@dataclass(frozen=True)
class TRPOSettings(_Settings):
    """The two distances of a run, and how the step is computed. There is no learning rate."""

    max_kl: float = option(
        0.1, "trust region: largest KL(old || new) of one update, nats per completion"
    )
    max_ref_kl: float | None = option(
        3.0,
        "budget: largest KL(policy || reference) of the whole run, nats per completion, or none",
    )
    gamma: float = option(1.0, "discount per token, in (0, 1]")
    lam: float | None = option(
        None, "GAE lambda, in [0, 1]; default: 0.5 with a prefix critic, 0.95 with a value head"
    )
    cg_iterations: int = option(8, "most conjugate-gradient iterations for each of the two solves")
    cg_tolerance: float = option(0.01, "relative residual at which conjugate gradient stops")
    damping: float | None = option(
        None,
        "added to the Fisher's diagonal, in units of its Rayleigh quotient along the gradient; "
        "default: the measured noise scale in batches",
    )
    fisher_completions: int | None = option(
        None,
        "completions (over all processes) whose tokens make up the Fisher products; default: a "
        "sixteenth of the batch, at least two and about 96 tokens, fewer where memory is short",
    )
    line_search_trials: int = option(
        8, "most step lengths to try before the step is rejected; 0: take the full step (NPG)"
    )
    backtrack_ratio: float = option(
        0.8, "each trial's step as a fraction of the previous one, in (0, 1)"
    )
    accept_ratio: float = option(
        0.1, "smallest fraction of the predicted gain that a step must achieve"
    )

    def __post_init__(self):
        _check(
            self,
            {
                "max_kl": (_number(self.max_kl, above=0), "a number above 0"),
                "max_ref_kl": (
                    self.max_ref_kl is None or _number(self.max_ref_kl, above=0),
                    "a number above 0, or None",
                ),
                "gamma": (_number(self.gamma, above=0, most=1), "in (0, 1]"),
                "lam": (self.lam is None or _number(self.lam, least=0, most=1), "in [0, 1]"),
                "cg_iterations": (_whole(self.cg_iterations, 1), "a whole number of at least 1"),
                "cg_tolerance": (_number(self.cg_tolerance, least=0), "a number of at least 0"),
                "damping": (
                    self.damping is None or _number(self.damping, least=0),
                    "a number of at least 0, or None",
                ),
                "fisher_completions": (
                    self.fisher_completions is None or _whole(self.fisher_completions, 1),
                    "at least 1, or None",
                ),
                "line_search_trials": (_whole(self.line_search_trials, 0), "at least 0"),
                "backtrack_ratio": (
                    _number(self.backtrack_ratio, above=0, most=0.999),
                    "in (0, 1)",
                ),
                "accept_ratio": (_number(self.accept_ratio, least=0, most=1), "in [0, 1]"),
            },
        )


@dataclass(frozen=True)
class PPOSettings(_Settings):
    """Policy gradient with Adam: PPO, and with other values REINFORCE, RLOO and GRPO."""

    learning_rate: float = option(1e-3, "Adam's step size; constant")
    epochs: int = option(4, "passes over each batch")
    minibatches: int = option(4, "optimiser steps in one pass")
    clip: float | None = option(0.2, "ratio is clipped to 1 +- clip; none: not clipped")
    beta: float = option(0.1, "price of the reference KL in the reward, score units per nat")
    target_ref_kl: float | None = option(
        None, "reference KL towards which beta adapts, nats per completion; none: beta is fixed"
    )
    advantage: str = option(
        "gae", "'gae' (critic), 'leave_one_out' (RLOO), 'group_normalised' (GRPO)"
    )
    gamma: float = option(1.0, "discount per token, in (0, 1]")
    lam: float | None = option(None, "GAE lambda, in [0, 1]; default: the critic's")
    max_grad_norm: float | None = option(1.0, "gradients longer than this are clipped; none: never")

    def __post_init__(self):
        _check(
            self,
            {
                "learning_rate": (_number(self.learning_rate, above=0), "a number above 0"),
                "epochs": (_whole(self.epochs, 1), "at least 1"),
                "minibatches": (_whole(self.minibatches, 1), "at least 1"),
                "clip": (self.clip is None or _number(self.clip, above=0), "above 0, or None"),
                "beta": (_number(self.beta, least=0), "a number of at least 0"),
                "target_ref_kl": (
                    self.target_ref_kl is None or _number(self.target_ref_kl, above=0),
                    "a number above 0, or None",
                ),
                "advantage": (
                    self.advantage in ("gae", "leave_one_out", "group_normalised"),
                    "'gae', 'leave_one_out' or 'group_normalised'",
                ),
                "gamma": (_number(self.gamma, above=0, most=1), "in (0, 1]"),
                "lam": (self.lam is None or _number(self.lam, least=0, most=1), "in [0, 1]"),
                "max_grad_norm": (
                    self.max_grad_norm is None or _number(self.max_grad_norm, above=0),
                    "above 0, or None",
                ),
            },
        )


@dataclass(frozen=True)
class TRLSettings(_Settings):
    """Settings of TRL's own trainers in a comparison; all others are TRL's defaults."""

    learning_rate: float = option(1e-3, "AdamW's step size; falls linearly to 0, TRL's default")
    beta: float = option(0.0, "price of the reference KL, as TRL defines it")

    def __post_init__(self):
        _check(
            self,
            {
                "learning_rate": (_number(self.learning_rate, above=0), "a number above 0"),
                "beta": (_number(self.beta, least=0), "a number of at least 0"),
            },
        )


DTYPES = ("auto", "float32", "bfloat16", "float16")
LORA = ("lora_r", "lora_alpha", "lora_target_modules")  # settings of the adapter that is added


@dataclass(frozen=True, kw_only=True)
class ModelSettings(_Settings):
    """How the base model is loaded, and the adapter that is added to it."""

    dtype: str = option(
        "auto",
        "precision of the frozen base: 'auto' (bfloat16 on a GPU that has it, else float32), "
        "'float32', 'bfloat16' or 'float16'; adapter, KL and solves are in float32",
    )
    attn_implementation: str | None = option(
        None, "attention kernels: 'sdpa', 'eager', 'flash_attention_2', ...; default: the model's"
    )
    load_in_4bit: bool = option(
        False, "quantise the frozen base to 4 bits (nf4); needs trpo_lm[quantized]"
    )
    load_in_8bit: bool = option(
        False, "quantise the frozen base to 8 bits; needs trpo_lm[quantized]"
    )
    lora_r: int = option(8, "rank of the LoRA adapter; it has no dropout")
    lora_alpha: int = option(16, "scale of the LoRA adapter, in units of 1 / lora_r")
    lora_target_modules: str = option(
        "all-linear", "layers that get LoRA: names with commas, or 'all-linear' (not the output's)"
    )

    def __post_init__(self):
        _check(self, _model_rules(self))


def _model_rules(settings: ModelSettings) -> dict[str, tuple[bool, str]]:
    kernels, targets = settings.attn_implementation, settings.lora_target_modules
    return {
        "dtype": (
            settings.dtype in DTYPES,
            "'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        "attn_implementation": (
            kernels is None or (isinstance(kernels, str) and kernels != "" and "/" not in kernels),
            "the name of installed kernels, or None: code is never loaded from a hub",
        ),
        "load_in_8bit": (
            not (settings.load_in_4bit and settings.load_in_8bit),
            "False where load_in_4bit is True",
        ),
        "lora_r": (_whole(settings.lora_r, 1), "a whole number of at least 1"),
        "lora_alpha": (_whole(settings.lora_alpha, 1), "a whole number of at least 1"),
        "lora_target_modules": (
            isinstance(targets, str) and all(name.strip() for name in targets.split(",")),
            "'all-linear', or names of layers with commas between them",
        ),
    }


@dataclass(frozen=True)
class DatasetSettings:
    """Where the prompts come from; `lm.prompts.load_prompts` reads them."""

    dataset: str = option("", "prompts: .jsonl, .csv, .parquet, .txt, or a folder or hub id")
    eval_dataset: str | None = option(
        None, "held-out prompts; default: eval_split, or the last rows of the dataset"
    )
    dataset_config: str | None = option(None, "configuration of a dataset, e.g. main of gsm8k")
    dataset_revision: str | None = option(None, "branch, tag or commit of a dataset on the hub")
    dataset_split: str = option("train", "split of a dataset to train on, e.g. train[:5000]")
    eval_split: str | None = option(None, "split of a dataset to evaluate on, e.g. test")
    dataset_rows: int | None = option(
        None, "read this many rows, the first ones, and stream a dataset on the hub"
    )
    prompt_column: str = option("prompt", "column that holds the prompt: text, or messages")
    prompt_template: str | None = option(
        None, "text with {column} placeholders that makes the prompt; a user's message in a chat"
    )
    answer_column: str | None = option(
        None, "column that rewards get as `answer`; default: the one of that name, if any"
    )

    def __post_init__(self):
        _check(
            self,
            {
                "dataset_rows": (
                    self.dataset_rows is None or _whole(self.dataset_rows, 1),
                    "None or a whole number of at least 1",
                ),
            },
        )


@dataclass(frozen=True)
class TrainerConfig(ModelSettings):
    """Settings of a run other than those of the update rule."""

    output_dir: str = option("runs/trpo", "folder that receives everything the run writes")
    run_name: str | None = option(None, "name shown by trackers; letters, digits, '.', '_', '-'")
    seed: int = option(0, "all random numbers of the run derive from it")
    updates: int = option(40, "policy updates")
    prompts_per_update: int = option(256, "distinct prompts sampled for one update, all processes")
    completions_per_prompt: int = option(
        1, "completions sampled for each prompt; RLOO and GRPO compare several"
    )
    max_completion_length: int = option(
        24, "most tokens of a completion; longer ones are truncated"
    )
    temperature: float = option(1.0, "sampling temperature; the policy is the tempered softmax")
    rollout_servers: list[str] | None = option(
        None,
        "URLs of vLLM servers that sample in place of this process, e.g. http://host:8000; "
        "`trpo-lm serve` starts one",
    )
    rollout_timeout: float | None = option(
        None,
        "seconds that such a server may take to answer, attempts repeated; default: 60, and one "
        "more for each token of max_completion_length",
    )
    truncate_prompts: str = option(
        "error", "prompts too long for the model: 'error', or 'left' to drop their beginning"
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None, "arguments of the chat template, as JSON or YAML, e.g. '{\"enable_thinking\": false}'"
    )
    micro_batch_tokens: int | None = option(
        None,
        "most tokens in one pass; changes memory, not results; default: as many as fit in memory",
    )
    critic: str = option("auto", "'auto', 'prefix', 'value_head' or 'none'")
    prefix_stride: int = option(
        1, "score every k-th prefix with an encoder reward model, interpolating between"
    )
    allow_untrained_reward_head: bool = option(
        False, "accept a reward model whose files hold no trained head"
    )
    reward_weights: list[float] | None = option(None, "one weight for each reward function")
    on_bad_reward: str = option(
        "error", "a reward that is nan or infinite: 'error' or 'skip' the row"
    )
    mask_truncated_completions: bool = option(
        False, "completions cut by the length limit get no score and are not learned from"
    )
    truncated_penalty: float = option(
        0.0, "subtracted from the score of completions cut by the length limit"
    )
    reward_timeout: float | None = option(
        None,
        "seconds after which a call of a reward function, in a process of its own, is killed; "
        "completions that hang by themselves get no score",
    )
    reward_workers: int = option(1, "processes for each reward function with a reward_timeout")
    reward_retries: int = option(
        0, "further attempts when such a function raises or its process dies"
    )
    ddp_timeout: float | None = option(
        None,
        "seconds a process waits for the others; must exceed the time of the slowest reward; "
        "default: torch's, 1800 with gloo and 600 with NCCL",
    )
    gradient_checkpointing: bool = option(False, "recompute activations in backward passes")
    shard_base: bool = option(
        False,
        "share the layers of the frozen base out over the processes of each node, or over all "
        "where a node has one; every pass gathers them, and sampling is slow",
    )
    logging_steps: int = option(1, "updates between two log lines")
    eval_steps: int = option(
        0, "updates between two evaluations on held-out prompts; 0: only at the end"
    )
    eval_prompts: int = option(256, "held-out prompts used for one evaluation, all processes")
    save_steps: int = option(10, "updates between two checkpoints; 0: only at the end")
    save_total_limit: int = option(2, "number of complete checkpoints to keep, the newest")
    resume_from_checkpoint: str | None = option(
        None,
        "'auto' (the newest checkpoint, if any) or a checkpoint folder: resume the run from it",
    )
    allow_config_change: str | None = option(
        None, "comma-separated settings allowed to differ from the checkpoint's when resuming"
    )
    overwrite_output_dir: bool = option(False, "write into a folder that already holds a run")
    report_to: str = option("none", "trackers of transformers, comma-separated, e.g. tensorboard")
    push_to_hub: bool = option(
        False, "upload adapter, tokenizer, critic, card and plots at the end"
    )
    hub_model_id: str | None = option(
        None, "repository for them, e.g. me/my-adapter; default: the name of output_dir"
    )
    hub_private_repo: bool | None = option(
        None, "whether a new repository is private; default: as the account has it"
    )

    def __post_init__(self):
        least = {
            "seed": 0, "updates": 1, "prompts_per_update": 1, "completions_per_prompt": 1,
            "max_completion_length": 1, "prefix_stride": 1, "reward_workers": 1,
            "reward_retries": 0, "logging_steps": 1, "eval_steps": 0, "eval_prompts": 1,
            "save_steps": 0, "save_total_limit": 1,
        }  # fmt: skip
        weights = self.reward_weights
        _check(
            self,
            _model_rules(self)
            | {
                name: (_whole(getattr(self, name), low), f"a whole number of at least {low}")
                for name, low in least.items()
            }
            | {
                "temperature": (_number(self.temperature, above=0), "a number above 0"),
                "micro_batch_tokens": (
                    self.micro_batch_tokens is None or _whole(self.micro_batch_tokens, 1),
                    "None or a whole number of at least 1",
                ),
                "rollout_servers": (
                    self.rollout_servers is None or _urls(self.rollout_servers),
                    "different URLs that begin with http:// or https://, or None",
                ),
                "truncate_prompts": (
                    self.truncate_prompts in ("error", "left"),
                    "'error' or 'left'",
                ),
                "chat_template_kwargs": (
                    self.chat_template_kwargs is None
                    or (
                        isinstance(self.chat_template_kwargs, dict)
                        and all(isinstance(name, str) for name in self.chat_template_kwargs)
                    ),
                    "a mapping from names to values",
                ),
                "critic": (
                    self.critic in ("auto", "prefix", "value_head", "none"),
                    "'auto', 'prefix', 'value_head' or 'none'",
                ),
                "truncated_penalty": (
                    _number(self.truncated_penalty, least=0),
                    "a number of at least 0",
                ),
                "shard_base": (
                    not (self.shard_base and (self.load_in_4bit or self.load_in_8bit)),
                    "False where the base is quantised: load it in bfloat16, or quantise it whole",
                ),
                "hub_model_id": (
                    self.hub_model_id is None or (self.push_to_hub and bool(self.hub_model_id)),
                    "None, or the name of a repository where push_to_hub is set",
                ),
                "on_bad_reward": (self.on_bad_reward in ("error", "skip"), "'error' or 'skip'"),
                "reward_weights": (
                    weights is None or (all(_number(w) for w in weights) and any(weights)),
                    "finite numbers, not all zero",
                ),
            }
            | {
                name: (value is None or _number(value, above=0), "seconds above 0, or None")
                for name, value in {
                    "reward_timeout": self.reward_timeout,
                    "rollout_timeout": self.rollout_timeout,
                    "ddp_timeout": self.ddp_timeout,
                }.items()
            },
        )
        if self.prompts_per_update * self.completions_per_prompt < 2:
            raise TrpoLMError(
                "an update of one completion has nothing to compare it with, and would be skipped",
                where="prompts_per_update",
                hint="sample at least 2: as many prompts an update as memory and patience allow",
            )


def describe(settings: Any) -> dict[str, Any]:
    """Return the fields of a settings dataclass as plain JSON values."""
    return {f.name: getattr(settings, f.name) for f in fields(settings)}


def _plain(value: Any) -> Any:
    """Return a path as text, and a number of another library as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
